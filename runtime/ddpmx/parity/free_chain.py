"""The free-running chain: the same x_T and noise as PyTorch's, without correction, judged by the pixels of its images.

A saturated pixel agrees whatever the error is: x̂_0 may be 1.2 on one side and 3 on the other. So pixels that are black, or
white, on both sides count for nothing, and where hardly any others are left, nothing is judged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.images import swd
from ddpmx.parity.check import Check
from ddpmx.parity.evaluator import Evaluator, InBatches
from ddpmx.parity.propagation import DRIFT, gain, pixels_bound, rms
from ddpmx.parity.reference import Reference
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc

LEAST_SHARE, LEAST_COUNT = 0.1, 64
"""The share and the number of pixels, not saturated, from which agreement says something. Of MNIST's pixels 13 % are."""

LEAST_BOUND = 0.5
"""A chain that moves half of its pixels by more than a level under errors that are allowed tells nothing of a file."""

_DIRECTIONS = 64
"""Along which patches are compared: enough for a few images, at an eighth of the time."""

AMPLIFIES = 4
"""From this |A·q| on, the drift of a chain has to be known to be judged. Of 50 steps it is 0.4 for a linear schedule that
predicts ε, 1 for one that predicts x_0, 60 for a cosine one with clipping and 600 without."""


def saturated(mine: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which values are black, or white, on both sides."""
    both: NDArray[np.bool_] = ((mine == 0) & (theirs == 0)) | ((mine == 255) & (theirs == 255))
    return both


def too_few(counted: NDArray[np.bool_]) -> str | None:
    """Why the pixels that are left say nothing, or None if they do."""
    share = float(np.mean(counted))
    if share >= LEAST_SHARE and np.count_nonzero(counted) >= LEAST_COUNT:
        return None
    return f"{1 - share:.1%} of the pixels are saturated on both sides, and would agree whatever the file computes"


def free_chain(
    evaluate: Evaluator,
    description: str,
    usual: float,
    error: float,
    reference: Reference,
    curves: dict[str, NDArray[Any]],
    levels: float | None = None,
) -> tuple[Check, NDArray[np.uint8] | None]:
    """Run the recorded chain without correction, and compare its images.

    Args:
        evaluate: the network.
        description: what it runs on.
        usual: the share of pixels within one level that a chain without amplification keeps.
        error: the bound on the RMS error of the output.
        reference: the record.
        curves: ``free`` and ``levels_apart`` are added; see :func:`ddpmx.parity.ladder.run_ladder`.
        levels: the bound on the RMS of the pixels' errors, where ``usual`` follows from that and not from the drift.

    Returns:
        The check, and the images, uint8 [m, H, W, C], or None if the chain was not run.
    """
    spec, table = reference.spec, reference.table()
    name = f"free chain of {reference.steps} steps{_how(reference)}, pixels within one level"
    bound = usual if levels is not None else pixels_bound(usual, reference.drift, error)
    why = f"usual for this precision: {usual:.3g}"
    if levels is not None:
        why = f"the share of normal errors of {levels:g} levels RMS, erf(1.5/({levels:g}·√2))"
    elif bound < usual:
        why = f"by the recorded drift of this chain, such errors move {(1 - bound) / 2:.1%} of the pixels; twice that"
    if not reference.trained:
        reason = f"the network is not trained (loss {reference.loss:.2f}, 1 is guessing): its chain saturates"
        return Check(name, float("nan"), usual, at_least=True, skipped=reason), None
    m = len(reference.final)
    indices = np.arange(m)
    x_start = chain.initial(reference.seed, indices, spec.shape)
    states = np.empty_like(reference.state)
    at = {int(step): i for i, step in enumerate(reference.at)}
    sample = x_start
    free = chain.run(
        reference.guided(InBatches(evaluate, description)),
        table,
        x_start,
        seed=reference.seed,
        images=indices,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=reference.chain_conditioning(),
    )
    for number, step in enumerate(free):
        if number in at:
            states[at[number]] = step.x[0]
        sample = step.x0
    curves["free"] = np.array([rms(a - b) for a, b in zip(states, reference.state, strict=True)])
    finals, theirs = to_nhwc(sample), reference.final.transpose(0, 2, 3, 1)
    counted = ~saturated(finals, theirs)
    apart = np.abs(finals.astype(np.int16) - theirs)[counted]
    if (silent := _not_judged(reference, counted, 1.0 if levels is not None else bound)) is not None:
        return Check(name, float("nan"), usual, at_least=True, skipped=silent), finals
    curves["levels_apart"] = np.bincount(apart, minlength=3)
    mse = float(np.mean(np.square(apart, dtype=np.float64)))
    psnr = "" if mse == 0 else f"at most {apart.max()} apart, PSNR {10 * np.log10(255**2 / mse):.1f} dB, "
    left_out = 1 - float(np.mean(counted))
    worst = f"{float(np.mean(apart == 0)):.2%} equal, {psnr}{m} images" + (
        f", {left_out:.1%} saturated on both sides and not counted" if left_out else ""
    )
    return Check(name, float(np.mean(apart <= 1)), bound, at_least=True, worst=worst, why=why), finals


def chain_levels(finals: NDArray[np.uint8], reference: Reference, levels: float) -> Check:
    """The RMS of the errors of the free chain's pixels, in levels of 256: PSNR by another name.

    Args:
        finals: the file's images, uint8 [m, H, W, C].
        reference: the record.
        levels: the bound.
    """
    theirs = reference.final.transpose(0, 2, 3, 1)
    apart = (finals.astype(np.float64) - theirs)[~saturated(finals, theirs)]
    found = rms(apart)
    return Check(
        f"free chain of {reference.steps} steps{_how(reference)}, RMS of the pixels' errors in levels",
        found,
        levels,
        worst="" if found == 0 else f"PSNR {20 * np.log10(255 / found):.1f} dB",
        why=f"{levels:g} levels by the precision, {20 * np.log10(255 / levels):.1f} dB: a right file's, times 2.5",
    )


def light_judge(finals: NDArray[np.uint8], reference: Reference, error: float, levels: float | None = None) -> Check:
    """The sliced Wasserstein distance between the images of both chains: what a judge of samples sees of the file's errors.

    Along every direction it is a distance, so it obeys the triangle inequality: against any real images, scaled alike, the
    file's samples and PyTorch's are judged differently by no more than this.

    Args:
        finals: the file's images, uint8 [m, H, W, C].
        reference: the record.
        error: the bound on the RMS error of the output.
        levels: the bound on the RMS of the pixels' errors, where it does not follow from the drift.
    """
    name, skipped = f"light judge of the chain's images, × {swd.SCALE}", None
    _, height, width = reference.spec.shape
    if min(height, width) < swd.SIDE:
        skipped = f"it compares patches of {swd.SIDE}×{swd.SIDE}, and the images are {height}×{width}"
    elif reference.drift is None and levels is None:
        skipped = "the record is from a version of ddpmx that did not measure how far a chain drifts"
    if levels is None and reference.drift is not None:
        levels = drifted(reference.drift, error)
        how = "; by the recorded drift, half of the bound on ε moves them so"
    else:
        how = ", those of the bound"
    if skipped is not None or levels is None:
        return Check(name, np.nan, 0.0, skipped=skipped)
    theirs = reference.final.transpose(0, 2, 3, 1)
    found = swd.sliced_wasserstein(finals, theirs, directions=_DIRECTIONS)
    most = swd.distance_bound(theirs, levels)
    level = int(np.argmax(np.divide(found.distances, most)))
    return Check(
        name,
        found.distances[level],
        most[level],
        worst=f"at {found.sizes[level]} pixels, of {found.images} images",
        why=f"√(2/π)·2·the RMS of the pixels' errors, in units of the patches' deviation{how}",
    )


def drifted(drift: NDArray[np.float32], error: float) -> float:
    """The RMS of the errors of uint8 pixels after a chain whose outputs have half of their largest error, in levels.

    A pixel that moves by d levels is rounded to ⌊d⌋ or ⌈d⌉ of them, so the mean of its square is d² + f·(1 − f), f the
    fraction of d: at most d² + min(d, 1/4). The files that are right have a quarter of the largest error; see
    :func:`ddpmx.parity.propagation.pixels_bound`.

    Args:
        drift: float32 [Q], quantiles of the recorded drift.
        error: the bound on the output's RMS error, in units of the outputs' RMS.
    """
    distance = drift.astype(np.float64) * (error / 2 / DRIFT)
    return float(np.sqrt(np.mean(distance**2 + np.minimum(distance, 0.25))))


def _how(reference: Reference) -> str:
    return "" if reference.guidance == 1 else f" with guidance {reference.guidance:g}"


def _not_judged(reference: Reference, counted: NDArray[np.bool_], bound: float) -> str | None:
    """Why the chain says nothing of a file, or None if it does."""
    if (few := too_few(counted)) is not None:
        return few
    if reference.drift is None and gain(reference.table(), reference.spec) > AMPLIFIES:
        return (
            f"this chain amplifies errors (up to {gain(reference.table(), reference.spec):.2g} times in a step), and the "
            "record is from a version of ddpmx that did not measure by how much in all; export again to make a new one"
        )
    if bound < LEAST_BOUND:
        return f"this chain amplifies: errors that are allowed would move {min(1.0, (1 - bound) / 2):.0%} of its pixels"
    return None
