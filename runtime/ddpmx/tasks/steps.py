"""One step of a table, for tasks that evaluate the network themselves: with the bits of a chain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table
from ddpmx.sampling import chain

Float32 = NDArray[np.float32]


def draws(table: Table, number: int) -> bool:
    """Whether a step of the table adds noise."""
    return bool(table.rows[number, 4].astype(np.float32) != 0)


def step(table: Table, number: int, x: Float32, x0: Float32, var: Float32 | None, z: Float32 | None) -> Float32:
    """x_next = (A·x̂_0 + B·x) + σ·z, float32, by :func:`ddpmx.sampling.chain.update`.

    Args:
        table: of a sampler without memory.
        number: which of its steps.
        x: x_t.
        x0: x̂_0, clipped, as :meth:`ddpmx.Pipeline.evaluate` gives it.
        var: the network's second output, or None.
        z: N(0, I) where the step :func:`draws`, or else None.
    """
    _, _, a, b, fixed = table.rows[number].astype(np.float32)
    sigma = None
    if z is not None and table.learned is not None and var is not None:
        sigma = chain.learned_sigma(table.learned[number].astype(np.float32), var)
    following = np.empty_like(x)
    row = np.array([0, 1, a, b, fixed], np.float32)  # 0·x + 1·x̂_0: the first half of the update is done
    chain.update(row, np.inf, x, x0, z, x0=np.empty_like(x), x_next=following, sigma=sigma)
    return following
