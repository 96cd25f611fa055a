"""The average of the weights, which is what gets exported: how much of it each step's weights make up."""

from __future__ import annotations

import math

MOST_FIRST = 0.05
"""The largest share of the first weights in the average without a warning."""


def decay_at(step: int, ema: float, ramp: bool) -> float:
    """The decay d_s in average ← d_s·average + (1 − d_s)·weights, at step s = 0, 1, ….

    With ``ramp`` it is min(ema, (1 + s)/(10 + s)), as of TensorFlow's ``tf.train.ExponentialMovingAverage`` with
    ``num_updates``: about the last ninth of the steps so far, until that is longer than what ``ema`` remembers. It depends
    on s alone, so that an interrupted run stays exact.
    """
    return min(ema, (1 + step) / (10 + step)) if ramp else ema


def share_of_first(steps: int, ema: float, ramp: bool) -> float:
    """The share of the weights before the first step in the average after ``steps``: Π_{s<steps} d_s, 0…1."""
    ramped = 0
    if ramp:  # (1 + s)/(10 + s) < ema below this step
        ramped = steps if ema >= 1 else min(steps, max(0, math.ceil((10 * ema - 1) / (1 - ema))))
    # Π_{s<n} (1 + s)/(10 + s) = n!·9!/(n + 9)!, of which nine factors are left
    return math.prod(k / (ramped + k) for k in range(1, 10)) * float(ema) ** (steps - ramped)
