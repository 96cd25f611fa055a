"""An estimate of the variational bound on the images that were held out, cheap enough to watch a run by."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_export.training.batches import Batches
from ddpm_export.training.objective import Objective

MOST_IMAGES = 256
"""Images of one estimate."""

AT_ONCE = 64


@torch.no_grad()
def bits_per_dim(
    objective: Objective, network: nn.Module, batches: Batches, device: torch.device, *, seed: int
) -> float:
    """The bound on −log₂ p(x_0) per dimension (equation 5), of up to :data:`MOST_IMAGES` images held out.

    L_T and L_0 of every image, and of L_{t−1} one t each: (T−1)·mean over t that are spread evenly over 1…T−1. The same
    noise every time, so that two estimates differ by the network alone. x̂_0 is clipped, as in the chain.

    Args:
        objective: of the training.
        network: in eval mode, on ``device``.
        batches: of the training.
        device: where to compute.
        seed: of the noise.

    Returns:
        Bits per dimension; NaN if no image was held out.
    """
    indices = batches.held_out[:MOST_IMAGES]
    if not len(indices):
        return math.nan
    T, n = objective.diffusion.timesteps, len(indices)
    generator = torch.Generator().manual_seed(seed % 2**63)
    spread = torch.from_numpy(np.floor((np.arange(n) + 0.5) * (T - 1) / n).astype(np.int64)) + 1
    spread = spread[torch.randperm(n, generator=generator)]
    total = {"prior": 0.0, "first": 0.0, "rest": 0.0}
    for at in range(0, n, AT_ONCE):
        batch = batches.whole(indices[at : at + AT_ONCE])
        x0 = batch.x0.to(device)
        named = {name: v.to(device) for name, v in (("y", batch.y), ("cond", batch.cond)) if v is not None}
        eps = torch.randn(x0.shape, generator=generator).to(device)

        def terms(t: Tensor, x0: Tensor = x0, eps: Tensor = eps, named: dict[str, Tensor] = named) -> float:
            x_t = objective.diffusion.q_sample(x0, t, eps)
            outputs = network(x_t, t, **named)
            out, var = outputs if isinstance(outputs, tuple) else (outputs, None)
            return float(objective.vlb_term(x0, t, x_t, out, var, clip=1.0).double().sum())

        total["prior"] += float(objective.prior_term(x0).double().sum())
        total["first"] += terms(torch.zeros(len(x0), dtype=torch.int64, device=device))
        if T > 1:
            total["rest"] += terms(spread[at : at + AT_ONCE].to(device))
    return (total["prior"] + total["first"] + (T - 1) * total["rest"]) / n
