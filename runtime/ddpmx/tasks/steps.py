"""What tasks that begin within a chain, or evaluate the network themselves, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import from_uint8
from ddpmx.sampling.request import Sampling

Float32 = NDArray[np.float32]


class Model(Protocol):
    """What knows a model and its chains: a :class:`ddpmx.Pipeline`, or a batcher."""

    @property
    def spec(self) -> ModelSpec:
        """The model."""

    def table(self, sampling: Sampling | None = None) -> Table:
        """A sampler as a table."""


def draws(table: Table, number: int) -> bool:
    """Whether a step of the table adds noise."""
    return bool(table.rows[number, 4].astype(np.float32) != 0)


def step(
    table: Table,
    number: int,
    x: Float32,
    x0: Float32,
    var: Float32 | None,
    z: Float32 | None,
    earlier: Sequence[Float32] = (),
) -> Float32:
    """One step of a table: x_next = (A·x̂_0 + B·x) + C·x̂_0' + D·x̂_0'' + σ·z, float32, as
    :func:`ddpmx.sampling.chain.update` has it.

    Args:
        table: the sampler's.
        number: which of its steps.
        x: x_t.
        x0: x̂_0, clipped, as :meth:`ddpmx.Pipeline.evaluate` gives it.
        var: the network's second output, or None.
        z: N(0, I) where the step :func:`draws`, or else None.
        earlier: x̂_0 of the step before, and of the one before that, for a sampler with memory; as far as there are.
    """
    _, _, a, b, fixed = table.rows[number].astype(np.float32)
    sigma = None
    if z is not None and table.learned is not None and var is not None:
        sigma = chain.learned_sigma(table.learned[number].astype(np.float32), var)
    memory = []
    if table.memory is not None:
        weights = table.memory[number].astype(np.float32)
        memory = [(weight, array) for weight, array in zip(weights, earlier, strict=False) if weight != 0]
    following = np.empty_like(x)
    row = np.array([0, 1, a, b, fixed], np.float32)  # 0·x + 1·x̂_0: the first half of the update is done
    chain.update(row, np.inf, x, x0, z, x0=np.empty_like(x), x_next=following, sigma=sigma, memory=memory)
    return following


def q_sample(schedule: Schedule, x0: Float32, t: int, eps: Float32) -> Float32:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Ho et al. 2020, equation 4), float32."""
    signal, noise = np.sqrt(schedule.alpha_bar[t]), np.sqrt(schedule.one_minus_alpha_bar[t])
    return np.float32(signal) * x0 + np.float32(noise) * eps


def as_states(pipeline: Model, images: NDArray[np.uint8], what: str = "images") -> Float32:
    """Pixels, uint8 [n, H, W, C] of the model's size, as x_0, float32 [n, C, H, W].

    Raises:
        InputError: an array of another type or shape.
    """
    C, H, W = pipeline.spec.shape
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.shape[1:] != (H, W, C) or not len(array):
        raise InputError(f"{what} must be uint8 [n, {H}, {W}, {C}]", note=f"they are {array.dtype} {[*array.shape]}")
    return np.ascontiguousarray(from_uint8(array).transpose(0, 3, 1, 2))


def visited(table: Table, t: int) -> int:
    """The timestep of the table that is nearest to t."""
    return int(table.timesteps[np.abs(table.timesteps - t).argmin()])
