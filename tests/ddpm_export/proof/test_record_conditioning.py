"""Records of networks that take a class, their own x̂_0 or a condition, or that learn their variance: what passes the
ladder, and what must not. The network is a closed form in torch; the one checked against it is the same with a fault.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="not verified here: records of PyTorch's outputs (no torch)")

from ddpm_export.networks.torch_backend import TorchBackend  # noqa: E402
from ddpm_export.networks.unet import UNet, UNetConfig  # noqa: E402
from ddpm_export.proof.record import record  # noqa: E402
from ddpmx.backends.base import Buffers  # noqa: E402
from ddpmx.diffusion.samplers import x0_coefficients  # noqa: E402
from ddpmx.errors import BackendError, FileFormatError, NumericError, SpecError  # noqa: E402
from ddpmx.formats.spec import ModelSpec  # noqa: E402
from ddpmx.parity import propagation  # noqa: E402
from ddpmx.parity.ladder import run_ladder  # noqa: E402
from ddpmx.parity.reference import Reference  # noqa: E402
from ddpmx.parity.report import to_json, to_markdown  # noqa: E402
from ddpmx.pipeline import Pipeline  # noqa: E402
from ddpmx.sampling.conditioning import example  # noqa: E402
from oracles import gaussian  # noqa: E402
from oracles.conditioning import ALL, KINDS  # noqa: E402
from oracles.random_weights import rerandomise  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 12
LEARNED = {"variance": "learned_range"}
CASES = {
    **KINDS,
    "variance": LEARNED,
    "log variance": {"variance": "learned"},
    "mean": {"prediction": "mu"},
    "no class": {"classes": 4, "null_class": True},
    "everything": {**ALL, **LEARNED},
}
EPS, V, FORCED, FORCED_V = "ε, RMS", "v, RMS", "teacher-forced chain, RMS of ε", "teacher-forced chain, RMS of v"
FREE = f"free chain of {STEPS} steps, pixels within one level"


class Closed(torch.nn.Module):
    """E[ε | x_t], plus a small term for each conditioning input."""

    def __init__(self, spec) -> None:
        super().__init__()
        slope, offset = gaussian.coefficients(spec.make_schedule())
        self.learns, self.log = spec.learns_variance, spec.variance == "learned"
        schedule = spec.make_schedule()
        p, q = x0_coefficients(schedule, "eps")
        a, b = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_xt
        self.mean = spec.prediction == "mu"
        mu = np.linspace(-0.5, 0.5, math.prod(spec.shape)).reshape(spec.shape)
        for name, value in (("slope", slope), ("offset", offset), ("mu", mu), ("of_x", a * p + b), ("of_eps", a * q)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(0.2 * torch.randn(spec.label_count or 1, generator=generator))

    def forward(self, x, t, y=None, x0_prev=None, cond=None):
        out = self.slope[t.long()].view(-1, 1, 1, 1) * x - self.offset[t.long()].view(-1, 1, 1, 1) * self.mu
        if y is not None:
            out = out + self.table[y.long()].view(-1, 1, 1, 1)
        if x0_prev is not None:
            out = out + 0.1 * x0_prev
        if cond is not None:
            out = out + 0.1 * cond[:, :1] - 0.05 * cond[:, -1:]
        if self.mean:
            out = self.of_x[t.long()].view(-1, 1, 1, 1) * x + self.of_eps[t.long()].view(-1, 1, 1, 1) * out
        var = torch.tanh(x - self.mu)
        return (out, var - 6 if self.log else var) if self.learns else out


def spec_of(case, **changes):
    return gaussian.SPEC.replace(**{**CASES[case], **changes})


def recorded(spec, **options):
    return record(Closed(spec), spec, **{"steps": STEPS, **options})


class Faulty(TorchBackend):
    """The network with a fault in its inputs or its outputs."""

    def __init__(self, network, fault) -> None:
        super().__init__(network)
        self._fault = fault

    def bind(self, buffers):
        self._mine = Buffers(*(None if a is None else a.copy() for a in vars(buffers).values()))
        self._theirs = buffers
        super().bind(self._mine)

    def enqueue(self):
        for name, array in self._mine.inputs().items():
            array[...] = self._theirs.inputs()[name]
        self._fault("before", self._mine)
        super().enqueue()
        self._fault("after", self._mine)
        for name, array in self._theirs.outputs().items():
            array[...] = self._mine.outputs()[name]


def failed(spec, fault, **options):
    return {
        check.name
        for check in run_ladder(Faulty(Closed(spec), fault), spec, recorded(spec, **options)).checks
        if not check.passed
    }


@pytest.mark.parametrize("case", CASES)
def test_the_network_itself_passes(case, tmp_path):
    """Also after the record was written and read."""
    spec = spec_of(case)
    recorded(spec).save(tmp_path / "model.parity.npz")
    reference = Reference.load(tmp_path / "model.parity.npz")
    assert reference.trained
    result = run_ladder(TorchBackend(Closed(spec)), spec, reference)
    assert result.passed, result.verdict
    names = [check.name for check in result.checks]
    assert ({V, FORCED_V} <= set(names)) == spec.learns_variance
    free = FREE.replace("steps", "steps with guidance 2") if spec.null_class else FREE
    assert {check.name: check.value for check in result.checks}[free] == 1.0
    report = to_json(result, "model.onnx")
    assert ("var" in report["curves"]) == spec.learns_variance
    assert all(f"**{name}.** " in to_markdown(result, "model.onnx", {}) for name in names)


@pytest.mark.parametrize("case", CASES)
def test_the_ladder_calls_the_network_as_often_as_its_progress_says(case):
    spec = spec_of(case)
    seen = []
    run_ladder(TorchBackend(Closed(spec)), spec, recorded(spec), progress=lambda *now: seen.append(now))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_the_recorded_classes_are_spread_over_all():
    spec = spec_of("classes", classes=60)
    reference = recorded(spec)
    assert reference.y.shape == reference.out.shape[:2]
    assert len(np.unique(reference.y)) == 60
    assert list(reference.final_y) == [59, 39, 20, 0]


def test_no_class_is_recorded_with_the_classes():
    """So a file whose "no class" is wrong does not pass."""
    spec = spec_of("no class")
    reference = recorded(spec)
    assert set(reference.y.ravel()) == {0, 1, 2, 3, 4}
    assert list(reference.final_y) == [3, 2, 1, 0]

    def fault(when, buffers):
        if when == "before":
            buffers.y[buffers.y == 4] = 2

    assert EPS in failed(spec, fault)


def test_a_network_that_can_be_guided_is_recorded_so():
    spec = spec_of("no class")
    reference = recorded(spec)
    assert reference.guidance == 2
    with Pipeline(spec, TorchBackend(Closed(spec))) as pipeline:
        images = {
            w: pipeline.generate(4, seed=reference.seed, labels=[3, 2, 1, 0], steps=STEPS, guidance=w) for w in (1, 2)
        }
    np.testing.assert_array_equal(reference.final.transpose(0, 2, 3, 1), images[2])
    assert np.mean(images[1] != images[2]) > 0.5


def test_guidance_in_a_record_is_checked():
    guided = recorded(spec_of("no class"))
    for wrong in (float("nan"), float("inf"), 1e9, 2, True):
        with pytest.raises(FileFormatError, match="out of range"):
            dataclasses.replace(guided, guidance=wrong)
    assert dataclasses.replace(guided, guidance=1.0).chain_rows == 4
    assert guided.chain_rows == 8
    with pytest.raises(FileFormatError, match="out of range"):
        dataclasses.replace(recorded(spec_of("classes")), guidance=2.0)


def test_two_classes_swapped_are_found():
    def fault(when, buffers):
        if when == "before":
            y = buffers.y.copy()
            buffers.y[y == 41], buffers.y[y == 42] = 42, 41

    spec = spec_of("classes", classes=60)
    assert EPS in failed(spec, fault)


@pytest.mark.parametrize("name", ["y", "cond"])
def test_ignored_conditioning_is_found(name):
    def fault(when, buffers):
        if when == "before":
            getattr(buffers, name)[...] = 0

    assert {EPS, FORCED, FREE} <= failed(spec_of("all"), fault)


def test_an_x0_that_is_ignored_is_found_along_the_chain():
    """For the first checks it is 0, as in a chain's first step."""

    def fault(when, buffers):
        if when == "before":
            buffers.x0_prev[...] = 0

    wrong = failed(spec_of("itself"), fault)
    assert {FORCED, FREE} <= wrong
    assert EPS not in wrong


def test_channels_of_a_condition_swapped_are_found():
    def fault(when, buffers):
        if when == "before":
            buffers.cond[...] = buffers.cond[:, ::-1].copy()

    assert EPS in failed(spec_of("condition"), fault)


@pytest.mark.parametrize(
    ("size", "wrong"), [(1e-5, set()), (1e-3, {V, "v, largest error", FORCED_V})], ids=["below the bound", "above it"]
)
def test_a_variance_that_is_off_is_found_and_nothing_else(size, wrong):
    def fault(when, buffers):
        if when == "after" and buffers.var is not None:
            buffers.var[...] += np.float32(size)

    found = failed(spec_of("variance"), fault)
    assert wrong <= found
    assert not {EPS, FORCED, "ε, largest error"} & found
    assert bool(found) == bool(wrong)


def test_a_variance_the_wrong_way_round_changes_step_chain_and_bound():
    def fault(when, buffers):
        if when == "after" and buffers.var is not None:
            buffers.var[...] *= -1

    found = failed(spec_of("variance"), fault)
    assert {V, FORCED_V, FREE, "one step, RMS of x_{t−1}", "variational bound, change in bits/dim"} <= found
    assert not {EPS, FORCED} & found


def test_a_variance_that_depends_on_neighbours_is_found():
    def fault(when, buffers):
        if when == "after" and buffers.var is not None:
            buffers.var[1:] += np.float32(0.01)

    assert "identical rows, largest difference" in failed(spec_of("variance"), fault)


def test_a_variance_that_is_not_finite_is_an_error():
    def fault(when, buffers):
        if when == "after" and buffers.var is not None:
            buffers.var[buffers.t == 0] = np.nan

    spec = spec_of("variance")
    with pytest.raises(NumericError, match="at t = 0 is not finite"):
        run_ladder(Faulty(Closed(spec), fault), spec, recorded(spec))


def test_a_network_without_the_variance_of_its_spec_is_refused():
    with pytest.raises(BackendError, match="no variance output"):
        record(Closed(gaussian.SPEC), spec_of("variance"), steps=STEPS)


@pytest.mark.parametrize(
    "inputs", [{"self_condition": True}, {"condition": 2}, {"self_condition": True, "condition": 2}]
)
def test_a_u_net_gets_its_further_inputs_in_their_order(inputs):
    """And one whose x0_prev or condition has no effect is found."""
    shape = (1, 8, 8)
    network = UNet(UNetConfig(1, 1, shape[1:], 8, (1, 2), 1, (), 0.0, 4, **inputs)).eval().requires_grad_(False)
    rerandomise(network)
    spec = ModelSpec(shape, timesteps=40, **inputs)
    reference = record(network, spec, steps=4)
    assert run_ladder(TorchBackend(network), spec, reference).passed
    fault = {"self_condition": "x0_prev", "condition": "cond"}
    for name in inputs:  # control

        def without(when, buffers, name=fault[name]):
            if when == "before":
                getattr(buffers, name)[...] = 0

        assert not run_ladder(Faulty(network, without), spec, reference).passed, name


def test_an_unconditional_network_gets_no_keywords():
    network = Closed(gaussian.SPEC)
    network.forward = lambda x, t: Closed.forward(network, x, t)
    record(network, gaussian.SPEC, steps=3)


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_the_bound_is_that_of_the_networks_variance(v, figure):
    """KL of two Gaussians in float64, pixel by pixel (equations 7 and 10)."""
    learned = gaussian.SPEC.replace(variance="learned_range")
    rng = np.random.default_rng(0)
    t = np.array([1, 30, 400, 999], np.int32)
    x0, x, out = rng.uniform(-1, 1, (2, 12)), *rng.standard_normal((2, 4, 2, 12))
    x, out, x0 = (a.astype(np.float32) for a in (x, out, x0))
    var = np.full(out.shape, v, np.float32)
    beta = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - beta)
    nearest = np.abs(np.arange(1, 1000)[:, None] - t).argmin(axis=1)
    total = 0.0
    for i, ti in enumerate(t):
        now, last, b = kept[ti], kept[ti - 1], beta[ti]
        small = b * (1 - last) / (1 - now)
        sigma2 = np.exp((v + 1) / 2 * np.log(b) + (1 - v) / 2 * np.log(small))
        guess = ((x[i] - np.sqrt(1 - now) * out[i]) / np.sqrt(now)).clip(-1, 1)
        gap = np.sqrt(last) * b / (1 - now) * (x0 - guess)
        kl = 0.5 * (np.log(sigma2 / small) + (small + gap**2) / sigma2 - 1)
        total += np.sum(nearest == i) * kl.mean() / np.log(2)
    figure(
        f"bound with v = {v}, relative to float64",
        abs(propagation.bits(learned, t, x0, x, out, var) / total - 1),
        at_most=1e-5,
    )
    if v == -1:
        fixed = gaussian.SPEC.replace(variance="fixed_small")
        assert propagation.bits(learned, t, x0, x, out, var) == pytest.approx(
            propagation.bits(fixed, t, x0, x, out, None)
        )


def test_a_record_stays_small_with_everything_in_it(tmp_path):
    class Random(torch.nn.Module):
        """Outputs that do not compress."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t, y, x0_prev, cond):
            return torch.randn_like(x), self.weight * torch.randn_like(x)

    spec = gaussian.SPEC.replace(shape=(3, 64, 64), clip=None, **CASES["everything"])
    record(Random(), spec, steps=40).save(tmp_path / "record.npz")
    assert (tmp_path / "record.npz").stat().st_size <= 4_000_000


def test_a_record_holds_its_betas(tmp_path):
    betas = np.linspace(1e-4, 0.03, 40)
    spec = spec_of("all", timesteps=40, schedule="betas", schedule_params={}, betas=betas)
    recorded(spec).save(tmp_path / "record.npz")
    reference = Reference.load(tmp_path / "record.npz")
    np.testing.assert_array_equal(reference.spec.betas, betas)
    assert run_ladder(TorchBackend(Closed(spec)), spec, reference).passed
    with pytest.raises(SpecError, match="another model's"):
        run_ladder(TorchBackend(Closed(spec)), spec.replace(betas=betas / 2), reference)


@pytest.mark.parametrize(("name", "case"), [("y", "classes"), ("final_y", "classes"), ("var", "variance"),
                                            ("state_var", "variance"), ("state_x0", "itself")])  # fmt: skip
def test_a_record_without_its_parts_is_refused(name, case):
    whole = recorded(spec_of(case))
    parts = {key: value for key, value in vars(whole).items() if key != name}
    with pytest.raises(FileFormatError, match=f"the record has no {name!r}"):
        Reference(**parts)
    plain = vars(recorded(gaussian.SPEC))
    with pytest.raises(FileFormatError, match=f"the record holds {name!r}, which its network does not have"):
        Reference(**{**plain, name: getattr(whole, name)})


def test_a_class_out_of_range_is_refused():
    whole = vars(recorded(spec_of("classes")))
    for name in ("y", "final_y"):
        wrong = whole[name].copy()
        wrong.reshape(-1)[-1] = 5
        with pytest.raises(FileFormatError, match="out of range"):
            Reference(**{**whole, name: wrong})


def test_a_record_of_a_model_without_classes_is_another_model_s():
    spec = spec_of("classes")
    with pytest.raises(SpecError, match="another model's") as caught:
        run_ladder(TorchBackend(Closed(spec)), spec, recorded(gaussian.SPEC))
    assert "classes: nothing there, 5 here" in str(caught.value)


def test_without_a_record_only_consistency_is_checked():
    spec = spec_of("everything")
    result = run_ladder(TorchBackend(Closed(spec)), spec, None)
    assert result.passed
    assert len(result.checks) == 2
    assert example(gaussian.SPEC, np.arange(3)) == {}
