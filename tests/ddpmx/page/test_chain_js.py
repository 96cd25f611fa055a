"""The chain in JavaScript has NumPy's bits: noise, σ, update, guidance, and every state of whole chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddpmx import Pipeline
from ddpmx.backends.base import Buffers
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.formats.spec import ModelSpec
from ddpmx.page.site import describe
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc, to_uint8
from ddpmx.sampling.request import Sampling
from oracles.conditioning import BY_CLASS, BY_ITSELF, factors
from oracles.javascript import javascript


def test_a_million_normal_numbers_have_the_bits_of_numpy():
    draws = [(0, 0, 0, 0), (2**64 - 1, 2**32 - 1, 999, 1), (0x123456789ABCDEF0, 7, 500, 1)]
    elements = 350_002  # no multiple of 4
    found = javascript(
        "for (const [seed, image, t, purpose] of request.draws)"
        " write(chain.normal(BigInt(seed), image, t, purpose, request.elements));",
        {"draws": [[str(seed), *rest] for seed, *rest in draws], "elements": elements},
    )
    wanted = [normal(seed, [image], t, Purpose(purpose), elements)[0] for seed, image, t, purpose in draws]
    np.testing.assert_array_equal(np.frombuffer(found, "<u4"), np.concatenate(wanted).view(np.uint32))


def test_philox_has_the_words_of_its_authors():
    # Random123's known answers for philox4x32-10
    found = javascript(
        "for (const [counter, key] of request)"
        " { const c = Uint32Array.from(counter); chain.philox(c, ...key); write(c); }",
        [
            [[0] * 4, [0] * 2],
            [[0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2],
            [[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]],
        ],
    )
    wanted = (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8 408f276d 41c83b0e a20bc7c6 6d5451fd d16cfe09 94fdcceb 5001e420 24126ea1"
    )
    assert np.frombuffer(found, "<u4").tolist() == [int(word, 16) for word in wanted.split()]


def test_exp_and_levels_have_the_bits_of_numpy():
    x = np.concatenate([np.linspace(-90, 90, 200_001), [0.0, -0.0, -87, 88]]).astype(np.float32)
    y = np.concatenate([np.linspace(-1.1, 1.1, 100_001), (np.arange(256) - 127.5) / 127.5]).astype(np.float32)
    found = javascript(
        "write(Float32Array.from(request.x, chain.exp)); write(Uint8Array.from(request.y, chain.uint8));",
        {"x": x.tolist(), "y": y.tolist()},
    )
    np.testing.assert_array_equal(np.frombuffer(found[: x.nbytes], "<u4"), chain.exp(x).view(np.uint32))
    np.testing.assert_array_equal(np.frombuffer(found[x.nbytes :], np.uint8), to_uint8(y))


class Toy:
    """out = factor[t]·x + 0.1·(y − 1) + 0.25·x0_prev, var = x/8 − 4, each operation in float32."""

    description = "toy"

    def __init__(self, spec: ModelSpec) -> None:
        self._factors = factors(spec)
        self._table = np.float32(BY_CLASS) * (np.arange(spec.label_count or 1) - np.float32(1)).astype(np.float32)

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        each = self.buffers
        each.out[...] = self._factors[each.t][:, None, None, None] * each.x
        if each.y is not None:
            each.out[...] += self._table[each.y][:, None, None, None]
        if each.x0_prev is not None:
            each.out[...] += np.float32(BY_ITSELF) * each.x0_prev
        if each.var is not None:
            each.var[...] = np.float32(0.125) * each.x - np.float32(4)

    def close(self) -> None:
        pass


TOY = """
const { model, factors, table, byItself, ...asked } = request;
const size = model.spec.shape.reduce((a, b) => a * b);
async function network({ x, t, y, x0_prev }) {
  const out = new Float32Array(x.length), v = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) {
    const image = Math.floor(i / size);
    let sum = Math.fround(Math.fround(factors[t[image]]) * x[i]);
    if (y) sum = Math.fround(sum + Math.fround(table[y[image]]));
    if (x0_prev) sum = Math.fround(sum + Math.fround(Math.fround(byItself) * x0_prev[i]));
    out[i] = sum;
    v[i] = Math.fround(Math.fround(0.125 * x[i]) - 4);
  }
  return { out, var: v };
}
const seeds = { seed: BigInt(asked.seed), towards: asked.towards && BigInt(asked.towards) };
for await (const { x, x0 } of chain.run(model, network, { ...asked, ...seeds })) { write(x0); write(x); }
"""

CASES: dict[str, tuple[dict[str, Any], int | None, dict[str, Any]]] = {
    "the whole chain": ({}, None, {}),
    "few steps": ({}, 7, {}),  # UniPC, which remembers
    "v, not clipped": ({"prediction": "v", "clip": None, "schedule": "cosine"}, None, {}),
    "x0": ({"prediction": "x0", "clip": 0.5}, None, {}),
    "a variance in a range": ({"variance": "learned_range"}, None, {}),
    "a learned variance": ({"variance": "learned"}, None, {}),
    "classes": ({"classes": 5}, None, {"labels": [3, 0, 4]}),
    "no class": ({"classes": 5, "null_class": True}, None, {}),
    "guided": ({"classes": 5, "null_class": True}, None, {"labels": [3, 0, 4], "guidance": 2.7}),
    "guided by nothing": ({"classes": 5, "null_class": True}, 7, {"labels": [3, 0, 4], "guidance": 0.0}),
    "between two seeds": ({}, 7, {"towards": 2**64 - 1, "share": 0.35}),
    "itself, guided": (
        {"classes": 5, "null_class": True, "self_condition": True, "variance": "learned_range"},
        None,
        {"labels": [1, 2, 3], "guidance": 1.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_state_of_a_chain_has_the_bits_of_numpy(name):
    changes, steps, asked = CASES[name]
    conditioning = {**asked}
    spec = ModelSpec((3, 4, 5), **{"timesteps": 20, **changes})
    described = describe(spec, "toy", "", 0, steps=[7])
    with Pipeline(spec, Toy(spec)) as pipeline:
        sampling = Sampling.chosen(20, steps=steps)
        if (towards := conditioning.pop("towards", None)) is not None:
            share, images = conditioning.pop("share"), np.arange(9, 12)
            conditioning["x"] = chain.between(2**40 + 5, towards, share, images, spec.shape)
        steps_before: list[tuple[np.ndarray, np.ndarray]] = []
        images = pipeline.generate(
            3,
            seed=2**40 + 5,
            first=9,
            batch=3,
            sampling=sampling,
            preview=lambda _, each: steps_before.append((each.x.copy(), each.x0.copy())),
            **conditioning,
        )
    found = javascript(
        TOY,
        {
            "model": described,
            "factors": factors(spec).tolist(),
            "table": (np.float32(BY_CLASS) * (np.arange(spec.label_count or 1) - np.float32(1))).tolist(),
            "byItself": BY_ITSELF,
            "steps": str(steps or 20),
            "seed": str(2**40 + 5),
            "images": [9, 10, 11],
            **asked,
            **({"towards": str(asked["towards"])} if "towards" in asked else {}),
        },
    )
    x0 = np.stack([each for _, each in steps_before])
    x_next = np.stack([x for x, _ in steps_before[1:]] + [x0[-1]])  # the chain ends with x̂_0
    states = np.frombuffer(found, "<f4").reshape(len(x0), 2, 3, *spec.shape)
    np.testing.assert_array_equal(states[:, 0].view(np.uint32), x0.view(np.uint32))
    np.testing.assert_array_equal(states[:, 1].view(np.uint32), x_next.view(np.uint32))
    np.testing.assert_array_equal(to_nhwc(states[-1, 1]), images)
