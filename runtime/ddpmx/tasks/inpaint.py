"""Inpainting: a part of an image is drawn anew, so that it goes with the rest (RePaint, Lugmayr et al. 2022).

The network was trained for no such thing. In every step what is known is taken from the image, noised to the timestep at
hand (equation 8a), and what is not from the chain (equation 8b). That alone gives parts that do not go together, since the
known part does not hear of the other; so the chain goes back again and again, by noise, and comes down anew: `resamplings`
times over every stretch of `jump` steps (Algorithm 1, and the paper's section on resampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import AnyArray, Labels
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import from_uint8, to_nhwc
from ddpmx.sampling.request import Sampling
from ddpmx.tasks.steps import draws, step

Float32 = NDArray[np.float32]

STEPS, JUMP, RESAMPLINGS = 250, 10, 10
"""The paper's."""


class Inpainted(NamedTuple):
    """An image with a part of it drawn anew, n times.

    Attributes:
        pixels: uint8 [n, H, W, C]. What is known is the image's, as it is.
        x0: float32 [n, C, H, W], the same before it was rounded, about −1…1.
    """

    pixels: NDArray[np.uint8]
    x0: Float32


def walk(steps: int, jump: int, resamplings: int) -> Iterator[int]:
    """How many steps are left before each call of the network, from ``steps`` to 1, with the ways back.

    A way back begins where 1, jump + 1, 2·jump + 1, … steps are left and goes ``jump`` steps up, ``resamplings − 1`` times.

    Args:
        steps: of the chain.
        jump: steps of a way back.
        resamplings: how often each stretch is gone down, 1 for a chain without ways back.
    """
    left = steps
    again = {end + 1: resamplings - 1 for end in range(0, steps - jump, jump)}
    while left > 0:
        yield left
        left -= 1
        if again.get(left, 0) > 0:
            again[left] -= 1
            left += jump


def inpaint(
    pipeline: Pipeline,
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    n: int = 1,
    *,
    steps: int | None = None,
    jump: int = JUMP,
    resamplings: int = RESAMPLINGS,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: AnyArray | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Inpainted:
    """Draw a part of an image anew.

    Image i of a seed is the same whatever else is drawn with it.

    Args:
        pipeline: the model.
        image: uint8 [H, W, C], of the model's size.
        mask: bool [H, W], True where the image is to be drawn anew.
        n: how many times.
        steps: of the chain, 1…T; by default :data:`STEPS`, or T if that is less.
        jump: steps of a way back, from 1.
        resamplings: how often each stretch is gone down, from 1. The network runs about ``steps · resamplings`` times.
        seed, first, batch, labels, cond, guidance: as for :meth:`ddpmx.Pipeline.generate`.
        progress: called repeatedly with (network calls done, network calls in all).
        cancel: called repeatedly; True stops the work.

    Raises:
        InputError: an array that does not fit the model, a mask that leaves nothing to draw, or a number out of its range.
        Cancelled, NumericError, BackendError: as :meth:`ddpmx.Pipeline.evaluate`.
    """
    spec = pipeline.spec
    C, H, W = spec.shape
    for name, array, shape, dtype in (("image", image, (H, W, C), np.uint8), ("mask", mask, (H, W), np.bool_)):
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"{name} must be {np.dtype(dtype)} {[*shape]}",
                note=f"it is {array.dtype} {[*array.shape]}" if isinstance(array, np.ndarray) else None,
            )
    if not mask.any():
        raise InputError("the mask leaves nothing to draw", hint="it is True where the image is to be drawn anew")
    for name, value in (("jump", jump), ("resamplings", resamplings)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= 1 << 16:
            raise InputError(f"{name} must be a whole number from 1 to {1 << 16}, not {value!r}")
    T = spec.timesteps
    steps = min(STEPS, T) if steps is None else steps
    # a variance of single steps belongs to a chain of all of them
    single = spec.variance == "learned" and steps != T
    sampling = Sampling(steps=steps, variance="fixed_small" if single else None)
    batch = pipeline.check_request(
        n, seed=seed, first=first, batch=batch, labels=labels, guidance=guidance, sampling=sampling
    )
    way = list(walk(steps, int(jump), int(resamplings)))
    known = from_uint8(image).transpose(2, 0, 1)
    found = np.empty((n, C, H, W), np.float32)
    classes = None if labels is None else class_labels(spec, n, labels)
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        how: dict[str, Any] = {"first": first + start, "batch": batch, "guidance": guidance, "cancel": cancel}
        how["labels"] = None if classes is None else classes[rows]
        how["cond"] = None if cond is None else np.asarray(cond)[rows]
        report = None
        if progress is not None:
            before, total = start // batch * len(way), -(-n // batch) * len(way)
            report = _after(progress, before, total)
        images = np.arange(first + rows.start, first + rows.stop)
        found[rows] = _paint(pipeline, sampling, way, known, mask, images, seed, how, report)
    pixels = to_nhwc(found)
    pixels[:, ~mask] = image[~mask]
    return Inpainted(pixels, found)


def _after(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _paint(
    pipeline: Pipeline,
    sampling: Sampling,
    way: list[int],
    known: Float32,
    mask: NDArray[np.bool_],
    images: NDArray[np.int64],
    seed: int,
    how: dict[str, Any],
    report: Callable[[int], None] | None,
) -> Float32:
    """A batch, float32 [n, C, H, W]."""
    spec = pipeline.spec
    table, schedule = pipeline.table(sampling), spec.make_schedule()
    S = len(table)
    at = table.timesteps[::-1].tolist()  # of the state with 1, 2, … steps left
    signal = [1.0, *np.sqrt(schedule.alpha_bar[at]).tolist()]
    noise = [0.0, *np.sqrt(schedule.one_minus_alpha_bar[at]).tolist()]
    shape = (len(images), *spec.shape)

    def draw(t: int, purpose: Purpose, repeat: int) -> Float32:
        return normal(seed, images, t, purpose, int(np.prod(spec.shape)), repeat=repeat).reshape(shape)

    def with_known(x: Float32, left: int, visit: int) -> Float32:
        """Equation 8: what is known, noised as the rest is. At the end it is the image."""
        noised = np.broadcast_to(known, shape)
        if left:
            eps = draw(at[left - 1], Purpose.DIFFUSE, visit)
            noised = np.float32(signal[left]) * noised + np.float32(noise[left]) * eps
        return np.where(mask, x, noised)

    visits = [0] * (S + 1)
    x = with_known(chain.initial(seed, images, spec.shape), S, 0)
    visits[S] = 1
    x0 = np.zeros(shape, np.float32)
    before = S
    for done, left in enumerate(way):
        if left > before:  # a way back: x_t of x_s, s < t, in one draw
            kept = signal[left] / signal[before]
            z = draw(at[left - 1], Purpose.BACK, visits[left])
            x = np.float32(kept) * x + np.float32(np.sqrt(1 - kept**2)) * z
            visits[left] += 1
        number = S - left
        more: dict[str, Any] = {"x0_prev": x0} if spec.self_condition else {}
        said = pipeline.evaluate(x, at[left - 1], **more, **how)
        x0 = said.x0
        z_step = draw(at[left - 1], Purpose.STEP, visits[left] - 1) if draws(table, number) else None
        before = left - 1
        x = with_known(step(table, number, x, x0, said.var, z_step), before, visits[before])
        visits[before] += 1
        if report is not None:
            report(done + 1)
    return x
