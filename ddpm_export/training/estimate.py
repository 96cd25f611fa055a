"""What a training costs, before it begins: parameters, arithmetic, memory, and time measured on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm_export.networks.registry import make_network
from ddpm_export.training.train import Trainer

FIRST_IMAGES, LONG_ENOUGH = 4, 0.3
"""How many images go through the network first to measure its time, and after how many seconds more need not."""

COPIES = 5
"""Weights, their gradient, Adam's two moments, the average: each as large as the weights."""


@dataclass(frozen=True)
class Estimate:
    """What one training costs.

    Attributes:
        parameters: of the network.
        flops: of one image forwards and backwards; a multiplication and an addition are two.
        memory: bytes of weights, moments and activations.
        seconds: of one step.
    """

    parameters: int
    flops: int
    memory: int
    seconds: float


def estimate(trainer: Trainer) -> Estimate:
    """What the steps of ``trainer`` cost. It is left as it is."""
    parameters = sum(p.numel() for p in trainer.network.parameters())
    flops, activations = _count(trainer)
    each = trainer.settings.batch // trainer.settings.accumulate // trainer.processes.size
    memory = COPIES * 4 * parameters + each * activations
    return Estimate(parameters, flops, memory, seconds_per_step(trainer))


def seconds_per_step(trainer: Trainer) -> float:
    """The seconds of one step, from forward and backward passes of as few images as tell."""
    settings = trainer.settings
    here = settings.batch // trainer.processes.size
    most = here // settings.accumulate  # more at once may not fit into memory
    weights = [p for p in trainer.network.parameters() if p.requires_grad]
    trainer.network.train()

    def once(n: int) -> float:
        x0, t, eps, conditioning = _example(trainer, n, trainer.device)
        begun = time.perf_counter()
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=settings.bf16):
            loss = trainer.objective(trainer.network, x0, t, eps, conditioning).loss.mean()
        torch.autograd.grad(loss, weights, allow_unused=True)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter() - begun

    n = min(most, FIRST_IMAGES)
    once(n)  # libraries choose their kernels
    seconds = once(n)
    while seconds < LONG_ENOUGH and n < most:
        n = min(4 * n, most)
        once(n)
        seconds = once(n)
    return seconds * here / n


def _count(trainer: Trainer) -> tuple[int, int]:
    """Arithmetic of one image, and bytes that its forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.device("meta"):
        network = make_network(trainer.network.config)
    network.train()
    if getattr(trainer.network, "checkpoint_activations", False):
        network.checkpoint_activations = True
    own = {id(p.untyped_storage()) for p in network.parameters()}
    x, t, _, conditioning = _example(trainer, 1, torch.device("meta"))
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x, t, **conditioning)
    activations = sum(size for storage, size in kept.items() if storage not in own)
    # backwards there is one product for the input and one for the weights
    return 3 * counter.get_total_flops(), activations


def _example(trainer: Trainer, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """n images, their t, noise and conditioning: of the right shapes."""
    spec = trainer.spec
    images = torch.zeros(n, *spec.shape, device=device)
    t = torch.zeros(n, dtype=torch.int64, device=device)
    conditioning = {
        name: torch.zeros(n, *shape, device=device, dtype=torch.int64 if name == "y" else torch.float32)
        for name, shape in spec.conditioning_shapes.items()
    }
    return images, t, torch.ones_like(images), conditioning
