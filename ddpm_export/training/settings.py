"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddpmx.errors import InputError

MAX_STEPS = 10**12
"""Far above any training, and far below what numbers in a file can hold."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run. A resumed run keeps those that it began with.

    The defaults are the paper's for CIFAR-10, but for ``hflip`` (mirrored letters are other letters) and ``ema_ramp``.

    Attributes:
        batch: images per step.
        lr: Adam's learning rate, after the warm-up.
        warmup: steps over which it rises from 0.
        grad_clip: the largest global norm of the gradient.
        ema: decay of the averaged weights per step.
        ema_ramp: begin with a short average, min(ema, (1 + s)/(10 + s)); without it 0.9999 remembers the initial weights
            for some 50,000 steps. See :mod:`ddpm_export.training.average`.
        hflip: mirror half of the images.
        seed: of everything random, 0…2⁶³−1.
        bf16: compute the network in bfloat16 where torch's autocast allows it.
    """

    batch: int = 128
    lr: float = 2e-4
    warmup: int = 5000
    grad_clip: float = 1.0
    ema: float = 0.9999
    ema_ramp: bool = True
    hflip: bool = False
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: one is out of its range.
        """
        for name, least, most in (("batch", 1, 1 << 20), ("warmup", 0, 1 << 40), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        for name, limit in (("lr", 1.0), ("grad_clip", math.inf), ("ema", 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= limit or (name != "ema" and value == 0):
                lower = "at least 0" if name == "ema" else "above 0"
                upper = f" and at most {limit:g}" if limit < math.inf else ""
                raise InputError(f"{name} must be a number {lower}{upper}, not {value!r}")


def check_steps(steps: int) -> None:
    """Check a number of optimiser steps.

    Raises:
        InputError: it is not a whole number from 1 to 10¹².
    """
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps must be a whole number from 1 to {MAX_STEPS:,}, not {steps!r}")
