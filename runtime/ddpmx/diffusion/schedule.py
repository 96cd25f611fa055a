"""β_t, and every coefficient that follows from it. The only place in ddpmx with schedule mathematics.

Everything is float64, from IEEE operations alone (:mod:`ddpmx.diffusion.elementary` builds the others from them), so that
it has the same bits everywhere. The paper (Ho, Jain, Abbeel 2020) counts t = 1…T; code here and everywhere in ddpmx counts
t = 0…T−1, so t = 0 is an image with one step of noise, and ᾱ_{−1} = 1 is the clean image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary
from ddpmx.errors import InputError

Float64 = NDArray[np.float64]

MAX_TIMESTEPS = 1_000_000
"""250 times the steps of any published schedule; a larger T is a mistake."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance schedule: the coefficients of q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t) and its posterior.

    Attributes:
        alpha_bar: ᾱ_t = Π_{s≤t} (1 − β_s), float64 [S], falling.
        betas: β_t = 1 − ᾱ_t/ᾱ_{t−1}, float64 [S], in (0, 1].
        timesteps: the network's input t at each step, int64 [S], rising. 0…T−1, or a part of it once respaced.
    """

    alpha_bar: Float64
    betas: Float64
    timesteps: NDArray[np.int64] = field(repr=False)

    @classmethod
    def from_betas(cls, betas: Float64) -> Schedule:
        """The schedule of the given β_t, float64 [T].

        Raises:
            InputError: β is empty, too long, or leaves (0, 1].
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not 1 <= len(betas) <= MAX_TIMESTEPS:
            raise InputError(f"a schedule has one β for each of 1…{MAX_TIMESTEPS} steps, not the shape {betas.shape}")
        if not (np.all(betas > 0) and np.all(betas <= 1)):
            raise InputError(
                "β_t must lie in (0, 1] at every t",
                note=f"it runs from {betas.min():g} to {betas.max():g}",
            )
        alpha_bar = np.cumprod(1.0 - betas, dtype=np.float64)
        return cls(alpha_bar, betas, np.arange(len(betas)))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Float64) -> Schedule:
        """The schedule of the given ᾱ_t, float64 [T], by β_t = 1 − ᾱ_t/ᾱ_{t−1}. ᾱ is recomputed from these β.

        Raises:
            InputError: ᾱ is empty, too long, not strictly decreasing, or leaves [0, 1).
        """
        alpha_bar = np.asarray(alpha_bar, np.float64)
        if alpha_bar.ndim != 1 or not 1 <= len(alpha_bar) <= MAX_TIMESTEPS:
            raise InputError(
                f"a schedule has one ᾱ for each of 1…{MAX_TIMESTEPS} steps, not the shape {alpha_bar.shape}"
            )
        previous = np.concatenate([[1.0], alpha_bar[:-1]])
        if not (np.all(alpha_bar >= 0) and np.all(alpha_bar < previous)):
            raise InputError(
                "ᾱ_t must decrease at every t, from below 1 to 0 or above",
                note=f"it runs from {alpha_bar[0]:g} to {alpha_bar[-1]:g}",
            )
        return cls.from_betas(1.0 - alpha_bar / previous)

    def __len__(self) -> int:
        """The number of steps, S."""
        return len(self.betas)

    @cached_property
    def alpha_bar_prev(self) -> Float64:
        """ᾱ_{t−1}, with ᾱ_{−1} = 1."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @cached_property
    def one_minus_alpha_bar(self) -> Float64:
        """1 − ᾱ_t, summed as Σ ᾱ_{s−1}·β_s: the difference itself would lose its digits where β is tiny."""
        return np.cumsum(self.alpha_bar_prev * self.betas, dtype=np.float64)

    @cached_property
    def one_minus_alpha_bar_prev(self) -> Float64:
        """1 − ᾱ_{t−1}, with 1 − ᾱ_{−1} = 0."""
        return np.concatenate([[0.0], self.one_minus_alpha_bar[:-1]])

    @cached_property
    def snr(self) -> Float64:
        """Signal to noise, ᾱ_t / (1 − ᾱ_t)."""
        return self.alpha_bar / self.one_minus_alpha_bar

    @cached_property
    def posterior_variance(self) -> Float64:
        """β̃_t = β_t·(1 − ᾱ_{t−1}) / (1 − ᾱ_t), equation 7. β̃_0 = 0."""
        return self.betas * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @cached_property
    def posterior_mean_coef_x0(self) -> Float64:
        """The coefficient of x_0 in μ̃_t, equation 7: β_t·√ᾱ_{t−1} / (1 − ᾱ_t)."""
        return self.betas * np.sqrt(self.alpha_bar_prev) / self.one_minus_alpha_bar

    @cached_property
    def posterior_mean_coef_xt(self) -> Float64:
        """The coefficient of x_t in μ̃_t, equation 7: √α_t·(1 − ᾱ_{t−1}) / (1 − ᾱ_t)."""
        return np.sqrt(1.0 - self.betas) * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @cached_property
    def log_variance_small(self) -> Float64:
        """Log of the "fixed small" variance σ²_t = β̃_t. β̃_0 = 0 has no logarithm: t = 0 takes the value of t = 1."""
        return elementary.log(self._first_replaced(self.posterior_variance))

    @cached_property
    def log_variance_large(self) -> Float64:
        """Log of the "fixed large" variance σ²_t = β_t; t = 0 takes β̃_1, which gives the better likelihood."""
        return elementary.log(self._first_replaced(self.betas))

    def _first_replaced(self, variance: Float64) -> Float64:
        first = self.posterior_variance[1] if len(self) > 1 else self.betas[0]
        return np.concatenate([[first], variance[1:]])


def respace(schedule: Schedule, timesteps: NDArray[np.int64]) -> Schedule:
    """The shorter chain that visits only ``timesteps``, with the same ᾱ at each of them.

    β'_i = 1 − ᾱ_{τ_i} / ᾱ_{τ_{i−1}} (Nichol & Dhariwal 2021, §4).

    Args:
        schedule: the full chain.
        timesteps: int64 [S], strictly rising, within 0…T−1.

    Raises:
        InputError: ``timesteps`` is empty, not rising, or leaves 0…T−1.
    """
    tau = np.asarray(timesteps, np.int64)
    if tau.ndim != 1 or len(tau) == 0 or tau[0] < 0 or tau[-1] >= len(schedule) or np.any(np.diff(tau) <= 0):
        raise InputError(f"timesteps must rise strictly within 0…{len(schedule) - 1}")
    if len(tau) == len(schedule):
        return schedule
    alpha_bar = schedule.alpha_bar[tau]
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    return Schedule(alpha_bar, 1.0 - alpha_bar / previous, schedule.timesteps[tau])


# --- the named schedules ---------------------------------------------------------------------------------------------


def linear(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64:
    """Ho et al.: β from ``beta_start`` to ``beta_end`` in equal steps. Not rescaled by 1000/T."""
    return np.linspace(beta_start, beta_end, T)


def quad(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64:
    """Ho et al.: √β in equal steps (others call it "scaled_linear")."""
    return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), T) ** 2


def const(T: int, *, beta_end: float = 0.02) -> Float64:
    """Ho et al.: the same β everywhere."""
    return np.full(T, beta_end)


def warmup10(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64:
    """Ho et al.: linear over the first 10 % of the steps, then ``beta_end``."""
    return _warmup(T, beta_start, beta_end, 0.1)


def warmup50(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64:
    """Ho et al.: linear over the first half of the steps, then ``beta_end``."""
    return _warmup(T, beta_start, beta_end, 0.5)


def jsd(T: int) -> Float64:
    """Ho et al.: β_t = 1/T, 1/(T−1), …, 1. It ends at ᾱ = 0, where x_0 does not follow from ε."""
    return 1.0 / np.arange(T, 0, -1, dtype=np.float64)


def cosine(T: int, *, s: float = 0.008, beta_max: float = 0.999) -> Float64:
    """Nichol & Dhariwal 2021, equation 17: ᾱ(u) ∝ cos²((u + s)/(1 + s)·π/2), β capped at ``beta_max``."""
    u = np.arange(T + 1, dtype=np.float64) / T
    return _betas_of(elementary.cos((u + s) / (1 + s) * np.pi / 2) ** 2, beta_max)


def sigmoid_alpha_bar(
    T: int, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0, beta_max: float = 0.999
) -> Float64:
    """Jabri et al. 2022: ᾱ follows a sigmoid (denoising-diffusion-pytorch's "sigmoid")."""
    u = np.arange(T + 1, dtype=np.float64) / T
    first, last = _sigmoid(start / tau), _sigmoid(end / tau)
    return _betas_of((last - _sigmoid((u * (end - start) + start) / tau)) / (last - first), beta_max)


def sigmoid_beta(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02, width: float = 6.0) -> Float64:
    """β follows a sigmoid over ±``width`` (diffusers' and DDIM's "sigmoid")."""
    return _sigmoid(np.linspace(-width, width, T)) * (beta_end - beta_start) + beta_start


SCHEDULES: Mapping[str, Callable[..., Float64]] = {
    function.__name__: function
    for function in (linear, quad, const, warmup10, warmup50, jsd, cosine, sigmoid_alpha_bar, sigmoid_beta)
}
"""Every schedule that a model file can name. There are two sigmoids, so neither is called just "sigmoid"."""


def schedule_params(name: str, params: Mapping[str, float] | None = None) -> dict[str, float]:
    """The parameters of a named schedule, defaults filled in.

    Raises:
        InputError: no such schedule, or a parameter that it does not have or that is not a finite number.
    """
    if name not in SCHEDULES:
        raise InputError(f"there is no schedule {name!r}", hint=f"one of: {', '.join(SCHEDULES)}")
    defaults = {
        key: float(parameter.default)
        for key, parameter in inspect.signature(SCHEDULES[name]).parameters.items()
        if key != "T"
    }
    for key, value in (params or {}).items():
        if key not in defaults:
            raise InputError(
                f"schedule {name!r} has no parameter {key!r}", hint=f"it has: {', '.join(defaults) or '-'}"
            )
        if not is_number(value):
            raise InputError(f"schedule {name!r}: {key} is {value!r}, which is not a number")
    return {**defaults, **{key: float(value) for key, value in (params or {}).items()}}


def scaled_params(name: str, T: int) -> dict[str, float]:
    """The parameters of a named schedule with every β multiplied by 1000/T, so that ᾱ_T is about that of T = 1000.

    As improved-diffusion's ``get_named_beta_schedule`` scales its "linear" (Nichol & Dhariwal 2021).

    Raises:
        InputError: the schedule has no β to scale, since it follows t/T as it is; or T is so small that β exceeds 1.
    """
    params = schedule_params(name)
    betas = [key for key in params if key.startswith("beta_") and key != "beta_max"]
    if not betas:
        raise InputError(
            f"β of the schedule {name!r} is not to be scaled: it follows from t/T, for every T",
            hint="omit the scaling, or another schedule",
        )
    scaled = {key: value * 1000 / T if key in betas else value for key, value in params.items()}
    if max(scaled[key] for key in betas) >= 1:
        raise InputError(
            f"β of the schedule {name!r}, scaled by 1000/{T}, is not below 1",
            note=f"it would reach {max(scaled[key] for key in betas):g}",
            hint="a larger T, or the schedule cosine, which suits every T",
        )
    return scaled


def make_schedule(name: str, T: int, params: Mapping[str, float] | None = None) -> Schedule:
    """The schedule of that name over T steps.

    Raises:
        InputError: unknown name or parameter, T outside 1…:data:`MAX_TIMESTEPS`, or parameters that take β out of
            (0, 1].
    """
    if isinstance(T, bool) or not isinstance(T, int) or not 1 <= T <= MAX_TIMESTEPS:
        raise InputError(f"T must be a whole number from 1 to {MAX_TIMESTEPS}, not {T!r}")
    filled = schedule_params(name, params)
    try:
        with np.errstate(all="ignore"):  # absurd parameters give NaN, which from_betas refuses as out of range
            return Schedule.from_betas(SCHEDULES[name](T, **filled))
    except ArithmeticError as error:
        raise InputError(f"schedule {name!r} cannot be computed with {filled}", note=str(error)) from error


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite float, or an int that fits into one."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> Float64:
    betas = np.full(T, beta_end)
    rising = int(T * fraction)
    betas[:rising] = np.linspace(beta_start, beta_end, rising)
    return betas


def _betas_of(alpha_bar: Float64, beta_max: float) -> Float64:
    """β_t from ᾱ at the T + 1 points u = 0…1, capped so that ᾱ never reaches 0."""
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], beta_max)


def _sigmoid(x: Float64 | float) -> Float64:
    return np.asarray(1.0 / (1.0 + elementary.exp(-np.asarray(x, np.float64))))
