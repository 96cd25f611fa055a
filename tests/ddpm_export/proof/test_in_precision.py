"""A module in real half: rounded after every operation, and its largest numbers known by their layers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: half precision on a CPU (no torch)")
pytest.importorskip("onnx", reason="not verified here: half precision on a CPU (no onnx)")

import torch

from ddpm_export.any_module.adapter import Adapter
from ddpm_export.any_module.export import export
from ddpm_export.graph.onnx_export import to_precision
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.proof import in_precision
from ddpm_export.proof.record import record
from ddpmx.backends.base import Buffers
from ddpmx.backends.open import open_model
from ddpmx.errors import FileFormatError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity import report as reports
from ddpmx.parity.ladder import run_ladder
from ddpmx.parity.reduced import RANGE, RANGE_BOUND, Reduced
from ddpmx.parity.reference import Reference
from oracles.foreign_nets import FractionNet, ready
from oracles.random_weights import rerandomise

pytestmark = pytest.mark.torch

SPEC = ModelSpec((1, 8, 8), timesteps=40)


def small(scale: float = 1.0) -> UNet:
    """A tiny U-Net; the body's numbers are ``scale`` times as large, and a norm brings them back."""
    network = UNet(UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)).eval()
    rerandomise(network, 0)
    with torch.no_grad():
        for parameter in network.middle[0].block.conv2.parameters():
            parameter.mul_(scale)
    return network.requires_grad_(False)


def outputs(backend: TorchBackend, seed: int = 0) -> np.ndarray:
    buffers = Buffers.of(3, SPEC.shape)
    buffers.x[...] = np.random.default_rng(seed).standard_normal(buffers.x.shape)
    buffers.t[...] = [0, 20, 39]
    backend.bind(buffers)
    backend.enqueue()
    return buffers.out.copy()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_operations_are_rounded_as_torch_s_own_half_rounds_them(precision):
    """torch sums in float32 and rounds once too; other orders of the sums leave a unit in the last place here and there."""
    network = small()
    exact = outputs(TorchBackend(network))
    own = outputs(TorchBackend(to_precision(network, precision)))
    mine = outputs(in_precision.RoundedBackend(to_precision(network, precision), precision))
    error, unit = np.abs(own - exact).max(), np.sqrt(np.mean(exact**2))
    assert error > (1e-4 if precision == "fp16" else 1e-3) * unit, "there is something to round"
    assert np.sqrt(np.mean((mine - own) ** 2)) < np.sqrt(np.mean((own - exact) ** 2))
    assert 0.7 < np.sqrt(np.mean((mine - exact) ** 2) / np.mean((own - exact) ** 2)) < 1.4


def test_the_largest_number_of_each_half_layer_is_known():
    network = to_precision(small(), "fp16")
    seen: dict[str, float] = {}

    def note(name):
        def hook(_module, _inputs, out):
            seen[name] = max(seen.get(name, 0.0), float(out.float().abs().max()))

        return hook

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.dtype == torch.float16:
            module.register_forward_hook(note(name))
    backend = in_precision.RoundedBackend(network, "fp16")
    outputs(backend)
    assert len(seen) > 10
    assert {name: backend.largest[name] for name in seen} == seen
    assert "conv_in" not in backend.largest, "it is float32"


@pytest.mark.parametrize(("scale", "overflows"), [(1.0, False), (1.5e4, False), (1e6, True)])
def test_an_export_whose_numbers_leave_half_s_range_fails_with_the_layer(scale, overflows):
    """onnxruntime's CPU computes this file in float32, and sees nothing."""
    reference = record(small(scale), SPEC, steps=4)
    _, reduced = in_precision.judge(small(scale), SPEC.replace(precision="fp16"), reference)
    found = reduced.checks[0]
    assert found.name == RANGE
    assert found.bound == RANGE_BOUND == 65504 / 4
    assert found.passed == (scale == 1)
    assert math.isinf(found.value) == overflows
    if scale > 1:
        assert found.worst.startswith("in middle.0.block.conv2")
        assert max(reduced.largest.values()) == next(iter(reduced.largest.values())), "the largest first"


def exported(tmp_path, precision: str):
    net = ready(FractionNet(c_in=1, c_out=1))
    return export(Adapter(net, time="fraction"), SPEC, tmp_path / "m.onnx", precision=precision)


def test_an_fp16_export_is_judged_as_a_file_and_in_real_half_and_the_record_keeps_it(tmp_path):
    done = exported(tmp_path, "fp16")
    judged = {check.judged for check in done.report.checks}
    assert judged == {"file", "module in real half"}
    both = {
        where: next(c for c in done.report.checks if c.name == "ε, RMS" and c.judged == where).value for where in judged
    }
    assert both["module in real half"] > 0
    assert any(check.name == RANGE for check in done.report.checks)
    again = Reference.load(done.record)
    assert again.reduced.to_json() == done.report.reference.reduced.to_json()
    spec, backend = open_model(done.file)  # as another machine does
    try:
        result = run_ladder(backend, spec, again)
    finally:
        backend.close()
    assert [c.name for c in result.checks] == [c.name for c in done.report.checks]
    text = reports.to_markdown(result, done.file, {})
    assert "| ε, RMS, module in real half | " in text
    assert "every operation rounded to float16" in text
    assert "| body." in text, "layers with their largest activation"


def test_what_a_record_knows_of_half_decides_elsewhere_too(tmp_path):
    done = exported(tmp_path, "fp16")
    known = Reference.load(done.record)
    bad = dataclasses.replace(known.reduced.checks[0], value=3e4, worst="in body.1")
    spec, backend = open_model(done.file)
    try:
        result = run_ladder(
            backend, spec, dataclasses.replace(known, reduced=dataclasses.replace(known.reduced, checks=(bad,)))
        )
        without = run_ladder(backend, spec, dataclasses.replace(known, reduced=None))
    finally:
        backend.close()
    assert not result.passed
    assert result.verdict.startswith("FAILED: half precision ends at 65504")
    assert "body.1" in result.verdict
    assert without.passed
    assert "knows float32 alone" in without.checks[-1].skipped
    assert without.verdict.endswith("; 2 not judged"), "the untrained network's free chain is the other"


def test_a_bf16_export_says_that_the_module_was_judged(tmp_path):
    done = exported(tmp_path, "bf16")
    assert {check.judged for check in done.report.checks} == {"module in real bfloat16"}
    assert "NOT the file" in done.report.ran_on
    assert Reference.load(done.record).reduced.precision == "bf16"
    assert not any(check.name == RANGE for check in done.report.checks), "bfloat16 has float32's range"


@pytest.mark.parametrize(
    "values",
    [None, [], {}, {"precision": "fp32"}, {"precision": "fp16", "made_with": "x", "checks": [{}], "largest": {}}],
)
def test_a_damaged_part_of_a_record_is_refused(values):
    with pytest.raises(FileFormatError, match="reduced precision"):
        Reduced.from_json(values)
