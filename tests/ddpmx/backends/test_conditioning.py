"""Conditioned networks as backends: their buffers, and plans that lack an input."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx import pipeline
from ddpmx.backends.base import Buffers, CopyingBackend
from ddpmx.errors import FileFormatError
from oracles import gaussian
from oracles.conditioning import ALL, spec_of


@pytest.mark.parametrize("missing", ["y", "x0_prev", "cond"])
def test_a_plan_without_an_input_of_its_spec_is_refused(conditioned_plan, missing):
    spec = spec_of("all")
    tensors = {**{n: ("INPUT", "INT32" if n in ("t", "y") else "FLOAT", (-1, *d)) for n, d in spec.inputs.items()}}
    tensors["eps"] = ("OUTPUT", "FLOAT", (-1, *spec.shape))
    del tensors[missing]
    with pytest.raises(FileFormatError, match="other inputs and outputs") as caught:
        pipeline.load(conditioned_plan(spec, tensors=tensors))
    assert f"no {missing}" in str(caught.value)


def test_buffers_of_one_image_are_views_of_its_own_row():
    spec = gaussian.SPEC.replace(**ALL)
    buffers = Buffers.of(3, spec.shape, var=True, conditioning_shapes=spec.conditioning_shapes)
    for number, array in enumerate({**buffers.inputs(), **buffers.outputs()}.values()):
        array[...] = (number + 10 * np.arange(3)).reshape(3, *(1,) * (array.ndim - 1))
    row = {**buffers.rows(slice(2, 3)).inputs(), **buffers.rows(slice(2, 3)).outputs()}
    assert list(row) == ["x", "t", "y", "x0_prev", "cond", "out", "var"]
    for number, array in enumerate(row.values()):
        assert len(array) == 1
        assert np.all(array == number + 20)


def test_a_copying_backend_takes_other_buffers_of_the_same_batch(conditioned_plan):
    spec = spec_of("all")
    with pipeline.load(conditioned_plan(spec)) as p:
        backend = p._runner._backend
        assert isinstance(backend, CopyingBackend)
        first, second = (Buffers.of(2, spec.shape, conditioning_shapes=spec.conditioning_shapes) for _ in range(2))
        second.y[...] = [1, 3]
        outputs = []
        for buffers in (first, second):
            backend.bind(buffers)
            backend.enqueue()
            outputs.append(buffers.out.copy())
        np.testing.assert_allclose(
            outputs[1] - outputs[0], np.broadcast_to([[[[0.1]]], [[[0.3]]]], outputs[0].shape), atol=1e-6
        )
