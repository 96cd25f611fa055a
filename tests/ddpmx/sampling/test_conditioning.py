"""Conditioned chains in NumPy: self-conditioning, and the measurement of the executed batch."""

from __future__ import annotations

import numpy as np

from ddpmx.diffusion.samplers import make_table
from ddpmx.sampling import chain
from oracles import gaussian
from oracles.conditioning import KINDS
from oracles.toy_backend import ToyBackend

TOY = {kind: gaussian.SPEC.replace(**fields) for kind, fields in KINDS.items()}
"""The specs of ToyBackend."""
TABLE = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=9)


def test_x0_prev_is_the_x0_of_the_step_before():
    """After its clip, 0 in the first step, and for each image its own."""
    seen = []

    class Watched(ToyBackend):
        def enqueue(self):
            seen.append(self.buffers.x0_prev.copy())
            super().enqueue()

    indices, spec = np.arange(3), TOY["itself"]
    start = chain.initial(0, indices, spec.shape)
    steps = chain.run(
        Watched(), TABLE, start, seed=0, images=indices, clip=0.1, conditioning_shapes=spec.conditioning_shapes
    )
    kept = [np.zeros_like(start), *(step.x0.copy() for step in steps)]
    assert len(seen) == len(TABLE)
    assert max(np.abs(x0).max() for x0 in kept) == np.float32(0.1)
    for fed, x0 in zip(seen, kept, strict=False):
        np.testing.assert_array_equal(fed, x0)


def test_the_executed_batch_is_measured_with_legal_labels():
    """A class is an index into the network's tables."""
    seen = []

    class Watched(ToyBackend):
        def enqueue(self):
            seen.append({name: array.copy() for name, array in self.buffers.inputs().items()})
            super().enqueue()

    spec = TOY["all"].replace(classes=2)
    assert chain.executed_batch(Watched(), spec, 3, 5) == 3
    assert len(seen) == 4
    for inputs in seen:
        assert set(inputs) == {"x", "t", "y", "x0_prev", "cond"}
        assert set(inputs["y"]) == {0, 1}
        assert all(len(np.unique(array)) > 1 for array in inputs.values())


def test_an_output_that_depends_on_a_neighbour_s_label_is_found():
    class Sways(ToyBackend):
        def enqueue(self):
            super().enqueue()
            out = self.buffers.out
            out += self.buffers.y[0] * np.float32(0.01)  # the first image's label, for all

    assert chain.executed_batch(Sways(), TOY["classes"], 4, 4) == 1
