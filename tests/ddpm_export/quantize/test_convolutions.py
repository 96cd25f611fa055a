"""Geometry of convolutions against torch's, and which are first and last."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from ddpm_export.quantize.convolutions import Convolution, convolutions, first_and_last
from oracles.eight_bits import graph

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("stride", "pads", "dilation", "group"),
    [
        ((1, 1), (1, 1, 1, 1), (1, 1), 1),
        ((2, 2), (0, 0, 0, 0), (1, 1), 1),
        ((2, 1), (1, 0, 1, 0), (1, 2), 1),
        ((1, 1), (2, 2, 2, 2), (2, 2), 2),
    ],
)
def test_the_mean_of_a_convolution_is_its_weights_times_the_mean_patch(stride, pads, dilation, group):
    random = np.random.default_rng(1)
    x, weight = random.standard_normal((3, 4, 9, 7)), random.standard_normal((6, 4 // group, 3, 3))
    one = Convolution("c", "x", "w", "", "y", group, stride, pads, dilation, (3, 3))
    out = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), None, stride, pads[:2], dilation, group).numpy()
    assert one.output_size(9, 7) == out.shape[2:]
    np.testing.assert_allclose(one.mean_output(weight, one.mean_patch(x)), out.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_padding_on_one_side_only_is_that_of_the_graph():
    x, weight = np.arange(16.0).reshape(1, 1, 4, 4), np.ones((1, 1, 3, 3))
    one = Convolution("c", "x", "w", "", "y", 1, (2, 2), (0, 0, 1, 1), (1, 1), (3, 3))
    padded = F.pad(torch.from_numpy(x), (0, 1, 0, 1))
    out = F.conv2d(padded, torch.from_numpy(weight), None, 2).numpy()
    assert one.mean_output(weight, one.mean_patch(x))[0] == out.mean()


def test_first_and_last_are_those_that_no_other_comes_before_or_after():
    model = graph()
    assert list(convolutions(model)) == ["first/Conv", "a/Conv", "b/Conv", "skip/Conv", "eps"]
    assert first_and_last(model) == {"first/Conv", "eps"}


def test_what_t_alone_goes_through_is_not_first():
    model = graph()
    weight = helper.make_tensor("w.t", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])
    model.graph.initializer.append(weight)
    model.graph.node.append(helper.make_node("Conv", ["t", "w.t"], ["odd"], "t/Conv"))
    assert "t/Conv" not in first_and_last(model)
