"""Conditioned chains on a GPU, without one: through a fake driver, whose kernels are the real ones on the host."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS
from ddpmx.cuda.executors import choose_executor
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import InputError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles import gaussian
from oracles.conditioning import CHANNELS, KINDS, conditioning_of
from oracles.cuda_on_host import Toy
from oracles.device_chain import IMAGES, SHAPE, Setup, array_at, expected

TABLE = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=9)


def small(kind):
    return gaussian.SPEC.replace(shape=SHAPE, **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("clip", [1.0, 0.25, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_gives_numpy_s_bits(fake, executor, kind, clip):
    spec = small(kind)
    others, mine = conditioning_of(spec, seed=5), conditioning_of(spec)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, clip=clip, table=TABLE) as s:
        assert choose_executor(s.chain, s.engine, executor).executor == executor
        alive = fake.alive()
        for now in (mine, others, mine):  # nothing is left of the chain before
            step = expected(clip=clip, table=TABLE, conditioning_shapes=spec.conditioning_shapes, conditioning=now)
            got = s.chain.run(seed=5, images=IMAGES, conditioning=now)
            assert got.tobytes() == to_nhwc(step.x0).tobytes()
            assert array_at(s.chain.x, step.x_next.shape, ctypes.c_float).tobytes() == step.x_next.tobytes()
        assert fake.alive() == alive


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_on_the_device_can_be_watched(fake, kind):
    spec = small(kind)
    drawn, mine = np.array(IMAGES), conditioning_of(spec)
    wanted = chain.run(
        Toy(SHAPE),
        TABLE,
        chain.initial(5, drawn, SHAPE),
        seed=5,
        images=drawn,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=mine,
    )
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE, with_x0=True) as s:
        s.chain.prepare(s.engine, "graph")
        for ours, theirs in zip(s.chain.steps(seed=5, images=IMAGES, conditioning=mine), wanted, strict=True):
            assert ours.x0.tobytes() == theirs.x0.tobytes()


def test_conditioning_is_padded_and_may_come_from_the_device(fake):
    spec = small("all")
    mine = conditioning_of(spec, 2)
    step = expected(IMAGES[:2], table=TABLE, conditioning_shapes=spec.conditioning_shapes, conditioning=mine)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s, s.driver.current():
        s.chain.prepare(s.engine, "plain")
        memory = {name: s.driver.allocate(array.nbytes, name) for name, array in mine.items()}
        for name, array in mine.items():
            s.driver.copy_in(memory[name].value, array, s.chain.stream)
        for now in (mine, {name: handle.value for name, handle in memory.items()}):
            got = s.chain.run(seed=5, images=IMAGES[:2], conditioning=now)
            assert got.tobytes() == to_nhwc(step.x0).tobytes()
            assert list(array_at(s.chain.conditioning["y"], (3,), ctypes.c_int32)) == [*mine["y"], mine["y"][-1]]
        for handle in memory.values():
            handle.close()


def test_conditioning_on_the_device_is_0_at_first(fake):
    """The engine's first runs come before any chain, and a class is an index into its tables."""
    spec, seen = small("all"), []
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s:
        enqueue = s.engine.toy.enqueue
        s.engine.toy.enqueue = lambda: (
            seen.append({name: array.copy() for name, array in s.engine.toy.buffers.inputs().items()}),
            enqueue(),
        )
        s.chain.prepare(s.engine, "while")
    assert len(seen) >= 3
    assert not any(inputs[name].any() for inputs in seen for name in ("y", "x0_prev", "cond"))


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ({}, "missing model input '(y|cond)'"),
        (
            {"y": np.zeros(3, np.int64), "cond": np.zeros((3, CHANNELS, *SHAPE[1:]), np.float32)},
            r"y must be int32 \[3\]",
        ),
        (
            {"y": np.zeros(2, np.int32), "cond": np.zeros((3, CHANNELS, *SHAPE[1:]), np.float32)},
            r"y must be int32 \[3\]",
        ),
        ({"y": 1 << 20, "cond": 1 << 20, "x0_prev": 1 << 20}, "no input 'x0_prev'"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(fake, conditioning, message):
    spec = small("all")
    drawn = np.array(IMAGES)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s:
        s.chain.prepare(s.engine, "plain")
        with pytest.raises(InputError, match=message):
            s.chain.run(seed=5, images=IMAGES, conditioning=conditioning)
    if not any(isinstance(array, int) for array in conditioning.values()):
        with pytest.raises(InputError, match=message):
            next(
                chain.run(
                    Toy(SHAPE),
                    TABLE,
                    chain.initial(5, drawn, SHAPE),
                    seed=5,
                    images=drawn,
                    conditioning_shapes=spec.conditioning_shapes,
                    conditioning=conditioning,
                )
            )
