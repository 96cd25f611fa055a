"""The trainings that ``training.py`` compares, each in a process of its own, with the protocol of ``peers_runs.py``.

All train ddpmx's own network on the same images in the same order. Beside the network, a step is that of the project: its
noise and loss, optimiser, clipping, average, and what it asks the device for after each step.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`

from benchmarks.peers_runs import forget_peak, peak_rss, serve
from ddpm_export.networks.unet import UNet
from ddpm_export.networks.unet_config import UNetConfig, cifar10
from ddpm_export.training.batches import Batches
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer
from ddpmx.formats.spec import ModelSpec

TIMESTEPS, RATE, CLIP = 1000, 2e-4, 1.0
SEED = 0


def network_config(name: str) -> UNetConfig:
    """``demo``, the one of examples/fashion_mnist, or the paper's for CIFAR-10. Without dropout, as those have none."""
    if name == "demo":
        return UNetConfig(1, 1, (16, 16), 32, (1, 2, 2), 1, (8,), 0.0, 8)
    return UNetConfig(**{**vars(cifar10()), "dropout": 0.0})


class Run(ABC):
    """A training, ready to make steps.

    Attributes:
        about: the numbers of the network, as JSON.
        versions: of the libraries.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.job, self.device = job, torch.device(job["device"])
        self.config = network_config(job["network"])
        self.settings = TrainSettings(
            batch=job["batch"], lr=RATE, warmup=0, grad_clip=CLIP, seed=SEED, bf16=job["precision"] == "bf16"
        )
        self.versions = {"torch": torch.__version__}
        self.about: dict[str, Any] = {"parameters": 0, "precision": job["precision"]}
        pixels = np.random.default_rng(0).integers(
            0, 256, (job["images"], *self.config.size, self.config.in_channels), np.uint8
        )
        self.data = Dataset(pixels, Source(Path("images")))

    @abstractmethod
    def load(self) -> str:
        """Make the network and what trains it. Returns what computes."""

    @abstractmethod
    def train(self, steps: int) -> float:
        """Make steps. Returns the mean of their losses."""


class Ddpmx(Run):
    """``Trainer``, by the loop of its session: the device is asked only now and then."""

    def load(self) -> str:
        folder = tempfile.TemporaryDirectory()
        self.folder = folder  # for as long as this lives
        spec = ModelSpec((self.config.in_channels, *self.config.size), TIMESTEPS)
        compiled = self.job["kind"] == "compiled"
        run = Path(folder.name) / "run"
        self.trainer = Trainer(
            run, self.data, spec, self.config, self.settings, device=str(self.device), compiled=compiled
        )
        self.network = self.trainer.network
        self.about["parameters"] = sum(p.numel() for p in self.network.parameters())
        return f"torch {torch.__version__}, {self.device}{', compiled' if compiled else ''}"

    def train(self, steps: int) -> float:
        trainer, seen, sums = self.trainer, 0, []
        with trainer.batches.ahead(trainer.step):
            for made in range(1, steps + 1):
                trainer.train_step()
                if made - seen >= trainer.check_steps or made == steps:
                    sums.append(trainer.check(made - seen))
                    seen = made
        from ddpm_export.training.watch import figures

        return figures(np.sum(sums, axis=0)).loss


class TheirLoop(Run):
    """A project whose step is written out here."""

    def load(self) -> str:
        """Make the network and what trains it. Returns what computes."""
        torch.manual_seed(SEED)
        self.network: nn.Module = UNet(self.config).to(self.device)
        self.batches, self.made = Batches(self.data, self.settings), 0
        self.prepare()
        self.about["parameters"] = sum(p.numel() for p in self.network.parameters())
        return f"torch {torch.__version__}, {self.device}"

    @abstractmethod
    def prepare(self) -> None:
        """Make optimiser and average, of a network on the device."""

    @abstractmethod
    def step(self, x0: Tensor) -> float:
        """One step with images [B, C, H, W] in −1…1 on the device. Returns the loss."""

    def train(self, steps: int) -> float:
        """Make steps. Returns the mean of their losses."""
        losses = []
        with self.batches.ahead(self.made):
            for _ in range(steps):
                losses.append(self.step(self.batches.draw(self.made).x0.to(self.device)))
                self.made += 1
        return float(np.mean(losses))

    def autocast(self) -> torch.autocast:
        """As accelerate's mixed precision does it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)


class _AsTheirs(nn.Module):
    """Our network with the attributes and the call that GaussianDiffusion expects."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels, self.out_dim = network, channels, channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, t)
        return out


class Lucidrains(TheirLoop):
    """denoising-diffusion-pytorch: ``GaussianDiffusion.forward``, and the step of its ``Trainer``."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        import denoising_diffusion_pytorch  # noqa: F401 - where it is missing, here
        import ema_pytorch  # noqa: F401

        for name in ("denoising-diffusion-pytorch", "ema-pytorch"):
            self.versions[name] = importlib.metadata.version(name)

    def prepare(self) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion
        from ema_pytorch import EMA

        self.diffusion = GaussianDiffusion(
            _AsTheirs(self.network, self.config.in_channels),
            image_size=self.config.size,
            timesteps=TIMESTEPS,
            beta_schedule="linear",
            objective="pred_noise",
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=RATE, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10).to(self.device)

    def step(self, x0: Tensor) -> float:
        with self.autocast():
            loss = self.diffusion((x0 + 1) / 2)  # it takes 0…1
        value = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return value


class Diffusers(TheirLoop):
    """diffusers: the step of its example for unconditional training, with ``--use_ema``, without accelerate."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        import diffusers

        self.versions["diffusers"] = diffusers.__version__

    def prepare(self) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rates = get_scheduler("cosine", self.optimizer, num_warmup_steps=0, num_training_steps=1_000_000)
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(self.device)

    def step(self, x0: Tensor) -> float:
        noise = torch.randn(x0.shape, device=self.device)
        t = torch.randint(0, TIMESTEPS, (len(x0),), device=self.device).long()
        noisy = self.scheduler.add_noise(x0, noise, t)
        with self.autocast():
            output = self.network(noisy, t)
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return loss.detach().item()


KINDS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "ddpmx": Ddpmx,
    "compiled": Ddpmx,
    "lucidrains": Lucidrains,
    "diffusers": Diffusers,
}


def reply_to(run: Run, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request other than the first."""
    if request["do"] == "load":
        begun = time.perf_counter()
        description = run.load()
        return {"seconds": time.perf_counter() - begun, "description": description, "about": run.about}
    assert request["do"] == "train", request
    on_gpu = run.device.type == "cuda"
    forget_peak()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    loss = run.train(request["steps"])
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    gpu = torch.cuda.max_memory_reserved() if on_gpu else None
    return {"seconds": seconds, "loss": loss, "rss": peak_rss(), "gpu": gpu}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(KINDS, reply_to)
