"""Code that treats the batch size as a Python number is traced for any batch, or refused with its line."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the export of any module (no torch)")
pytest.importorskip("onnx", reason="not verified here: the export of any module (no onnx)")

import onnxruntime
import torch
from torch import nn

from ddpm_export import Adapter, export
from ddpm_export.graph.any_batch import any_batch
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ModelSpec

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SPEC = ModelSpec((1, 8, 8), timesteps=50, classes=3)


class Guided(nn.Module):
    """Classifier-free guidance by a doubled batch; how the halves are taken apart is the subclasses'."""

    def __init__(self) -> None:
        super().__init__()
        first, middle, last = (nn.Conv2d(c, d, 3, padding=1) for c, d in ((1, 8), (8, 8), (8, 1)))
        self.net = nn.Sequential(first, nn.GroupNorm(2, 8), nn.SiLU(), middle, last)
        self.time, self.label = nn.Embedding(50, 1), nn.Embedding(4, 1)

    def both(self, x, t, y):
        t, y = torch.cat([t, t]), torch.cat([y + 1, torch.zeros_like(y)])
        return self.net(torch.cat([x, x]) + (self.time(t) + self.label(y))[..., None, None])

    def halves(self, out, x):
        return out[: x.shape[0]], out[x.shape[0] :]

    def forward(self, x, t, y):
        given, free = self.halves(self.both(x, t, y), x)
        return 3 * given - 2 * free


class Chunk(Guided):
    def halves(self, out, x):
        return out.chunk(2)


class ChunkDim(Guided):
    def halves(self, out, x):
        return torch.chunk(out, chunks=2, dim=0)


class SplitHalf(Guided):
    def halves(self, out, x):
        return out.split(len(out) // 2)


class SplitList(Guided):
    def halves(self, out, x):
        return torch.split(out, [len(x), len(x)])


class SplitSize(Guided):
    def halves(self, out, x):
        return out.split(split_size=x.size(0), dim=0)


class Half(Guided):
    def halves(self, out, x):
        n = len(out) // 2
        return out[:n], out[n:]


class Int(Guided):
    def halves(self, out, x):
        n = int(x.shape[0])
        return out[:n], out[n:]


class Unflatten(Guided):
    def halves(self, out, x):
        return out.unflatten(0, (2, len(x))).unbind(0)


class Odd(Guided):
    """Three parts, of which the last is as long as the others for every batch."""

    def forward(self, x, t, y):
        first, second, third = torch.cat([self.both(x, t, y), x]).chunk(3)
        return 3 * first - 2 * second + third


class Loop(Guided):
    def halves(self, out, x):
        parts = [out[i] for i in range(len(x))]
        return torch.stack(parts), out[x.shape[0] :]


class Pairs(Guided):
    def halves(self, out, x):
        return torch.stack([a for a, _ in zip(out, x, strict=False)]), out[x.shape[0] :]


def ready(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return net.eval()


def inputs(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, 1, 8, 8, generator=generator),
        "t": (torch.arange(n) * 7 % 50).to(torch.int32),
        "y": (torch.arange(n) % 3).to(torch.int32),
    }


@pytest.mark.parametrize(
    "kind",
    [Chunk, ChunkDim, SplitHalf, SplitList, SplitSize, Half, Int, Unflatten, Odd],
    ids=lambda kind: kind.__name__,
)
def test_a_batch_taken_apart_is_traced_for_any_batch(kind, tmp_path, figure):
    net = ready(kind())
    export(net, SPEC, tmp_path / "m.onnx", parity=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 2, 3, 8):
        given = inputs(n)
        with torch.no_grad():
            expected = net(given["x"], given["t"].long(), y=given["y"].long()).numpy()
        (out,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        error = float(np.abs(out - expected).max() / np.sqrt(np.mean(expected**2)))
        figure(f"{kind.__name__}, batch of {n}", error, at_most=2e-5)


@pytest.mark.parametrize(("kind", "call"), [(Loop, "range(len(x))"), (Pairs, "zip(out, x")])
def test_what_needs_the_batch_as_a_number_is_refused_with_its_line_and_a_cure(kind, call, tmp_path):
    line = next(i for i, text in enumerate(inspect.getsource(kind).splitlines()) if call in text)
    number = inspect.getsourcelines(kind)[1] + line
    with pytest.raises(BackendError, match="only for one size of the batch") as caught:
        export(ready(kind()), SPEC, tmp_path / "m.onnx")
    assert f"test_any_batch.py:{number} in " in str(caught.value.note)
    assert "without a loop" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_len_is_pythons_own_again_after_the_trace():
    with any_batch(Chunk()):
        assert "len" in globals()
    assert "len" not in globals()


def state(net: nn.Module) -> dict[str, object]:
    """All that an export might change."""
    return {
        name: (
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            type(module),
            {
                key: (p.requires_grad, p.dtype, p.device, p.data_ptr(), p.grad)
                for key, p in module.named_parameters(recurse=False)
            },
        )
        for name, module in net.named_modules()
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_leaves_the_module_as_it_was(precision, tmp_path):
    net = ready(Chunk())
    net.net[0].weight.requires_grad_(False)
    net.net[2].register_forward_hook(lambda module, inputs, out: None)
    before, weights = state(net), copy.deepcopy(net.state_dict())
    adapter = Adapter(net)
    adapter.network(SPEC)
    export(adapter, SPEC, tmp_path / "m.onnx", parity=False, precision=precision)
    assert state(net) == before
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_each_part_stays_and_one_part_in_training_is_seen(mode, tmp_path):
    net = ready(Chunk()).train(mode)
    net.net[1].train(not mode)
    before = state(net)
    Adapter(net).network(SPEC)
    assert state(net) == before
    with pytest.raises(InputError, match="in training mode"):
        export(net, SPEC, tmp_path / "m.onnx")
    assert state(net) == before
