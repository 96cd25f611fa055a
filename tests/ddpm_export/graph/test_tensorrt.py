"""What TensorRT does not take of a graph is said at the export, with the line; a parser that is here says the same."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch", reason="not verified here: what TensorRT takes of a graph (no torch)")
pytest.importorskip("onnx", reason="not verified here: what TensorRT takes of a graph (no onnx)")

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from ddpm_export import Exported, export
from ddpm_export.graph import onnx_export
from ddpm_export.graph.tensorrt import refusals
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.trt import library as trt_library

pytestmark = [pytest.mark.torch, pytest.mark.slow]


def antialias(h):
    return F.interpolate(F.interpolate(h, scale_factor=0.5, mode="bilinear", antialias=True), scale_factor=2)


def fourier(h):
    return torch.fft.irfft2(torch.fft.rfft2(h, norm="ortho"), s=h.shape[-2:], norm="ortho")


def folded(h):
    return F.fold(F.unfold(h, 3, padding=1), h.shape[-2:], 3, padding=1)


def unpooled(h):
    out, places = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(out, places, 2)


def scattered(h):
    return h.scatter_add(-1, torch.zeros_like(h[..., :1], dtype=torch.int64), h[..., :1])


def bits(h):
    return h * ((h * 8).to(torch.int32) & 3)


def plain(h):
    return F.interpolate(F.avg_pool2d(h, 2), scale_factor=2, mode="bicubic") + h.cumsum(-1) + torch.roll(h, 2, -1)


REFUSED = {
    antialias: ("Resize with antialias", "antialias=True"),
    fourier: ("DFT", "rfft2"),
    folded: ("Col2Im", "F.fold"),
    unpooled: ("MaxPool with indices", "return_indices=True"),
    scattered: ("ScatterElements with a reduction", "scatter_add"),
    bits: ("BitwiseAnd", "& 3"),
}


class Net(nn.Module):
    def __init__(self, part) -> None:
        super().__init__()
        self.part = part
        self.first, self.last, self.time = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 1, 3, padding=1),
            nn.Embedding(9, 4),
        )

    def forward(self, x, t):
        return self.last(self.part(self.first(x) + self.time(t)[..., None, None]))


def exported(part, path) -> Exported:
    torch.manual_seed(0)
    return export(Net(part).eval(), ModelSpec((1, 8, 8), timesteps=9), path / "m.onnx", parity=False)


@pytest.fixture(params=["table", "parser"])
def source(request, monkeypatch) -> str:
    """The table alone, or the parser of an installed TensorRT alone."""
    if request.param == "table":
        monkeypatch.setattr(onnx_export, "parser_refusals", lambda model: [])
    else:
        try:
            trt_library.load("TensorRT-RTX")
        except BackendError:
            pytest.skip("not verified here: the parser of TensorRT-RTX (not installed)")
        monkeypatch.setattr(onnx_export, "refusals", lambda model: [])
    return request.param


@pytest.mark.parametrize("part", REFUSED, ids=lambda part: part.__name__)
def test_an_operator_that_tensorrt_does_not_take_is_named_with_its_line(part, source, tmp_path):
    what, call = REFUSED[part]
    done = exported(part, tmp_path)
    text = done.verdict
    assert done.file.is_file(), "ONNX Runtime takes it"
    assert "TensorRT does not take" in text
    if source == "table":
        assert what in text
    number = inspect.getsourcelines(part)[1] + next(
        i for i, line in enumerate(inspect.getsource(part).splitlines()) if call in line
    )
    if not (part is scattered and source == "parser"):  # the parser names no node there
        assert f"test_tensorrt.py:{number} in {part.__name__}" in text


def test_a_graph_that_tensorrt_takes_has_no_notes(source, tmp_path):
    assert exported(plain, tmp_path).notes == ()


def test_operators_of_another_domain_and_computed_axes_are_refused():
    x, axes = (helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
               helper.make_tensor_value_info("axes", TensorProto.INT64, [1]))  # fmt: skip
    nodes = [
        helper.make_node("FastGelu", ["x"], ["h"], domain="com.microsoft"),
        helper.make_node("ReduceSum", ["h", "axes"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x, axes], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    found = refusals(helper.make_model(graph, opset_imports=opsets))
    assert [one.what for one in found] == ["com.microsoft.FastGelu", "ReduceSum whose axes are computed"]
