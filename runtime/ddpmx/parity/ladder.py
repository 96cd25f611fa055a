"""The parity ladder: ordered checks, from one output of the network to whole chains, each a figure with a bound.

1. self-consistency — identical rows give identical outputs, and neighbours make no difference (needs no reference)
2. ε — the outputs over all of 0…T−1, at x_t drawn from q(x_t | x_0)
3. one step — x_{t−1} from the same x_t
4. distribution — how much the errors change the variational bound: the terms t ≥ 1, and L_0
5. teacher-forced chain — every step starts at the state of PyTorch's chain
6. free-running chain — the same x_T and noise, without correction: the pixels of the final images, and their distance from
   PyTorch's by the light judge of samples (:mod:`ddpmx.images.swd`)
7. on a GPU, the chain that runs there — equal to NumPy's with every executor (needs no reference)

8. for half precision and bfloat16, what the record knows of the module with every operation rounded

Errors are in units of the RMS of PyTorch's outputs (1 for a network that predicts ε). The bounds on ε are those of the
precision; the others follow from them by the sampler's own table (:mod:`ddpmx.parity.propagation`). If the network learns
its variance, the second output v is judged like the first, in its own unit: −1…1 spans the smallest σ² to the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Backend, CopyingBackend
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import InputError, NumericError, SpecError
from ddpmx.formats.spec import ModelSpec, beside
from ddpmx.parity import on_device
from ddpmx.parity.allowed import Allowed, allowed
from ddpmx.parity.check import BOUNDS, BOUNDS_ON_GPU, Check
from ddpmx.parity.evaluator import ANY, Evaluator
from ddpmx.parity.free_chain import chain_levels, free_chain, light_judge
from ddpmx.parity.propagation import bits, bits_bound, distortion, distortion_bound, rms, step, step_bound
from ddpmx.parity.reduced import RANGE, not_known
from ddpmx.parity.reference import Reference, elements
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import from_uint8
from ddpmx.sampling.runner import fitting_batch

SILENT = 1e-3
"""An RMS of the outputs below this means an untrained network: its last layers still have their initial weights (almost
zero in Ho et al.), so a fault in the layers before them would not show. ε, x_0 and v all have an RMS of about 1."""

MOST = 16  # rows per network call

_OF_ONE_CALL = ("ε", "v,", "one step", "teacher-forced")
"""The checks of single network calls. Of a file in 8 bits they are shown and not judged: errors that average out along a
chain and errors that add up look the same there."""


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
    def judged(self) -> bool:
        """Whether anything could be judged: not every check was skipped."""
        return any(check.skipped is None for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether every check holds that could be judged, and there is one."""
        return self.judged and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if failed := [check for check in self.checks if not check.passed]:
            what = "this is not the PyTorch model" if self.reference is not None else "it does not agree with itself"
            if failed[0].name == RANGE:
                what = "half precision ends at 65504, and this network comes too near"
            return f"FAILED: {what}: {failed[0]}" + (f"; and {len(failed) - 1} more" if len(failed) > 1 else "")
        if not self.judged:
            return "NOT VERIFIED: nothing could be judged"
        judged = [check for check in self.checks if check.skipped is None]
        skipped = len(self.checks) - len(judged)
        what = "the PyTorch model" if self.reference is not None else "consistent with itself"
        return (
            f"PASSED: {what}, {len(judged)} of {len(judged)} bounds hold"
            + (f"; {skipped} not judged" if skipped else "")
            + ("; NOT VERIFIED: whether it is the PyTorch model" if self.reference is None else "")
            + (
                "; the network ignores t, as its export states"
                if self.reference and self.reference.ignores_time
                else ""
            )
        )


def check_record_of(spec: ModelSpec, reference: Reference) -> None:
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
    judged: str = "file",
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare a backend with a record of PyTorch's outputs.

    Args:
        backend: runs the file.
        spec: of the file.
        reference: the record; without it only the checks that need no reference are made.
        batch: most rows per network call, if the network accepts batches that small.
        judged: what the backend runs, for the report: the file, or the module in a stated precision.
        progress: called with (network calls done, network calls in all).

    Returns:
        The report. Its ``curves`` are, over t: ``t``, ``eps`` (RMS error), ``eps_pixel`` (largest error), ``step``, and
        their bounds ``eps_bound``, ``eps_pixel_bound``, ``step_bound``; over
        the recorded states of the chain: ``chain_t``, ``forced`` (error of the output), ``forced_step`` and ``free``
        (error of x_t); after a free chain ``levels_apart`` (how many of the pixels that are not saturated on
        both sides are 0, 1, 2, … levels apart); with a learned
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
        check_record_of(spec, reference)
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
    ranges = backend.device.batches if isinstance(backend, CopyingBackend) else ANY
    if reference is not None and reference.trained:
        runs += reference.steps * Evaluator(backend, spec, batch, None, 0, ranges).calls(reference.chain_rows)
    evaluate = Evaluator(backend, spec, batch, progress, runs + 2 + -(-batch // least), ranges)
    table = BOUNDS_ON_GPU if on_gpu else BOUNDS
    bounds = None if reference is None else allowed(table, spec.precision, reference)
    largest = table[spec.precision].eps_pixel if bounds is None else float(bounds.eps_pixel.max())
    checks = _self_consistency(evaluate, spec, largest, reference, least)
    if isinstance(backend, CopyingBackend):
        checks += on_device.checks(backend, spec)
    if reference is None or bounds is None:
        return ParityReport(spec, backend.description, None, tuple(checks))
    curves: dict[str, NDArray[Any]] = {}
    checks += _over_timesteps(evaluate, spec, bounds, reference, curves)
    more, finals = _chains(evaluate, backend.description, bounds, reference, curves)
    checks += more
    if bounds.usual.levels is not None:
        checks = [_shown(check) if check.name.startswith(_OF_ONE_CALL) else check for check in checks]
    if judged != "file":
        checks = [replace(check, judged=judged) for check in checks]
    elif reference.reduced is not None and reference.reduced.precision == beside(spec.precision):
        checks += reference.reduced.checks
    elif spec.precision != "fp32" and not on_gpu:
        checks.append(not_known(beside(spec.precision), reference.made_with))
    return ParityReport(spec, backend.description, reference, tuple(checks), curves, finals)


def not_finite(
    backend: Backend, spec: ModelSpec, reference: Reference | None, error: NumericError, *, judged: str = "file"
) -> ParityReport:
    """The report of a ladder that ended in NaN or infinities: one check, which fails."""
    check = Check("answers that are not finite", 1, 0, worst=error.fact, judged=judged)
    known: tuple[Check, ...] = ()
    if judged == "file" and reference is not None and reference.reduced is not None:
        known = reference.reduced.checks if reference.reduced.precision == beside(spec.precision) else ()
    return ParityReport(spec, backend.description, reference, (check, *known))


def _self_consistency(
    evaluate: Evaluator, spec: ModelSpec, bound: float, reference: Reference | None, least: int
) -> list[Check]:
    """Checks without a reference: some TensorRT versions compute only the first row of a batch correctly.

    ``bound`` is the largest error of a single number, ``least`` the smallest batch that the network takes.
    """
    n = evaluate.batch
    x = chain.initial(0, np.arange(n), spec.shape)
    t = np.linspace(0, spec.timesteps - 1, n).round().astype(np.int32) if n > 1 else np.array([spec.timesteps // 2])
    conditioning = example(spec, np.arange(n))
    if spec.self_condition:
        conditioning["x0_prev"] = np.clip(x[::-1], -1, 1)
    whole = evaluate(x, t, conditioning)
    unit = max(rms(whole.out), 1e-12) if reference is None else reference.scale
    middle = np.full(n, spec.timesteps // 2, np.int32)
    first = {name: np.repeat(array[:1], n, axis=0) for name, array in {"x": x, **conditioning}.items()}
    same = evaluate(first.pop("x"), middle, first)
    alone = evaluate(x, t, conditioning, batch=least)
    rows, neighbours = float(np.abs(same.out - same.out[:1]).max()), float(np.abs(alone.out - whole.out).max())
    rows, neighbours = rows / unit, neighbours / unit
    if same.var is not None and alone.var is not None and whole.var is not None:
        own = 1.0 if spec.variance == "learned_range" else max(1.0, rms(whole.var))
        rows = max(rows, float(np.abs(same.var - same.var[:1]).max()) / own)
        neighbours = max(neighbours, float(np.abs(alone.var - whole.var).max()) / own)
    one = "a batch of one" if n == 1 else None
    few = one or (None if least < n else f"the network takes only batches of {n} and more")
    why = "that of the largest error of a single number"
    return [
        Check("identical rows, largest difference", rows, bound, skipped=one, worst=_exact(rows), why=why),
        Check(
            "batch against one by one, largest difference",
            neighbours,
            bound,
            skipped=few,
            worst=_exact(neighbours),
            why=why,
        ),
    ]


def _over_timesteps(
    evaluate: Evaluator, spec: ModelSpec, bounds: Allowed, reference: Reference, curves: dict[str, NDArray[Any]]
) -> list[Check]:
    """ε and one step over t, and how much they change the variational bound."""
    kept, unit, usual = elements(spec.shape), reference.scale, bounds.usual
    k, n = reference.out.shape[:2]
    x = np.stack([reference.inputs(i) for i in range(k)])
    t = np.repeat(reference.t, n)
    each = [reference.conditioning_at(i) for i in range(k)]
    conditioning = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    outputs = evaluate(x.reshape(k * n, *spec.shape), t, conditioning)
    out = outputs.out.reshape(k, n, -1)[:, :, kept]
    var = None if outputs.var is None else outputs.var.reshape(k, n, -1)[:, :, kept]
    x = x.reshape(k, n, -1)[:, :, kept]
    error = out - reference.out
    curves["t"] = reference.t
    curves["eps"] = np.array([rms(e) for e in error]) / unit
    curves["eps_pixel"] = np.abs(error).reshape(k, -1).max(axis=1) / unit
    curves["eps_bound"], curves["eps_pixel_bound"] = bounds.eps, bounds.eps_pixel
    var_error = usual.eps * reference.var_scale
    curves["step"], curves["step_bound"] = _steps(
        spec, reference.t, x, (out, var), (reference.out, reference.var), bounds.eps * unit, var_error
    )
    x0 = from_uint8(reference.x0).reshape(n, -1)[:, kept]
    levels = _levels(spec, reference, x0, x, (out, var), bounds.eps * unit, var_error)
    mine = bits(spec, reference.t, x0, x, out, var)
    theirs = bits(spec, reference.t, x0, x, reference.out, reference.var)
    second = []
    if var is not None and reference.var is not None:
        difference = var - reference.var
        curves["var"] = np.array([rms(e) for e in difference]) / reference.var_scale
        curves["var_pixel"] = np.abs(difference).reshape(k, -1).max(axis=1) / reference.var_scale
        second = [
            _worst("v, RMS", curves["var"], usual.eps, reference.t),
            _worst("v, largest error", curves["var_pixel"], usual.eps_pixel, reference.t),
        ]
    return [
        _worst("ε, RMS", curves["eps"], bounds.eps, reference.t, bounds.why, usual.eps),
        _worst("ε, largest error", curves["eps_pixel"], bounds.eps_pixel, reference.t, bounds.why, usual.eps_pixel),
        *second,
        _worst("one step, RMS of x_{t−1}", curves["step"], curves["step_bound"], reference.t, _why_step),
        Check(
            "variational bound, change in bits/dim",
            abs(mine - theirs),
            bits_bound(spec, reference.t, x0, x, reference.out, reference.var, bounds.eps * unit, var_error),
            worst=f"{theirs:.4f} by PyTorch, {mine:.4f} by the file, terms t ≥ 1",
            why="A²/(2σ²)·(2ρ·|q|δ·‖x_0 − x̂_0‖ + (qδ)²) over all t, δ the bound on ε, ρ = 1/4",
        ),
        levels,
    ]


def _levels(
    spec: ModelSpec,
    reference: Reference,
    x0: Float32,
    x: Float32,
    mine: tuple[Float32, Float32 | None],
    error: NDArray[np.float64],
    var_error: float,
) -> Check:
    """The rest of the variational bound: L_0, the bits of the 256 levels at t = 0. L_T is the schedule's alone."""
    name, at = "distortion L_0, change in bits/dim", np.flatnonzero(reference.t == 0)
    if not at.size:
        return Check(name, np.nan, 0.0, skipped="t = 0 is not among the recorded timesteps")
    i = int(at[0])
    (out, var), theirs = (_pairs(*outputs)[i] for outputs in (mine, (reference.out, reference.var)))
    before, now = (distortion(spec, x0, x[i], *outputs) for outputs in (theirs, (out, var)))
    return Check(
        name,
        abs(now - before),
        distortion_bound(spec, x0, x[i], *theirs, float(error[i]), var_error),
        worst=f"{before:.4f} by PyTorch, {now:.4f} by the file",
        why="ρ·|q|δ·‖∂L_0/∂x̂_0‖ + (qδ)²/(2σ²) at t = 0, δ the bound on ε, ρ = 1/4",
    )


def _chains(
    evaluate: Evaluator, description: str, bounds: Allowed, reference: Reference, curves: dict[str, NDArray[Any]]
) -> tuple[list[Check], NDArray[np.uint8] | None]:
    """The recorded chain, teacher-forced and free. (checks, images of the free chain)"""
    spec, kept, unit, usual = reference.spec, elements(reference.spec.shape), reference.scale, bounds.usual
    t = reference.table().timesteps[reference.at].astype(np.int32)
    outputs = evaluate(reference.state, t, reference.state_conditioning())
    out = outputs.out.reshape(len(t), -1)[:, kept]
    var = None if outputs.var is None else outputs.var.reshape(len(t), -1)[:, kept]
    states = reference.state.reshape(len(t), -1)[:, kept]
    curves["chain_t"] = t
    curves["forced"] = np.array([rms(a - b) for a, b in zip(out, reference.state_out, strict=True)]) / unit
    curves["forced_step"], forced_bound = _steps(
        spec,
        t,
        states,
        (out, var),
        (reference.state_out, reference.state_var),
        bounds.state_eps * unit,
        usual.eps * reference.var_scale,
    )
    checks = [
        _worst("teacher-forced chain, RMS of ε", curves["forced"], bounds.state_eps, t, bounds.why, usual.eps),
        _worst("teacher-forced chain, RMS of x_{t−1}", curves["forced_step"], forced_bound, t, _why_step),
    ]
    if var is not None and reference.state_var is not None:
        differences = [rms(a - b) for a, b in zip(var, reference.state_var, strict=True)]
        curves["forced_var"] = np.array(differences) / reference.var_scale
        checks.insert(1, _worst("teacher-forced chain, RMS of v", curves["forced_var"], usual.eps, t))
    error = rms(bounds.state_eps)
    free, finals = free_chain(evaluate, description, usual.pixels, error, reference, curves, usual.levels)
    checks.append(free)
    if finals is not None and free.skipped is None:
        if usual.levels is not None:
            checks.append(chain_levels(finals, reference, usual.levels))
        checks.append(light_judge(finals, reference, error, usual.levels))
    return checks, finals


def _steps(
    spec: ModelSpec,
    t: NDArray[np.int32],
    x: Float32,
    mine: tuple[Float32, Float32 | None],
    theirs: tuple[Float32, Float32 | None],
    error: NDArray[np.float64],
    var_error: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(RMS error of x_{t−1}, its bound) at each t."""
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    errors, bounds = [], []
    for ti, xi, ours, reference, delta in zip(t.tolist(), x, _pairs(*mine), _pairs(*theirs), error, strict=True):
        errors.append(rms(step(table, spec, ti, xi, *ours) - step(table, spec, ti, xi, *reference)))
        bounds.append(step_bound(table, spec, ti, xi, *reference, float(delta), var_error))
    return np.array(errors), np.array(bounds)


def _pairs(out: Float32, var: Float32 | None) -> list[tuple[Float32, Float32 | None]]:
    """(first output, second output) of each row."""
    return [(a, None if var is None else var[i]) for i, a in enumerate(out)]


def _why_step(bound: float, usual: float) -> str:
    return "|A·q| of the sampler's table × the bound on ε, at most 2·|A|·clip, and the update's own rounding"


def _worst(
    name: str,
    values: NDArray[Any],
    bounds: float | NDArray[Any],
    t: NDArray[np.int32],
    why: Callable[[float, float], str] | None = None,
    usual: float = 0.0,
) -> Check:
    """The check of the t whose value comes nearest to its bound, or exceeds it most."""
    limits = np.broadcast_to(bounds, values.shape)
    i = int(np.argmax(values / limits))
    limit = float(limits[i])
    reason = f"{limit:g}, by the precision" if why is None else why(limit, usual)
    return Check(name, float(values[i]), limit, worst=f"worst at t = {t[i]}", why=reason)


def _shown(check: Check) -> Check:
    """A check without its verdict."""
    seen = f"8 bits are judged by their chain; it is {check.value:.3g}" + (f", {check.worst}" if check.worst else "")
    return replace(check, skipped=check.skipped or seen)


def _exact(difference: float) -> str:
    return "equal bit for bit" if difference == 0 else ""
