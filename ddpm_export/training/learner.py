"""One optimiser step of Ho et al. (appendix B): Adam, linear warm-up, gradient clipping, an average of the weights.

Everything random in step s is drawn from a generator seeded by (seed, s), so that no generator state has to be saved.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ddpmx
from ddpm_export.networks.registry import Config, check_spec, make_network
from ddpm_export.networks.unet import UNet
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.average import decay_at
from ddpm_export.training.batches import Batch, Batches
from ddpm_export.training.data import Dataset
from ddpm_export.training.distributed import ALONE, Processes
from ddpm_export.training.likelihood import bits_per_dim
from ddpm_export.training.log import bucket_edges
from ddpm_export.training.objective import Losses, Objective
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.timesteps import make_timesteps
from ddpm_export.training.watch import Sums, figures
from ddpmx.errors import InputError, NumericError, SpecError
from ddpmx.formats.spec import ModelSpec

GPU_CHECK_STEPS = 16
"""A GPU is asked only every so often how it goes: each answer makes it wait for the next step's commands."""

NO_NEWS = "Grad strides do not match bucket view strides"
"""Torch's warning where several processes train, of the strides of a 1×1 convolution's sides of length 1: they mean nothing
(https://github.com/pytorch/pytorch/issues/157862)."""

RUNAWAY = {"simple": 10.0, "hybrid": 10.0, "vlb": 100.0}
"""A running mean of the loss this many times above its lowest is a training that has run away."""


class Learner:
    """A network that is being trained, in memory: what one optimiser step is.

    Args:
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
        run_away: whether training was stopped because the loss had run away.
        check_steps: after how many steps it is time for :meth:`check`.

    Raises:
        SpecError: spec, network and images do not fit together.
        InputError: a new network is to have attention at a height that it does not have; the settings contradict the model.
    """

    def __init__(
        self,
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
        check_conditioning(dataset, spec, settings)
        check_spec(network, spec)
        if weights is None and isinstance(network, UNetConfig):
            network.check_attention()
        self.objective = Objective(
            spec.make_schedule(), spec.prediction, spec.variance, settings.loss, settings.min_snr
        )
        self.dataset, self.settings, self.processes = dataset, settings, processes
        self.spec = spec.replace(ddpmx=ddpmx.__version__)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step, self.loss = 0, math.nan
        self.run_away = False
        self._lowest = math.inf
        torch.manual_seed(seed_of(settings.seed, 0, "initial weights"))
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

    def bits_per_dim(self) -> float:
        """An estimate of the bound on −log₂ p of the images held out, by the averaged weights; NaN if there are none."""
        return bits_per_dim(self.objective, self.average, self.batches, self.device, seed=self.settings.seed)

    def train_step(self) -> None:
        """One optimiser step. ``step`` counts on, whatever came of it; :meth:`check` tells.

        Raises:
            NumericError: on a CPU, if the gradient is not finite. The step is then not made.
        """
        with self.processes.talking(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NO_NEWS)
            self._train_step()
        self.step += 1

    def _train_step(self) -> None:
        settings, step = self.settings, self.step
        torch.manual_seed(seed_of(settings.seed, step, "step"))
        batch = self.batches.draw(step)
        share = self.processes.share(settings.batch)
        t, weights = (self._moved(values[share]) for values in self.timesteps.sample(settings.batch))
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
        if self.timesteps.learns:
            self.timesteps.update(self.processes.gather(t), self.processes.gather(loss))

    def _inputs(
        self, batch: Batch, t: Tensor, eps: Tensor, share: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x0, y, cond and x0_prev of this process's share of the batch, on the device."""
        settings, spec = self.settings, self.spec
        x0, y, cond = (None if v is None else self._moved(v) for v in (batch.x0, batch.y, batch.cond))
        assert x0 is not None
        if y is not None and settings.label_dropout:
            assert spec.classes is not None
            dropped = self._moved((torch.rand(settings.batch) < settings.label_dropout)[share])
            y = torch.where(dropped, spec.classes, y)
        x0_prev = None
        if spec.self_condition:
            x0_prev = torch.zeros_like(x0)
            if torch.rand(()) < 0.5:  # Chen et al. 2022, Algorithm 1: half of the batches get an estimate
                x0_prev = self._estimate(x0, t, eps, y, cond)
        if self.processes.size > 1:  # dropout differs between the processes
            torch.manual_seed(seed_of(settings.seed, self.step, f"process {self.processes.rank}"))
        return x0, y, cond, x0_prev

    def _moved(self, values: Tensor) -> Tensor:
        """On the training's device; a GPU copies while it computes, and is not waited for, as it is by ``to`` alone."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

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
            self._check_finite()
        else:  # the fused Adam leaves everything as it is where this is 1, as torch.amp.GradScaler uses it
            self.optimizer.found_inf = (self._bad > 0).float()  # type: ignore[attr-defined]

    def _check_finite(self, *, counted: bool = False) -> None:
        """Raise if a gradient was not finite; ``counted``: the steps since then were, and did nothing."""
        if not (bad := int(self._bad.item())):
            return
        self.step -= bad if counted else 0
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
            self._check_finite(counted=True)
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


def check_conditioning(dataset: Dataset, spec: ModelSpec, settings: TrainSettings) -> None:
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


def seed_of(seed: int, step: int, purpose: str) -> int:
    """A seed for torch, well mixed: its CPU generator uses 32 bits of what it is given."""
    return int(np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1)[0])
