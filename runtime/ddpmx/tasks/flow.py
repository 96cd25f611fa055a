"""The ODE whose states have the distributions of the chain's (Song et al. 2021, §4.3): images ↔ x_T, and log p.

With x̄ = x/√ᾱ and ℓ = log(√(1−ᾱ)/√ᾱ) the probability-flow ODE is

    dx̄/dℓ = e^ℓ·ε̂(x, ℓ),    d log p(x̄)/dℓ = −√(1−ᾱ)·∇ₓ·ε̂

between ℓ of t = 0 and of t = T−1. scipy chooses the steps, for each image by itself, so that an image does not depend on
others. ε̂ between two timesteps is interpolated (:class:`ddpmx.tasks.continuous.Between`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose, check_seed
from ddpmx.diffusion.samplers import x0_coefficients
from ddpmx.diffusion.schedule import Float64
from ddpmx.errors import BackendError, InputError, NumericError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.continuous import Between, Float32, alpha_bar
from ddpmx.tasks.steps import as_states

Divergence = Callable[[Float32, int, Float32, int], Float64]
"""(x_t [n, C, H, W], t, probes v of the same shape, index of the first image) → v·J·v of each image, float64 [n], J the
Jacobian of the network's output by x."""

STEP = 0.01
"""Half of the distance of a finite difference, in standard deviations of x_t's noise: float32 outputs are exact to about
1e-6, and over this distance they change by 1e-2."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images as the noise that the ODE makes them from.

    Attributes:
        x: float32 [n, C, H, W], x_T: :func:`decode` gives the images again.
        log_p: float64 [n], log p of each image as a point of [−1, 1]^(C·H·W), in nats; None if it was not asked for.
        calls: how often the network ran, an image counted once each time.
    """

    x: Float32
    log_p: Float64 | None
    calls: int

    @property
    def bits_per_dim(self) -> Float64:
        """−log₂ of the probability of one level of 256 at each pixel, per dimension, float64 [n].

        Raises:
            InputError: log p was not asked for.
        """
        if self.log_p is None:
            raise InputError("log p was not computed", hint="encode(…, likelihood=True)")
        bits: Float64 = -self.log_p / (math.log(2) * self.x[0].size) + math.log2(127.5)
        return bits


def encode(
    pipeline: Pipeline,
    images: NDArray[np.uint8],
    *,
    likelihood: bool = False,
    divergence: Divergence | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: NDArray[np.float32] | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Encoded:
    """Follow the ODE from images, taken as states at t = 0, to t = T−1.

    With ``likelihood`` it is an estimate of log p, by one probe of random signs for each image (Hutchinson): right on
    average over seeds. Each value is moved to a random place within its level first, as for any density of images.
    ∇·ε̂ is exact along the probe with ``divergence``, and else by finite differences in float32.

    Args:
        pipeline: the model.
        images: uint8 [n, H, W, C].
        likelihood: estimate log p as well; three to four times as many calls of the network.
        divergence: of the network's output, where torch runs it: the method of that name of
            ``ddpm_export.training.pipeline.RunPipeline``.
        tolerance: relative and absolute, of the ODE.
        seed: of the probes, and of the places within the levels.
        first, batch, labels, cond, guidance: as for :meth:`ddpmx.Pipeline.evaluate`.
        progress: called with (images done, images in all).
        cancel: called before each call of the network; True stops the work.

    Raises:
        InputError: images that do not fit the model, a number out of its range, a schedule that ends at ᾱ = 0, a network
            that conditions on itself, or finite differences of a network in half precision.
        Cancelled: ``cancel`` returned True.
        NumericError: the network's output was not finite, or the ODE could not be solved.
        BackendError: the network could not be run, or scipy is missing.
    """
    spec, seed = pipeline.spec, check_seed(seed)
    x: Float64 = as_states(pipeline, images).astype(np.float64)
    if likelihood and divergence is None and spec.precision != "fp32":
        raise InputError(
            f"log p needs differences of the network's output, and in {spec.precision} they are lost in rounding",
            hint="the fp32 file of the model, or the run that it was exported from",
        )
    n = len(images)
    each = _each(pipeline, n, first, batch, labels, cond, guidance)
    if likelihood:
        x = x + _within_levels(seed, first, n, spec.shape)
    found, log_p, calls = np.empty((n, *spec.shape), np.float32), np.empty(n), 0
    for i in range(n):
        network = Between(pipeline, cancel, **each(i))
        ends = float(network.levels[0]), float(network.levels[-1])
        rate = None
        if likelihood:
            z = noise.normal(seed, np.array([first + i]), 0, Purpose.PROBE, math.prod(spec.shape))
            probe = np.where(z < 0, np.float32(-1), np.float32(1)).reshape(1, *spec.shape)
            rate = _rate(network, pipeline, probe, divergence, first + i)
        state, change = _solve(network, x[i], ends, tolerance, first + i, rate)
        signal = math.sqrt(alpha_bar(ends[1]))
        found[i] = signal * state
        size = state.size
        standard = -0.5 * (float(np.square(found[i], dtype=np.float64).sum()) + size * math.log(2 * math.pi))
        log_p[i] = standard + size * math.log(signal) - change
        calls += network.calls
        if progress is not None:
            progress(i + 1, n)
    return Encoded(found, log_p if likelihood else None, calls)


def decode(
    pipeline: Pipeline,
    x: Float32,
    *,
    tolerance: float = 1e-4,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: NDArray[np.float32] | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> NDArray[np.uint8]:
    """Follow the ODE from x_T to t = 0, and take x̂_0 there: uint8 [n, H, W, C].

    Args:
        pipeline, tolerance, first, batch, labels, cond, guidance, progress, cancel: as for :func:`encode`.
        x: float32 [n, C, H, W], N(0, I) or what :func:`encode` gave.

    Raises:
        InputError, Cancelled, NumericError, BackendError: as :func:`encode`.
    """
    spec = pipeline.spec
    x = np.asarray(x)
    if x.dtype != np.float32 or x.ndim != 4 or x.shape[1:] != spec.shape or not len(x):
        raise InputError(f"x must be float32 {['n', *spec.shape]}, n at least 1", note=f"it is {x.dtype} {[*x.shape]}")
    n = len(x)
    each = _each(pipeline, n, first, batch, labels, cond, guidance)
    samples = np.empty_like(x)
    for i in range(n):
        network = Between(pipeline, cancel, **each(i))
        ends = float(network.levels[-1]), float(network.levels[0])
        state, _ = _solve(network, x[i] / math.sqrt(alpha_bar(ends[0])), ends, tolerance, first + i, None)
        samples[i] = network.x0((math.sqrt(alpha_bar(ends[1])) * state).astype(np.float32)[None], first + i)[0]
        if progress is not None:
            progress(i + 1, n)
    return to_nhwc(samples)


def sample(pipeline: Pipeline, n: int = 1, *, seed: int = 0, first: int = 0, **how: Any) -> NDArray[np.uint8]:
    """Draw images by the ODE from the x_T of :meth:`ddpmx.Pipeline.generate`, uint8 [n, H, W, C].

    Args:
        pipeline, n, seed, first: as there.
        **how: as for :func:`decode`.

    Raises:
        InputError, Cancelled, NumericError, BackendError: as :func:`encode`.
    """
    pipeline.check_request(n, seed=seed, first=first)
    start = chain.initial(check_seed(seed), np.arange(first, first + n), pipeline.spec.shape)
    return decode(pipeline, start, first=first, **how)


def _solve(
    network: Between,
    state: Float64,
    ends: tuple[float, float],
    tolerance: float,
    index: int,
    rate: Callable[[Float32, float], float] | None,
) -> tuple[Float64, float]:
    """x̄ [C, H, W] at the other end, and the change of log p on the way there (0 without its ``rate``)."""
    if not (isinstance(tolerance, float) and 1e-7 <= tolerance <= 0.1):
        raise InputError(f"tolerance must be from 1e-7 to 0.1, not {tolerance!r}")
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise BackendError(
            "the ODE is solved by scipy, which is missing", note=str(error), hint="pip install 'ddpmx[flow]'"
        ) from error
    shape, size = state.shape, state.size

    def slope(level: float, y: Float64) -> Float64:
        signal = math.sqrt(alpha_bar(level))
        x = (signal * y[:size]).astype(np.float32).reshape(1, *shape)
        out = np.zeros_like(y)
        out[:size] = math.exp(level) * network.eps(x, level, index).reshape(-1)
        if rate is not None:
            out[size] = -rate(x, level)
        return out

    begin = np.append(state.reshape(-1), [0.0] * (rate is not None))
    solved = solve_ivp(slope, ends, begin, rtol=tolerance, atol=tolerance)
    if not solved.success or not np.isfinite(solved.y[:, -1]).all():
        raise NumericError("the ODE could not be solved", note=str(solved.message)[:200], hint="a larger tolerance")
    y = solved.y[:, -1]
    return y[:size].reshape(shape), float(y[size]) if rate is not None else 0.0


def _rate(
    network: Between, pipeline: Pipeline, probe: Float32, divergence: Divergence | None, index: int
) -> Callable[[Float32, float], float]:
    """√(1−ᾱ)·v·J·v with J the Jacobian of ε̂ by x, at a state and a level."""
    spec = pipeline.spec
    p, q = x0_coefficients(spec.make_schedule(), spec.prediction)

    def exact(x: Float32, level: float) -> float:
        assert divergence is not None
        total = 0.0
        for t, weight in network.neighbours(level):
            signal, deviation = (math.sqrt(v) for v in (alpha_bar(network.levels[t]), 1 - alpha_bar(network.levels[t])))
            of_out = float(divergence(x, t, probe, index)[0])
            # ε̂ = (x − √ᾱ·x̂_0)/√(1−ᾱ) with x̂_0 = p·x + q·out
            total += weight * ((1 - signal * p[t]) * probe.size - signal * q[t] * of_out) / deviation
        return math.sqrt(1 - alpha_bar(level)) * total

    def differences(x: Float32, level: float) -> float:
        deviation = math.sqrt(1 - alpha_bar(level))
        h = np.float32(STEP * deviation)
        ahead, behind = (network.eps(x + sign * h * probe, level, index).astype(np.float64) for sign in (1, -1))
        return deviation * float(((ahead - behind) * probe).sum()) / (2 * float(h))

    return differences if divergence is None else exact


def _within_levels(seed: int, first: int, n: int, shape: tuple[int, int, int]) -> Float64:
    """Where in its level each value lies, uniform in ±1/255·(255/255): float64 [n, C, H, W], ±1/255."""
    words = noise.integers(
        seed, np.arange(first, first + n), Purpose.PROBE, np.full(math.prod(shape), 1 << 16), repeat=1
    )
    return ((words + 0.5) / (1 << 16) - 0.5).reshape(n, *shape) / 127.5


def _each(
    pipeline: Pipeline,
    n: int,
    first: int,
    batch: int | None,
    labels: Labels | None,
    cond: NDArray[np.float32] | None,
    guidance: float,
) -> Callable[[int], dict[str, Any]]:
    """The conditioning of each image alone."""
    pipeline.check_request(n, first=first, batch=batch, labels=labels, guidance=guidance)
    classes = None if labels is None else class_labels(pipeline.spec, n, labels)
    condition = None if cond is None else np.asarray(cond)
    if condition is not None and len(condition) != n:
        raise InputError(f"there are {n} images and {len(condition)} conditions")

    def of(i: int) -> dict[str, Any]:
        return {
            "batch": batch,
            "labels": None if classes is None else int(classes[i]),
            "cond": None if condition is None else condition[i : i + 1],
            "guidance": guidance,
        }

    return of
