"""The training loop of Ho et al. (appendix B): Adam, linear warm-up, gradient clipping, an average of the weights.

Everything random in step s is drawn from a generator seeded by (seed, s), and the order of the images from one seeded by
(seed, epoch). So no generator state has to be saved, and an interrupted run continues exactly: on one CPU the weights
after 20 + 20 steps equal those after 40 bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ddpmx
from ddpm_export.networks.registry import Config, check_spec, make_network
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.average import decay_at
from ddpm_export.training.checkpoint import TrainingState, Weights
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.diffusion import GaussianDiffusion
from ddpm_export.training.images import cache
from ddpm_export.training.settings import TrainSettings, check_steps
from ddpmx.errors import FileFormatError, InputError, NumericError, SpecError
from ddpmx.formats.atomic import make_folder
from ddpmx.formats.model_file import SPEC_FILE
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import from_uint8
from ddpmx.sampling.request import Sampling

__all__ = ["Progress", "TrainSettings", "Trainer", "recorded_source"]

SAMPLE_COUNT, SAMPLE_STEPS = 16, 50


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: optimiser steps made, over all sessions.
        steps: in all.
        loss: a running mean of L_simple.
        images_per_second: over the last steps.
        seconds_left: at that speed, without the time of sample grids and checkpoints.
    """

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


class Trainer:
    """A run in memory: new, begun with another network's weights, or resumed from its newest checkpoint.

    Args:
        run: the run's folder.
        dataset: the images.
        spec: of the model. Its shape must be the images'.
        network: the config of the network.
        settings: of the training.
        device: where to train; by default a GPU if there is one.
        weights: the weights to begin with and their average, both by name; by default new ones.

    Attributes:
        step: optimiser steps made.
        loss: a running mean of L_simple; NaN before the first step.

    Raises:
        SpecError: spec, network and images do not fit together.
        InputError: a new network is to have attention at a height that it does not have.
    """

    def __init__(
        self,
        run: Path,
        dataset: Dataset,
        spec: ModelSpec,
        network: Config,
        settings: TrainSettings,
        *,
        device: str | None = None,
        weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    ) -> None:
        if not (spec.shape == dataset.shape == (network.in_channels, *network.size)):
            raise SpecError(
                "model, network and images disagree about the shape of an image",
                note=f"{spec.shape}, {(network.in_channels, *network.size)} and {dataset.shape}",
            )
        if spec.conditioning_shapes or spec.variance == "learned_range":
            takes = ", ".join(spec.inputs) + ("; its variance is learned" if spec.variance == "learned_range" else "")
            raise SpecError(
                "ddpmx trains only networks of x and t with a fixed variance", note=f"this one takes {takes}"
            )
        check_spec(network, spec)
        if weights is None and isinstance(network, UNetConfig):
            network.check_attention()
        self.run, self.dataset, self.settings = run, dataset, settings
        self.spec = spec.replace(ddpmx=ddpmx.__version__)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step, self.loss = 0, math.nan
        self._saved_step = -1
        self._fingerprint = dataset.fingerprint()
        torch.manual_seed(_seed(settings.seed, 0, "initial weights"))
        self.network = make_network(network).to(self.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        if weights is not None:
            self.network.load_state_dict(weights[0])
            self.average.load_state_dict(weights[1])
        self.begun_from: dict[str, Any] | None = None
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._diffusion = GaussianDiffusion(spec.make_schedule(), spec.prediction, spec.variance).to(self.device)
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def resume(cls, run: Path, dataset: Dataset, *, device: str | None = None) -> Trainer:
        """Resume a run from its newest checkpoint.

        Raises:
            FileFormatError: there is no checkpoint, or it is damaged, or ``dataset`` is not what it was trained on.
        """
        checkpoint = _newest(run)
        state = checkpoints.load_training(checkpoint)
        network, spec = checkpoints.load_network(checkpoint, "raw")
        average, _ = checkpoints.load_network(checkpoint, "ema")
        try:
            settings, fingerprint = TrainSettings(**state.settings["train"]), state.settings["data"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{checkpoint}: settings of another version of ddpmx", note=str(error)) from error
        if fingerprint != dataset.fingerprint():
            raise FileFormatError(
                f"{run}: this run was trained on other images than {dataset.source.path} holds now",
                hint="--data with the images it began with, or begin a new run",
            )
        weights = (network.state_dict(), average.state_dict())
        trainer = cls(run, dataset, spec, network.config, settings, device=device, weights=weights)
        trainer.step = trainer._saved_step = state.step
        if isinstance(loss := state.settings.get("loss"), float):
            trainer.loss = loss
        trainer.begun_from = state.settings.get("from")
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
        device: str | None = None,
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
            device: where to train; by default a GPU if there is one.

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
        trainer = cls(run, dataset, spec, config, settings, device=device, weights=(state, state))
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
        sample_every: int = 0,
        save_seconds: float = 600.0,
        cache_images: bool = True,
    ) -> Path:
        """Train until ``steps`` optimiser steps have been made in all, and save.

        Args:
            steps: in all, this session's and earlier ones'.
            progress: called after each step.
            stop: called after each step; True saves and returns early.
            sample_every: write a grid of images every so many steps; 0 for never.
            save_seconds: time between checkpoints. There is always one at the end.
            cache_images: keep the pixels of a folder in the run, so that resuming it decodes nothing.

        Returns:
            The checkpoint.

        Raises:
            InputError: fewer steps than have been made, or fewer than one.
            NumericError: the loss is not finite. The last checkpoint is kept.
            OutputError: a checkpoint could not be written.
        """
        check_steps(steps)
        if steps < self.step:
            raise InputError(f"{self.run} has made {self.step} steps, more than {steps}")
        make_folder(self.run)
        with _alone(self.run):
            if cache_images and self.dataset.cache_key is not None:
                cache.store(self.run, self.dataset.cache_key, self.dataset.images, self.dataset.notes)
            return self._train(steps, progress, stop, sample_every, save_seconds)

    def _train(
        self,
        steps: int,
        progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
        sample_every: int,
        save_seconds: float,
    ) -> Path:
        self.network.train()
        saved_at = time.monotonic()
        rate = _Rate()
        while self.step < steps:
            loss = self._train_step()
            if not math.isfinite(loss):
                raise NumericError(
                    f"the loss is {loss} at step {self.step}",
                    note="training has diverged; the last checkpoint is untouched",
                    hint="a smaller --lr, or a longer --warmup",
                )
            self.step += 1
            self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
            steps_per_second = rate.tick()
            if progress is not None:
                left = (steps - self.step) / steps_per_second
                progress(Progress(self.step, steps, self.loss, steps_per_second * self.settings.batch, left))
            if sample_every and self.step % sample_every == 0:
                with rate.paused():
                    self.sample_grid()
            if stop is not None and stop():
                break
            if time.monotonic() - saved_at > save_seconds:
                with rate.paused():
                    self.save()
                saved_at = time.monotonic()
        return checkpoints.resolve(self.run) if self._saved_step == self.step else self.save()

    def save(self) -> Path:
        """Write a checkpoint of the current state."""
        moments = {}
        for name, parameter in self.network.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                # a run that was stopped before its first step has no moments yet: they begin at zero
                moments[f"{moment}.{name}"] = self.optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
        settings: dict[str, Any] = {
            "train": dataclasses.asdict(self.settings),
            "loss": None if math.isnan(self.loss) else self.loss,
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
        )
        self._saved_step = self.step
        return saved

    def sample_grid(self) -> Path:
        """Write a grid of images sampled with the averaged weights, from the same seed each time to show the change."""
        pipeline = Pipeline(self.spec, TorchBackend(self.average))
        sampling = Sampling.chosen(self.spec.timesteps, steps=min(SAMPLE_STEPS, self.spec.timesteps))
        drawn = pipeline.generate(SAMPLE_COUNT, seed=self.settings.seed, sampling=sampling)
        path = make_folder(self.run / "samples") / f"grid-{self.step:08d}.png"
        sheet = writers.grid(drawn)
        writers.save_png(path, sheet, zoom=writers.zoom_for(sheet.shape[1]))
        return path

    def _train_step(self) -> float:
        """One optimiser step; its loss."""
        settings = self.settings
        torch.manual_seed(_seed(settings.seed, self.step, "step"))
        x0 = self._batch()
        t = self._diffusion.sample_t(len(x0)).to(self.device)
        eps = torch.randn(x0.shape, device=self.device)
        for group in self.optimizer.param_groups:
            # as Ho et al.: the rate is 0 in the very first step
            group["lr"] = settings.lr * min(self.step / settings.warmup, 1.0) if settings.warmup else settings.lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            loss = self._diffusion.loss(self.network, x0, t, eps)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.grad_clip)
        self.optimizer.step()
        self._update_average()
        return loss.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = decay_at(self.step, self.settings.ema, self.settings.ema_ramp)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    def _batch(self) -> Tensor:
        """The images of this step, float32 [B, C, H, W] in [−1, 1]; half of them mirrored."""
        batch, n = self.settings.batch, len(self.dataset)
        where = np.arange(self.step * batch, (self.step + 1) * batch)
        indices = np.array(
            [
                self._order(epoch)[position]
                for epoch, position in zip((where // n).tolist(), (where % n).tolist(), strict=True)
            ]
        )
        picked = torch.from_numpy(from_uint8(self.dataset.images[indices])).permute(0, 3, 1, 2)
        if self.settings.hflip:
            mirrored = torch.rand(batch) < 0.5
            picked = torch.where(mirrored[:, None, None, None], picked.flip(3), picked)
        return picked.contiguous().to(self.device)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the images in one epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.settings.seed, epoch])
            self._epoch = epoch, generator.permutation(len(self.dataset))
        return self._epoch[1]

    def _load_moments(self, moments: dict[str, Tensor], checkpoint: Path) -> None:
        for name, parameter in self.network.named_parameters():
            pair = [moments.get(f"{moment}.{name}") for moment in ("exp_avg", "exp_avg_sq")]
            if any(m is None or m.shape != parameter.shape for m in pair):
                raise FileFormatError(f"{checkpoint}: the training state is not of this network", note=f"at {name!r}")
            first, second = (m.to(self.device, torch.float32) for m in pair if m is not None)
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


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
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

    def tick(self) -> float:
        """Count a step."""
        self._times.append(self._now())
        if len(self._times) > 2 and self._times[-1] - self._times[1] > 30:
            del self._times[0]
        return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)


def _seed(seed: int, step: int, purpose: str) -> int:
    """A seed for torch, well mixed: its CPU generator uses 32 bits of what it is given."""
    return int(np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1)[0])
