"""How likely images are under a model: the variational bound in bits per dimension, and rate against distortion.

Ho et al. (2020), §2 and §4.3, Tables 1 and 4, Figure 5. The formulas are in :mod:`ddpmx.diffusion.bound`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion import bound, noise
from ddpmx.diffusion.noise import MAX_IMAGE, Purpose, check_seed
from ddpmx.diffusion.samplers import LEARNED_VARIANCES, Variance
from ddpmx.diffusion.schedule import Float64, Schedule
from ddpmx.errors import Cancelled, InputError, NumericError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import from_uint8

FULL_SCALE = 127.5
"""Levels of a difference of 1 in the model's [−1, 1]."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The bound on −log₂ p(x_0) of some images, in bits per dimension.

    The timesteps are in K groups, t = first[k]…last[k], of which group 0 is t = 0 alone; each t is its own group where all
    were computed.

    Attributes:
        variance: σ² of p.
        T: the model's timesteps.
        terms: how often the network ran for each image.
        seed: of the noise.
        images: float64 [n], the bound for each image.
        prior: float64 [n], L_T of each image.
        first, last: int64 [K], the timesteps of each group, rising.
        bits: float64 [K], the sum of a group's terms, mean over the images; ``bits[0]`` is L_0.
        bits_error: float64 [K], its standard error.
        mse: float64 [K], the mean of (x_0 − x̂_0)² at the group's timesteps, in [−1, 1].
    """

    variance: Variance
    T: int
    terms: int
    seed: int
    images: Float64
    prior: Float64
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    bits: Float64
    bits_error: Float64
    mse: Float64

    @property
    def bits_per_dim(self) -> float:
        """The bound: the mean of :attr:`images`."""
        return float(self.images.mean())

    @property
    def standard_error(self) -> float:
        """Of :attr:`bits_per_dim` over the images, with what the noise and the choice of t add. NaN of one image."""
        return _standard_error(self.images)

    @property
    def distortion(self) -> float:
        """L_0: the bits that the 256 levels of an image still need once x_t at t = 0 is known."""
        return float(self.bits[0])

    @property
    def rate(self) -> float:
        """All of the bound but L_0: the bits for x_t at t = 0."""
        return float(self.prior.mean() + self.bits[1:].sum())

    @property
    def rates(self) -> Float64:
        """The bits that are spent when x̂_0 is taken from x_t at a group's timesteps, float64 [K].

        L_T and the terms above t. Of a group of several timesteps, the mean over them if their terms are alike.
        """
        above = np.concatenate([np.cumsum(self.bits[:0:-1])[::-1], [0.0]])
        sizes = self.last - self.first + 1
        rates: Float64 = self.prior.mean() + above + self.bits * (sizes - 1) / (2 * sizes)
        return rates

    @property
    def rmse(self) -> Float64:
        """The distortion then: √ of the mean square of x_0 − x̂_0, in levels 0…255, float64 [K]."""
        return FULL_SCALE * np.sqrt(self.mse)

    def rows(self) -> Iterator[dict[str, float | int]]:
        """The table by t: t, first and last t of the group, bits and their standard error, rate and RMSE."""
        columns = (self.first, self.last, self.bits, self.bits_error, self.rates, self.rmse)
        for first, last, bits, error, rate, rmse in zip(*(column.tolist() for column in columns), strict=True):
            t = first if first == last else (first + last) / 2
            yield {
                "t": t,
                "first_t": first,
                "last_t": last,
                "bits_per_dim": bits,
                "standard_error": error,
                "rate": rate,
                "rmse": rmse,
            }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; None for a standard error that one image does not have."""
        rows = [{name: _number(value) for name, value in row.items()} for row in self.rows()]
        return {
            "bits_per_dim": self.bits_per_dim,
            "standard_error": _number(self.standard_error),
            "rate": self.rate,
            "distortion": self.distortion,
            "prior": float(self.prior.mean()),
            "variance": self.variance,
            "T": self.T,
            "terms": self.terms,
            "seed": self.seed,
            "images": self.images.tolist(),
            "by_t": rows,
        }


def nll(
    pipeline: Pipeline,
    images: NDArray[np.uint8],
    *,
    indices: NDArray[np.integer[Any]] | None = None,
    labels: Labels | None = None,
    cond: NDArray[np.float32] | None = None,
    guidance: float = 1.0,
    variance: Variance | None = None,
    terms: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Likelihood:
    """The variational bound on the negative log-likelihood of images, in bits per dimension (equation 5).

    Each term takes one draw of x_t for each image, whose noise is a function of (seed, index, t). x̂_0 is clipped as in the
    model's chain. A network that conditions on itself gets 0, as in a chain's first step.

    Args:
        pipeline: the model.
        images: uint8 [n, H, W, C].
        indices: [n], the index of each image, which its noise is a function of; 0…n−1 by default.
        labels, cond, guidance: as for :meth:`Pipeline.generate`; with them it is the likelihood given class or condition.
        variance: σ² of p(x_{t−1} | x_t), instead of the model's own.
        terms: compute only so many of the T terms of each image: that of t = 0, and of each of ``terms`` − 1 groups of
            timesteps one at random, times the group's size. The result is right on average, and its standard error holds
            what chance adds. By default all T.
        seed: of the noise.
        batch: images at once.
        progress: called with (network calls done, network calls in all).
        cancel: called before each network call; True stops the work.

    Raises:
        InputError: images that do not fit the model, a number out of its range, labels or a condition that are missing or
            wrong, or a variance that the network does not give.
        Cancelled: ``cancel`` returned True.
        NumericError: the network's output, or a term, is not finite.
        BackendError: the network could not be run.
    """
    spec, schedule = pipeline.spec, pipeline.spec.make_schedule()
    c, height, width = spec.shape
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, c) or not len(images):
        raise InputError(
            f"images must be uint8 [n, {height}, {width}, {c}], n at least 1",
            note=f"they are {images.dtype} {[*images.shape]}",
        )
    n = len(images)
    numbers = _indices(indices, n)
    pipeline.table(variance=variance)  # refuses a variance that the network does not give
    chosen = variance or spec.variance
    seed, first = check_seed(seed), groups(schedule, terms)
    batch = pipeline.check_request(n, batch=batch, labels=labels, guidance=guidance)
    classes = None if labels is None else class_labels(spec, n, labels)
    condition = None if cond is None else np.asarray(cond)
    if condition is not None and len(condition) != n:
        raise InputError(f"there are {n} images and {len(condition)} conditions")
    sizes = np.diff(np.append(first, spec.timesteps))
    draws = first + noise.integers(seed, numbers, Purpose.LIKELIHOOD, sizes, repeat=1)
    chain = _Terms(schedule, bound.log_variance(schedule, chosen), learned=chosen in LEARNED_VARIANCES)
    moments, squares = _Moments(len(first)), np.zeros(len(first))
    totals, prior = np.empty(n), np.empty(n)
    calls = -(-n // batch) * len(first)
    for number, at in enumerate(range(0, n, batch)):
        part = slice(at, min(at + batch, n))
        x0 = np.ascontiguousarray(from_uint8(images[part]).transpose(0, 3, 1, 2))
        values = np.empty((len(x0), len(first)))
        for k in range(len(first)):
            if cancel is not None and cancel():
                raise Cancelled("cancelled before all terms were computed")
            t = draws[part, k]
            x_t = _diffused(schedule, x0, t, seed, numbers[part])
            found = pipeline.evaluate(
                x_t,
                t,
                first=at,
                batch=batch,
                labels=None if classes is None else classes[part],
                cond=None if condition is None else condition[part],
                guidance=guidance,
            )
            apart = x0.astype(np.float64) - found.x0
            squares[k] += np.square(apart).reshape(len(x0), -1).mean(axis=1).sum()
            values[:, k] = sizes[k] * chain.bits(t, x0.astype(np.float64), found.x0.astype(np.float64), found.var)
            if progress is not None:
                progress(number * len(first) + k + 1, calls)
        prior[part] = bound.bits_per_dim(bound.prior_term(schedule, x0))
        totals[part] = prior[part] + values.sum(axis=1)
        moments.add(values)
    return Likelihood(
        chosen,
        spec.timesteps,
        len(first),
        seed,
        totals,
        prior,
        first,
        first + sizes - 1,
        moments.mean,
        moments.standard_error(),
        squares / n,
    )


def groups(schedule: Schedule, terms: int | None = None) -> NDArray[np.int64]:
    """The first timestep of each of ``terms`` groups of neighbouring ones, int64 [terms]; of all T where it is None.

    Group 0 is t = 0 alone. In the others log SNR falls by about the same: L_t is half of the fall of the SNR times the
    square of x̂_0's error, which is about 1/SNR and less, so no group can hold much more than the others.

    Raises:
        InputError: ``terms`` is not from 2 to T, or 1 where T is.
    """
    T = len(schedule)
    least = min(2, T)
    if terms is None:
        return np.arange(T)
    if isinstance(terms, bool) or not isinstance(terms, (int, np.integer)) or not least <= terms <= T:
        raise InputError(
            f"terms must be a whole number from {least} to {T}, not {terms!r}", note=f"the model has T = {T}"
        )
    with np.errstate(divide="ignore"):
        falls = -np.diff(np.log(schedule.snr))
    falls[~np.isfinite(falls)] = falls[np.isfinite(falls)].max(initial=1.0)  # where ᾱ = 0
    share = np.concatenate([[0.0], np.cumsum(falls)]) / max(falls.sum(), 1e-300)
    first = [0]
    for k in range(1, terms):
        wanted = 1 + int(np.searchsorted(share, (k - 1) / (terms - 1), side="right")) - 1
        first.append(min(max(wanted, first[-1] + 1), T - (terms - k)))
    return np.array(first)


class _Terms:
    """The terms L_t of one chain."""

    def __init__(self, schedule: Schedule, log_variance: Float64, *, learned: bool) -> None:
        self._schedule, self._log_variance, self._learned = schedule, log_variance, learned

    def bits(self, t: NDArray[np.int64], x0: Float64, x0_hat: Float64, var: NDArray[np.float32] | None) -> Float64:
        """L_t of each image in bits per dimension, [n]. All t are 0, or none is."""
        column = (slice(None), None, None, None)
        log_var = self._log_variance[t, 0][column]
        if self._learned:
            assert var is not None
            log_var = log_var + self._log_variance[t, 1][column] * var
        with np.errstate(all="ignore"):
            if t[0] == 0:
                nats = bound.decoder_term(x0, x0_hat, log_var)
            else:
                nats = bound.transition_term(self._schedule, t[column], x0, x0_hat, log_var)
            bits = bound.bits_per_dim(nats)
        if not np.isfinite(bits).all():
            bad = int(np.argmin(np.isfinite(bits)))
            raise NumericError(
                f"the term of t = {t[bad]} is not finite",
                note=f"log σ² is from {np.min(log_var):g} to {np.max(log_var):g}",
                hint="--variance fixed_small does without a variance that the network has learned",
            )
        return bits


class _Moments:
    """Mean and variance of many columns, batch by batch (Chan et al. 1983)."""

    def __init__(self, columns: int) -> None:
        self.n, self.mean, self._squares = 0, np.zeros(columns), np.zeros(columns)

    def add(self, values: Float64) -> None:
        """Add [m, columns]."""
        m, mean = len(values), values.mean(axis=0)
        apart, n = mean - self.mean, self.n + m
        self._squares += np.square(values - mean).sum(axis=0) + np.square(apart) * self.n * m / n
        self.mean += apart * m / n
        self.n = n

    def standard_error(self) -> Float64:
        """Of the means; NaN of one value."""
        if self.n < 2:
            return np.full_like(self.mean, np.nan)
        return np.sqrt(self._squares / (self.n - 1) / self.n)


def _standard_error(values: Float64) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _indices(indices: NDArray[np.integer[Any]] | None, n: int) -> NDArray[np.int64]:
    if indices is None:
        return np.arange(n)
    array = np.asarray(indices)
    if array.dtype.kind not in "iu" or array.shape != (n,) or array.min() < 0 or array.max() > MAX_IMAGE:
        raise InputError(f"indices must be {n} whole numbers from 0 to 2**32 - 1")
    return array.astype(np.int64)


def _diffused(
    schedule: Schedule, x0: NDArray[np.float32], t: NDArray[np.int64], seed: int, images: NDArray[np.int64]
) -> NDArray[np.float32]:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (equation 4), with a t for each image."""
    z = noise.normal(seed, images, t, Purpose.LIKELIHOOD, x0[0].size, each=True)
    signal, rest = (
        np.sqrt(values[t])[:, None, None, None] for values in (schedule.alpha_bar, schedule.one_minus_alpha_bar)
    )
    return (signal * x0 + rest * z.reshape(x0.shape)).astype(np.float32)
