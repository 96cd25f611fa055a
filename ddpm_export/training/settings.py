"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddpm_export.training.objective_names import LOSSES, TIMESTEP_SAMPLINGS, Loss, TimestepSampling
from ddpmx.errors import InputError

MAX_STEPS = 10**12
"""Far above any training, and far below what numbers in a file can hold."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run: everything that decides which weights come of model, network and images.

    The defaults are the paper's for CIFAR-10, but for ``hflip`` (mirrored letters are other letters) and ``ema_ramp``.

    Attributes:
        batch: images per step, over all processes and all ``accumulate`` parts.
        lr: Adam's learning rate, after the warm-up.
        warmup: steps over which it rises from 0.
        grad_clip: the largest global norm of the gradient.
        ema: decay of the averaged weights per step.
        ema_ramp: begin with a short average, min(ema, (1 + s)/(10 + s)); without it 0.9999 remembers the initial weights
            for some 50,000 steps. See :mod:`ddpm_export.training.average`.
        hflip: mirror half of the images.
        seed: of everything random, 0…2⁶³−1.
        bf16: compute the network in bfloat16 where torch's autocast allows it.
        loss: ``simple``, ``vlb`` or ``hybrid``. See :mod:`ddpm_export.training.objective`.
        timestep_sampling: ``uniform`` or ``importance``. See :mod:`ddpm_export.training.timesteps`.
        min_snr: γ of the weights min(SNR, γ) on the error of x̂_0, or None for equal weights of the output's error.
        label_dropout: share of the images that are trained without their class, so that guidance has something to compare.
        crop: train on random parts of this size, (H, W), of the images; None for whole ones.
        accumulate: in how many parts a batch goes through the network, one after the other: less memory, the same gradient.
        lr_decay: the step at which the learning rate has fallen to 0, by a half cosine; 0 for a constant rate.
        holdout: number of images that are not trained on, for the likelihood in the log.
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
    loss: Loss = "simple"
    timestep_sampling: TimestepSampling = "uniform"
    min_snr: float | None = None
    label_dropout: float = 0.0
    crop: tuple[int, int] | None = None
    accumulate: int = 1
    lr_decay: int = 0
    holdout: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: one is out of its range.
        """
        for name, least, most in (
            ("batch", 1, 1 << 20),
            ("warmup", 0, 1 << 40),
            ("seed", 0, 2**63 - 1),
            ("accumulate", 1, 1 << 20),
            ("lr_decay", 0, MAX_STEPS),
            ("holdout", 0, 1 << 40),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        for name, limit in (("lr", 1.0), ("grad_clip", math.inf), ("ema", 1.0), ("label_dropout", 1.0)):
            value, zero = getattr(self, name), name in ("ema", "label_dropout")
            if type(value) not in (int, float) or not 0 <= value <= limit or (not zero and value == 0):
                lower = "at least 0" if zero else "above 0"
                upper = f" and at most {limit:g}" if limit < math.inf else ""
                raise InputError(f"{name} must be a number {lower}{upper}, not {value!r}")
        for name, choices in (("loss", LOSSES), ("timestep_sampling", TIMESTEP_SAMPLINGS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.crop is not None:
            object.__setattr__(self, "crop", tuple(self.crop))
            if len(self.crop) != 2 or any(type(side) is not int or side < 1 for side in self.crop):
                raise InputError(f"crop must be two whole numbers above 0, not {self.crop!r}")
        if self.batch % self.accumulate:
            raise InputError(
                f"accumulate must be a divisor of the batch, and {self.batch} is not divisible by {self.accumulate}"
            )
        if self.lr_decay and self.lr_decay <= self.warmup:
            raise InputError(
                "lr_decay must be longer than the warm-up",
                note=f"{self.lr_decay} steps, of which {self.warmup} warm up",
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of step s = 0, 1, …: lr·min(s/warmup, 1) as Ho et al. (0 in the first), times the decay."""
        lr = self.lr * min(step / self.warmup, 1.0) if self.warmup else self.lr
        if self.lr_decay and step > self.warmup:
            done = min(1.0, (step - self.warmup) / (self.lr_decay - self.warmup))
            lr *= (1 + math.cos(math.pi * done)) / 2
        return lr


def check_steps(steps: int) -> None:
    """Check a number of optimiser steps.

    Raises:
        InputError: it is not a whole number from 1 to 10¹².
    """
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps must be a whole number from 1 to {MAX_STEPS:,}, not {steps!r}")
