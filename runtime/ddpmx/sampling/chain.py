"""The reverse chain in NumPy: one update, and the loop that runs a sampler's table over a batch.

The update is float32 whatever the precision of the network: x̂_0 multiplies the network's error by up to 157 at t = 999,
and x_{t−1} must feel no more than 0.02 of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import NO_CONDITIONING, Backend, Buffers, PartBackend
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import NumericError
from ddpmx.formats.spec import ConditioningShapes, ModelSpec
from ddpmx.sampling.conditioning import check_conditioning, example

Float32 = NDArray[np.float32]

NOISE_AT_ONCE = 1 << 13
"""Elements of noise drawn in one call, at least: below that, NumPy's overhead per call dominates."""


class Step(NamedTuple):
    """One reverse step. The arrays belong to the chain: copy what must outlive the next step.

    Attributes:
        t: the timestep that the network was run at.
        x: float32 [B, C, H, W], x_t, the network's input.
        x0: float32 [B, C, H, W], x̂_0.
        x_next: float32 [B, C, H, W], the state after the step; after the last step, the sample.
    """

    t: int
    x: Float32
    x0: Float32
    x_next: Float32


class Preview(NamedTuple):
    """A running chain, for one batch of images.

    Attributes:
        t: the timestep, falling to 0.
        x: float32 [n, C, H, W], x_t.
        x0: float32 [n, C, H, W], x̂_0, the network's current estimate of the image. In the last one, the sample itself.
    """

    t: int
    x: NDArray[np.float32]
    x0: NDArray[np.float32]


_EXP_LEAST, _EXP_MOST = np.float32(-87), np.float32(88)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # high has ten bits: k·high is exact
_EXP_POLY = np.array(
    [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1], np.float32
)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which is then in the lowest bits


def exp(x: Float32) -> Float32:
    """eˣ by IEEE + − × alone, so that NumPy here and C in ``cuda/step.h`` give the same bits.

    Within 1 ulp; meaningless for NaN. x is clamped to −87…88, where the result is a normal float32: beyond, it stays at
    1.6e−38 and 1.7e38.

    x = k·ln 2 + r with k = round(x·log₂e) (Cody & Waite 1980), and eˣ = 2ᵏ·(1 + r + r²·P(r)).
    """
    x = np.minimum(np.maximum(x, _EXP_LEAST), _EXP_MOST)
    rounded = x * _LOG2_E + _ROUND
    k = rounded - _ROUND
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    y = np.full_like(r, _EXP_POLY[0])
    for coefficient in _EXP_POLY[1:]:
        y = y * r + coefficient
    y = (y * (r * r) + r) + np.float32(1)
    power = ((rounded.view(np.uint32) + np.uint32(127)) << np.uint32(23)).view(np.float32)  # 2ᵏ
    result: Float32 = y * power
    return result


def learned_sigma(learned: Float32, var: Float32) -> Float32:
    """σ = exp(c + d·v), float32, of the network's output ``var``, v.

    Args:
        learned: float32 [2], c and d, see :func:`ddpmx.diffusion.samplers.learned_range` and ``learned_log``.
        var: v, finite float32 of any shape.
    """
    c, d = learned
    return exp(c + d * var)


def update(
    row: Float32,
    limit: float,
    x: Float32,
    out: Float32,
    z: Float32 | None,
    *,
    x0: Float32,
    x_next: Float32,
    sigma: Float32 | None = None,
    memory: Sequence[tuple[np.float32, Float32]] = (),
) -> None:
    """x̂_0 = clip(p·x + q·out), x_next = (A·x̂_0 + B·x) + σ·z, in float32 and in that order, without fused operations.

    With ``memory`` x_next = ((A·x̂_0 + B·x) + C·x̂_0') + D·x̂_0''.

    Args:
        row: float32 [5], p, q, A, B, σ.
        limit: the largest |x̂_0|; infinity for no clipping. NaN passes through.
        x: x_t.
        out: the network's output.
        z: N(0, I), or None where σ = 0.
        x0: x̂_0 is written here. Any shape, the same for all arrays.
        x_next: the result is written here.
        sigma: σ of every element, where it is learned; None for the row's σ.
        memory: (C, x̂_0 of the step before) and (D, x̂_0 of the one before that), those that are not 0.
    """
    p, q, a, b, fixed = row
    np.multiply(x, p, out=x0)
    np.multiply(out, q, out=x_next)
    np.add(x0, x_next, out=x0)
    np.clip(x0, np.float32(-limit), np.float32(limit), out=x0)
    np.multiply(x, b, out=x_next)
    np.add(x0 * a, x_next, out=x_next)
    for weight, earlier in memory:
        np.add(x_next, earlier * weight, out=x_next)
    if z is not None:
        np.add(x_next, z * (fixed if sigma is None else sigma), out=x_next)


def not_finite(t: int, index: int, steps: int, network: str) -> NumericError:
    """The error of a step, from 0, whose output is not finite. ``network``: what it is, for the message."""
    return NumericError(
        f"the network's output at t = {t} is not finite",
        note=f"step {index + 1} of {steps}; {network}",
        hint="if the file is fp16, try fp32: an activation may exceed 65504",
    )


def initial(seed: int, images: NDArray[np.int64], shape: tuple[int, int, int]) -> Float32:
    """x_T ~ N(0, I) for each image, float32 [n, C, H, W]."""
    z = noise.normal(seed, images, 0, Purpose.INITIAL, int(np.prod(shape)))
    return z.reshape(len(images), *shape)


def between(seed: int, towards: int, share: float, images: NDArray[np.int64], shape: tuple[int, int, int]) -> Float32:
    """x_T between those of two seeds, N(0, I) as well: ((1−λ)·x_T + λ·x'_T) / √((1−λ)² + λ²), float32 [n, C, H, W].

    Args:
        seed: that of x_T, λ = 0.
        towards: that of x'_T, λ = 1.
        share: λ, 0…1.
        images: their indices.
        shape: (C, H, W).
    """
    length = math.sqrt((1 - share) * (1 - share) + share * share)  # not hypot, whose last bit depends on the library
    mine, theirs = np.float32((1 - share) / length), np.float32(share / length)
    return mine * initial(seed, images, shape) + theirs * initial(towards, images, shape)


def executed_batch(backend: Backend, spec: ModelSpec, n: int, batch: int) -> int:
    """The batch size at which to run ``n`` ≤ ``batch`` images, so that how images are grouped changes no bit of them.

    Libraries pick other instructions for other shapes, and threads may split a batch in the middle of an image. Their
    choice depends on the shape alone, so it can be measured with random images:

    - 1, if an image's output depends on its place among ``batch``: then each has to run alone;
    - ``n``, if that gives the same bits as a batch of ``batch``;
    - ``batch`` otherwise: the rest has to be filled up. So too if the same batch gives other bits every time, where nothing
      helps.

    It takes three runs of ``batch`` images, and one of ``n`` if that is less. An output ``var`` has to be the same
    as well.
    """
    if batch == 1:
        return 1
    images, output = np.arange(batch), _probe(backend, spec, batch)
    whole, moved = output(images), np.roll(images, 1)
    if not np.array_equal(output(images), whole, equal_nan=True):
        return batch
    if not np.array_equal(output(moved), whole[moved], equal_nan=True):
        return 1
    last = images[batch - n :]
    return n if n == batch or np.array_equal(output(last), whole[last], equal_nan=True) else batch


def choose_part(backend: PartBackend, spec: ModelSpec, batch: int) -> int:
    """The size of the parts into which a batch is to be cut, and set in the backend: without a rest, and no larger than
    the backend takes; 1 if neighbours in a part make a difference, which is measured.
    """
    part = next(size for size in range(min(backend.largest_part, batch), 0, -1) if batch % size == 0)
    part = part if fixed_places(backend, spec, part) else 1
    backend.use_part(part)
    return part


def fixed_places(backend: PartBackend, spec: ModelSpec, part: int) -> bool:
    """Whether an image in a part of ``part`` has the same bits at the same place, whatever its neighbours are.

    Random images run in two parts, and once more beside others in the other part. It takes two runs of ``2·part`` images.
    """
    backend.use_part(part)
    if part == 1:
        return True
    mine, others, even = np.arange(part), np.arange(part, 2 * part), np.arange(part) % 2 == 0
    output = _probe(backend, spec, 2 * part)
    first = output(np.concatenate([mine, np.where(even, mine, others)]))
    second = output(np.concatenate([np.where(even, others, mine), mine]))
    whole = first[:part]
    return (
        np.array_equal(second[part:], whole, equal_nan=True)
        and np.array_equal(first[part:][even], whole[even], equal_nan=True)
        and np.array_equal(second[:part][~even], whole[~even], equal_nan=True)
    )


def _probe(backend: Backend, spec: ModelSpec, count: int) -> Callable[[NDArray[np.int64]], Float32]:
    """What the network answers to some of ``count`` random images, at timesteps of all of 0…T−1."""
    images, var = np.arange(count), spec.learns_variance
    inputs = {"x": initial(0, images, spec.shape), **example(spec, images)}
    inputs["t"] = np.linspace(0, spec.timesteps - 1, count).round().astype(np.int32)
    if spec.self_condition:
        inputs["x0_prev"] = np.clip(inputs["x"][::-1], -1, 1)

    def output(rows: NDArray[np.int64]) -> Float32:
        buffers = Buffers.of(len(rows), spec.shape, var=var, conditioning_shapes=spec.conditioning_shapes)
        for name, array in buffers.inputs().items():
            array[...] = inputs[name][rows]
        backend.bind(buffers)
        backend.enqueue()
        return buffers.out if buffers.var is None else np.stack([buffers.out, buffers.var], axis=1)

    return output


def _noise(seed: int, images: NDArray[np.int64], table: Table, elements: int) -> Iterator[Float32]:
    """z of every step that has one. For small images the noise of several steps is drawn at once, at hardly more cost."""
    timesteps = table.timesteps[table.rows[:, 4].astype(np.float32) != 0]
    steps = max(1, NOISE_AT_ONCE // (len(images) * elements))
    for start in range(0, len(timesteps), steps):
        yield from noise.normal(seed, images, timesteps[start : start + steps], Purpose.STEP, elements)


class Walk:
    """The steps of a chain whose network somebody else runs: what is between two calls of it.

    Chains at different timesteps can so share one call (:mod:`ddpmx.serve.batcher`).

    Args:
        table: the sampler. One with a learned σ needs the network's output ``var``. One with memory gets x̂_0 of the steps
            before, as it was clipped.
        shape: (n, C, H, W).
        seed: of the noise.
        images: int64 [n], the index of each image: with the seed it fixes the image's noise.
        clip: the largest |x̂_0|, or None.
        x0: float32 of that shape, where x̂_0 is to be; by default an array of its own.

    Attributes:
        x0: x̂_0 of the last step; before the first as it was.
    """

    def __init__(
        self,
        table: Table,
        shape: tuple[int, ...],
        *,
        seed: int,
        images: NDArray[np.int64],
        clip: float | None = 1.0,
        x0: Float32 | None = None,
    ) -> None:
        self.x0: Float32 = np.zeros(shape, np.float32) if x0 is None else x0
        self._x_next: Float32 = np.empty(shape, np.float32)
        self._limit = np.inf if clip is None else clip
        self._table, self._timesteps = table, table.timesteps.tolist()
        self._rows = table.rows.astype(np.float32)
        self._learned = None if table.learned is None else table.learned.astype(np.float32)
        self._weights = None if table.memory is None else table.memory.astype(np.float32)
        self._earlier: list[Float32] = []  # x̂_0 of the step before, and of the one before that
        self._draws = _noise(seed, images, table, int(np.prod(shape[1:])))
        self.done = 0
        """How many steps were made."""

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._timesteps)

    @property
    def t(self) -> int:
        """The timestep at which the network is to run next."""
        t: int = self._timesteps[self.done]
        return t

    def step(self, x: Float32, out: Float32, var: Float32 | None, network: str) -> Step:
        """Make a step.

        Args:
            x: x_t, with which the network was run.
            out: what it answered.
            var: its output ``var``, or None if there is none.
            network: what it is, for messages.

        Returns:
            The step. ``x0`` and ``x_next`` belong to the walk.

        Raises:
            NumericError: ``out`` or ``var`` is not finite.
        """
        index, t, row = self.done, self.t, self._rows[self.done]
        if not np.isfinite(out).all() or (var is not None and not np.isfinite(var).all()):
            raise not_finite(t, index, len(self), network)
        z = sigma = None
        if row[4] != 0:
            z = next(self._draws).reshape(x.shape)
        memory = []
        if self._weights is not None:
            memory = [(w, array) for w, array in zip(self._weights[index], self._earlier, strict=False) if w != 0]
        # the check above has the better message
        with np.errstate(over="ignore", invalid="ignore"):
            if z is not None and self._learned is not None and var is not None:
                sigma = learned_sigma(self._learned[index], var)
            update(row, self._limit, x, out, z, x0=self.x0, x_next=self._x_next, sigma=sigma, memory=memory)
        if self._weights is not None:
            self._earlier = [self.x0.copy(), *self._earlier[:1]]
        self.done += 1
        return Step(t, x, self.x0, self._x_next)


def run(
    backend: Backend,
    table: Table,
    x_start: Float32,
    *,
    seed: int,
    images: NDArray[np.int64],
    clip: float | None = 1.0,
    conditioning_shapes: ConditioningShapes = NO_CONDITIONING,
    conditioning: Mapping[str, NDArray[Any]] = NO_CONDITIONING,
) -> Iterator[Step]:
    """Run the table from ``x_start``, one :class:`Step` at a time. To stop early, close the iterator.

    Args:
        backend: runs the network.
        table, seed, images, clip: as for :class:`Walk`.
        x_start: float32 [B, C, H, W], the state at the table's first timestep.
        conditioning_shapes: the conditioning inputs: :attr:`ModelSpec.conditioning_shapes`. ``x0_prev`` is x̂_0 of the
            step before, which the chain provides, and 0 in the first (Chen et al. 2022, "Analog bits").
        conditioning: the other conditioning inputs, the same in all steps: ``y`` int32 [B], ``cond`` float32 [B, K, H, W].

    Raises:
        InputError: ``conditioning`` does not fit ``conditioning_shapes``.
        NumericError: an output of the network was not finite.
        BackendError: the network could not be run.
    """
    batch, *chw = x_start.shape
    check_conditioning(conditioning_shapes, conditioning, batch)
    buffers = Buffers.of(
        batch, (chw[0], chw[1], chw[2]), var=table.learned is not None, conditioning_shapes=conditioning_shapes
    )
    buffers.x[...] = x_start
    for name, value in conditioning.items():
        getattr(buffers, name)[...] = value
    walk = Walk(table, x_start.shape, seed=seed, images=images, clip=clip, x0=buffers.x0_prev)
    backend.bind(buffers)
    while walk.done < len(walk):
        buffers.t.fill(walk.t)
        backend.enqueue()
        step = walk.step(buffers.x, buffers.out, buffers.var, backend.description)
        yield step
        buffers.x[...] = step.x_next
