"""A linear sampler is a table: five numbers for every step, and one update for all samplers.

    x̂_0    = clip(p·x_t + q·out)
    x_next = A·x̂_0 + B·x_t + σ·z,   z ~ N(0, I)

``out`` is the network's output (ε, x_0, v or μ), (p, q) turn it into x̂_0, and (A, B, σ) are the sampler. Tables are float64
and rounded to float32 once, by the chain that runs them.

A network that learns its variance has a second output, v, and two more numbers give σ = exp(c + d·v) for every element.
What v means is the model's ``variance``: a place between two bounds (``learned_range``), or log σ² itself (``learned``).

A multistep sampler (:mod:`ddpmx.diffusion.multistep`) remembers x̂_0 of the two steps before, and two more numbers add
C·x̂_0' + D·x̂_0'' to x_next.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary, multistep
from ddpmx.diffusion.grids import Spacing, log_snr, timestep_grid
from ddpmx.diffusion.schedule import Float64, Schedule, respace
from ddpmx.errors import InputError, SpecError

Prediction = Literal["eps", "x0", "v", "mu"]
Variance = Literal["fixed_small", "fixed_large", "learned_range", "learned"]
Sampler = Literal["ancestral", "ddim", "dpmpp_2m", "unipc"]

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
VARIANCES: tuple[Variance, ...] = get_args(Variance)
FIXED_VARIANCES: tuple[Variance, ...] = ("fixed_small", "fixed_large")
"""The variances that need no second output of the network."""
LEARNED_VARIANCES: tuple[Variance, ...] = ("learned_range", "learned")
"""The variances that are a second output of the network, ``var``."""
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


@dataclass(frozen=True, eq=False)
class Table:
    """A chain to run, first step first.

    Attributes:
        timesteps: int64 [S], falling: the network's input t in each step.
        rows: float64 [S, 5], the columns p, q, A, B, σ. A step draws noise where σ is not 0.
        learned: float64 [S, 2], the columns c and d of σ = exp(c + d·v), or None if σ is that of ``rows``. With them, σ
            in ``rows`` only marks the steps with noise: 1, or 0 for none.
        memory: float64 [S, 2], the columns C and D, which multiply x̂_0 of the step before and of the one before that; or
            None for a sampler without memory. Both are 0 in the first step, D is in the second, and a table with memory has
            no noise and no ``learned``.
    """

    timesteps: NDArray[np.int64]
    rows: Float64
    learned: Float64 | None = None
    memory: Float64 | None = None

    def __len__(self) -> int:
        """The number of steps, S."""
        return len(self.timesteps)

    @property
    def coefficients(self) -> Float64:
        """float64 [S, 5], or [S, 7] with ``learned`` or ``memory`` appended: every number that the chain computes with."""
        more = [columns for columns in (self.learned, self.memory) if columns is not None]
        return np.concatenate([self.rows, *more], axis=1) if more else self.rows


def x0_coefficients(schedule: Schedule, prediction: Prediction) -> tuple[Float64, Float64]:
    """(p, q), each float64 [S], with x̂_0 = p·x_t + q·out.

    - ``eps``: √(1/ᾱ)·x − √(1/ᾱ − 1)·ε (equation 15)
    - ``x0``: out itself
    - ``v``: √ᾱ·x − √(1−ᾱ)·v (Salimans & Ho 2022)
    - ``mu``: (μ − B·x)/A, with A and B of μ̃ = A·x_0 + B·x (equation 7). μ belongs to a single step, so the schedule must
      not be respaced: a chain that leaves out timesteps takes the rows of the whole schedule.

    Raises:
        SpecError: an unknown prediction, or ε where ᾱ reaches 0.
    """
    alpha_bar = schedule.alpha_bar
    if prediction == "eps":
        if alpha_bar[-1] <= 0:
            raise SpecError(
                "this schedule ends at ᾱ = 0, where x_0 does not follow from ε",
                hint="predict x0 or v, or choose a schedule that keeps some signal",
            )
        return np.sqrt(1 / alpha_bar), -np.sqrt(schedule.one_minus_alpha_bar / alpha_bar)
    if prediction == "x0":
        return np.zeros_like(alpha_bar), np.ones_like(alpha_bar)
    if prediction == "v":
        return np.sqrt(alpha_bar), -np.sqrt(schedule.one_minus_alpha_bar)
    if prediction == "mu":
        a, b = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_xt
        return -b / a, 1 / a
    raise SpecError(f"there is no prediction {prediction!r}", hint=f"one of: {', '.join(PREDICTIONS)}")


X0Coefficients = tuple[Float64, Float64]
"""(p, q) of :func:`x0_coefficients`."""


def ancestral(
    schedule: Schedule, prediction: Prediction, variance: Variance, *, x0: X0Coefficients | None = None
) -> Table:
    """Ho et al., Algorithm 2: x_{t−1} = μ̃(x_t, x̂_0) + σ_t·z, no noise at t = 0.

    Args:
        schedule, prediction, variance: of the model, the schedule perhaps respaced.
        x0: p and q at the schedule's timesteps, where they are not :func:`x0_coefficients` of it.
    """
    if variance not in VARIANCES:
        raise SpecError(f"there is no variance {variance!r}", hint=f"one of: {', '.join(VARIANCES)}")
    learned = None
    if variance in LEARNED_VARIANCES:
        sigma = np.ones(len(schedule))
        learned = learned_range(schedule) if variance == "learned_range" else learned_log(schedule)
    else:
        log_variance = schedule.log_variance_large if variance == "fixed_large" else schedule.log_variance_small
        sigma = elementary.exp(0.5 * log_variance)
    sigma[0] = 0.0
    a, b = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_xt
    return _table(schedule, x0 or x0_coefficients(schedule, prediction), a, b, sigma, learned)


def learned_range(schedule: Schedule) -> Float64:
    """The columns c and d of σ = exp(c + d·v), float64 [S, 2], by t.

    Nichol & Dhariwal 2021, equation 15: log σ² = f·log β + (1−f)·log β̃ with f = (v + 1)/2, so that v runs from −1 (β̃)
    to 1 (β), but is not clipped. β̃_0 = 0 has no logarithm and is replaced by β̃_1. β_0 stays, unlike in ``fixed_large``.
    """
    small, large = schedule.log_variance_small, elementary.log(schedule.betas)
    return np.stack([(large + small) / 4, (large - small) / 4], axis=1)


def learned_log(schedule: Schedule) -> Float64:
    """c = 0 and d = 1/2 of σ = exp(c + d·v) at every t, float64 [S, 2]: v is log σ² (Ho et al. 2020, Table 2)."""
    return np.tile([0.0, 0.5], (len(schedule), 1))


def ddim(schedule: Schedule, prediction: Prediction, eta: float = 0.0, *, x0: X0Coefficients | None = None) -> Table:
    """Song et al. 2020, equation 12, with ε̂ re-derived from the clipped x̂_0. η = 0 draws no noise after x_T.

    x_next = √ᾱ_prev·x̂_0 + √(1−ᾱ_prev−σ²)·ε̂ + σ·z,  ε̂ = (x_t − √ᾱ·x̂_0)/√(1−ᾱ),
    σ = η·√((1−ᾱ_prev)/(1−ᾱ))·√(1−ᾱ/ᾱ_prev)

    Args:
        schedule, prediction, x0: as for :func:`ancestral`.
        eta: η.

    Raises:
        InputError: η outside 0…1.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"η must lie between 0 (no noise) and 1 (as much as the ancestral chain), not {eta!r}")
    alpha_bar, previous = schedule.alpha_bar, schedule.alpha_bar_prev
    noise, noise_previous = schedule.one_minus_alpha_bar, schedule.one_minus_alpha_bar_prev
    sigma = eta * np.sqrt(noise_previous / noise) * np.sqrt(schedule.betas)  # β = 1 − ᾱ/ᾱ_prev
    # 1−ᾱ_prev−σ² written without a difference, by 1−ᾱ = α·(1−ᾱ_prev) + β: the difference may round below 0
    direction = np.sqrt(
        noise_previous * ((1 - schedule.betas) * noise_previous + (1 - eta * eta) * schedule.betas) / noise
    )
    b = direction / np.sqrt(noise)
    x0 = x0 or x0_coefficients(schedule, prediction)
    return _table(schedule, x0, np.sqrt(previous) - b * np.sqrt(alpha_bar), b, sigma)


def multistep_table(
    schedule: Schedule,
    prediction: Prediction,
    sampler: Sampler,
    *,
    x0: X0Coefficients | None = None,
    steps: int | None = None,
) -> Table:
    """A sampler of :mod:`ddpmx.diffusion.multistep`, without noise after x_T.

    Args:
        schedule, prediction, x0: as for :func:`ancestral`.
        sampler: ``dpmpp_2m`` or ``unipc``.
        steps: only so many of the last steps, of which the first remembers nothing; by default all.
    """
    columns = {"dpmpp_2m": multistep.dpmpp_2m, "unipc": multistep.unipc}[sampler](schedule, steps)
    p, q = x0 or x0_coefficients(schedule, prediction)
    S = len(columns)
    rows = np.stack([p[:S][::-1], q[:S][::-1], columns[:, 0], columns[:, 1], np.zeros(S)], axis=1)
    return Table(schedule.timesteps[:S][::-1].copy(), rows, memory=columns[:, 2:])


def make_table(
    schedule: Schedule,
    prediction: Prediction,
    variance: Variance,
    *,
    sampler: Sampler = "ancestral",
    steps: int | None = None,
    spacing: Spacing = "linspace",
    eta: float = 0.0,
    start: int | None = None,
) -> Table:
    """The table of a named sampler over ``steps`` of the schedule's timesteps (all of them by default).

    A learned variance is for networks with a second output ``var``, which the caller has to check. ``learned`` is that of
    single steps, so its ancestral chain takes all T. The other samplers have their own σ and ignore ``variance``.

    With ``start`` the chain begins at this timestep: x is then x_t at that t, and the rows before it are left out. Where it
    is not visited, the chain begins at the nearest that is, and a UserWarning says so. A multistep sampler has nothing to
    remember there, and its first step is of first order.

    Raises:
        InputError: an unknown sampler, a number of steps outside 1…T, η outside 0…1 or with another sampler than ddim, a
            ``start`` outside 0…T−1, or fewer than T steps of the ancestral chain with the variance ``learned``.
        SpecError: ε is predicted where ᾱ reaches 0, or a coefficient is not a finite float32.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"there is no sampler {sampler!r}", hint=f"one of: {', '.join(SAMPLERS)}")
    if sampler != "ddim" and eta:
        raise InputError("η is for the ddim sampler only", hint="sampler ddim, or leave out η")
    T = len(schedule)
    timesteps = timestep_grid(T, T if steps is None else steps, spacing, log_snr=lambda: log_snr(schedule))
    if sampler == "ancestral" and variance == "learned" and len(timesteps) < T:
        raise InputError(
            f"the network learned the variance of single steps, and this chain takes {len(timesteps)} of {T}",
            hint="sampler ddim, or variance fixed_small",
        )
    with np.errstate(all="ignore"):
        part, x0 = respace(schedule, timesteps), None
        if prediction == "mu":  # also in a chain that leaves out timesteps, μ is the mean of a single step
            p, q = x0_coefficients(schedule, prediction)
            x0 = p[timesteps], q[timesteps]
        if sampler == "ddim":
            table = ddim(part, prediction, eta, x0=x0)
        elif sampler == "ancestral":
            table = ancestral(part, prediction, variance, x0=x0)
        else:
            table = multistep_table(part, prediction, sampler, x0=x0)
        if not np.isfinite(table.coefficients.astype(np.float32)).all():
            raise SpecError(
                "this schedule leaves no signal or adds no noise at some timestep",
                note="the chain would compute with NaN or infinities",
                hint="other β, or fewer timesteps",
            )
        if start is None:
            return table
        at = _position(table, start, T)
        if table.memory is not None:
            return multistep_table(part, prediction, sampler, x0=x0, steps=len(table) - at)
    return Table(table.timesteps[at:], table.rows[at:], None if table.learned is None else table.learned[at:])


def _position(table: Table, start: int, T: int) -> int:
    """The step that begins at the timestep ``start``, or at the nearest that is visited."""
    if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
        raise InputError(f"start must be a timestep that the chain visits, not {start!r}")
    if not 0 <= start < T:
        raise InputError(f"start must be from 0 to {T - 1}, not {start}", note=f"the model has T = {T}")
    visited = table.timesteps
    at = int(
        np.abs(visited - start).argmin()
    )  # the first of two: the larger t, where noise is rather removed than left
    if visited[at] != start:
        warnings.warn(
            f"start is {start}, which the chain does not visit: it begins at {visited[at]}, the nearest that it does",
            stacklevel=2,
        )
    return at


def _table(
    schedule: Schedule,
    x0: X0Coefficients,
    a: Float64,
    b: Float64,
    sigma: Float64,
    learned: Float64 | None = None,
) -> Table:
    rows = np.stack([*x0, a, b, sigma], axis=1)
    return Table(schedule.timesteps[::-1].copy(), rows[::-1].copy(), None if learned is None else learned[::-1].copy())
