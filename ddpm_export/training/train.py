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
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ddpmx
from ddpm_export.networks.registry import Config, check_spec, make_network
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet import UNet
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.average import decay_at
from ddpm_export.training.batches import Batch, Batches
from ddpm_export.training.checkpoint import TrainingState, Weights
from ddpm_export.training.config import RunConfig, write_config
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.distributed import ALONE, Processes
from ddpm_export.training.images import cache
from ddpm_export.training.images.pixels import InMemory
from ddpm_export.training.likelihood import bits_per_dim
from ddpm_export.training.log import CsvLog, Tracker, bucket_edges
from ddpm_export.training.objective import Losses, Objective
from ddpm_export.training.session import Housekeeping, Progress, Session, alone
from ddpm_export.training.settings import TrainSettings, check_steps
from ddpm_export.training.timesteps import make_timesteps
from ddpm_export.training.watch import Sums, figures
from ddpmx.errors import FileFormatError, InputError, NumericError, SpecError
from ddpmx.formats.atomic import make_folder
from ddpmx.formats.model_file import SPEC_FILE
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling

__all__ = ["Housekeeping", "Progress", "TrainSettings", "Trainer", "recorded_source"]

SAMPLE_COUNT, SAMPLE_STEPS = 16, 50

GPU_CHECK_STEPS = 16
"""A GPU is asked only every so often how it goes: each answer makes it wait for the next step's commands."""

CHANGEABLE = frozenset({"lr", "warmup", "lr_decay", "ema", "grad_clip"})
"""Settings that a resumed run may change. The others decide which images and which noise a step gets."""

RUNAWAY = {"simple": 10.0, "hybrid": 10.0, "vlb": 100.0}
"""A running mean of the loss this many times above its lowest is a training that has run away."""


class Trainer:
    """A run in memory: new, begun with another network's weights, or resumed from its newest checkpoint.

    Args:
        run: the run's folder.
        dataset: the images.
        spec: of the model. Its shape must be that of the images, after cropping.
        network: the config of the network.
        settings: of the training.
        device: where to train; by default a GPU if there is one.
        weights: the weights to begin with and their average, both by name; by default new ones.
        processes: of the training, see :func:`ddpm_export.training.distributed.joined`.
        compiled: let ``torch.compile`` translate the network.
        checkpoint_activations: compute each block again in the backward pass instead of keeping its activations: less
            memory, about a third more time, the same gradient.

    Attributes:
        step: optimiser steps made.
        loss: a running mean of the loss; NaN before the first step.
        saved_step: of the newest checkpoint, −1 without.
        config: the choices that the run was begun by, if any: they are written into its folder.
        run_away: whether training was stopped because the loss had run away.
        check_steps: after how many steps it is time for :meth:`check`.

    Raises:
        SpecError: spec, network and images do not fit together.
        InputError: a new network is to have attention at a height that it does not have; the settings contradict the model.
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
        processes: Processes = ALONE,
        compiled: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        self.batches = Batches(dataset, settings, processes)
        if not (spec.shape == self.batches.shape == (network.in_channels, *network.size)):
            raise SpecError(
                "model, network and images disagree about the shape of an image",
                note=f"{spec.shape}, {(network.in_channels, *network.size)} and {self.batches.shape}",
            )
        _check_conditioning(dataset, spec, settings)
        check_spec(network, spec)
        if weights is None and isinstance(network, UNetConfig):
            network.check_attention()
        self.objective = Objective(
            spec.make_schedule(), spec.prediction, spec.variance, settings.loss, settings.min_snr
        )
        self.run, self.dataset, self.settings, self.processes = run, dataset, settings, processes
        self.spec = spec.replace(ddpmx=ddpmx.__version__)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step, self.loss = 0, math.nan
        self.saved_step = -1
        self.run_away = False
        self._lowest = math.inf
        self._fingerprint = dataset.fingerprint()
        torch.manual_seed(_seed(settings.seed, 0, "initial weights"))
        self.network = make_network(network).to(self.device)
        if self.device.type == "cuda":
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint_activations:
            if not isinstance(self.network, UNet):
                raise InputError("checkpoint_activations is for ddpmx's own U-Net")
            self.network.checkpoint_activations = True
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        if weights is not None:
            self.network.load_state_dict(weights[0])
            self.average.load_state_dict(weights[1])
        self.config: RunConfig | None = None
        self.begun_from: dict[str, Any] | None = None
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.objective.to(self.device)
        self.timesteps = make_timesteps(settings.timestep_sampling, spec.timesteps)
        self._sums = Sums(spec.timesteps, self.device)
        self.check_steps = GPU_CHECK_STEPS if self.device.type == "cuda" else 1
        self._bad = torch.zeros((), device=self.device)
        self._bad_t = torch.full((), float(spec.timesteps), device=self.device)
        self._model: nn.Module = self.network
        if processes.size > 1:
            gpus = [self.device] if self.device.type == "cuda" else None
            with processes.talking():
                # Without the flag torch sorts the gradients anew after the first step, a resumed run after its first as
                # well, and sums of the same numbers in another order differ in their last bits.
                self._model = nn.parallel.DistributedDataParallel(
                    self._model, device_ids=gpus, find_unused_parameters=True
                )
        if compiled:
            self._model = torch.compile(self._model)  # type: ignore[assignment]

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
                        write_config(self.run, self.config, data=self.dataset.source.path)
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

    def bits_per_dim(self) -> float:
        """An estimate of the bound on −log₂ p of the images held out, by the averaged weights; NaN if there are none."""
        return bits_per_dim(self.objective, self.average, self.batches, self.device, seed=self.settings.seed)

    def train_step(self) -> None:
        """One optimiser step. ``step`` counts on, whatever came of it; :meth:`check` tells.

        Raises:
            NumericError: on a CPU, if the gradient is not finite. The step is then not made.
        """
        with self.processes.talking(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True")
            self._train_step()
        self.step += 1

    def _train_step(self) -> None:
        settings, step = self.settings, self.step
        torch.manual_seed(_seed(settings.seed, step, "step"))
        batch = self.batches.draw(step)
        share = self.processes.share(settings.batch)
        t, weights = (values[share].to(self.device) for values in self.timesteps.sample(settings.batch))
        # of the whole batch, as one process would draw it
        eps = torch.randn((settings.batch, *self.spec.shape), device=self.device)[share]
        inputs = self._inputs(batch, t, eps, share)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        found: list[Losses] = []
        parts = settings.accumulate
        size = len(t) // parts
        for part in range(parts):
            these = slice(part * size, (part + 1) * size)
            x0, *conditioning = (None if values is None else values[these] for values in inputs)
            assert x0 is not None
            named = {n: v for n, v in zip(("y", "cond", "x0_prev"), conditioning, strict=True) if v is not None}
            last = part == parts - 1 or not isinstance(self._model, nn.parallel.DistributedDataParallel)
            with contextlib.nullcontext() if last else self._model.no_sync():  # type: ignore[operator]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
                    losses = self.objective(self._model, x0, t[these], eps[these], named)
                ((losses.loss * weights[these]).mean() / parts).backward()
            found.append(Losses(losses.loss.detach(), losses.simple, losses.out))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.grad_clip)
        loss, simple = (torch.cat([getattr(part, name) for part in found]) for name in ("loss", "simple"))
        self._note_bad(t, loss, norm)
        self.optimizer.step()
        self._update_average()
        self._sums.add(t, simple, loss * weights, norm)
        self.timesteps.update(self.processes.gather(t), self.processes.gather(loss))

    def _inputs(
        self, batch: Batch, t: Tensor, eps: Tensor, share: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x0, y, cond and x0_prev of this process's share of the batch, on the device."""
        settings, spec = self.settings, self.spec
        x0, y, cond = (None if v is None else v.to(self.device) for v in (batch.x0, batch.y, batch.cond))
        assert x0 is not None
        if y is not None and settings.label_dropout:
            assert spec.classes is not None
            dropped = (torch.rand(settings.batch) < settings.label_dropout)[share].to(self.device)
            y = torch.where(dropped, spec.classes, y)
        x0_prev = None
        if spec.self_condition:
            x0_prev = torch.zeros_like(x0)
            if torch.rand(()) < 0.5:  # Chen et al. 2022, Algorithm 1: half of the batches get an estimate
                x0_prev = self._estimate(x0, t, eps, y, cond)
        if self.processes.size > 1:  # dropout differs between the processes
            torch.manual_seed(_seed(settings.seed, self.step, f"process {self.processes.rank}"))
        return x0, y, cond, x0_prev

    @torch.no_grad()
    def _estimate(self, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None, cond: Tensor | None) -> Tensor:
        """x̂_0 as the chain would feed it back: by the network with x0_prev = 0, clipped."""
        diffusion = self.objective.diffusion
        x_t = diffusion.q_sample(x0, t, eps)
        named = {name: value for name, value in (("y", y), ("cond", cond)) if value is not None}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            out = self.network(x_t, t, x0_prev=torch.zeros_like(x_t), **named)
        return diffusion.predict_x0(x_t, t, out[0] if isinstance(out, tuple) else out, clip=self.spec.clip)

    def _note_bad(self, t: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Keep the optimiser from a gradient that is not finite, and from every step after it.

        Raises:
            NumericError: on a CPU, at once.
        """
        bad = ~torch.isfinite(norm)
        where = torch.where(torch.isfinite(loss), float(self.spec.timesteps), t.float()).min()
        self._bad_t = torch.where(self._bad > 0, self._bad_t, where)
        self._bad = self._bad + torch.maximum(bad.float(), (self._bad > 0).float())
        if self.check_steps == 1:
            self._check_finite(0)
        else:  # the fused Adam leaves everything as it is where this is 1, as torch.amp.GradScaler uses it
            self.optimizer.found_inf = (self._bad > 0).float()  # type: ignore[attr-defined]

    def _check_finite(self, done: int) -> None:
        """Raise if a gradient was not finite; ``done``: whether the steps since then were counted."""
        if not (bad := int(self._bad.item())):
            return
        self.step -= bad if done else 0
        lowest = self.processes.gather(self._bad_t.reshape(1)).min().item()
        t = int(lowest) if lowest < self.spec.timesteps else None
        where = (
            "the loss is finite, and the gradient is not" if t is None else f"first at t = {t}, {_bucket(t, self.spec)}"
        )
        raise NumericError(
            f"the loss or its gradient is not finite at step {self.step:,}",
            note=f"{where}; the step was not made, and the last good state is the newest checkpoint",
            hint="a smaller --lr, a longer --warmup or a smaller --grad-clip; with --bf16, without it",
        )

    def check(self, steps: int) -> NDArray[np.float64]:
        """See how the last ``steps`` steps went.

        Returns:
            Sums for :func:`ddpm_export.training.watch.figures`.

        Raises:
            NumericError: a gradient was not finite; the weights, and ``step``, are those before it. Or the loss has run
                away; the weights are then not the last good ones.
        """
        if self.check_steps > 1:
            self._check_finite(steps)
        sums = self._sums.read(self.processes)
        loss, kept = figures(sums).loss, 0.98**steps
        self.loss = loss if math.isnan(self.loss) else kept * self.loss + (1 - kept) * loss
        if self.step > 500:
            self._lowest = min(self._lowest, self.loss)
            if self.loss > RUNAWAY[self.settings.loss] * self._lowest > 0:
                self.run_away = True
                raise NumericError(
                    f"the loss has run away: {self.loss:.3g} at step {self.step:,}, after {self._lowest:.3g}",
                    note="the last checkpoint is from before",
                    hint="a smaller --lr, in a new run or with --resume; a longer --warmup",
                )
        return sums

    def is_good(self) -> bool:
        """Whether the weights are finite, and the loss has not run away: a state worth saving."""
        return not self.run_away and all(bool(torch.isfinite(p).all()) for p in self.network.parameters())

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = decay_at(self.step, self.settings.ema, self.settings.ema_ramp)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    def _write_data_picture(self, trackers: Sequence[Tracker]) -> None:
        """``data.png``: the first images as the network gets them, after crop, flip and background."""
        torch.manual_seed(_seed(self.settings.seed, 0, "step"))
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


def _check_conditioning(dataset: Dataset, spec: ModelSpec, settings: TrainSettings) -> None:
    """Check that the images have what the network takes.

    Raises:
        SpecError, InputError: they do not, or have what it does not take.
    """
    labels = dataset.labels
    if (labels is None) != (spec.classes is None):
        raise SpecError(
            "the network has classes, and the images have none" if labels is None else "the network takes no class",
            hint="--classes takes the names of folders, or the labels in an .npz"
            if labels is None
            else "omit --classes",
        )
    if labels is not None and spec.classes is not None and int(labels.max()) >= spec.classes:
        raise SpecError(f"the network has {spec.classes} classes, and the images {int(labels.max()) + 1}")
    channels = None if dataset.conditions is None else dataset.conditions.channels
    if channels != spec.condition:
        raise SpecError(
            "network and images disagree about the condition",
            note=f"{spec.condition or 'no'} channels, and {channels or 'no'} channels",
            hint="--condition FOLDER has the condition of each image, under its name",
        )
    if settings.label_dropout and not spec.null_class:
        raise InputError("label_dropout needs a network with a class for 'none'", note="the spec has no null_class")


def _bucket(t: int, spec: ModelSpec) -> str:
    """The bucket of t, as the log names it."""
    low, high = next((low, high) for low, high in bucket_edges(spec.timesteps) if low <= t <= high)
    return f"of t = {low}…{high}"


def _seed(seed: int, step: int, purpose: str) -> int:
    """A seed for torch, well mixed: its CPU generator uses 32 bits of what it is given."""
    return int(np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1)[0])
