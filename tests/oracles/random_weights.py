"""Random weights that let no mistake go unnoticed. Needs torch."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def rerandomise(model: nn.Module, seed: int = 0) -> None:
    """Give every tensor random values that keep activations near 1.

    A fresh network ends each block in a layer that is almost zero, behind which a whole branch could be wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(values / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.2 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
