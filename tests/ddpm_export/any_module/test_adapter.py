"""Other conventions of a module, against the diffusion in its own units done by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: adapters (no torch)")

import torch
from torch import nn

from ddpm_export.any_module.adapter import Adapter
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

T = 40
SHAPE = (1, 2, 2)
RANGES = [(0.0, 1.0), (-0.5, 0.5), (0.0, 255.0), (0.0, 2.0)]


class Recorder(nn.Module):
    """Returns a fixed tensor and records its arguments."""

    def __init__(self, out=None) -> None:
        super().__init__()
        self.out = out

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return args[0] if self.out is None else self.out


def diffused(data_range, prediction):
    """(their spec, the adapter, x_t, t, the output of a perfect network in our units, its input y_t in theirs)."""
    spec = ModelSpec(SHAPE, timesteps=T, schedule="cosine", prediction=prediction, variance="fixed_small")
    theirs = spec.make_schedule()
    generator = np.random.default_rng(0)
    t = np.arange(T)
    x0 = generator.uniform(-1, 1, (T, *SHAPE))
    eps = generator.standard_normal((T, *SHAPE))
    low, high = data_range
    y0 = low + (x0 + 1) / 2 * (high - low)

    def mixed(schedule, clean):
        s, n = (np.sqrt(v)[:, None, None, None] for v in (schedule.alpha_bar, schedule.one_minus_alpha_bar))
        return s * clean + n * eps, {"eps": eps, "x0": clean, "v": s * eps - n * clean}[prediction]

    y_t, out = mixed(theirs, y0)
    net = Recorder(torch.from_numpy(out.astype(np.float32)))
    adapter = Adapter(net, data_range=data_range)
    x_t, expected = mixed(adapter.spec_of(spec).make_schedule(), x0)
    return spec, adapter, torch.from_numpy(x_t.astype(np.float32)), torch.from_numpy(t.astype(np.int32)), expected, y_t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("data_range", RANGES)
def test_inputs_and_outputs_of_a_network_of_another_range_are_converted(data_range, prediction):
    spec, adapter, x_t, t, expected, y_t = diffused(data_range, prediction)
    out = adapter.network(spec)(x_t, t)
    width = data_range[1] - data_range[0]
    np.testing.assert_allclose(adapter.module.args[0], y_t, atol=2e-6 * max(1, width))
    np.testing.assert_allclose(out, expected, atol=1e-5 * max(1, width / 2))


@pytest.mark.parametrize("data_range", RANGES)
def test_the_posterior_of_equation_7_is_theirs_in_other_units(data_range):
    spec = ModelSpec(SHAPE, timesteps=T, schedule="cosine", variance="fixed_small")
    adapter = Adapter(Recorder(), data_range=data_range)
    a, b = adapter.scale
    theirs, ours = spec.make_schedule(), adapter.spec_of(spec).make_schedule()
    c = np.sqrt(a**2 * theirs.alpha_bar + theirs.one_minus_alpha_bar)
    before = np.concatenate([[a], c[:-1]])  # c at ᾱ = 1
    x0, x_t = 0.3, -0.7
    y0, y_t = a * x0 + b, c * x_t + b * np.sqrt(theirs.alpha_bar)
    mean = theirs.posterior_mean_coef_x0 * y0 + theirs.posterior_mean_coef_xt * y_t
    back = (mean - b * np.sqrt(theirs.alpha_bar_prev)) / before
    np.testing.assert_allclose(ours.posterior_mean_coef_x0 * x0 + ours.posterior_mean_coef_xt * x_t, back, atol=1e-9)
    np.testing.assert_allclose(ours.posterior_variance, theirs.posterior_variance / before**2, rtol=1e-9, atol=1e-15)


def test_in_the_range_of_minus_one_to_one_nothing_is_changed():
    spec = ModelSpec(SHAPE, timesteps=T)
    adapter = Adapter(Recorder())
    assert adapter.spec_of(spec) is spec
    x, t = torch.randn(3, *SHAPE), torch.arange(3, dtype=torch.int32)
    assert torch.equal(adapter.network(spec)(x, t), x)
    assert [name for name, _ in adapter.network(spec).named_buffers()] == []


def test_where_noise_was_added_in_minus_one_to_one_the_schedule_stays():
    spec = ModelSpec(SHAPE, timesteps=T, prediction="x0")
    adapter = Adapter(Recorder(), data_range=(0, 1), diffused_in_range=False)
    assert adapter.spec_of(spec) is spec
    x, t = torch.randn(3, *SHAPE), torch.arange(3, dtype=torch.int32)
    torch.testing.assert_close(adapter.network(spec)(x, t), x)
    torch.testing.assert_close(adapter.module.args[0], (x + 1) / 2)


def test_the_networks_own_x0_is_in_its_units():
    spec = ModelSpec(SHAPE, timesteps=T, self_condition=True, condition=1)
    adapter = Adapter(Recorder(torch.zeros(3, *SHAPE)), data_range=(-0.5, 0.5))
    x0_prev, cond = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    adapter.network(spec)(torch.zeros(3, *SHAPE), torch.arange(3, dtype=torch.int32), x0_prev=x0_prev, cond=cond)
    assert torch.equal(adapter.module.kwargs["x0_prev"], x0_prev / 2)
    assert torch.equal(adapter.module.kwargs["cond"], cond)


@pytest.mark.parametrize(
    ("fields", "adapter", "why"),
    [
        ({"variance": "learned_range"}, {}, "learned variance"),
        ({"self_condition": True}, {}, "its own x̂_0"),
        ({"prediction": "v"}, {"diffused_in_range": False}, "v could be in either range"),
    ],
)
def test_combinations_without_an_exact_counterpart_are_refused(fields, adapter, why):
    with pytest.raises(InputError, match=why):
        Adapter(Recorder(), data_range=(0, 1), **adapter).network(ModelSpec(SHAPE, timesteps=T, **fields))


def log_snr(t):
    return torch.log1p(t)


@pytest.mark.parametrize(
    ("time", "expected", "dtype"),
    [
        ("index", lambda t: t, torch.int64),
        ("float", lambda t: t, torch.float32),
        ("fraction", lambda t: t / T, torch.float32),
        ("index1", lambda t: t + 1, torch.int64),
        ("float1", lambda t: t + 1, torch.float32),
        ("fraction1", lambda t: (t + 1) / T, torch.float32),
        ((0.5, 2.0), lambda t: 0.5 * t + 2, torch.float32),
        (log_snr, lambda t: torch.log1p(t.float()), torch.float32),
        (np.linspace(3, 4, T), lambda t: torch.linspace(3, 4, T)[t], torch.float32),
    ],
)
def test_time_follows_the_modules_convention(time, expected, dtype):
    adapter = Adapter(Recorder(), time=time, time_dims=2)
    t = torch.tensor([0, 7, T - 1], dtype=torch.int32)
    adapter.network(ModelSpec(SHAPE, timesteps=T))(torch.zeros(3, *SHAPE), t)
    passed = adapter.module.args[1]
    assert (passed.dtype, passed.shape) == (dtype, (3, 1))
    torch.testing.assert_close(passed[:, 0], expected(t.long()).to(dtype))


def test_inputs_go_to_their_arguments():
    spec = ModelSpec(SHAPE, timesteps=T, classes=4, condition=2)
    style, mask = torch.tensor([1.0, 2.0]), torch.ones(7)
    adapter = Adapter(
        Recorder(torch.zeros(3, *SHAPE)),
        inputs={"t": 0, "x": 1, "y": "label"},
        channels=("cond", "x"),
        fixed={"mode": "plain", "mask": mask},
        fixed_per_image={"style": style},
    )
    x, cond = torch.randn(3, *SHAPE), torch.randn(3, 2, *SHAPE[1:])
    t, y = torch.arange(3, dtype=torch.int32), torch.tensor([3, 0, 1], dtype=torch.int32)
    adapter.network(spec)(x, t, y=y, cond=cond)
    args, kwargs = adapter.module.args, adapter.module.kwargs
    assert torch.equal(args[0], t.long())
    assert torch.equal(args[1], torch.cat([cond, x], dim=1))
    assert kwargs.keys() == {"label", "mode", "mask", "style"}
    assert kwargs["label"].dtype == torch.int64
    assert kwargs["label"].tolist() == [3, 0, 1]
    assert kwargs["mode"] == "plain"
    assert torch.equal(kwargs["mask"], mask)
    assert torch.equal(kwargs["style"], style.expand(3, 2))


@pytest.mark.parametrize(
    ("output", "which"),
    [
        (("a", 1), 1), ({"a": 1}, "a"), ({"sample": 1}, None), ((1,), None), ((0, 1), lambda out: out[1]),
    ],
)  # fmt: skip
def test_the_output_is_found_in_what_the_module_returns(output, which):
    tensor = torch.randn(3, *SHAPE)

    def real(value):
        return tensor if value == 1 else value

    if isinstance(output, dict):
        output = {key: real(value) for key, value in output.items()}
    else:
        output = tuple(real(value) for value in output)
    adapter = Adapter(Recorder(output), output=which)
    t = torch.zeros(3, dtype=torch.int32)
    assert adapter.network(ModelSpec(SHAPE, timesteps=T))(torch.zeros(3, *SHAPE), t) is tensor


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"time": "hours"}, "no time 'hours'"),
        ({"time_dims": 0}, "time_dims"),
        ({"data_range": (1, 1)}, "must rise"),
        ({"data_range": (0, float("inf"))}, "must rise"),
        ({"data_range": "01"}, "must rise|two numbers"),
        ({"channels": ("cond",)}, "must hold x"),
        ({"channels": ("x", "x")}, "each once"),
        ({"channels": ("x", "cond"), "inputs": {"cond": "c"}}, "both concatenated and"),
        ({"inputs": {"z": 1}}, "there is no z"),
        ({"inputs": {"x": 1}}, "same place: 1"),
        ({"inputs": {"x": "a"}}, "positions"),
        ({"fixed": {"cond": 1}}, "same place: cond"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(fields, why):
    if fields == {"data_range": "01"}:
        fields = {"data_range": "x"}
    with pytest.raises(InputError, match=why):
        Adapter(Recorder(), **fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"time": [1.0, 2.0, 3.0]}, "one finite number"),
        ({"time": lambda t: t / 0}, "one finite number"),
        ({"time": lambda t: 1 // 0}, "time: not numbers"),
        ({"channels": ("x", "cond")}, "channels name cond"),
        ({"inputs": {"y": "label"}}, "inputs name y"),
    ],
)
def test_an_adapter_that_does_not_fit_the_spec_is_refused(fields, why):
    with pytest.raises(InputError, match=why):
        Adapter(Recorder(), **fields).network(ModelSpec(SHAPE, timesteps=T))


def test_the_converted_chain_is_a_chain_of_known_coefficients():
    spec = ModelSpec(SHAPE, timesteps=T, variance="fixed_small")
    table = make_table(Adapter(Recorder(), data_range=(0, 1)).spec_of(spec).make_schedule(), "eps", "fixed_small")
    assert np.isfinite(table.coefficients).all()
    assert len(table) == T
