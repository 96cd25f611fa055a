"""Which convention for the time fits a network, by the error of ε on real images.

t = 0…T−1 here is 1…T in the paper, and authors divide by T, by T − 1, or by nothing. A network that gets the time of the
next step answers nearly as well at most t, and clearly worse at the smallest, where ᾱ changes most from one t to the
next. There is no other sign of it: file and module agree.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_export.any_module import probes
from ddpm_export.any_module.adapter import Adapter, Time
from ddpm_export.proof.record import check_images
from ddpmx.diffusion.samplers import x0_coefficients
from ddpmx.errors import DdpmxError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.reference import diffusion_noise
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import from_uint8

MOST_IMAGES = 64
TIMES_TRIED = (0, 1, 2, 4, 8, 16, 32)
"""And T−1, for which a table of T rows has no row of the next."""

LEARNED = 0.9
"""A network with a larger error than this has not learnt: one that answers 0 has 1, the variance of ε."""

CLEARLY = 4.0
"""A convention fits better if its error is smaller by so many standard errors of the difference, image by image."""


@dataclass(frozen=True)
class TimeFit:
    """How well each convention for the time fits.

    Attributes:
        given: the name of the adapter's own.
        errors: for each convention, the mean square error of ε at the smallest t; 1 is that of answering 0.
        better: the convention that fits clearly better than the adapter's own, None if there is none.
    """

    given: str
    errors: dict[str, float]
    better: str | None

    def __str__(self) -> str:
        """In a sentence."""
        if self.better is None:
            return f"time={self.given} fits the images (error of ε {self.errors[self.given]:.3g})"
        return (
            f"time={self.better} fits the images better than time={self.given}: "
            f"error of ε {self.errors[self.better]:.3g}, not {self.errors[self.given]:.3g}"
        )


def fit_time(adapter: Adapter, spec: ModelSpec, images: NDArray[np.uint8]) -> TimeFit:
    """Compare the adapter's convention for the time with its neighbours.

    Args:
        adapter: of a trained network.
        spec: of the module, as for ``export``.
        images: uint8 [N, H, W, C] of the kind it was trained on; the first 64 count.

    Raises:
        InputError: the images are not uint8, or not of the model's size.
        DdpmxError: the network fails.
    """
    check_images(images, spec)
    images = images[:MOST_IMAGES]
    times = sorted({t for t in (*TIMES_TRIED, spec.timesteps - 1) if t < spec.timesteps})
    given = _name(adapter.time)
    each: dict[str, NDArray[np.float64]] = {}
    for name, time in _candidates(adapter.time, spec.timesteps).items():
        try:
            each[name] = _errors(dataclasses.replace(adapter, time=time), spec, images, times)
        except DdpmxError:  # a table of T rows has none for T
            if name == given:
                raise
    errors = {name: float(values.mean()) for name, values in each.items()}
    best = min(errors, key=lambda name: errors[name])
    gain = each[given] - each[best]
    deviation = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    clear = best != given and errors[best] < LEARNED and float(gain.mean()) > CLEARLY * deviation
    return TimeFit(given, errors, best if clear else None)


def _candidates(time: Time, timesteps: int) -> dict[str, Time]:
    """The convention itself, and those that it is mistaken for."""
    if isinstance(time, str):
        base = time.removesuffix("1")
        found: dict[str, Time] = {f'"{base}"': base, f'"{base}1"': f"{base}1"}  # type: ignore[dict-item]
        if base == "fraction" and timesteps > 1:
            found[f"(1/{timesteps - 1}, 0)"] = (1 / (timesteps - 1), 0.0)
        return found
    if isinstance(time, tuple) and len(time) == 2 and timesteps != 2:
        scale, offset = time
        moved = {offset: time, offset + scale: (scale, offset + scale), offset - scale: (scale, offset - scale)}
        return {_name(one): one for one in moved.values()}
    if callable(time):
        return {_name(time): time, "(t ↦ time(t + 1))": _moved(time, 1), "(t ↦ time(t − 1))": _moved(time, -1)}
    return {_name(time): time}


def _moved(time: Callable[[Tensor], Tensor], by: int) -> Callable[[Tensor], Tensor]:
    return lambda t: time(t + by)


def _name(time: Time) -> str:
    if isinstance(time, str):
        return f'"{time}"'
    if isinstance(time, tuple) and len(time) == 2:
        return f"({time[0]:g}, {time[1]:g})"
    return "(your function)" if callable(time) else "(your numbers)"


def _errors(adapter: Adapter, spec: ModelSpec, images: NDArray[np.uint8], times: list[int]) -> NDArray[np.float64]:
    """Of each image, the mean square error of ε over the times."""
    ours = adapter.spec_of(spec)
    network = copy.deepcopy(adapter.network(spec)).to("cpu").eval()
    schedule = ours.make_schedule()
    rows = np.arange(len(images))
    x0 = np.ascontiguousarray(from_uint8(images).transpose(0, 3, 1, 2))
    total = np.zeros(len(images))
    for t in times:
        eps = diffusion_noise(x0, t, 0)
        signal, sigma = math.sqrt(schedule.alpha_bar[t]), math.sqrt(schedule.one_minus_alpha_bar[t])
        x_t = (signal * x0 + sigma * eps).astype(np.float32)
        inputs: dict[str, Any] = {"x": x_t, "t": np.full(len(rows), t, np.int32), **example(ours, rows, seed=0)}
        if ours.self_condition:
            inputs["x0_prev"] = np.zeros_like(x_t)
        out = probes.run(network, {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in inputs.items()})
        out = out[:, : ours.shape[0]].numpy().astype(np.float64)
        if ours.prediction == "x0":  # ε = (x_t − √ᾱ·x̂_0)/√(1−ᾱ)
            out = (x_t - signal * out) / sigma
        elif ours.prediction == "v":  # ε = √ᾱ·v + √(1−ᾱ)·x_t
            out = signal * out + sigma * x_t
        elif ours.prediction == "mu":
            p, q = x0_coefficients(schedule, "mu")
            out = (x_t - signal * (p[t] * x_t + q[t] * out)) / sigma
        total += np.mean((out - eps) ** 2, axis=(1, 2, 3))
    return total / len(times)
