"""One update, one loop: runs a sampler's table over a batch.

The update is float32 whatever the precision of the network: x̂_0 multiplies the network's error by up to 157 at t = 999,
and x_{t−1} must feel no more than 0.02 of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx import noise
from ddpmx.backends import Backend, Buffers
from ddpmx.errors import NumericError
from ddpmx.noise import Purpose
from ddpmx.samplers import Table

Float32 = NDArray[np.float32]


class Step(NamedTuple):
    """One reverse step. The arrays are the chain's own: copy what must outlive the next step.

    Attributes:
        t: what the network was told.
        x: float32 [B, C, H, W], x_t, that the network saw.
        x0: float32 [B, C, H, W], x̂_0.
        x_next: float32 [B, C, H, W], the state that the step leads to; after the last one, the sample.
    """

    t: int
    x: Float32
    x0: Float32
    x_next: Float32


def update(
    row: Float32, limit: float, x: Float32, out: Float32, z: Float32 | None, *, x0: Float32, x_next: Float32
) -> None:
    """x̂_0 = clip(p·x + q·out), x_next = (A·x̂_0 + B·x) + σ·z, in float32 and in that order, without fused operations.

    Args:
        row: float32 [5], p, q, A, B, σ.
        limit: the largest |x̂_0|; infinity for no clipping. NaN passes through.
        x: x_t.
        out: the network's answer.
        z: N(0, I), or None where σ = 0.
        x0: where x̂_0 goes. Any shape, the same for all arrays.
        x_next: where the result goes.
    """
    p, q, a, b, sigma = row
    np.multiply(x, p, out=x0)
    np.multiply(out, q, out=x_next)
    np.add(x0, x_next, out=x0)
    np.clip(x0, np.float32(-limit), np.float32(limit), out=x0)
    np.multiply(x, b, out=x_next)
    np.add(x0 * a, x_next, out=x_next)
    if z is not None:
        np.add(x_next, z * sigma, out=x_next)


def initial(seed: int, images: NDArray[np.int64], shape: tuple[int, int, int]) -> Float32:
    """x_T ~ N(0, I) for each image, float32 [n, C, H, W]."""
    z = noise.normal(seed, images, 0, Purpose.INITIAL, int(np.prod(shape)))
    return z.reshape(len(images), *shape)


def executed_batch(backend: Backend, shape: tuple[int, int, int], timesteps: int, n: int, batch: int) -> int:
    """At which batch size to run ``n`` ≤ ``batch`` images, so that how images are grouped changes no bit of them.

    Libraries pick other instructions for other shapes, and threads may split a batch in the middle of an image. What
    they pick depends on the shape alone, so random images tell:

    - 1, if an image's answer depends on its place among ``batch``: then each has to run alone;
    - ``n``, if that gives the same bits as a batch of ``batch``;
    - ``batch`` otherwise: the rest has to be filled up.

    It takes two runs of ``batch`` images, and one of ``n`` if that is less.
    """
    if batch == 1:
        return 1
    images = np.arange(batch)
    x = initial(0, images, shape)
    t = np.linspace(0, timesteps - 1, batch).round().astype(np.int32)

    def answer(rows: NDArray[np.int64]) -> Float32:
        buffers = Buffers.of(len(rows), shape)
        buffers.x[...], buffers.t[...] = x[rows], t[rows]
        backend.bind(buffers)
        backend.enqueue()
        return buffers.out

    whole, moved = answer(images), np.roll(images, 1)
    if not np.array_equal(answer(moved), whole[moved], equal_nan=True):
        return 1
    last = images[batch - n :]
    return n if n == batch or np.array_equal(answer(last), whole[last], equal_nan=True) else batch


def run(
    backend: Backend,
    table: Table,
    x_start: Float32,
    *,
    seed: int,
    images: NDArray[np.int64],
    clip: float | None = 1.0,
) -> Iterator[Step]:
    """Walk the table from ``x_start``, one :class:`Step` at a time. To stop, stop asking.

    Args:
        backend: computes the network's answer.
        table: the sampler.
        x_start: float32 [B, C, H, W], the state at the table's first timestep.
        seed: of the noise.
        images: int64 [B], the index of each image: with the seed it fixes the image's noise.
        clip: the largest |x̂_0|, or None.

    Raises:
        NumericError: the network's answer was not finite.
        BackendError: the network could not be run.
    """
    batch, *chw = x_start.shape
    buffers = Buffers.of(batch, (chw[0], chw[1], chw[2]))
    x, out = buffers.x, buffers.out
    x[...] = x_start
    x0, x_next = np.empty_like(x), np.empty_like(x)
    limit = np.inf if clip is None else clip
    backend.bind(buffers)
    rows = table.rows.astype(np.float32)
    elements = int(np.prod(chw))
    with np.errstate(over="ignore", invalid="ignore"):  # the finite check below says it better
        for index, (t, row) in enumerate(zip(table.timesteps.tolist(), rows, strict=True)):
            buffers.t.fill(t)
            backend.enqueue()
            if not np.isfinite(out).all():
                raise NumericError(
                    f"the network's answer at t = {t} is not finite",
                    note=f"step {index + 1} of {len(table)}; {backend.description}",
                    hint="if the file is fp16, try fp32: an activation may exceed 65504",
                )
            z = None
            if row[4] != 0:
                z = noise.normal(seed, images, t, Purpose.STEP, elements).reshape(x.shape)
            update(row, limit, x, out, z, x0=x0, x_next=x_next)
            yield Step(t, x, x0, x_next)
            x[...] = x_next
