"""A training run: begun, resumed, saved, looked at. :mod:`.learner` has the optimiser step, :mod:`.session` the loop.

Everything random in step s is drawn from a generator seeded by (seed, s), and the order of the images from one seeded by
(seed, epoch). So no generator state has to be saved, and an interrupted run continues exactly: on one CPU the weights
after 20 + 20 steps equal those after 40 bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_export.networks.registry import Config
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.checkpoint import TrainingState, Weights
from ddpm_export.training.config import RunConfig, write_config
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.images import cache
from ddpm_export.training.images.pixels import InMemory
from ddpm_export.training.labels import named
from ddpm_export.training.learner import Learner, seed_of
from ddpm_export.training.log import CsvLog, Tracker
from ddpm_export.training.session import Housekeeping, Progress, Session, alone
from ddpm_export.training.settings import TrainSettings, check_steps
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.atomic import make_folder
from ddpmx.formats.model_file import SPEC_FILE
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling

__all__ = ["Housekeeping", "Progress", "TrainSettings", "Trainer", "recorded_source"]

SAMPLE_COUNT, SAMPLE_STEPS = 16, 50

CHANGEABLE = frozenset({"lr", "warmup", "lr_decay", "ema", "grad_clip"})
"""Settings that a resumed run may change. The others decide which images and which noise a step gets."""


class Trainer(Learner):
    """A run: new, begun with another network's weights, or resumed from its newest checkpoint.

    Args:
        run: the run's folder.
        dataset, spec, network, settings: as of :class:`Learner`.
        **how: ``device``, ``weights``, ``processes``, ``compiled`` and ``checkpoint_activations``, as there.

    Attributes:
        saved_step: of the newest checkpoint, −1 without.
        steps: at which the run is to end, 0 if that was never said.
        config: the choices that the run was begun by, if any: they are written into its folder.

    Raises:
        SpecError, InputError: as :class:`Learner`.
    """

    def __init__(
        self, run: Path, dataset: Dataset, spec: ModelSpec, network: Config, settings: TrainSettings, **how: Any
    ) -> None:
        spec, unnamed = named(spec, dataset.classes)
        if unnamed is not None and unnamed not in dataset.notes:
            dataset.notes += (unnamed,)
        super().__init__(dataset, spec, network, settings, **how)
        self.run = run
        self.saved_step = -1
        self.steps = 0
        self.config: RunConfig | None = None
        self.begun_from: dict[str, Any] | None = None
        self._fingerprint = dataset.fingerprint()

    @classmethod
    def resume(
        cls,
        run: Path,
        dataset: Dataset,
        *,
        changes: Mapping[str, Any] | None = None,
        other_images: bool = False,
        **how: Any,
    ) -> Trainer:
        """Resume a run from its newest checkpoint.

        Args:
            run: the run's folder.
            dataset: the images that it was trained on.
            changes: settings that are to be others from here on, among :data:`CHANGEABLE`.
            other_images: train on with other images of the same shape.
            **how: ``device``, ``processes``, ``compiled`` and ``checkpoint_activations``.

        Raises:
            FileFormatError: there is no checkpoint, or it is damaged, or ``dataset`` is not what it was trained on.
            InputError: a setting that cannot be changed.
        """
        checkpoint = _newest(run)
        state = checkpoints.load_training(checkpoint)
        network, spec = checkpoints.load_network(checkpoint, "raw")
        average, _ = checkpoints.load_network(checkpoint, "ema")
        try:
            settings, fingerprint = TrainSettings(**state.settings["train"]), state.settings["data"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{checkpoint}: settings of another version of ddpmx", note=str(error)) from error
        if changes:
            if fixed := sorted(changes.keys() - CHANGEABLE):
                raise InputError(f"{fixed[0]} cannot be changed when a run is resumed")
            settings = dataclasses.replace(settings, **changes)
        if fingerprint != dataset.fingerprint() and not other_images:
            raise FileFormatError(
                f"{run}: this run was trained on other images than {dataset.source.path} holds now",
                hint="--data with the images it began with; --other-images goes on with these; or begin a new run",
            )
        weights = (network.state_dict(), average.state_dict())
        trainer = cls(run, dataset, spec, network.config, settings, weights=weights, **how)
        trainer.step = trainer.saved_step = state.step
        if changes or other_images:
            trainer.saved_step = -1
        if isinstance(loss := state.settings.get("loss"), float):
            trainer.loss = loss
        if type(steps := state.settings.get("steps")) is int:
            trainer.steps = steps
        trainer.begun_from = state.settings.get("from")
        if not trainer.timesteps.load(state.moments):
            raise FileFormatError(f"{checkpoint}: the training state is not of this T", note="at timesteps.losses")
        trainer._load_moments(state.moments, checkpoint)
        return trainer

    @classmethod
    def fine_tune(
        cls,
        run: Path,
        dataset: Dataset,
        source: Path,
        settings: TrainSettings,
        *,
        weights: Weights = "ema",
        dropout: float | None = None,
        **how: Any,
    ) -> Trainer:
        """A new run that begins with the weights of another, trained or imported one.

        Schedule, prediction, variance and network are that run's. The optimiser is new, and so is the average: it begins
        with the same weights. The images may be others of the same shape.

        Args:
            run: the new run's folder.
            dataset: the images.
            source: a run, or one of its checkpoints.
            settings: of the training.
            weights: which weights to begin with.
            dropout: in place of the source's, where its network has dropout.
            **how: as for :meth:`resume`.

        Raises:
            FileFormatError: ``source`` is no run, or damaged.
            SpecError: its network is not one that can be trained here, or of images of another shape.
            InputError: ``dropout`` is out of its range, or the network has none.
        """
        checkpoint = checkpoints.resolve(source)
        network, spec = checkpoints.load_network(checkpoint, weights)
        config = network.config
        if dropout is not None:
            if not isinstance(config, UNetConfig):
                raise InputError(f"the network of {source} has no dropout")
            config = dataclasses.replace(config, dropout=dropout)
        state = network.state_dict()
        trainer = cls(run, dataset, spec, config, settings, weights=(state, state), **how)
        trainer.begun_from = {
            "path": str(checkpoint.resolve()),
            "weights": weights,
            "sha256": checkpoints.weights_hash(state),
        }
        return trainer

    def train(
        self,
        steps: int,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        message: Callable[[str], None] | None = None,
        housekeeping: Housekeeping | None = None,
    ) -> Path:
        """Train until ``steps`` optimiser steps have been made in all, and save.

        Args:
            steps: in all, this session's and earlier ones'.
            progress: called after each step on a CPU, after each :data:`GPU_CHECK_STEPS` on a GPU.
            stop: called as often; True saves and returns early.
            message: called with a line that a user should read, such as that the disk is full.
            housekeeping: what is done beside training.

        Returns:
            The checkpoint.

        Raises:
            InputError: fewer steps than have been made, or fewer than one.
            NumericError: the loss is not finite or has run away. The last good state is kept as a checkpoint.
            OutputError: a checkpoint could not be written. On a full disk it is tried again until ``stop`` says True.
            BackendError: another process of this training has ended.
        """
        check_steps(steps)
        if steps < self.step:
            raise InputError(f"{self.run} has made {self.step} steps, more than {steps}")
        house = Housekeeping() if housekeeping is None else housekeeping
        self.steps = steps
        make_folder(self.run)
        with alone(self.run) if self.processes.first else contextlib.nullcontext():
            trackers: list[Tracker] = []
            if self.processes.first:
                if (
                    house.cache_images
                    and self.dataset.cache_key is not None
                    and isinstance(self.dataset.pixels, InMemory)
                ):
                    cache.store(self.run, self.dataset.cache_key, self.dataset.pixels.array, self.dataset.notes)
                if self.step == 0:
                    self._write_data_picture(house.trackers)
                    if self.config is not None:
                        source = self.dataset.source
                        write_config(self.run, self.config, data=source.path, reading=source.to_config())
                trackers = [CsvLog(self.run, self.spec.timesteps, self.step), *house.trackers]
            session = Session(
                self, steps, house, trackers, progress, stop or (lambda: False), message or (lambda _: None)
            )
            return session.run()

    def save(self, *, keep: int = 2, keep_every: int = 0) -> Path:
        """Write a checkpoint of the current state."""
        moments = self.timesteps.state()
        for name, parameter in self.network.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                # a run that was stopped before its first step has no moments yet: they begin at zero
                moments[f"{moment}.{name}"] = self.optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
        settings: dict[str, Any] = {
            "train": dataclasses.asdict(self.settings),
            "loss": None if math.isnan(self.loss) else self.loss,
            "steps": max(self.steps, self.step),
            "data": {"fingerprint": self._fingerprint, "images": len(self.dataset), **self.dataset.source.to_json()},
        }
        if self.begun_from is not None:
            settings["from"] = self.begun_from
        saved = checkpoints.save(
            self.run,
            self.spec,
            self.network.config,
            self.network.state_dict(),
            self.average.state_dict(),
            TrainingState(self.step, settings, moments),
            keep=keep,
            keep_every=keep_every,
        )
        self.saved_step = self.step
        return saved

    def sample_grid(self, trackers: Sequence[Tracker] = ()) -> Path:
        """Write a grid of images sampled with the averaged weights, from the same seed each time to show the change."""
        spec = self.spec
        pipeline = Pipeline(spec, TorchBackend(self.average))
        sampling = Sampling.chosen(spec.timesteps, steps=min(SAMPLE_STEPS, spec.timesteps))
        conditioning: dict[str, Any] = {}
        if spec.classes is not None:
            conditioning["labels"] = np.arange(SAMPLE_COUNT) % spec.classes
        if spec.condition is not None:
            chosen = np.resize(
                self.batches.held_out if len(self.batches.held_out) else self.batches.trained, SAMPLE_COUNT
            )
            cond = self.batches.whole(chosen).cond
            assert cond is not None
            conditioning["cond"] = cond.numpy()
        drawn = pipeline.generate(SAMPLE_COUNT, seed=self.settings.seed, sampling=sampling, **conditioning)
        path = make_folder(self.run / "samples") / f"grid-{self.step:08d}.png"
        sheet = writers.grid(drawn)
        writers.save_png(path, sheet, zoom=writers.zoom_for(sheet.shape[1]))
        for tracker in trackers:
            tracker.picture("samples", self.step, sheet)
        return path

    def _write_data_picture(self, trackers: Sequence[Tracker]) -> None:
        """``data.png``: the first images as the network gets them, after crop, flip and background."""
        torch.manual_seed(seed_of(self.settings.seed, 0, "step"))
        batch = self.batches.draw(0)
        rows = [batch.x0] if batch.cond is None or batch.cond.shape[1] != batch.x0.shape[1] else [batch.cond, batch.x0]
        count = min(SAMPLE_COUNT // len(rows), len(batch.x0))
        images = torch.stack([row[:count] for row in rows], 1).flatten(0, 1).permute(0, 2, 3, 1)
        sheet = writers.grid(np.rint((images.numpy() + 1) * 127.5).astype(np.uint8))
        writers.save_png(self.run / "data.png", sheet, zoom=writers.zoom_for(sheet.shape[1]))
        for tracker in trackers:
            tracker.picture("data", 0, sheet)

    def _load_moments(self, moments: dict[str, Tensor], checkpoint: Path) -> None:
        for name, parameter in self.network.named_parameters():
            pair = [moments.get(f"{moment}.{name}") for moment in ("exp_avg", "exp_avg_sq")]
            if any(m is None or m.shape != parameter.shape for m in pair):
                raise FileFormatError(f"{checkpoint}: the training state is not of this network", note=f"at {name!r}")
            # laid out as the parameter, which is channels_last on a GPU: the fused Adam goes by the place in memory
            first, second = (torch.empty_like(parameter.detach()).copy_(m) for m in pair if m is not None)
            if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise FileFormatError(f"{checkpoint}: the training state holds NaN or infinities", note=f"at {name!r}")
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=self.device),
                "exp_avg": first,
                "exp_avg_sq": second,
            }


def recorded_source(run: Path) -> Source:
    """Where the images of a run came from.

    Raises:
        FileFormatError: there is no such run, or its training state is damaged.
    """
    checkpoint = _newest(run)
    _, settings = checkpoints.read_training_json(checkpoint)
    if "imported" in settings and "data" not in settings:
        raise FileFormatError(
            f"{run} was imported: there is no training of it to resume",
            hint=f"--from {shlex.quote(str(run))} --data FOLDER --out runs/NEW begins one with its weights",
        )
    return Source.from_json(settings.get("data"), str(checkpoint))


def recorded_steps(run: Path) -> int | None:
    """The steps at which a run was to end; None if it does not say.

    Raises:
        FileFormatError: there is no such run, or its training state is damaged.
    """
    steps = checkpoints.read_training_json(_newest(run))[1].get("steps")
    return steps if type(steps) is int else None


def _newest(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        InputError: ``run`` is one of a run's checkpoints.
        FileFormatError: it has none.
    """
    if (run / SPEC_FILE).is_file():
        raise InputError(
            f"{run} is a checkpoint; only a run can be resumed", hint=f"--out {shlex.quote(str(run.parent.parent))}"
        )
    return checkpoints.resolve(run)
