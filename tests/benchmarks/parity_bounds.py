"""Do the bounds of the parity ladder call a right file right, and a wrong one wrong?

    python tests/benchmarks/parity_bounds.py [--models 200] [--seed 0]

Needs torch, on the CPU; three minutes. The models are known in closed form: pixels of N(μ, s²) in a range of their own,
by random schedules, T, predictions, variances, clips, ranges and classes, each recorded by ``record`` as an export would.

A right file is the model with the errors that other runtimes make: in fp32 a relative error of 6e-6 of the module's own
output (the most of eight runtimes, docs/parity.md), in fp16 and bf16 every operation but the first rounded to that type, as
exports do. None may fail.

A wrong file is a quarter of a mistake: its output is three quarters right, one quarter what the mistake gives. There is
one mistake for each of the eleven bounds, and two for networks with classes or a learned variance; the check that is named
has to fail by itself. "found down to" is the smallest part, by halves, at which it still does.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_export import Adapter
from ddpm_export.any_module.adapter import Canonical
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.proof.record import record
from ddpmx.errors import DdpmxError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.ladder import ParityReport, run_ladder
from ddpmx.parity.reference import Reference

SHAPE, STEPS = (1, 8, 8), 50
RUNTIME = 6e-6
"""Relative error of float32 in another runtime: MNN's Winograd convolutions, the largest of eight that were measured."""

SCHEDULES = ("linear", "cosine", "sigmoid_alpha_bar", "sigmoid_beta", "quad")
RANGES = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5), (0.0, 255.0), (-0.42, 2.82))


class ClosedForm(nn.Module):
    """The best network for pixels of N(mean, deviation²) in its own range: E[ε], E[y_0] or E[v] given y_t.

    E[y_0 | y_t] = mean + √ᾱ·s²/(ᾱs² + 1 − ᾱ)·(y_t − √ᾱ·mean); a class shifts the mean. With a learned variance the second
    output is a smooth function of t. ``dtype`` is what the operations after the first are rounded to.
    """

    def __init__(self, spec: ModelSpec, data_range: tuple[float, float], seed: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        low, high = data_range
        half, middle = (high - low) / 2, (high + low) / 2
        self.spec, self.dtype = spec, torch.float32
        self.deviation = half * float(np.exp(random.uniform(np.log(0.03), np.log(0.4))))
        mean = middle + half * random.uniform(-0.6, 0.6, SHAPE)
        shifts = half * random.uniform(-0.2, 0.2, max(1, spec.classes or 1))
        self.mean = nn.Parameter(torch.from_numpy(mean).float(), requires_grad=False)
        self.shifts = nn.Parameter(torch.from_numpy(shifts).float(), requires_grad=False)
        self.set_schedule(spec)
        patterns = random.standard_normal((7, 2 if spec.variance == "learned_range" else 1, *SHAPE[1:]))
        self.register_buffer("patterns", torch.from_numpy(patterns).float())
        self.runtime = 0.0

    def set_schedule(self, spec: ModelSpec) -> None:
        """Use another schedule inside: float64 coefficients for each t, rounded once."""
        schedule = spec.make_schedule()
        alpha_bar, noise, square = schedule.alpha_bar, schedule.one_minus_alpha_bar, self.deviation**2
        signal, total = np.sqrt(alpha_bar), alpha_bar * square + noise
        # out = gain·(y_t − √ᾱ·mean) + constant·mean, for y_0, ε and v = √ᾱ·ε − √(1−ᾱ)·y_0
        eps, y0 = np.sqrt(noise) / total, signal * square / total
        gain, constant = {
            "x0": (y0, np.ones_like(y0)),
            "eps": (eps, np.zeros_like(y0)),
            "v": (signal * eps - np.sqrt(noise) * y0, -np.sqrt(noise)),
        }[spec.prediction]
        table = torch.from_numpy(np.stack([gain, constant, signal], axis=1)).float()
        self.register_buffer("table", table)

    def forward(self, y_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """For y_t [B, 1, 8, 8], t int64 [B], the class int64 [B]."""
        gain, constant, signal = self.table[t][:, :, None, None, None].unbind(1)
        mean = self.mean[None]
        if label is not None:
            mean = mean + self.shifts[label][:, None, None, None]
        # the first layer is float32 in every precision
        inner = y_t - signal * mean
        gain, constant, mean, inner = (one.to(self.dtype) for one in (gain, constant, mean, inner))
        out = gain * inner + constant * mean
        if self.spec.variance == "learned_range":
            v = torch.sin(0.01 * t.float())[:, None, None, None] * torch.ones_like(y_t)
            out = torch.cat([out, v.to(self.dtype)], dim=1)
        out = out.float()
        return out * (1 + self.runtime * self.patterns[t % 7]) if self.runtime else out


@dataclass(frozen=True, eq=False)
class Model:
    """A random model: its adapter, the specs in its own range and in ours, and its record."""

    adapter: Adapter
    own: ModelSpec
    spec: ModelSpec
    reference: Reference

    def backend(self, **changes: Any) -> TorchBackend:
        """The model in another runtime or precision; the module's attributes in ``changes`` are set meanwhile."""
        return _With(self.adapter.network(self.own), changes)


class _With(TorchBackend):
    def __init__(self, network: Canonical, changes: dict[str, Any]) -> None:
        super().__init__(network)
        self._module, self._changes = network.module, changes

    def enqueue(self) -> None:
        before = {name: getattr(self._module, name) for name in self._changes}
        for name, value in self._changes.items():
            setattr(self._module, name, value)
        try:
            super().enqueue()
        finally:
            for name, value in before.items():
                setattr(self._module, name, value)


def make(seed: int, **fixed: Any) -> Model:
    """A random model."""
    random = np.random.default_rng(seed)

    def one(values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    precision = one(("fp32", "fp32", "fp16", "bf16"))
    prediction, data_range = one(("eps", "x0", "v")), one(RANGES)
    if precision != "fp32" and prediction == "v":
        data_range = RANGES[0]  # v of another range cancels, and half's digits with it: a file that rightly fails
    chosen: dict[str, Any] = {
        "timesteps": one((50, 100, 400, 1000)),
        "schedule": one(SCHEDULES),
        "prediction": prediction,
        "variance": one(
            ("fixed_large", "fixed_small", "learned_range") if data_range == RANGES[0] else ("fixed_large",)
        ),
        "clip": one((1.0, None, 1.5)),
        "classes": one((None, None, 3)),
        "data_range": data_range,
        "precision": precision,
    } | fixed
    data_range, precision = chosen.pop("data_range"), chosen.pop("precision")
    own = ModelSpec(SHAPE, **chosen)
    module = ClosedForm(own, data_range, seed).eval()
    adapter = Adapter(module, data_range=data_range, inputs={"y": "label"} if own.classes else {})
    network = adapter.network(own)
    reference = record(
        network,
        adapter.spec_of(own),
        steps=STEPS,
        magnitude=network.magnitude if network.converts else None,
    )
    return Model(adapter, own, adapter.spec_of(own).replace(precision=precision), reference)


def right(model: Model) -> ParityReport:
    """The report of a right file."""
    changes: dict[str, Any] = {
        "fp32": {"runtime": RUNTIME},
        "fp16": {"dtype": torch.float16},
        "bf16": {"dtype": torch.bfloat16},
    }[model.spec.precision]
    return run_ladder(model.backend(**changes), model.spec, model.reference)


class Planted:
    """A right backend whose output is moved a part of the way to what a mistake gives."""

    description = "planted"

    def __init__(self, model: Model, mistake: str, part: float) -> None:
        self._model, self._mistake, self._part = model, mistake, part
        self._right = model.backend(runtime=RUNTIME)
        changed: dict[str, Any] = {}
        if mistake == "half precision where float32 is claimed":
            changed = {"dtype": torch.float16}
        if mistake == "another schedule inside":
            module = ClosedForm.__new__(ClosedForm)
            nn.Module.__init__(module)
            module.deviation = model.adapter.module.deviation
            T = model.own.timesteps
            betas = np.minimum(1.05 * model.own.make_schedule().betas, 0.999)
            module.set_schedule(
                ModelSpec(SHAPE, timesteps=T, schedule="betas", betas=betas, prediction=model.own.prediction)
            )
            changed = {"table": module.table}
        self._wrong = model.backend(**changed)
        chain = set(model.reference.table().timesteps.tolist())
        at = model.reference.table().timesteps[model.reference.at].tolist()
        self._unseen = np.array(sorted(chain - set(at) - set(model.reference.t.tolist())))

    def bind(self, buffers: Any) -> None:
        """Read inputs from, and write outputs to, these buffers."""
        self._buffers = buffers
        self._right.bind(buffers)
        self._wrong.bind(buffers)

    def enqueue(self) -> None:
        """Run the network once."""
        b, mistake = self._buffers, self._mistake
        self._right.enqueue()
        out = b.out.copy()
        var = None if b.var is None else b.var.copy()
        kept = {name: array.copy() for name, array in b.inputs().items()}
        wrong_var = var
        if mistake == "t off by one":
            b.t[...] = np.minimum(b.t + 1, self._model.spec.timesteps - 1)
        elif mistake == "t ignored":
            b.t[...] = self._model.spec.timesteps // 2
        elif mistake == "input scaled, (x + 1)/2":
            b.x[...] = (b.x + 1) / 2
        elif mistake == "classes shifted by one":
            b.y[...] = (b.y + 1) % self._model.spec.classes
        self._wrong.enqueue()
        wrong = b.out.copy()
        if mistake == "rows after the first not computed":
            wrong[1:] = 0
        elif mistake == "neighbours leak":
            wrong = wrong + b.x.mean(axis=0)
        elif mistake == "a corner not padded":
            wrong[:, :, 0, 0] = 0
        elif mistake == "wrong between the recorded states":
            wrong[np.isin(b.t, self._unseen)] = 0
        elif mistake == "wrong at t = 0":
            wrong[b.t == 0] = 0
        elif mistake == "wrong in the second half of the chain":
            wrong[b.t < self._model.spec.timesteps // 2] = 0
        elif mistake == "v from 0 to 1, not from −1" and var is not None:
            wrong_var = (var + 1) / 2
        for name, array in b.inputs().items():
            array[...] = kept[name]
        b.out[...] = out + np.float32(self._part) * (wrong - out)
        if b.var is not None and var is not None and wrong_var is not None:
            b.var[...] = var + np.float32(self._part) * (wrong_var - var)

    def close(self) -> None:
        """Do nothing."""


MISTAKES = {
    "rows after the first not computed": "identical rows",
    "neighbours leak": "batch against one by one",
    "t off by one": "ε, RMS",
    "a corner not padded": "ε, largest error",
    "another schedule inside": "one step",
    "t ignored": "variational bound",
    "half precision where float32 is claimed": "teacher-forced chain, RMS of ε",
    "input scaled, (x + 1)/2": "teacher-forced chain, RMS of x",
    "wrong between the recorded states": "free chain",
    "wrong at t = 0": "distortion L_0",
    "wrong in the second half of the chain": "light judge",
    "classes shifted by one": "ε, RMS",
    "v from 0 to 1, not from −1": "v, RMS",
}
"""Each mistake, and the check that has to fail."""

HOSTS: tuple[dict[str, Any], ...] = (
    {"schedule": "linear", "prediction": "eps", "clip": 1.0, "timesteps": 1000},
    {"schedule": "cosine", "prediction": "eps", "clip": None, "timesteps": 1000},
    {"schedule": "cosine", "prediction": "x0", "clip": 1.0, "timesteps": 400},
    {"schedule": "sigmoid_alpha_bar", "prediction": "v", "clip": None, "timesteps": 400, "data_range": (0.0, 1.0)},
)
"""Models in which mistakes are planted: an easy one, and those whose bounds are widest."""


def host(number: int, mistake: str) -> Model:
    """The model for a mistake."""
    fixed: dict[str, Any] = {"precision": "fp32", "variance": "fixed_large", "classes": None, "data_range": (-1.0, 1.0)}
    fixed |= HOSTS[number]
    if mistake.startswith("classes"):
        fixed["classes"] = 3
    if mistake.startswith("v "):
        fixed |= {"variance": "learned_range", "data_range": (-1.0, 1.0)}
    return make(1000 + number, **fixed)


def finds(model: Model, mistake: str, part: float) -> bool:
    """Whether the mistake's own check fails."""
    report = run_ladder(Planted(model, mistake, part), model.spec, model.reference)
    return any(check.name.startswith(MISTAKES[mistake]) and not check.passed for check in report.checks)


def smallest(model: Model, mistake: str) -> float:
    """The smallest part of a mistake, by halves from a quarter on, that is still found; 0 if a quarter is not."""
    part, found = 0.25, 0.0
    while part > 1e-6 and finds(model, mistake, part):
        found, part = part, part / 2
    return found


def main() -> int:
    """Print both tables. 1 if a right file fails or a mistake is not found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    nearest: dict[str, float] = {}
    failures, made, seed = [], 0, arguments.seed
    while made < arguments.models:
        seed += 1
        try:
            model = make(seed)
        except DdpmxError as error:
            counts["not a model", error.fact[:60]] += 1
            continue
        made += 1
        report = right(model)
        for check in report.checks:
            state = "not judged" if check.skipped else "holds" if check.passed else "FAILS"
            counts[check.name.split(" of 50")[0], state] += 1
            if not check.skipped:
                share = (1 - check.value) / (1 - check.bound) if check.at_least else check.value / check.bound
                name = check.name.split(" of 50")[0]
                nearest[name] = max(share, nearest.get(name, 0.0))
        if not report.passed:
            failures.append(f"seed {seed}: {model.spec.precision} {model.own}: {report.verdict}")
    print(f"{made} right models, {len(failures)} called FAILED")
    print("| check | holds | not judged | fails | nearest to its bound |\n|---|---|---|---|---|")
    for name in nearest:
        row = [counts[name, state] for state in ("holds", "not judged", "FAILS")]
        print(f"| {name} | {row[0]} | {row[1]} | {row[2]} | {nearest[name]:.0%} |")
    for (what, why), number in counts.items():
        if what == "not a model":
            print(f"drawn again, {number} times: {why}")
    for line in failures:
        print(line)
    print("\n| a quarter of a mistake | its check | found in | found down to |\n|---|---|---|---|")
    missed = 0
    for mistake, name in MISTAKES.items():
        parts = [smallest(host(number, mistake), mistake) for number in range(len(HOSTS))]
        found = sum(part > 0 for part in parts)
        missed += found < len(HOSTS)
        least = max(parts) if found == len(HOSTS) else 0.0
        print(f"| {mistake} | {name} | {found} of {len(HOSTS)} models | {f'1/{1 / least:.0f}' if least else '—'} |")
    print(f"{time.monotonic() - begun:.0f} s")
    return int(bool(failures) or missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
