"""Small networks in the style of other projects, which know nothing of ddpmx. Needs torch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.random_weights import rerandomise


class FractionNet(nn.Module):
    """A few convolutions; its time input is t/T."""

    def __init__(self, c_in: int = 3, c_out: int = 3, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.norm = nn.GroupNorm(3, width)
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, width))
        self.last = nn.Conv2d(width, c_out, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(4 * t[:, None])[:, :, None, None]
        for layer in self.body:
            h = h + F.silu(layer(self.norm(h)))
        return self.last(h)


class EmbeddingNet(nn.Module):
    """t as a row of a learnt table, keywords with names of its own, batch norm, an object as output."""

    def __init__(self, timesteps: int, classes: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(timesteps, 12)
        self.labels = nn.Embedding(classes, 12) if classes else None
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 1, 1)

    def forward(
        self, timestep: Tensor, sample: Tensor, *, gain: float, style: Tensor, label: Tensor | None = None
    ) -> SimpleNamespace:
        shift = self.table(timestep) + style
        if self.labels is not None:
            shift = shift + self.labels(label)
        h = self.norm(self.first(sample)) + gain * shift[:, :, None, None]
        return SimpleNamespace(sample=self.last(F.relu(self.body(h)) + h), hidden=h)


class StandardisedConv(nn.Conv2d):
    """Weights brought to mean 0 and variance 1 whenever they are used."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        return F.conv2d(x, (self.weight - mean) * (variance + eps).rsqrt(), self.bias, padding=1)


class LinearAttentionNet(nn.Module):
    """Linear attention, weight-standardised convolutions, sines of a float t; self-conditioned with ``c_in`` = 2·``c``."""

    def __init__(self, c: int = 3, c_in: int = 3, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, width, 7, padding=3)
        self.conv = StandardisedConv(width, width, 3)
        self.norm = nn.GroupNorm(4, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1)
        self.time = nn.Linear(8, 2 * width)
        self.last = nn.Conv2d(width, c, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(torch.arange(4, device=x.device) * -(math.log(10000) / 3))
        scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))[:, :, None, None].chunk(2, dim=1)
        h = self.first(x)
        h = F.silu(self.norm(self.conv(h)) * (scale + 1) + shift) + h
        b, c, height, width = h.shape
        q, k, v = (part.reshape(b, 4, c // 4, height * width) for part in self.qkv(h).chunk(3, dim=1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        mixed = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2)).reshape(b, c, height, width)
        return self.last(h + self.out(mixed))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class AutogradNet(FractionNet):
    """Its activation is a custom autograd function that saves memory."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(4 * t[:, None])[:, :, None, None]
        for layer in self.body:
            h = h + _Swish.apply(layer(self.norm(h)))
        return self.last(h)


class GaussianNet(nn.Module):
    """The best x̂_0 there is for images whose pixels are N(mean, deviation²), in whatever range; t picks ᾱ.

    E[y_0 | y_t] = mean + √ᾱ·deviation²/(ᾱ·deviation² + 1 − ᾱ)·(y_t − √ᾱ·mean).
    """

    def __init__(self, alpha_bar: Tensor, mean: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("alpha_bar", alpha_bar)
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        square = self.deviation**2
        gain = alpha_bar.sqrt() * square / (alpha_bar * square + 1 - alpha_bar)
        return self.mean + gain * (y - alpha_bar.sqrt() * self.mean)


def ready(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, eval mode."""
    rerandomise(network, seed)
    return network.eval()
