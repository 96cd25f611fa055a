"""One call of ``Trainer.train``: the loop, and what is done beside it. None of it changes the weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.log import Row, Tracker, bucket_names
from ddpm_export.training.watch import figures, is_full, memory_mb
from ddpmx.errors import InputError, NumericError, OutputError

if TYPE_CHECKING:
    from ddpm_export.training.train import Trainer

FULL_DISK_SECONDS = 5.0
"""Between two tries to write to a full disk."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: optimiser steps made, over all sessions.
        steps: in all.
        loss: a running mean of the loss.
        images_per_second: over the last steps.
        seconds_left: at that speed, without the time of sample grids and checkpoints.
    """

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Housekeeping:
    """What a session does beside training.

    Attributes:
        sample_every: steps between grids of samples, and likelihoods of the images held out; 0 for never.
        save_minutes: time between checkpoints. There is always one at the end.
        keep: how many of the newest checkpoints are kept.
        keep_every: write a checkpoint at each multiple of so many steps, and keep it; 0 for none.
        log_every: steps between rows of ``log.csv``.
        cache_images: keep the pixels of a folder in the run, so that resuming it decodes nothing.
        trackers: who else gets the figures and pictures.
    """

    sample_every: int = 0
    save_minutes: float = 10.0
    keep: int = 2
    keep_every: int = 0
    log_every: int = 50
    cache_images: bool = True
    trackers: Sequence[Tracker] = ()

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: one is out of its range.
        """
        for name, least in (("sample_every", 0), ("keep", 1), ("keep_every", 0), ("log_every", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 1 << 40:
                raise InputError(f"{name} must be a whole number, at least {least}, not {value!r}")
        if not self.save_minutes > 0:
            raise InputError(f"save_minutes must be above 0, not {self.save_minutes!r}")


class Session:
    """The loop.

    Args:
        trainer: the run.
        steps: at which it ends.
        house: what is done beside training.
        trackers: who gets figures and pictures: none but in the first process.
        progress: called with the progress.
        stop: True ends the loop after the step that is being made.
        message: called with what a user should read.
    """

    def __init__(
        self,
        trainer: Trainer,
        steps: int,
        house: Housekeeping,
        trackers: Sequence[Tracker],
        progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool],
        message: Callable[[str], None],
    ) -> None:
        self._trainer, self._steps, self._house, self._trackers = trainer, steps, house, trackers
        self._progress, self._stop, self._message = progress, stop, message
        self._begun = self._saved_at = time.monotonic()
        self._rate = _Rate()

    def run(self) -> Path:
        """Train, and save at the end. Returns the checkpoint; the errors are those of ``Trainer.train``."""
        trainer = self._trainer
        trainer.network.train()
        try:
            with trainer.batches.ahead(trainer.step):
                self._loop()
        except NumericError:
            if trainer.saved_step != trainer.step and trainer.is_good():
                self._save()
            raise
        finally:
            for tracker in self._trackers:
                tracker.close()
        if trainer.saved_step != trainer.step:
            self._save()
        return checkpoints.resolve(trainer.run)

    def _loop(self) -> None:
        trainer, house = self._trainer, self._house
        seen, stopped = trainer.step, False
        sums: NDArray[np.float64] | None = None
        while trainer.step < self._steps and not stopped:
            trainer.train_step()
            self._rate.tick()
            step = trainer.step
            sampled, kept = (bool(n) and step % n == 0 for n in (house.sample_every, house.keep_every))
            logged = step % house.log_every == 0 or step == self._steps or sampled
            if not (logged or kept) and step - seen < trainer.check_steps:
                continue
            new = trainer.check(step - seen)
            sums, seen = new if sums is None else sums + new, step
            if self._progress is not None:
                rate = self._rate.per_second
                left = (self._steps - step) / rate
                self._progress(Progress(step, self._steps, trainer.loss, rate * trainer.settings.batch, left))
            stopped = self._agreed(self._stop())
            bits = self._sample() if sampled else math.nan
            if logged or stopped:
                self._log(sums, bits)
                sums = None
            if not stopped and (self._agreed(time.monotonic() - self._saved_at > 60 * house.save_minutes) or kept):
                self._save()

    def _sample(self) -> float:
        """Draw a grid, and the likelihood of the images held out."""
        trainer = self._trainer
        bits = math.nan
        with self._rate.paused():
            if trainer.processes.first:
                self._patiently(lambda: trainer.sample_grid(self._trackers))
                bits = trainer.bits_per_dim()
            trainer.processes.wait()
        return bits

    def _log(self, sums: NDArray[np.float64], bits: float) -> None:
        trainer = self._trainer
        means = figures(sums, trainer.processes.size)
        row: Row = {
            "step": trainer.step,
            "seconds": time.monotonic() - self._begun,
            "loss": means.loss,
            "grad_norm": means.grad_norm,
            "lr": trainer.settings.lr_at(trainer.step - 1),
            "images_per_second": self._rate.per_second * trainer.settings.batch,
            "memory_mb": memory_mb(trainer.device),
            "bits_per_dim": bits,
            **dict(zip(bucket_names(trainer.spec.timesteps), means.buckets, strict=True)),
        }
        for tracker in self._trackers:
            self._patiently(lambda tracker=tracker: tracker.row(row))  # type: ignore[misc]

    def _save(self) -> None:
        trainer, house = self._trainer, self._house
        with self._rate.paused():
            if trainer.processes.first:
                self._patiently(lambda: trainer.save(keep=house.keep, keep_every=house.keep_every))
            trainer.processes.wait()
            trainer.saved_step = trainer.step  # in every process: all of them have to save at the same steps
        self._saved_at = time.monotonic()

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write; where the disk is full, wait until it is not.

        Raises:
            OutputError: for another reason, or the user would not wait.
        """
        waiting = False
        while True:
            try:
                write()
            except OutputError as error:
                if not is_full(error) or self._stop():
                    raise
                if not waiting:
                    self._message(f"{error.fact}: no space left. Training waits until there is some; Ctrl-C gives up")
                waiting = True
                with self._rate.paused():
                    until = time.monotonic() + FULL_DISK_SECONDS
                    while time.monotonic() < until and not self._stop():
                        time.sleep(0.1)
            else:
                if waiting:
                    self._message("there is space again: training goes on")
                return

    def _agreed(self, mine: bool) -> bool:
        """Whether any process says so: all do the same after the same step."""
        trainer = self._trainer
        if trainer.processes.size == 1:
            return mine
        return trainer.processes.sum(torch.tensor(float(mine), device=trainer.device)).item() > 0


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold the run's lock: two trainings would remove each other's checkpoints.

    Raises:
        InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (run / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{run}: another training is writing to this run", hint="choose another --out") from error
        yield


class _Rate:
    """Steps per second over the last half minute, without what is not training: grids of samples, checkpoints."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._times = [self._now()]

    def _now(self) -> float:
        return time.monotonic() - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begun

    def tick(self) -> None:
        """Count a step."""
        self._times.append(self._now())
        if len(self._times) > 2 and self._times[-1] - self._times[1] > 30:
            del self._times[0]

    @property
    def per_second(self) -> float:
        return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
