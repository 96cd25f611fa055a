"""Any module becomes a file with the same outputs, or is refused with an error that says where to look."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the export of any module (no torch)")
pytest.importorskip("onnx", reason="not verified here: the export of any module (no onnx)")

import onnx
import onnxruntime
import torch
from torch import nn

from ddpm_export import Adapter, export, spec_from_arrays
from ddpmx.errors import BackendError, DdpmxError, InputError, OutputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity import report as reports
from ddpmx.parity.reference import Reference
from ddpmx.pipeline import load
from oracles.foreign_nets import AutogradNet, EmbeddingNet, FractionNet, GaussianNet, LinearAttentionNet, ready
from oracles.onnx_types import element_types, half_precision_faults

pytestmark = [pytest.mark.torch, pytest.mark.slow]

HERE = Path(__file__).name
COLOUR, GREY = (3, 8, 12), (1, 8, 8)
ALPHA_BAR = np.cos(np.linspace(0.02, 1.5, 50)) ** 2


def embedding() -> Adapter:
    net = EmbeddingNet(50, classes=3)
    net.norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    ready(net)
    style = torch.linspace(-1, 1, 12)
    return Adapter(
        net,
        inputs={"x": "sample", "t": "timestep", "y": "label"},
        fixed={"gain": 0.5},
        fixed_per_image={"style": style},
    )


def case(name: str) -> tuple[Adapter, ModelSpec]:
    """The adapter and the spec of a file."""
    return {
        "fraction": lambda: (Adapter(ready(FractionNet()), time="fraction"), ModelSpec(COLOUR, schedule="cosine")),
        "embedding": lambda: (embedding(), spec_from_arrays(GREY, alpha_bar=ALPHA_BAR, classes=3)),
        "linear attention": lambda: (
            Adapter(ready(LinearAttentionNet(c_in=6)), time="float", channels=("x0_prev", "x")),
            ModelSpec(COLOUR, self_condition=True, prediction="v"),
        ),
        "autograd function": lambda: (Adapter(ready(AutogradNet()), time=(1 / 999, 0.01)), ModelSpec(COLOUR)),
        "condition": lambda: (
            Adapter(ready(FractionNet(c_in=5, c_out=6)), time="fraction", channels=("x", "cond"), data_range=(-1, 1)),
            ModelSpec(COLOUR, condition=2, variance="learned_range"),
        ),
    }[name]()


def in_torch(name: str, net: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The module called as its author calls it."""
    x, t = inputs["x"], inputs["t"].long()
    with torch.no_grad():
        if name == "fraction":
            return [net(x, t / 1000)]
        if name == "embedding":
            style = torch.linspace(-1, 1, 12)
            return [net(timestep=t, sample=x, gain=0.5, style=style, label=inputs["y"].long()).sample]
        if name == "linear attention":
            return [net(torch.cat([inputs["x0_prev"], x], dim=1), t.float())]
        if name == "autograd function":
            return [net(x, t / 999 + 0.01)]
        return list(net(torch.cat([x, inputs["cond"]], dim=1), t / 1000).chunk(2, dim=1))


def inputs_for(spec: ModelSpec, n: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(n, *dims, generator=generator) for name, dims in spec.inputs.items()}
    inputs["t"] = torch.linspace(0, spec.timesteps - 1, n).round().to(torch.int32)
    if spec.classes is not None:
        inputs["y"] = (torch.arange(n) % spec.classes).to(torch.int32)
    return inputs


def in_onnx(file, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(list(spec.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})


CASES = [
    ("fraction", "fp32"), ("fraction", "fp16"), ("embedding", "fp32"), ("linear attention", "fp32"),
    ("linear attention", "fp16"), ("autograd function", "fp32"), ("condition", "fp16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each file, once."""
    folder, files = tmp_path_factory.mktemp("any"), {}

    def make(name: str, precision: str = "fp32"):
        if (name, precision) not in files:
            adapter, spec = case(name)
            before = copy.deepcopy(adapter.module.state_dict())
            exported = export(adapter, spec, folder / f"{name} {precision}.onnx", precision=precision)
            assert all(torch.equal(before[key], value) for key, value in adapter.module.state_dict().items())
            files[name, precision] = adapter.module, exported
        return files[name, precision]

    return make


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_file_computes_what_the_module_does_and_passes_the_ladder(made, name, precision, figure):
    net, exported = made(name, precision)
    assert exported.passed, exported.verdict
    assert exported.verdict.startswith("PASSED")
    assert exported.record.exists()
    spec = exported.spec
    assert (spec.precision, len(spec.weights)) == (precision, 64)
    for n in (1, 9):
        inputs = inputs_for(spec, n)
        for mine, theirs in zip(in_onnx(exported.file, spec, inputs), in_torch(name, net, inputs), strict=True):
            error = np.sqrt(np.mean((mine - theirs.numpy()) ** 2) / np.mean(theirs.numpy() ** 2))
            figure(
                f"{name} {precision}, batch of {n}: relative RMS error",
                error,
                at_most=2e-5 if precision == "fp32" else 5e-3,
            )


def test_half_precision_is_for_plain_layers_between_the_first_and_the_last_alone(made):
    assert made("fraction", "fp16")[1].halved == ("body.0", "body.1", "body.2")
    exported = made("linear attention", "fp16")[1]
    assert exported.halved == ("qkv", "out")  # not first, last, the standardised one, nor the time's
    model = onnx.load(exported.file)
    assert half_precision_faults(model) == []
    types = element_types(model)
    halves = [types[node.input[1]] == onnx.TensorProto.FLOAT16 for node in model.graph.node if node.op_type == "Conv"]
    assert sorted(halves) == [False, False, False, True, True]


def test_a_module_without_such_layers_has_no_half_precision(tmp_path):
    with pytest.raises(InputError, match="no layer of this module may compute in fp16"):
        export(Adapter(ready(_Small())), ModelSpec(GREY, timesteps=50), tmp_path / "m.onnx", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_a_layer_with_large_numbers_stays_float32(tmp_path):
    net = ready(FractionNet())
    with torch.no_grad():
        net.body[1].weight *= 1e5
        net.last.weight /= 1e5
    exported = export(
        Adapter(net, time="fraction"), ModelSpec(COLOUR), tmp_path / "m.onnx", precision="fp16", parity=False
    )
    assert exported.halved == ("body.0", "body.2")
    assert not exported.passed
    assert exported.verdict.startswith("NOT VERIFIED")


def test_a_schedule_by_alpha_bar_is_that_alpha_bar(made):
    spec = made("embedding")[1].spec
    assert (spec.schedule, spec.timesteps) == ("betas", 50)
    np.testing.assert_allclose(spec.make_schedule().alpha_bar, ALPHA_BAR, rtol=1e-12)
    with pytest.raises(InputError, match="either betas or alpha_bar"):
        spec_from_arrays(GREY)


@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-0.5, 0.5)])
def test_a_network_of_another_range_samples_the_images_that_it_models(data_range, tmp_path, figure):
    theirs = ModelSpec(GREY, timesteps=200, schedule="cosine", prediction="x0", variance="fixed_small", clip=None)
    mean, deviation = data_range[0] + 0.7, 0.05  # in units of [−1, 1]: 0.4 and 0.1
    net = GaussianNet(torch.from_numpy(theirs.make_schedule().alpha_bar).float(), mean, deviation).eval()
    exported = export(Adapter(net, data_range=data_range), theirs, tmp_path / "m.onnx", full=True)
    assert exported.passed, exported.verdict
    assert (exported.spec.schedule, exported.spec.prediction) == ("betas", "x0")
    images = load(exported.file).generate(32, seed=1).astype(np.float64) / 127.5 - 1
    # the result of their own chain, in their units: it is linear in y_t, so mean and variance follow step by step
    schedule = theirs.make_schedule()
    m, square = 0.0, 1.0
    for t in reversed(range(200)):
        signal, noise = schedule.alpha_bar[t], schedule.one_minus_alpha_bar[t]
        gain = np.sqrt(signal) * deviation**2 / (signal * deviation**2 + noise)
        a, b = schedule.posterior_mean_coef_x0[t], schedule.posterior_mean_coef_xt[t]
        if t == 0:  # the last step gives x̂_0 itself
            a, b = 1.0, 0.0
        m = a * (mean + gain * (m - np.sqrt(signal) * mean)) + b * m
        square = (a * gain + b) ** 2 * square + (schedule.posterior_variance[t] if t else 0)
    expected = 2 * (m - data_range[0]) - 1, 2 * np.sqrt(square)
    # 2048 pixels: four standard errors
    figure(f"{data_range}: mean of samples", abs(images.mean() - expected[0]), at_most=4 * expected[1] / 2048**0.5)
    figure(f"{data_range}: their deviation", abs(images.std() - expected[1]), at_most=4 * expected[1] / 4096**0.5)
    assert expected == pytest.approx((0.4, 0.1), abs=0.02)


def test_in_place_of_a_bfloat16_file_the_module_is_checked_and_the_report_says_so(tmp_path):
    adapter, spec = case("fraction")
    exported = export(adapter, spec, tmp_path / "m.onnx", precision="bf16")
    assert exported.passed, exported.verdict
    assert "NOT the file" in exported.report.ran_on


class _Outside(FractionNet):
    """Uses a layer's weights outside the layer."""

    def forward(self, x, t):
        h = super().forward(x, t)
        return h + torch.nn.functional.conv2d(x, self.body[1].weight[:3, :3], padding=1)


class _Tied(FractionNet):
    def __init__(self):
        super().__init__()
        self.body[2].weight = self.body[1].weight


class _Named(nn.Conv2d):
    """A convolution of another class name."""


class _Renamed(FractionNet):
    def __init__(self):
        super().__init__()
        self.body[0] = _Named(12, 12, 3, padding=1)


def test_weights_used_outside_their_layer_cannot_be_half(tmp_path):
    adapter = Adapter(ready(_Outside()), time="fraction")
    with pytest.raises(InputError, match=r"does not work with layers in fp16.*conv2d"):
        export(adapter, ModelSpec(COLOUR), tmp_path / "m.onnx", precision="fp16")
    assert export(adapter, ModelSpec(COLOUR), tmp_path / "m.onnx").passed


@pytest.mark.parametrize(("net", "halved"), [(_Tied, ("body.0",)), (_Renamed, ("body.0", "body.1", "body.2"))])
def test_layers_that_share_weights_stay_float32_and_names_do_not_matter(net, halved, tmp_path):
    adapter = Adapter(ready(net()), time="fraction")
    exported = export(adapter, ModelSpec(COLOUR), tmp_path / "m.onnx", precision="fp16")
    assert exported.passed, exported.verdict
    assert exported.halved == halved


def test_a_layer_whose_weights_are_computed_stays_float32(tmp_path):
    net = ready(FractionNet())
    nn.utils.parametrizations.weight_norm(net.body[0])
    exported = export(Adapter(net, time="fraction"), ModelSpec(COLOUR), tmp_path / "m.onnx", precision="fp16")
    assert exported.passed, exported.verdict
    assert exported.halved == ("body.1", "body.2")


def test_a_module_that_cannot_be_copied_is_refused(tmp_path):
    net = ready(FractionNet())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.body[1])
    with pytest.raises(InputError, match="cannot be copied"):
        export(Adapter(net, time="fraction"), ModelSpec(COLOUR), tmp_path / "m.onnx")


@pytest.mark.parametrize(("name", "precision"), [("linear attention", "fp16"), ("embedding", "fp32")])
def test_tensorrt_rtx_builds_it(made, name, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    from ddpmx.trt.build import build

    build(made(name, precision)[1].file, tmp_path / "model.plan")
    assert (tmp_path / "model.plan").stat().st_size > 1000


def test_the_package_loads_torch_only_when_export_is_used():
    code = "import sys, ddpm_export; assert 'torch' not in sys.modules; assert callable(ddpm_export.export)"
    subprocess.run([sys.executable, "-c", code], check=True)


class _Small(nn.Module):
    """One weight and a table of t."""

    def __init__(self, timesteps: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(timesteps, 1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.changed(self.conv(x) + self.table(t)[:, :, None, None], t)

    def changed(self, h, t):
        return h


class _Branch(_Small):
    def changed(self, h, t):
        if self.conv.weight.sum() > 0:  # depends on a value
            h = -h
        return h


class _NoOnnx(_Small):
    def changed(self, h, t):
        return h + torch.linalg.eigvals(torch.eye(2) + h[:, 0, :2, :2] ** 2).real.sum(dim=1)[:, None, None, None]


class _Inside(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.block = net

    def forward(self, x, t):
        return self.block(x, t)


def test_a_module_that_loops_over_its_batch_in_python_is_refused_and_an_older_file_is_kept(tmp_path):
    export(ready(_Small()), SPEC, tmp_path / "m.onnx", parity=False)
    before = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(BackendError, match=r"one size of the batch[\s\S]*test_export.py:\d+ in [\s\S]*without a loop"):
        export(ready(_Loop()), SPEC, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


class _Forgets(nn.Identity):
    """A layer that is constructed again when it is copied, as those of einops are."""

    def __deepcopy__(self, memo):
        return type(self)()


def test_a_layer_that_loses_its_mode_when_it_is_copied_can_be_exported(tmp_path):
    net = ready(FractionNet())
    net.norm = nn.Sequential(net.norm, _Forgets()).eval()
    assert export(Adapter(net, time="fraction"), ModelSpec(COLOUR), tmp_path / "m.onnx").passed


def test_torchs_own_transformer_in_half(tmp_path):
    adapter = Adapter(ready(_Transformer()), time="fraction", time_dims=2)
    exported = export(adapter, SPEC, tmp_path / "m.onnx", precision="fp16")
    assert exported.passed, exported.verdict
    assert exported.halved == ("encoder.layers.0.linear1", "encoder.layers.0.linear2")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("net", [_Branch, _NoOnnx])
def test_the_error_of_an_impossible_export_says_where(net, tmp_path):
    with pytest.raises(BackendError) as caught:
        export(_Inside(ready(net())).eval(), ModelSpec(GREY, timesteps=50), tmp_path / "m.onnx")
    text = str(caught.value)
    assert f"stops at block, {HERE}:" in text, text
    assert "in changed" in text, text
    line = "if self.conv.weight.sum() > 0" if net is _Branch else "linalg.eigvals"
    assert line in text, text
    assert "Hint:" in text, text
    assert not list(tmp_path.iterdir())


class _Loop(_Small):
    def changed(self, h, t):
        return torch.cat([h[i : i + 1].clone() for i in range(h.shape[0])])


class _Transformer(nn.Module):
    """Patches, torch's own encoder, and a time of two dimensions."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, stride=2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.time = nn.Linear(1, 16)
        self.back = nn.ConvTranspose2d(16, 1, 2, stride=2)

    def forward(self, x, t):
        h = self.patches(x) + self.time(t)[:, :, None, None]
        tokens = self.encoder(h.flatten(2).transpose(1, 2))
        return self.back(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))


class _OverBatch(_Small):
    def changed(self, h, t):
        return h - h.mean(dim=0, keepdim=True)


class _FirstT(_Small):
    def forward(self, x, t):
        return self.conv(x) + self.table(t[:1])[:, :, None, None]


class _Doubles(_Small):
    def changed(self, h, t):
        return (h.double() * t.double()[:, None, None, None]).float()


class _Whole(_Small):
    def forward(self, x, t):
        return super().forward(x, t.long())


class _HalfTime(_Small):
    def forward(self, x, t):
        return self.conv(x) * t.to(torch.bfloat16).float()[:, None, None, None]


class _Random(_Small):
    def changed(self, h, t):
        return h + torch.rand_like(h)


class _Counts(_Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def changed(self, h, t):
        self.calls += 1
        return h


class _Listed(_Small):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Conv2d(1, 1, 1)]

    def changed(self, h, t):
        return self.more[0](h)


class _Autocast(_Small):
    def changed(self, h, t):
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(h).float()


class _Fails(_Small):
    def forward(me, x, t):  # noqa: N805 - some do
        raise ValueError("nothing but trouble")


class _Blind(_Small):
    def forward(self, x, t):
        return self.conv(x)


class _BlindToX(_Small):
    def forward(self, x, t):
        return self.conv(torch.zeros_like(x)) + self.table(t)[:, :1, None, None]


class _Alone(_Small):
    def forward(self, x):
        return self.conv(x)


def in_range(net: nn.Module, data_range: tuple[float, float]) -> Adapter:
    return Adapter(ready(net), data_range=data_range)


def nan() -> nn.Module:
    net = ready(_Small())
    with torch.no_grad():
        net.conv.weight[0, 0, 1, 1] = float("nan")
    return net


SPEC = ModelSpec(GREY, timesteps=50)
REFUSED = {
    "batch statistics": (lambda: ready(_OverBatch()), SPEC, "depends on the other images", "others"),
    "t of the first": (lambda: ready(_FirstT()), SPEC, "depends on the other images", "batch"),
    "training": (lambda: ready(_Small()).train(), SPEC, "training mode", "module.eval()"),
    "batch norm in training": (lambda: embedding().module.train(), SPEC, "training mode", "BatchNorm2d"),
    "float64": (lambda: ready(_Doubles()), SPEC, "float64 inside", "h.double()"),
    "time cut": (lambda: Adapter(ready(_Whole()), time="fraction"), SPEC, "casts its time to int64", "t.long()"),
    "time in bfloat16": (
        lambda: Adapter(ready(_HalfTime()), time="float"), ModelSpec(GREY), "time to bfloat16", "t.to(torch.bfloat16)"),
    "random": (lambda: ready(_Random()), SPEC, "differs between two calls", "torch.rand_like(h)"),
    "changes itself": (lambda: ready(_Counts()), SPEC, "changes itself", "calls"),
    "weights in a list": (lambda: ready(_Listed()), SPEC, "does not own", "nn.ModuleList"),
    "no weights": (lambda: nn.Identity().eval(), SPEC, "has no weights", "nn.ModuleList"),
    "autocast": (lambda: ready(_Autocast()), SPEC, "bfloat16 inside", "self.conv(h)"),
    "fails": (lambda: ready(_Fails()), SPEC, f"fails at the module itself, {HERE}", "nothing but trouble"),
    "blind to t": (lambda: ready(_Blind()), SPEC, "does not depend on t", "inputs"),
    "blind to t, 0…1": (lambda: in_range(_Blind(), (0, 1)), SPEC, "does not depend on t", "uses_time=False"),
    "blind to t, ±0.5": (lambda: in_range(_Blind(), (-0.5, 0.5)), SPEC, "does not depend on t", "uses_time=False"),
    "blind to t, 0…255": (
        lambda: in_range(_Blind(), (0, 255)), SPEC.replace(prediction="v"), "does not depend on t", "uses_time=False"),
    "blind to x, 0…255": (
        lambda: in_range(_BlindToX(), (0, 255)), SPEC.replace(prediction="v"), "does not depend on x", "inputs"),
    "not blind to t": (
        lambda: Adapter(ready(_Small()), uses_time=False, inputs={"t": 1}), SPEC, "depends on t, and the adapter", "leave"),
    "not a number": (nan, SPEC, "conv.weight has NaN", "checkpoint"),
    "double weights": (lambda: ready(_Small()).double(), SPEC, "is float64, not float32", "module.float()"),
    "table too short": (lambda: ready(_Small()), ModelSpec(GREY, timesteps=51), "fails at .*self.table", "each of the T"),
    "another shape": (
        lambda: Adapter(ready(FractionNet(c_out=6)), time="float"), ModelSpec(COLOUR), "has the shape", "learned_range"),
    "time of another type": (lambda: ready(FractionNet()), ModelSpec(COLOUR), "fails at the module itself", "float"),
    "a tuple": (lambda: Adapter(ready(_Small()), output=lambda out: (out, out)), SPEC, "not a tensor", "output=0"),
    "no such output": (lambda: Adapter(ready(_Small()), output="sample"), SPEC, "has no 'sample'", "Tensor"),
    "silent": (lambda: _Small().eval().apply(_zero), SPEC, "output is nearly zero", "train it first"),
}  # fmt: skip


@pytest.mark.parametrize("data_range", [(-1, 1), (0, 1)])
@pytest.mark.parametrize("takes", ["x alone", "t too", "t of necessity"])
def test_a_network_that_ignores_t_on_purpose_is_exported_and_the_report_says_so(tmp_path, data_range, takes):
    net, inputs = {
        "x alone": (_Alone(), {}),
        "t too": (_Blind(), {"t": 1}),
        "t of necessity": (_Blind(), {}),  # forward(x, t) cannot be called without
    }[takes]
    adapter = Adapter(ready(net), uses_time=False, inputs=inputs, data_range=data_range)
    exported = export(adapter, SPEC, tmp_path / "m.onnx")
    assert exported.passed, exported.verdict
    assert "the network ignores t, as its export states" in exported.verdict
    assert "ignores t, on purpose" in reports.to_markdown(exported.report, exported.file, {})
    assert Reference.load(exported.record).ignores_time
    with load(exported.file, threads=1) as pipeline:
        assert pipeline.generate(2, steps=3).shape == (2, 8, 8, 1)


def _zero(module: nn.Module) -> None:
    for p in module.parameters():
        nn.init.zeros_(p)


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_whose_file_would_be_wrong_is_refused(name, tmp_path):
    make, spec, fact, more = REFUSED[name]
    with pytest.raises(DdpmxError, match=fact) as caught:
        export(make(), spec, tmp_path / "m.onnx")
    assert more in str(caught.value), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_impossible_outputs_are_refused(tmp_path):
    for output, error in (
        (tmp_path, OutputError),
        (tmp_path / "no" / "m.onnx", OutputError),
        (tmp_path / "m.plan", InputError),
    ):
        with pytest.raises(error):
            export(ready(_Small()), SPEC, output)


def test_a_record_that_is_none_is_not_overwritten(tmp_path):
    (tmp_path / "m.parity.npz").write_text("mine")
    with pytest.raises(OutputError, match=r"m\.parity\.npz"):
        export(ready(_Small()), SPEC, tmp_path / "m.onnx")
    assert (tmp_path / "m.parity.npz").read_text() == "mine"
    assert not (tmp_path / "m.onnx").exists()
