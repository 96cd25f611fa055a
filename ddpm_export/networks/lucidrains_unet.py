"""The U-Net of denoising-diffusion-pytorch, which shares hardly a layer with :mod:`ddpm_export.networks.unet`.

Each level has two residual blocks and an attention, linear in the number of pixels on the finer levels. Norms come after
convolutions and scale channels to a fixed length; t scales and shifts the output of a block's first norm; attention has a
few learnt keys and values beside those of the image; and the network may take its own last x̂_0 (self-conditioning, Chen
et al. 2022).

The graph changed between releases, and the shapes of the weights do not show all of the changes:
:class:`~ddpm_export.networks.lucidrains_config.LucidrainsConfig` names each change. What depends on t alone lives in
:class:`TimeScales`, as it does in the other U-Net.

Norms, softmax and the whole of linear attention compute in float32 whatever the precision around them: a softmax over all
pixels has values near 1/(H·W), which half precision rounds to a few bits, and the products with them are cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_export.networks.lucidrains_config import LucidrainsConfig, Standardised


class LucidrainsUNet(nn.Module):
    """Predicts ε, x_0 or v.

    ``forward(x, t, x0_prev)`` takes x float32 [B, C, H, W], t int [B] in 0…T−1 and, with self-conditioning, x̂_0 of the
    step before (zeros at first, and if it is omitted), float32 [B, C, H, W]. It gives float32 [B, C, H, W], and a
    second such tensor if the variance is learned.
    """

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.widths, len(config.multipliers)
        block_widths: list[int] = []  # of every residual block, in the order in which they run

        def block(c_in: int, c_out: int) -> ResidualBlock:
            block_widths.append(c_out)
            return ResidualBlock(c_in, c_out, config)

        c_in = config.in_channels * (2 if config.self_condition else 1)
        self.conv_in = nn.Conv2d(c_in, widths[0], 7, padding=3)
        self.down = nn.ModuleList()
        for level in range(levels):
            c, c_next = widths[level], widths[level + 1]
            last = level == levels - 1
            # Their 1×1 convolution behind pixel-unshuffle is a 2×2 convolution of stride 2
            resample = conv3x3(c, c_next) if last else nn.Conv2d(c, c_next, 2, stride=2)
            self.down.append(Level(block(c, c), block(c, c), attention(c, config, level), resample))
        self.middle = Level(
            block(widths[-1], widths[-1]),
            block(widths[-1], widths[-1]),
            FullAttention(widths[-1], config, levels - 1),
            nn.Identity(),
        )
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            c, c_next = widths[level + 1], widths[level]
            resample = conv3x3(c, c_next)
            first, second = (block(c + c_next, c) for _ in range(2))
            self.up.append(Level(first, second, attention(c, config, level), resample))
        self.block_out = block(2 * widths[0], widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 1)
        self.time: nn.Module = TimeScales(config, block_widths)

    def forward(self, x: Tensor, t: Tensor, x0_prev: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output for each image at its own t."""
        scales = iter(self.time(t))
        if self.config.self_condition:
            x = torch.cat([torch.zeros_like(x) if x0_prev is None else x0_prev, x], dim=1)
        # conv_in and conv_out stay in float32 when the body is half: first and last layers cost little and matter most
        h = stem = self.conv_in(x).to(self._body_dtype())
        skips: list[Tensor] = []
        for level in _levels(self.down):
            h = level.block1(h, next(scales))
            skips.append(h)
            h = level.block2(h, next(scales))
            h = level.attention(h) + h
            skips.append(h)
            h = level.resample(h)
        h = self.middle.block1(h, next(scales))
        h = self.middle.attention(h) + h
        h = self.middle.block2(h, next(scales))
        for index, level in enumerate(_levels(self.up)):
            h = level.block1(torch.cat([h, skips.pop()], dim=1), next(scales))
            h = level.block2(torch.cat([h, skips.pop()], dim=1), next(scales))
            h = level.attention(h) + h
            if index < len(self.up) - 1:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = level.resample(h)
        h = self.block_out(torch.cat([h, stem], dim=1), next(scales))
        out: Tensor = self.conv_out(h.to(self.conv_out.weight.dtype))
        if self.config.out_channels == self.config.in_channels:
            return out
        prediction, var = out.chunk(2, dim=1)
        return prediction, var

    def _body_dtype(self) -> torch.dtype:
        return self.middle.block1.conv1.weight.dtype


class TimeScales(nn.Module):
    """t → scale ‖ shift of each residual block: a tuple of float32 [B, 2·width], one per block in running order."""

    def __init__(self, config: LucidrainsConfig, block_widths: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.theta = config.channels, config.theta
        width = config.channels
        if config.fourier is not None:
            # t itself goes in front of its sines and cosines
            self.frequencies, width = nn.Parameter(torch.randn(config.fourier // 2)), config.fourier + 1
        self.dense0 = nn.Linear(width, 4 * config.channels)
        self.dense1 = nn.Linear(4 * config.channels, 4 * config.channels)
        self.projections = nn.ModuleList(nn.Linear(4 * config.channels, 2 * width) for width in block_widths)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """For t int [B]."""
        h = self.dense0(self._embedding(t.to(torch.float32)[:, None]))
        h = h * 0.5 * (1 + torch.erf(h * 0.5**0.5))  # GELU, in operators that every runtime has
        h = F.silu(self.dense1(h))
        return tuple(projection(h) for projection in self.projections)

    def _embedding(self, t: Tensor) -> Tensor:
        if "frequencies" in self._parameters:
            # The products in their order: an angle near 2π·999·f has an error of a thousandth, which must equal theirs
            angles = t * self.frequencies[None, :] * 2 * math.pi
            return torch.cat([t, torch.sin(angles), torch.cos(angles)], dim=1)
        half = self.channels // 2
        step = -math.log(self.theta) / (half - 1)
        angles = t * torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * step)[None, :]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class Level(nn.Module):
    """Two residual blocks and an attention of one resolution, and the resampling to the next."""

    HALVED: ClassVar[tuple[str, ...]] = ("resample",)
    """The parts that compute in half precision when the network does."""

    def __init__(
        self,
        block1: ResidualBlock,
        block2: ResidualBlock,
        attention: LinearAttention | FullAttention,
        resample: nn.Module,
    ) -> None:
        super().__init__()
        self.block1, self.block2, self.attention, self.resample = block1, block2, attention, resample


class ResidualBlock(nn.Module):
    """x ↦ skip(x) + silu(norm2(conv2(silu(norm1(conv1(x))·(1 + scale) + shift))))."""

    HALVED: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "skip")
    """The parts that compute in half precision when the network does."""

    def __init__(self, c_in: int, c_out: int, config: LucidrainsConfig) -> None:
        super().__init__()
        self.conv1 = block_conv(c_in, c_out, config)
        self.norm1 = block_norm(c_out, config)
        self.conv2 = block_conv(c_out, c_out, config)
        self.norm2 = block_norm(c_out, config)
        self.skip: nn.Module = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        """For x [B, c_in, H, W] and scale ‖ shift, float32 [B, 2·c_out]."""
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(self.conv1(x).to(torch.float32)) * (scale + 1) + shift
        h = self.conv2(F.silu(h).to(x.dtype))
        h = F.silu(self.norm2(h.to(torch.float32))).to(x.dtype)
        out: Tensor = h + self.skip(x)
        return out


class LinearAttention(nn.Module):
    """Attention whose cost grows with H·W and not with its square (Shen et al. 2018): (softmax(k)·vᵀ)ᵀ·softmax(q)."""

    HALVED: ClassVar[tuple[str, ...]] = ("qkv", "out")
    """The parts that compute in half precision when the network does."""

    def __init__(self, channels: int, config: LucidrainsConfig, level: int) -> None:
        super().__init__()
        self.heads, self.head_channels = config.heads[level], config.head_channels[level]
        self.divided = config.divided
        hidden = self.heads * self.head_channels
        self.norm = attention_norm(channels, config)
        self.memory = memory(config.memory, (self.heads, self.head_channels, config.memory))
        self.qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.out = nn.Conv2d(hidden, channels, 1)
        self.norm_out = attention_norm(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        pixels = x.shape[2] * x.shape[3]
        qkv = self.qkv(self.norm(x.to(torch.float32)).to(x.dtype)).to(torch.float32).flatten(2)
        q, k, v = (part.unflatten(1, (self.heads, self.head_channels)) for part in qkv.chunk(3, dim=1))
        if self.memory is not None:
            k, v = with_memory(self.memory, k, v, dim=3)
        if self.divided:
            v = v / pixels
        q = q.softmax(dim=2) * self.head_channels**-0.5  # over a head's channels
        context = k.softmax(dim=3) @ v.transpose(2, 3)  # over pixels; [B, heads, d of k, d of v]
        h = (context.transpose(2, 3) @ q).flatten(1, 2).unflatten(2, (x.shape[2], x.shape[3]))
        out: Tensor = self.norm_out(self.out(h.to(x.dtype)).to(torch.float32)).to(x.dtype)
        return out


class FullAttention(nn.Module):
    """Attention over all H·W positions and the memory: out(softmax(q·kᵀ/√d)·v)."""

    HALVED: ClassVar[tuple[str, ...]] = ("qkv", "out")
    """The parts that compute in half precision when the network does."""

    def __init__(self, channels: int, config: LucidrainsConfig, level: int) -> None:
        super().__init__()
        self.heads, self.head_channels = config.heads[level], config.head_channels[level]
        hidden = self.heads * self.head_channels
        self.norm = attention_norm(channels, config)
        self.memory = memory(config.memory, (self.heads, config.memory, self.head_channels))
        self.qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        qkv = self.qkv(self.norm(x.to(torch.float32)).to(x.dtype)).flatten(2)
        q, k, v = (part.unflatten(1, (self.heads, self.head_channels)).transpose(2, 3) for part in qkv.chunk(3, dim=1))
        if self.memory is not None:
            k, v = with_memory(self.memory, k, v, dim=2)
        # q is scaled before the product, so that in half precision the product stays small
        scores = (q * self.head_channels**-0.5) @ k.transpose(2, 3)
        h = scores.to(torch.float32).softmax(dim=3).to(v.dtype) @ v
        out: Tensor = self.out(h.transpose(2, 3).flatten(1, 2).unflatten(2, (x.shape[2], x.shape[3])))
        return out


class RMSNorm(nn.Module):
    """x ↦ g·√C·x/‖x‖ over channels, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """For x float32 [B, C, H, W]."""
        length = (x * x).sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        out: Tensor = x / length * self.weight[:, None, None] * math.sqrt(len(self.weight))
        return out


class ChannelNorm(nn.Module):
    """x ↦ g·(x − mean)/√(var + 1e-5) over channels, in float32: a layer norm without a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """For x float32 [B, C, H, W]."""
        centred = x - x.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        return centred * (variance + 1e-5).rsqrt() * self.weight[:, None, None]


class StandardisedConv(nn.Conv2d):
    """A 3×3 convolution whose weights have mean 0 and variance 1 for every output channel (Qiao et al. 2019)."""

    def __init__(self, c_in: int, c_out: int, how: Standardised) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, c_in, H, W]."""
        weight = self.weight.to(torch.float32)
        centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = (centred * centred).mean(dim=(1, 2, 3), keepdim=True)
        variance = variance + 1e-5 if self.how == "plus" else variance.clamp_min(1e-5)
        return F.conv2d(x, (centred * variance.rsqrt()).to(x.dtype), self.bias, padding=1)


def block_conv(c_in: int, c_out: int, config: LucidrainsConfig) -> nn.Conv2d:
    """The convolution of a residual block."""
    return conv3x3(c_in, c_out) if config.standardised == "no" else StandardisedConv(c_in, c_out, config.standardised)


def attention(channels: int, config: LucidrainsConfig, level: int) -> LinearAttention | FullAttention:
    """The attention of a level."""
    kind = FullAttention if config.full_attention[level] else LinearAttention
    return kind(channels, config, level)


def block_norm(channels: int, config: LucidrainsConfig) -> nn.Module:
    """The norm behind a block's convolution; takes and gives float32."""
    return RMSNorm(channels) if config.block_norm == "rms" else nn.GroupNorm(config.groups, channels)


def attention_norm(channels: int, config: LucidrainsConfig) -> nn.Module:
    """The norm before an attention, and behind a linear one; takes and gives float32."""
    return RMSNorm(channels) if config.attention_norm == "rms" else ChannelNorm(channels)


def memory(count: int, shape: tuple[int, int, int]) -> nn.Parameter | None:
    """Learnt keys and values, [2, …], or none."""
    return nn.Parameter(torch.randn(2, *shape)) if count else None


def with_memory(learnt: Tensor, k: Tensor, v: Tensor, *, dim: int) -> Iterator[Tensor]:
    """k and v with the learnt ones in front of the pixels, which run along ``dim``."""
    for row, part in zip(learnt.to(k.dtype).unbind(0), (k, v), strict=True):
        yield torch.cat([row[None].expand(part.shape[0], -1, -1, -1), part], dim=dim)


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _levels(modules: nn.ModuleList) -> Iterator[Level]:
    return iter(cast("Sequence[Level]", modules))
