"""The parity ladder: ordered checks, from one output of the network to whole chains, each a figure with a bound.

1. self-consistency — identical rows give identical outputs, and neighbours make no difference (needs no reference)
2. ε — the outputs over all of 0…T−1, at x_t drawn from q(x_t | x_0)
3. one step — x_{t−1} from the same x_t
4. distribution — how much the errors change the variational bound
5. teacher-forced chain — every step starts at the state of PyTorch's chain
6. free-running chain — the same x_T and noise, without correction: the pixels of the final images
7. on a GPU, the chain that runs there — equal to NumPy's with every executor (needs no reference)

Errors are in units of the RMS of PyTorch's outputs (1 for a network that predicts ε). If the network learns its variance,
the second output v is judged like the first, in its own unit: −1…1 spans the smallest σ² to the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Backend, CopyingBackend
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.diffusion.schedule import Float64
from ddpmx.errors import InputError, NumericError, SpecError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity import on_device
from ddpmx.parity.check import BOUNDS, BOUNDS_ON_GPU, Bounds, Check
from ddpmx.parity.evaluator import Evaluator
from ddpmx.parity.reference import Reference, elements
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import from_uint8, to_nhwc
from ddpmx.sampling.runner import fitting_batch

SILENT = 1e-3
"""An RMS of the outputs below this means an untrained network: its last layers still have their initial weights (almost
zero in Ho et al.), so a fault in the layers before them would not show. ε, x_0 and v all have an RMS of about 1."""

MOST = 16  # rows per network call


@dataclass(frozen=True, eq=False)
class ParityReport:
    """The result of :func:`run_ladder`.

    Attributes:
        spec: of the file.
        ran_on: description of the backend that ran the file.
        reference: the record that the file was compared with, or None if only self-consistency was checked.
        checks: in the order in which they were made.
        curves: figures over t and over the chain, for plots; see :func:`run_ladder`.
        finals: uint8 [m, H, W, C], the images of the free chain, or None.
    """

    spec: ModelSpec
    ran_on: str
    reference: Reference | None
    checks: tuple[Check, ...]
    curves: dict[str, NDArray[Any]] = field(default_factory=dict)
    finals: NDArray[np.uint8] | None = None

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if failed := [check for check in self.checks if not check.passed]:
            what = "this is not the PyTorch model" if self.reference is not None else "it does not agree with itself"
            return f"FAILED: {what}: {failed[0]}" + (f"; and {len(failed) - 1} more" if len(failed) > 1 else "")
        judged = [check for check in self.checks if check.skipped is None]
        if not judged:
            return "NOT VERIFIED: nothing could be judged"
        skipped = len(self.checks) - len(judged)
        what = "the PyTorch model" if self.reference is not None else "consistent with itself"
        return (
            f"PASSED: {what}, {len(judged)} of {len(judged)} bounds hold"
            + (f"; {skipped} not judged" if skipped else "")
            + ("; NOT VERIFIED: whether it is the PyTorch model" if self.reference is None else "")
        )


def check_same_model(spec: ModelSpec, reference: Reference) -> None:
    """Check that a record was made from this model.

    Raises:
        SpecError: it was made from another one.
    """
    mine, theirs = spec.to_json(), reference.spec.to_json()
    ignored = {"precision", "ddpmx"}
    if spec.weights is None:
        ignored.add("weights")  # a file made by other software does not state them
    nothing = "nothing"
    names = (mine.keys() | theirs.keys()) - ignored
    if differing := sorted(name for name in names if mine.get(name, nothing) != theirs.get(name, nothing)):
        name = differing[0]
        raise SpecError(
            "the record is another model's",
            note=f"{', '.join(differing)} differ; {name}: {str(theirs.get(name, nothing))[:70]} there, "
            f"{str(mine.get(name, nothing))[:70]} here",
            hint="use the .parity.npz that the same export wrote, or --checkpoint and --weights of the same network",
        )


def run_ladder(
    backend: Backend,
    spec: ModelSpec,
    reference: Reference | None,
    *,
    batch: int = MOST,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare a backend with a record of PyTorch's outputs.

    Args:
        backend: runs the file.
        spec: of the file.
        reference: the record; without it only the checks that need no reference are made.
        batch: most rows per network call, if the network accepts batches that small.
        progress: called with (network calls done, network calls in all).

    Returns:
        The report. Its ``curves`` are, over t: ``t``, ``eps`` (RMS error), ``eps_pixel`` (largest error), ``step``; over
        the recorded states of the chain: ``chain_t``, ``forced`` (error of the output), ``forced_step`` and ``free``
        (error of x_t); after a free chain ``levels_apart`` (how many pixels are 0, 1, 2, … levels apart); with a learned
        variance also ``var``, ``var_pixel`` and ``forced_var``.

    Raises:
        InputError: the batch is out of range.
        SpecError: the record was made from another model, or its outputs are almost zero.
        NumericError: an output of the network is not finite.
        BackendError: the network could not be run.
    """
    if not 1 <= batch <= 1 << 16:
        raise InputError(f"a batch is 1…{1 << 16}, not {batch}")
    if reference is not None:
        check_same_model(spec, reference)
        if reference.scale < SILENT:
            raise SpecError(
                "the recorded outputs are almost zero, so any file would pass",
                note=f"their RMS is {reference.scale:.1g}",
                hint="train the network first",
            )
    on_gpu = isinstance(backend, CopyingBackend)
    least = 1
    if isinstance(backend, CopyingBackend):
        batch, least = (fitting_batch(backend.device.batches, wanted) for wanted in (batch, 1))
    runs = 0 if reference is None else -(-reference.out[:, :, 0].size // batch) + -(-len(reference.at) // batch)
    runs += 0 if reference is None or not reference.trained else reference.steps
    evaluate = Evaluator(backend, spec, batch, progress, total=runs + 2 + -(-batch // least))
    bounds = (BOUNDS_ON_GPU if on_gpu else BOUNDS)[spec.precision]
    checks = _self_consistency(evaluate, spec, bounds, reference, least)
    if isinstance(backend, CopyingBackend):
        checks += on_device.checks(backend, spec)
    if reference is None:
        return ParityReport(spec, backend.description, None, tuple(checks))
    curves: dict[str, NDArray[Any]] = {}
    checks += _over_timesteps(evaluate, spec, bounds, reference, curves)
    more, finals = _chains(evaluate, backend, bounds, reference, curves)
    return ParityReport(spec, backend.description, reference, tuple(checks + more), curves, finals)


def not_finite(backend: Backend, spec: ModelSpec, reference: Reference | None, error: NumericError) -> ParityReport:
    """The report of a ladder that ended in NaN or infinities: one check, which fails."""
    return ParityReport(
        spec, backend.description, reference, (Check("answers that are not finite", 1, 0, worst=error.fact),)
    )


def _self_consistency(
    evaluate: Evaluator, spec: ModelSpec, bounds: Bounds, reference: Reference | None, least: int
) -> list[Check]:
    """Checks without a reference: some TensorRT versions compute only the first row of a batch correctly.

    ``least`` is the smallest batch that the network takes.
    """
    n = evaluate.batch
    x = chain.initial(0, np.arange(n), spec.shape)
    t = np.linspace(0, spec.timesteps - 1, n).round().astype(np.int32) if n > 1 else np.array([spec.timesteps // 2])
    conditioning = example(spec, np.arange(n))
    if spec.self_condition:
        conditioning["x0_prev"] = np.clip(x[::-1], -1, 1)
    whole = evaluate(x, t, conditioning)
    unit = max(_rms(whole.out), 1e-12) if reference is None else reference.scale
    middle = np.full(n, spec.timesteps // 2, np.int32)
    first = {name: np.repeat(array[:1], n, axis=0) for name, array in {"x": x, **conditioning}.items()}
    same = evaluate(first.pop("x"), middle, first)
    alone = evaluate(x, t, conditioning, batch=least)
    rows, neighbours = float(np.abs(same.out - same.out[:1]).max()), float(np.abs(alone.out - whole.out).max())
    rows, neighbours = rows / unit, neighbours / unit
    if same.var is not None and alone.var is not None and whole.var is not None:
        rows = max(rows, float(np.abs(same.var - same.var[:1]).max()))
        neighbours = max(neighbours, float(np.abs(alone.var - whole.var).max()))
    one = "a batch of one" if n == 1 else None
    few = one or (None if least < n else f"the network takes only batches of {n} and more")
    return [
        Check("identical rows, largest difference", rows, bounds.eps_pixel, skipped=one, worst=_exact(rows)),
        Check(
            "batch against one by one, largest difference",
            neighbours,
            bounds.eps_pixel,
            skipped=few,
            worst=_exact(neighbours),
        ),
    ]


def _over_timesteps(
    evaluate: Evaluator, spec: ModelSpec, bounds: Bounds, reference: Reference, curves: dict[str, NDArray[Any]]
) -> list[Check]:
    """ε and one step over t, and how much they change the variational bound."""
    kept, unit = elements(spec.shape), reference.scale
    k, n = reference.out.shape[:2]
    x = np.stack([reference.inputs(i) for i in range(k)])
    t = np.repeat(reference.t, n)
    each = [reference.conditioning_at(i) for i in range(k)]
    conditioning = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    outputs = evaluate(x.reshape(k * n, *spec.shape), t, conditioning)
    out = outputs.out.reshape(k, n, -1)[:, :, kept]
    var = None if outputs.var is None else outputs.var.reshape(k, n, -1)[:, :, kept]
    x = x.reshape(k, n, -1)[:, :, kept]
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    error = out - reference.out
    curves["t"] = reference.t
    curves["eps"] = np.array([_rms(e) for e in error]) / unit
    curves["eps_pixel"] = np.abs(error).reshape(k, -1).max(axis=1) / unit
    curves["step"] = np.array(
        [
            _rms(_step(table, spec, ti, xi, *mine) - _step(table, spec, ti, xi, *theirs))
            for ti, xi, mine, theirs in zip(
                reference.t, x, _pairs(out, var), _pairs(reference.out, reference.var), strict=True
            )
        ]
    )
    x0 = from_uint8(reference.x0).reshape(n, -1)[:, kept]
    bits = [_bits(spec, reference.t, x0, x, *both) for both in ((out, var), (reference.out, reference.var))]
    second = []
    if var is not None and reference.var is not None:
        difference = var - reference.var
        curves["var"] = np.array([_rms(e) for e in difference])
        curves["var_pixel"] = np.abs(difference).reshape(k, -1).max(axis=1)
        second = [
            _worst("v, RMS", curves["var"], bounds.eps, reference.t),
            _worst("v, largest error", curves["var_pixel"], bounds.eps_pixel, reference.t),
        ]
    return [
        _worst("ε, RMS", curves["eps"], bounds.eps, reference.t),
        _worst("ε, largest error", curves["eps_pixel"], bounds.eps_pixel, reference.t),
        *second,
        _worst("one step, RMS of x_{t−1}", curves["step"], bounds.step, reference.t),
        Check(
            "variational bound, change in bits/dim",
            abs(bits[0] - bits[1]),
            bounds.bits,
            worst=f"{bits[1]:.4f} by PyTorch, {bits[0]:.4f} by the file, terms t ≥ 1",
        ),
    ]


def _chains(
    evaluate: Evaluator, backend: Backend, bounds: Bounds, reference: Reference, curves: dict[str, NDArray[Any]]
) -> tuple[list[Check], NDArray[np.uint8] | None]:
    """The recorded chain, teacher-forced and free. (checks, images of the free chain)"""
    spec, kept, unit = reference.spec, elements(reference.spec.shape), reference.scale
    table = reference.table()
    t = table.timesteps[reference.at].astype(np.int32)
    outputs = evaluate(reference.state, t, reference.state_conditioning())
    out = outputs.out.reshape(len(t), -1)[:, kept]
    var = None if outputs.var is None else outputs.var.reshape(len(t), -1)[:, kept]
    states = reference.state.reshape(len(t), -1)[:, kept]
    curves["chain_t"] = t
    curves["forced"] = np.array([_rms(a - b) for a, b in zip(out, reference.state_out, strict=True)]) / unit
    full = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    curves["forced_step"] = np.array(
        [
            _rms(_step(full, spec, ti, xi, *mine) - _step(full, spec, ti, xi, *theirs))
            for ti, xi, mine, theirs in zip(
                t, states, _pairs(out, var), _pairs(reference.state_out, reference.state_var), strict=True
            )
        ]
    )
    checks = [
        _worst("teacher-forced chain, RMS of ε", curves["forced"], bounds.eps, t),
        _worst("teacher-forced chain, RMS of x_{t−1}", curves["forced_step"], bounds.step, t),
    ]
    if var is not None and reference.state_var is not None:
        curves["forced_var"] = np.array([_rms(a - b) for a, b in zip(var, reference.state_var, strict=True)])
        checks.insert(1, _worst("teacher-forced chain, RMS of v", curves["forced_var"], bounds.eps, t))
    name = f"free chain of {reference.steps} steps, pixels within one level"
    if not reference.trained:
        why = f"the network is not trained (loss {reference.loss:.2f}, 1 is guessing): its chain saturates"
        return [*checks, Check(name, float("nan"), bounds.pixels, at_least=True, skipped=why)], None
    m = len(reference.final)
    indices = np.arange(m)
    x_start = chain.initial(reference.seed, indices, spec.shape)
    states_free = np.empty_like(reference.state)
    at = {int(step): i for i, step in enumerate(reference.at)}
    sample = x_start
    free = chain.run(
        backend,
        table,
        x_start,
        seed=reference.seed,
        images=indices,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=reference.chain_conditioning(),
    )
    for number, step in enumerate(free):
        if number in at:
            states_free[at[number]] = step.x[0]
        sample = step.x0
        evaluate.tick()
    curves["free"] = np.array([_rms(a - b) for a, b in zip(states_free, reference.state, strict=True)])
    finals = to_nhwc(sample)
    apart = np.abs(finals.astype(np.int16) - reference.final.transpose(0, 2, 3, 1))
    curves["levels_apart"] = np.bincount(apart.reshape(-1), minlength=3)
    mse = float(np.mean(np.square(apart, dtype=np.float64)))
    psnr = "" if mse == 0 else f"at most {apart.max()} apart, PSNR {10 * np.log10(255**2 / mse):.1f} dB, "
    worst = f"{float(np.mean(apart == 0)):.2%} equal, {psnr}{m} images"
    return [*checks, Check(name, float(np.mean(apart <= 1)), bounds.pixels, at_least=True, worst=worst)], finals


def _pairs(out: Float32, var: Float32 | None) -> list[tuple[Float32, Float32 | None]]:
    """(first output, second output) of each row."""
    return [(a, None if var is None else var[i]) for i, a in enumerate(out)]


def _step(table: Table, spec: ModelSpec, t: int, x: Float32, out: Float32, var: Float32 | None) -> Float32:
    """x_{t−1} without its noise, which is the same on both sides; with a learned σ, z = 1 makes its error count."""
    index = len(table) - 1 - int(t)
    row = table.rows[index].astype(np.float32)
    x0, x_next = np.empty_like(x), np.empty_like(x)
    sigma = z = None
    if table.learned is not None and var is not None and row[4] != 0:
        sigma, z = chain.learned_sigma(table.learned[index].astype(np.float32), var), np.ones_like(x)
    limit = np.inf if spec.clip is None else spec.clip
    chain.update(row, limit, x, out, z, x0=x0, x_next=x_next, sigma=sigma)
    return x_next


def _bits(spec: ModelSpec, t: NDArray[np.int32], x0: Float32, x: Float32, out: Float32, var: Float32 | None) -> float:
    """Σ_{t≥1} KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) in bits per dimension, from the recorded t.

    With a fixed σ² the part that depends on the network is A²‖x_0 − x̂_0‖²/(2σ²) (equation 10, for any prediction); with a
    learned σ², (log(σ²/β̃) + β̃/σ² − 1)/2 is added. Each recorded t stands for the timesteps that are nearest to it.
    """
    schedule = spec.make_schedule()
    table = make_table(schedule, spec.prediction, spec.variance)
    rows: Float64 = table.rows[::-1][t]  # by t
    limit = np.inf if spec.clip is None else spec.clip
    owners = np.abs(np.arange(1, spec.timesteps)[:, None] - t[None, :]).argmin(axis=1)
    share = np.bincount(owners, minlength=len(t))
    total = 0.0
    for i, (p, q, a, _, sigma) in enumerate(rows):
        if sigma == 0:
            continue
        guess = np.clip(p * x[i] + q * out[i], -limit, limit)
        variance: Any = sigma**2
        if table.learned is not None and var is not None:
            c, d = table.learned[::-1][t[i]]
            variance, small = np.exp(2 * (c + d * var[i].astype(np.float64))), schedule.posterior_variance[t[i]]
            total += share[i] * float(np.mean(np.log(variance / small) + small / variance - 1)) / 2
        total += share[i] * a**2 * float(np.mean(np.square(x0 - guess) / (2 * variance)))
    return total / float(np.log(2))


def _worst(name: str, values: NDArray[Any], bound: float, t: NDArray[np.int32]) -> Check:
    i = int(np.argmax(values))
    return Check(name, float(values[i]), bound, worst=f"worst at t = {t[i]}")


def _exact(difference: float) -> str:
    return "equal bit for bit" if difference == 0 else ""


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
