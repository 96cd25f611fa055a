"""Classifier-free guidance: chains whose mean is known, their network calls, and that neighbours make no difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddpmx.backends.base import Buffers
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import Guidance, GuidedBackend, combine, guided_batches
from ddpmx.sampling.request import Conditioning, check_request
from oracles.conditioning import conditioning_of
from oracles.toy_backend import ToyBackend

SHAPE = (1, 3, 4)
SPEC = ModelSpec(SHAPE, ddpmx="0.1.0", classes=3, null_class=True)
T = SPEC.timesteps
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
MEANS = np.array([-0.2, 0.1, 0.25, 0.05])  # of each class, and of the data without one
S = 0.02


def eps_of(x, t, mean):
    """E[ε | x_t] where every pixel of x_0 is N(mean, s²), in x's type."""
    a = ALPHA_BAR[t]
    return np.sqrt(1 - a) / (a * S**2 + 1 - a) * (x - np.sqrt(a) * mean)


class ByClass:
    """A network of images whose class says their mean, as a Backend. ``calls`` holds the rows of each call."""

    description = "by class"

    def __init__(self, sways=None):
        self.calls, self.labels, self.sways = [], [], sways

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self):
        x, t, y = self.buffers.x, self.buffers.t, self.buffers.y
        self.calls.append(len(x))
        self.labels.append(y.tolist())
        means = MEANS[y][:, None, None, None]
        self.buffers.out[...] = np.stack([eps_of(*one) for one in zip(x.astype(np.float64), t, means, strict=True)])
        if self.buffers.var is not None:
            self.buffers.var[...] = y[:, None, None, None]
        if self.sways == "size":
            self.buffers.out[...] += np.float32(0.01 * len(x))
        elif self.sways == "place":
            self.buffers.out[...] += np.float32(0.01) * np.arange(len(x), dtype=np.float32)[:, None, None, None]

    def close(self):
        pass


def drawn(n=3, backend=None, spec=SPEC, **options: Any):
    with Pipeline(spec, backend or ByClass()) as pipeline:
        return pipeline.generate(n, **{"seed": 5, "steps": 20, **options})


def previews(n, **options):
    with Pipeline(SPEC, ByClass()) as pipeline:
        return [step.x0 for step in pipeline.stream(n, seed=5, **options)]


def by_hand(mean, n, seed=5):
    """Algorithm 2 with σ² = β in float64, for images of one mean."""
    beta = np.linspace(1e-4, 0.02, T)
    size = int(np.prod(SHAPE))

    def draw(t, purpose):
        return noise.normal(seed, np.arange(n), t, purpose, size).reshape(n, *SHAPE).astype(np.float64)

    x = draw(0, Purpose.INITIAL)
    for t in range(T - 1, -1, -1):
        a = ALPHA_BAR[t]
        before = ALPHA_BAR[t - 1] if t else 1.0
        x0 = np.clip((x - np.sqrt(1 - a) * eps_of(x, t, mean)) / np.sqrt(a), -1, 1)
        x = (np.sqrt(before) * beta[t] * x0 + np.sqrt(1 - beta[t]) * (1 - before) * x) / (1 - a)
        x += np.sqrt(beta[t]) * draw(t, Purpose.STEP) if t else 0
    return x


@pytest.mark.parametrize(("label", "w"), [(0, 2.0), (2, 3.5), (1, -1.0), (2, 0.5)])
def test_a_guided_chain_has_the_mean_that_w_says(label, w, figure):
    """out_∅ + w·(out_y − out_∅) is the network of images with the mean m_∅ + w·(m_y − m_∅), as ε is linear in it."""
    mean = MEANS[3] + w * (MEANS[label] - MEANS[3])
    found = previews(2, labels=label, guidance=w)[-1]
    figure(
        f"guided chain, class {label}, w = {w}, against float64", np.abs(found - by_hand(mean, 2)).max(), at_most=1e-4
    )
    assert abs(found.mean() - mean) < 4 * S / np.sqrt(found.size) + 0.01
    assert np.abs(found - by_hand(MEANS[label], 2)).max() > 0.01  # the control


def test_a_guided_step_is_one_call_of_two_rows_for_each_image():
    backend = ByClass()
    drawn(3, backend, labels=[0, 1, 2], guidance=2, batch=3, steps=5)
    chain_calls = backend.labels[-5:]
    assert chain_calls == [[0, 1, 2, 3, 3, 3]] * 5


@pytest.mark.parametrize("w", [1, 1.0, np.float32(1)])
def test_a_guidance_of_one_changes_nothing_and_costs_nothing(w):
    guided, plain = ByClass(), ByClass()
    assert drawn(3, guided, labels=1, guidance=w).tobytes() == drawn(3, plain, labels=1).tobytes()
    assert guided.calls == plain.calls
    assert drawn(labels=1, guidance=1.5).tobytes() != drawn(labels=1).tobytes()  # the control


def test_a_guidance_of_zero_is_the_network_without_classes():
    backend = ByClass()
    images = drawn(3, backend, labels=[0, 1, 2], guidance=0)
    assert images.tobytes() == drawn(3).tobytes() == drawn(3, labels=None).tobytes()
    assert backend.labels[-1] == [3, 3, 3]
    assert images.tobytes() != drawn(3, labels=[0, 1, 2]).tobytes()


@pytest.mark.parametrize("sways", [None, "size", "place"])
@pytest.mark.parametrize("self_condition", [False, True])
def test_any_n_split_or_batch_gives_the_same_images(sways, self_condition):
    spec = SPEC.replace(self_condition=self_condition)
    labels = [i % 3 for i in range(7)]
    options: dict[str, Any] = {"guidance": 2.5, "spec": spec, "steps": 6}
    whole = drawn(7, ByClass(sways), labels=labels, batch=3, **options)
    for n, first in ((2, 0), (3, 2), (1, 6), (4, 3)):
        part = drawn(n, ByClass(sways), labels=labels[first : first + n], first=first, batch=3, **options)
        assert part.tobytes() == whole[first : first + n].tobytes(), (n, first)
    if sways is None:
        for batch in (1, 2, 7, 16):
            assert drawn(7, labels=labels, batch=batch, **options).tobytes() == whole.tobytes()


class Parted(ByClass):
    """A backend that computes in parts: the bits depend on the place in a part and on its size."""

    largest_part = 2

    def use_part(self, part):
        self.part = part

    def enqueue(self):
        super().enqueue()
        rows = len(self.buffers.x)
        assert rows % self.part == 0
        place = np.arange(rows) % self.part + 10 * self.part
        self.buffers.out[...] += np.float32(0.01) * place.astype(np.float32)[:, None, None, None]


def test_parts_stay_where_they_are():
    labels = [i % 3 for i in range(7)]
    whole = drawn(7, Parted(), labels=labels, batch=4, guidance=2)
    for n, first in ((3, 0), (4, 3), (1, 5)):
        part = drawn(n, Parted(), labels=labels[first : first + n], first=first, batch=4, guidance=2)
        assert part.tobytes() == whole[first : first + n].tobytes(), (n, first)


def test_x0_prev_and_the_condition_are_those_of_the_image_in_both_rows():
    spec = SPEC.replace(self_condition=True, condition=2)
    seen = []

    class Watched(ByClass):
        def enqueue(self):
            seen.append({name: array.copy() for name, array in self.buffers.inputs().items()})
            super().enqueue()

    cond = np.random.default_rng(0).uniform(-1, 1, (2, 2, *SHAPE[1:])).astype(np.float32)
    drawn(2, Watched(), spec, labels=[0, 1], cond=cond, guidance=2, batch=2, steps=4)
    for inputs in seen[-4:]:
        for name in ("x", "t", "x0_prev", "cond"):
            np.testing.assert_array_equal(inputs[name][:2], inputs[name][2:])
        np.testing.assert_array_equal(inputs["cond"][:2], cond)
    assert np.abs(seen[-1]["x0_prev"]).max() > 0


def test_the_learned_variance_is_that_of_the_class():
    spec = SPEC.replace(variance="learned_range")
    buffers = Buffers.of(2, SHAPE, var=True, conditioning_shapes=spec.conditioning_shapes)
    buffers.y[...] = [0, 2]
    backend = GuidedBackend(ByClass(), spec, Guidance(2.0, 3))
    backend.bind(buffers)
    backend.enqueue()
    assert buffers.var[:, 0, 0, 0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("ranges", "images"),
    [
        (((1, 16),), ((1, 8),)),
        (((4, 16),), ((2, 8),)),
        (((1, 1), (20, 24)), ((10, 12),)),
        (((2, 3),), ((1, 1),)),
        (((3, 9),), ((2, 4),)),
    ],
)
def test_how_many_images_fit(ranges, images):
    assert guided_batches(ranges) == images


@pytest.mark.parametrize(("ranges", "note"), [(((1, 1),), "it takes 1"), (((3, 3), (1, 1)), "it takes 3, 1")])
def test_a_network_that_takes_no_two_rows_cannot_be_guided(ranges, note):
    with pytest.raises(InputError, match="two rows for each image") as caught:
        guided_batches(ranges)
    assert caught.value.note == note


def test_the_formula_has_its_order():
    """float32, the difference first, without fused operations."""
    rng = np.random.default_rng(0)
    c, u = rng.standard_normal((2, 4096)).astype(np.float32)
    out = np.empty_like(c)
    combine(np.float32(2.3), c, u, out)
    np.testing.assert_array_equal(out, u + (c - u) * np.float32(2.3))
    assert np.any(out != (c * np.float32(2.3) + u * (1 - np.float32(2.3))))


@pytest.mark.parametrize(
    ("spec", "options", "fact"),
    [
        (SPEC, {"labels": 1, "guidance": np.nan}, "finite"),
        (SPEC, {"labels": 1, "guidance": -np.inf}, "finite"),
        (SPEC, {"labels": 1, "guidance": 1e39}, "finite"),
        (SPEC, {"labels": 1, "guidance": "2"}, "number"),
        (SPEC, {"labels": 1, "guidance": True}, "number"),
        (SPEC, {"guidance": 2}, "needs the class"),
        (SPEC, {"labels": 3}, "no class 3"),
        (SPEC.replace(null_class=False), {"labels": 1, "guidance": 2}, "cannot be guided"),
        (SPEC.replace(null_class=False), {"labels": 1, "guidance": 0}, "cannot be guided"),
        (SPEC.replace(null_class=False), {}, "missing labels"),
        (SPEC.replace(null_class=False, classes=None), {"guidance": 2}, "cannot be guided"),
        (SPEC, {"conditioning": Conditioning(1), "guidance": 2}, "guidance as well"),
    ],
)
def test_what_is_refused(spec, options, fact):
    backend = ByClass()
    with pytest.raises(InputError, match=fact):
        drawn(2, backend, spec, **options)
    assert backend.calls == []


def test_a_conditioning_holds_it_too():
    assert drawn(conditioning=Conditioning(2, guidance=2)).tobytes() == drawn(labels=2, guidance=2).tobytes()


def test_twice_the_rows_count_for_the_memory():
    large = SPEC.replace(shape=(3, 512, 512))
    check_request(large, 42, labels=1, batch=42)
    with pytest.raises(InputError, match="42 images of 512×512 at once"):
        check_request(large, 42, labels=1, batch=42, guidance=2)
    assert check_request(SPEC, 9, labels=1, guidance=2, ranges=((1, 16),)).batch == 8


def test_an_output_that_is_not_finite_in_either_row_is_named():
    class Broken(ByClass):
        def enqueue(self):
            super().enqueue()
            if self.buffers.t[0] < 500:
                self.buffers.out[-1, 0, 0, 0] = np.inf  # a row without a class

    with pytest.raises(NumericError, match="not finite"):
        drawn(2, Broken(), labels=1, guidance=2)
    drawn(2, ByClass(), labels=1, guidance=2)


def test_the_toy_s_guided_chain_is_the_chain_of_its_combined_output():
    """With classes, x̂_0 of the step before and a condition at once, written out beside the wrapper."""
    spec = ModelSpec((3, 8, 8), classes=5, null_class=True, self_condition=True, condition=2)
    given = conditioning_of(spec, 2)

    class Both(ToyBackend):
        def enqueue(self):
            super().enqueue()
            with_class = self.buffers.out.copy()
            labels = self.buffers.y.copy()
            self.buffers.y[...] = 5
            super().enqueue()
            out = self.buffers.out
            out += (with_class - out) * np.float32(2)
            self.buffers.y[...] = labels

    table = make_table(spec.make_schedule(), "eps", "fixed_large", steps=8)
    images = np.arange(2)
    start = chain.initial(0, images, spec.shape)
    runs = (
        chain.run(
            backend,
            table,
            start,
            seed=0,
            images=images,
            conditioning_shapes=spec.conditioning_shapes,
            conditioning=given,
        )
        for backend in (GuidedBackend(ToyBackend(), spec, Guidance(2.0, 5)), Both())
    )
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(ours.x0, theirs.x0)
