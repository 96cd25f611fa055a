"""What an error of the network's output does to x_{t−1}, to the likelihood and to the pixels, and bounds that follow.

One update is x̂_0 = clip(p·x + q·out), x_{t−1} = A·x̂_0 + B·x + σ·z, the numbers from the sampler's table. So an error δ of
the output becomes an error A·q·δ of x_{t−1}: at most 0.02·δ for a linear schedule that predicts ε, 32·δ in the first step
of a cosine schedule, δ itself at t = 0 for a network that predicts x_0. No number serves all of them; each bound here is
computed from the table of the model at hand and the bound on its output, and grows with neither the file nor its error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import bound
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.diffusion.schedule import Float64
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Float32

ULP = 2.0**-24
"""Half the spacing of float32 just above 1: the largest relative error of one rounding."""

ALIGNED = 0.25
"""The part of an error that may point along the residual x_0 − x̂_0 (their correlation). Roundings know nothing of what the
network cannot predict: over N values the correlation is about 1/√N. A fault that makes every x̂_0 worse has 1."""

DRIFT = 1e-3
"""Size of the error, in units of the outputs' RMS, with which the drift of a recorded chain is measured."""


def rms(values: NDArray[Any]) -> float:
    """√mean(values²), in float64."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def step(table: Table, spec: ModelSpec, t: int, x: Float32, out: Float32, var: Float32 | None) -> Float32:
    """x_{t−1} without its noise, which is the same on both sides; with a learned σ, z = 1 makes its error count.

    Args:
        table: of all T timesteps.
        spec: of the network.
        t: the timestep.
        x: x_t, float32 of any shape.
        out: the output, of the same shape.
        var: the second output, or None.
    """
    row, learned = _row(table, t)
    row32 = row.astype(np.float32)
    x0, x_next = np.empty_like(x), np.empty_like(x)
    sigma = z = None
    if learned is not None and var is not None and row[4] != 0:
        sigma, z = chain.learned_sigma(learned.astype(np.float32), var), np.ones_like(x)
    chain.update(row32, _limit(spec), x, out, z, x0=x0, x_next=x_next, sigma=sigma)
    return x_next


def step_bound(
    table: Table, spec: ModelSpec, t: int, x: Float32, out: Float32, var: Float32 | None, error: float, var_error: float
) -> float:
    """The largest RMS error of :func:`step` that an RMS error of the outputs can cause.

    |A|·min(|q|·δ, 2·clip) + |d|·max σ·δ_v + 4u·(|A|·(|p|·|x| + |q|·|out|) + |B|·|x| + max σ)

    Clipping brings two numbers nearer to each other, never further apart, and leaves them at most 2·clip apart. The second
    term is the derivative of σ = exp(c + d·v). The third is float32's rounding of the update itself on both sides, u =
    2⁻²⁴, with RMS values for |x| and |out|.

    Args:
        table, spec, t, x, out, var: as for :func:`step`, by PyTorch.
        error: δ, of the output.
        var_error: δ_v, of the second output.
    """
    (p, q, a, b, _), learned = _row(table, t)
    moved = abs(a) * min(abs(q) * error, 2 * _limit(spec))
    size = abs(a) * (abs(p) * rms(x) + abs(q) * rms(out)) + abs(b) * rms(x)
    if learned is not None and var is not None and t > 0:
        sigma = float(np.exp(learned[0] + learned[1] * var.astype(np.float64) + abs(learned[1]) * var_error).max())
        moved += abs(learned[1]) * sigma * var_error
        size += sigma
    return float(moved + 4 * ULP * size)


def bits(spec: ModelSpec, t: NDArray[np.int32], x0: Float32, x: Float32, out: Float32, var: Float32 | None) -> float:
    """Σ_{t≥1} KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) in bits per dimension, from the recorded t.

    With a fixed σ² the part that depends on the network is A²‖x_0 − x̂_0‖²/(2σ²) (equation 10, for any prediction); with a
    learned σ², (log(σ²/β̃) + β̃/σ² − 1)/2 is added. Each recorded t stands for the timesteps that are nearest to it.

    Args:
        spec: of the network.
        t: int32 [K].
        x0: float32 [n, E], the images.
        x: float32 [K, n, E], x_t.
        out: float32 [K, n, E], the outputs.
        var: float32 [K, n, E], the second outputs, or None.
    """
    return sum(term.value for term in _terms(spec, t, x0, x, out, var)) / float(np.log(2))


def bits_bound(
    spec: ModelSpec,
    t: NDArray[np.int32],
    x0: Float32,
    x: Float32,
    out: Float32,
    var: Float32 | None,
    error: Float64,
    var_error: float,
) -> float:
    """The largest change of :func:`bits` by RMS errors of the outputs that are not aligned with what they spoil.

    A²/(2σ²)·(2ρ·|q|δ·‖x_0 − x̂_0‖ + (qδ)²) for each t, ρ = :data:`ALIGNED`: the difference of two squares, by
    Cauchy–Schwarz where ρ = 1. A learned σ² adds ρ times its own derivative,
    |2d|·δ_v·‖(1 − β̃/σ²)/2 − A²(x_0 − x̂_0)²/(2σ²)‖.

    Args:
        spec, t, x0, x, out, var: as for :func:`bits`, by PyTorch.
        error: δ, float64 [K], of the output at each t.
        var_error: δ_v, of the second output.
    """
    limit, total = _limit(spec), 0.0
    for term in _terms(spec, t, x0, x, out, var):
        moved = min(abs(term.q) * float(error[term.index]), 2 * limit)
        total += term.weight * (2 * ALIGNED * moved * term.residual + moved**2)
        total += ALIGNED * term.slope * var_error
    return total / float(np.log(2)) + 1e-9  # float64's own rounding


def distortion(spec: ModelSpec, x0: Float32, x: Float32, out: Float32, var: Float32 | None) -> float:
    """L_0 = −log p(x_0 | x_t) at t = 0, of the 256 levels, in bits per dimension (equation 13).

    Args:
        spec: of the network.
        x0: float32 [n, E], the images, levels in [−1, 1].
        x: float32 [n, E], x_t at t = 0.
        out: float32 [n, E], the outputs there.
        var: float32 [n, E], the second outputs, or None.
    """
    guess, log_var = _at_zero(spec, x, out, var)
    return float(bound.decoder_term(x0.astype(np.float64), guess, log_var).mean()) / float(np.log(2))


def distortion_bound(
    spec: ModelSpec, x0: Float32, x: Float32, out: Float32, var: Float32 | None, error: float, var_error: float
) -> float:
    """The largest change of :func:`distortion` by RMS errors of the outputs that are not aligned with what they spoil.

    2ρ·m·‖L_0'‖/2 + m²/(2σ²), m = min(|q|·δ, 2·clip): Taylor's formula in x̂_0, since the second derivative of −log p is at
    most 1/σ². A learned σ² adds what v ± δ_v changes by itself.

    Args:
        spec, x0, x, out, var: as for :func:`distortion`, by PyTorch.
        error: δ, of the output.
        var_error: δ_v, of the second output.
    """
    clean = x0.astype(np.float64)
    guess, log_var = _at_zero(spec, x, out, var)
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    moved = min(abs(_row(table, 0)[0][1]) * error, 2 * _limit(spec))
    total, least = 0.0, float(np.min(log_var))
    if var is not None:
        here = bound.decoder_term(clean, guess, log_var)
        for sign in (-1, 1):
            _, shifted = _at_zero(spec, x, out, var + np.float32(sign * var_error))
            total = max(total, float(np.abs(bound.decoder_term(clean, guess, shifted) - here).mean()))
            least = min(least, float(shifted.min()))
    total += ALIGNED * moved * rms(bound.level_slope(clean, guess, 0.5 * log_var)) + moved**2 / (2 * np.exp(least))
    return float(total / np.log(2)) + 1e-9


def _at_zero(spec: ModelSpec, x: Float32, out: Float32, var: Float32 | None) -> tuple[Float64, Float64]:
    """(x̂_0, log σ² of the decoder) at t = 0."""
    schedule = spec.make_schedule()
    (p, q, *_), _ = _row(make_table(schedule, spec.prediction, spec.variance), 0)
    limit = _limit(spec)
    c, d = bound.log_variance(schedule, spec.variance)[0]
    guess = np.clip(p * x.astype(np.float64) + q * out.astype(np.float64), -limit, limit)
    return guess, np.broadcast_to(c if var is None else c + d * var.astype(np.float64), guess.shape)


class _Term:
    """The KL divergence at one recorded t, times the number of timesteps that it stands for; in nats per dimension."""

    def __init__(self, index: int, q: float, weight: float, residual: float, value: float, slope: float) -> None:
        self.index, self.q, self.weight, self.residual, self.value, self.slope = (
            index,
            q,
            weight,
            residual,
            value,
            slope,
        )


def _terms(
    spec: ModelSpec, t: NDArray[np.int32], x0: Float32, x: Float32, out: Float32, var: Float32 | None
) -> list[_Term]:
    schedule = spec.make_schedule()
    table = make_table(schedule, spec.prediction, spec.variance)
    limit = _limit(spec)
    owners = np.abs(np.arange(1, spec.timesteps)[:, None] - t[None, :]).argmin(axis=1)
    share = np.bincount(owners, minlength=len(t))
    terms = []
    for i, ti in enumerate(t.tolist()):
        (p, q, a, _, sigma), learned = _row(table, ti)
        if sigma == 0:
            continue
        guess = np.clip(p * x[i].astype(np.float64) + q * out[i].astype(np.float64), -limit, limit)
        squares = np.square(x0 - guess)
        variance: Any = sigma**2
        value, slope = 0.0, 0.0
        if learned is not None and var is not None:
            c, d = learned
            variance, small = np.exp(2 * (c + d * var[i].astype(np.float64))), schedule.posterior_variance[ti]
            value = float(np.mean(np.log(variance / small) + small / variance - 1)) / 2
            slope = abs(2 * d) * rms((1 - small / variance) / 2 - a**2 * squares / (2 * variance))
        value += a**2 * float(np.mean(squares / (2 * variance)))
        # where σ² differs from place to place, its least: the bound is one for every place
        weight = float(a**2 / (2 * np.min(variance)))
        terms.append(_Term(i, q, share[i] * weight, float(np.sqrt(squares.mean())), share[i] * value, share[i] * slope))
    return terms


def pixels_bound(usual: float, drift: Float32 | None, error: float) -> float:
    """The least share of a free chain's pixels within one level, for outputs with errors of this size.

    The drift of PyTorch's own chain was recorded, under errors of :data:`DRIFT` in every output, half of their variance
    the same in all steps and half new in each. A file's errors are usually a quarter of their bound. Drift grows with the
    error, so each pixel's distance d is known in levels: within one level for d ≤ 1, not for d ≥ 2, and between them with
    a chance of 2 − d. Twice as many pixels may be off.

    Args:
        usual: the share demanded of a chain that does not amplify errors.
        drift: float32 [Q], quantiles of the distance in levels, or None if it was not recorded.
        error: the bound on the output's RMS error, in units of the outputs' RMS.
    """
    if drift is None:
        return usual
    distance = drift.astype(np.float64) * (error / 4 / DRIFT)
    within = float(np.clip(2 - distance, 0, 1).mean())
    return min(usual, 1 - 2 * (1 - within))


def gain(table: Table, spec: ModelSpec) -> float:
    """The largest |A·q| of a chain, where clipping does not bound it: how much of an output's error x_{t−1} feels."""
    _, q, a, _, _ = table.rows.T
    return float(np.max(np.abs(a) * np.minimum(np.abs(q), 2 * _limit(spec) / DRIFT)))


def _row(table: Table, t: int) -> tuple[Float64, Float64 | None]:
    index = len(table) - 1 - int(t)
    return table.rows[index], None if table.learned is None else table.learned[index]


def _limit(spec: ModelSpec) -> float:
    return np.inf if spec.clip is None else spec.clip
