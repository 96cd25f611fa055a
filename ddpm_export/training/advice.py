"""What a training says before it begins: what is trained on what, and what will not come out well."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.average import MOST_FIRST, share_of_first
from ddpm_export.training.checkpoint import read_training_json
from ddpm_export.training.data import Dataset
from ddpm_export.training.estimate import seconds_per_step
from ddpm_export.training.images.cache import NAME
from ddpm_export.training.images.pixels import InMemory
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer
from ddpmx.diffusion.last_step import signal_warning
from ddpmx.errors import DdpmxError

LONG_SECONDS = 12 * 3600.0
"""A training of which it is said what would be smaller."""

DARK = 64
"""Images in which nothing reaches this are likely to be numbers of another range: 0 and 1, or a few bits."""


def introduce(trainer: Trainer, steps: int, *, cached: bool) -> list[str]:
    """The lines before a training of ``steps`` steps in all; those that warn begin with "Note".

    Args:
        trainer: the run.
        steps: in all.
        cached: whether a folder's pixels are kept in the run.
    """
    parameters = sum(p.numel() for p in trainer.network.parameters())
    c, height, width = trainer.spec.shape
    settings, config = trainer.settings, trainer.network.config
    mirrored = "half of them mirrored (--flip)" if settings.hflip else "none mirrored"
    lines = [
        f"{trainer.run}: {parameters:,} parameters, {len(trainer.dataset):,} images of {height}×{width}×{c}, {mirrored}, "
        f"steps {trainer.step:,} → {steps:,} on {trainer.device}"
    ]
    if isinstance(config, UNetConfig):
        lines.append(f"network: {config.describe()}")
    if trainer.begun_from is not None:
        lines.append(f"begun with the {trainer.begun_from.get('weights')} weights of {trainer.begun_from.get('path')}")
    lines += trainer.dataset.notes
    most = _brightest(trainer.dataset)
    if most < DARK:
        lines.append(
            f"Note: no number in the images is above {most} of 255, so all of them are nearly black: white should be 255 "
            "(in an .npz, --white N says which number is white)"
        )
    if cached and trainer.dataset.cache_key is not None:
        lines.append(f"pixels are kept in {trainer.run / NAME}, for --resume (--no-cache: they are not)")
    if warning := signal_warning(trainer.spec.make_schedule()):
        lines.append(f"Note: {warning}. --scale-betas multiplies β by 1000/T; --schedule cosine suits every T")
    if steps < settings.warmup:
        lines.append(
            f"Note: the learning rate rises over {settings.warmup:,} steps, of which there are {steps:,}: it reaches "
            f"{settings.lr * steps / settings.warmup:.2g} of {settings.lr:g} (--warmup)"
        )
    if 0 < settings.lr_decay < steps:
        lines.append(
            f"Note: the learning rate is 0 from step {settings.lr_decay:,} on (--lr-decay lets it fall until the new end, "
            "--no-lr-decay leaves it as it is)"
        )
    if note := average_note(trainer, steps, "will hold"):
        lines.append(note)
    return lines


def _brightest(dataset: Dataset) -> int:
    """The largest number in the images; in some of them where they are not in memory."""
    if isinstance(dataset.pixels, InMemory):
        return int(dataset.pixels.array.max())
    return int(dataset.take(np.unique(np.linspace(0, len(dataset) - 1, 64).astype(np.int64))).max())


def duration_line(trainer: Trainer, steps: int) -> str:
    """How long the steps that are left take here, measured on a few images, and what would be smaller."""
    seconds = seconds_per_step(trainer)
    left = seconds * (steps - trainer.step)
    line = f"about {_duration(left)} on this machine: {seconds:.2g} s a step (measured), without sample grids"
    if left > LONG_SECONDS:
        line += "; smaller: --preset tiny or small, --size, --width, fewer --steps (--dry-run says more)"
    return line


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def average_note(trainer: Trainer, steps: int, verb: str) -> str | None:
    """A warning if the average after ``steps`` is still made of the weights that training began with."""
    fact = _average_fact(trainer.settings, steps, verb, trainer.begun_from is not None)
    if fact is None:
        return None
    ramp = "" if trainer.settings.ema_ramp else "--ema-ramp or "
    return (
        f"{fact}. {ramp}a smaller --ema avoids it in a new run; "
        f"ddpmx export {shlex.quote(str(trainer.run))} --weights raw takes the weights as trained"
    )


def note_of_checkpoint(checkpoint: Path) -> str | None:
    """The same warning for a checkpoint, if it is of a training and says how its average was made."""
    try:
        step, settings = read_training_json(checkpoint)
        fact = _average_fact(TrainSettings(**settings["train"]), step, "holds", "from" in settings)
    except (DdpmxError, KeyError, TypeError):
        return None
    return fact and f"{fact}; --weights raw exports the weights as trained"


def _average_fact(settings: TrainSettings, steps: int, verb: str, begun: bool) -> str | None:
    share = share_of_first(steps, settings.ema, settings.ema_ramp)
    if share <= MOST_FIRST:
        return None
    first = "the weights it began with" if begun else "the random weights it began with"
    return (
        f"Note: the average of the weights (--ema {settings.ema:g}), which is exported, {verb} {share:.0%} of {first} "
        f"after {steps:,} steps"
    )
