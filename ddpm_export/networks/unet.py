"""The ε-network of Ho, Jain, Abbeel 2020 (appendix B): a U-Net with group norm, attention and a sinusoidal time embedding.

Two named sizes, :func:`cifar10` and :func:`lsun256`, are the paper's. A network is described by :class:`UNetConfig`,
plain numbers that go into a checkpoint's ``spec.json``; its knobs make the network that of OpenAI's improved-diffusion
and guided-diffusion, of diffusers, and of others who began with Ho's.

Everything that depends on t (and on the class y, where there are classes) lives in one module, :class:`TimeShifts`,
which gives every residual block the vector that it uses. So it can stay in float32 while the rest is half, and be
replaced by a table at export.

Norms and softmax compute in float32 whatever the precision around them: their sums overflow or lose digits in half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_export.networks.unet_config import UNetConfig, cifar10, lsun256
from ddpmx.errors import InputError

__all__ = ["UNet", "UNetConfig", "cifar10", "lsun256"]

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)

ZERO_GAIN = 1e-5
"""Ho et al. initialise "zero" layers with a variance scale of 1e-10, which is a gain of 1e-5 and not quite zero."""


class UNet(nn.Module):
    """ε_θ(x_t, t), with more inputs for a network that has them.

    ``forward(x, t)`` takes x float32 [B, C, H, W] and t [B] in 0…T−1, whole or not, and gives float32 [B, C, H, W].
    With classes it also takes the class y int [B]; with self-conditioning x0_prev float32 [B, C, H, W], x̂_0 of the step
    before (zeros at first, and if it is omitted); with a condition cond float32 [B, K, H, W]. With a learned variance it
    gives two such tensors, the prediction and ``var``.

    Attributes:
        checkpoint_activations: compute the stages again in the backward pass, instead of keeping their activations.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        widths = config.widths
        height = config.size[0]
        block_widths: list[int] = []  # of every residual block, in the order in which they run

        def stage(c_in: int, c_out: int, attention: bool) -> Stage:
            block_widths.append(c_out)
            return Stage(c_in, c_out, attention, config)

        def resample(c: int, size: Halve | Double) -> nn.Module:
            if config.resample_blocks:
                block_widths.append(c)
                return ResidualBlock(c, c, config, size)
            if config.average_pool:
                return size
            return Downsample(c, config.symmetric_padding) if isinstance(size, Halve) else Upsample(c)

        self.conv_in = conv3x3(config.image_inputs, config.channels)
        self.down = nn.ModuleList()
        skips = [c := config.channels]
        for level, width in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(stage(c, width, height in config.attention))
                skips.append(c := width)
            last = level == len(widths) - 1
            self.down.append(Level(stages, nn.Identity() if last else resample(c, Halve())))
            if not last:
                skips.append(c)
                height //= 2
        self.middle = nn.ModuleList([stage(c, c, True), stage(c, c, False)])
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stages.append(stage(c + skips.pop(), width, height in config.attention))
                c = width
            self.up.append(Level(stages, nn.Identity() if level == 0 else resample(c, Double())))
            height *= 2
        self.norm_out = GroupNorm32(config.groups, c, config.norm_eps)
        self.conv_out = conv3x3(c, config.out_channels, gain=ZERO_GAIN)
        self.time: nn.Module = TimeShifts(config, block_widths)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        x0_prev: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output for each image at its own t, and its variance where that is learned.

        Raises:
            InputError: a class or a condition for a network without, or none for one that has it.
        """
        if (y is None) != (self.config.classes is None):
            raise InputError("this network takes no class" if y is not None else "this network needs a class")
        if (cond is None) != (self.config.condition is None):
            raise InputError(
                "this network takes no condition" if cond is not None else "this network needs a condition"
            )
        if x0_prev is not None and not self.config.self_condition:
            raise InputError("this network takes no x0_prev")
        if self.config.self_condition:
            x = torch.cat([x, torch.zeros_like(x) if x0_prev is None else x0_prev], dim=1)
        if cond is not None:
            x = torch.cat([x, cond], dim=1)
        shifts = iter(self.time(t) if y is None else self.time(t, y))
        # conv_in and conv_out stay in float32 when the body is half: first and last layers cost little and matter most
        h = self.conv_in(x).to(self._body_dtype())
        skips = [h]
        for level in _levels(self.down):
            for stage in level.stages:
                h = self._run(stage, h, next(shifts))
                skips.append(h)
            if not isinstance(level.resample, nn.Identity):
                h = _resampled(level, h, shifts)
                skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, next(shifts))
        for level in _levels(self.up):
            for stage in level.stages:
                h = self._run(stage, torch.cat([h, skips.pop()], dim=1), next(shifts))
            h = _resampled(level, h, shifts)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h.to(self.conv_out.weight.dtype))))
        if self.config.learned_variance:
            prediction, var = out.chunk(2, dim=1)
            return prediction, var
        return out

    def _run(self, stage: nn.Module, h: Tensor, shift: Tensor) -> Tensor:
        """A stage; with :attr:`checkpoint_activations` it keeps nothing for the backward pass but its input."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            out: Tensor = checkpoint(stage, h, shift, use_reentrant=False)
        else:
            out = stage(h, shift)
        return out

    def _body_dtype(self) -> torch.dtype:
        stage = self.middle[0]
        assert isinstance(stage, Stage)
        return stage.block.conv1.weight.dtype


class TimeShifts(nn.Module):
    """t (and y) → the vector that each residual block adds: a tuple of float32 [B, width], one per block.

    Sinusoidal embedding, two dense layers shared by all blocks, one dense layer per block. A class adds its learnt
    vector before the blocks' layers. With ``scale_shift`` each block gets [B, 2·width]: scale ‖ shift.
    """

    def __init__(self, config: UNetConfig, block_widths: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        hidden, rows = 4 * config.channels, 2 if config.scale_shift else 1
        self.dense0 = dense(config.channels, hidden)
        self.dense1 = dense(hidden, hidden)
        self.projections = nn.ModuleList(dense(hidden, rows * width) for width in block_widths)
        self.classes = None if config.classes is None else nn.Embedding(config.label_count, hidden)

    def forward(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """For t [B], and y int [B] in 0…classes−1, or classes where that stands for none."""
        config = self.config
        t = t.to(torch.float32)
        if config.time_scale != 1:
            t = t * config.time_scale
        h = sinusoidal_embedding(t, config.channels, cos_first=config.cos_first, frequency_shift=config.frequency_shift)
        h = self.dense1(F.silu(self.dense0(h)))
        if self.classes is not None:
            h = h + self.classes(y)
        h = F.silu(h)
        return tuple(projection(h) for projection in self.projections)


def sinusoidal_embedding(t: Tensor, channels: int, *, cos_first: bool = False, frequency_shift: int = 1) -> Tensor:
    """sin(t·f_i) ‖ cos(t·f_i) with f_i = 10000^(−i/(half − shift)), i = 0…half−1, half = channels // 2.

    In Ho's network sin comes first and the shift is 1; its descendants differ in both. Always float32, since in half
    precision t·f is off by up to half a radian at t ≥ 512. Float32 [B, channels]; an odd width ends in a zero.
    """
    half = channels // 2
    decay = -math.log(10000) / (half - frequency_shift)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * decay)
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]
    parts = [torch.sin(angles), torch.cos(angles)]
    embedding = torch.cat(parts[::-1] if cos_first else parts, dim=1)
    return F.pad(embedding, (0, channels % 2))


class Stage(nn.Module):
    """One residual block, and the attention that follows it where there is one."""

    def __init__(self, c_in: int, c_out: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, config)
        self.attention: nn.Module = Attention(c_out, config) if attention else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """For x [B, c_in, H, W] and the block's vector from :class:`TimeShifts`."""
        h: Tensor = self.attention(self.block(x, shift))
        return h


class Level(nn.Module):
    """The stages of one resolution, and the resampling to the next."""

    def __init__(self, stages: nn.ModuleList, resample: nn.Module) -> None:
        super().__init__()
        self.stages = stages
        self.resample = resample


class ResidualBlock(nn.Module):
    """x ↦ skip(x) + conv2(drop(silu(norm2(conv1(silu(norm1(x))) + shift)))).

    With ``scale_shift``, norm2(h)·(1 + scale) + shift replaces norm2(h + shift). A block that changes the size
    does so to silu(norm1(x)), and to the x that goes around.
    """

    HALVED: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "skip")

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, resample: Halve | Double | None = None) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm1 = GroupNorm32(config.groups, c_in, config.norm_eps)
        self.resample: nn.Module = resample or nn.Identity()
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = GroupNorm32(config.groups, c_out, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(c_out, c_out, gain=ZERO_GAIN)
        self.skip: nn.Module = nn.Identity() if c_in == c_out else conv1x1(c_in, c_out)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """For x [B, c_in, H, W] and shift [B, c_out], or scale ‖ shift [B, 2·c_out]."""
        h: Tensor = self.conv1(self.resample(F.silu(self.norm1(x))))
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * _per_channel(1 + scale, h) + _per_channel(shift, h)
        else:
            h = self.norm2(h + _per_channel(shift, h))
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = self.skip(self.resample(x)) + h
        return out


def _per_channel(values: Tensor, h: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, 1], in the dtype of h [B, C, H, W]."""
    return values[:, :, None, None].to(h.dtype)


class Attention(nn.Module):
    """Attention over all H·W positions: x ↦ x + out(softmax(q·kᵀ/√c)·v) in each head of width c.

    The output channels of q, k and v, and the input channels of out, are ordered [head][channel].
    """

    HALVED: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads_of(channels)
        self.norm = GroupNorm32(config.groups, channels, config.norm_eps)
        self.q = conv1x1(channels, channels)
        self.k = conv1x1(channels, channels)
        self.v = conv1x1(channels, channels)
        self.out = conv1x1(channels, channels, gain=ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, H·W]
        if self.heads > 1:
            q, k, v = (part.unflatten(1, (self.heads, -1)) for part in (q, k, v))  # [B, heads, c, H·W]
        # q is scaled before the product, so that in half precision the product stays small
        scores = (q * q.shape[-2] ** -0.5).transpose(-2, -1) @ k
        weights = scores.to(torch.float32).softmax(dim=-1).to(v.dtype)
        h = v @ weights.transpose(-2, -1)
        if self.heads > 1:
            h = h.flatten(1, 2)
        out: Tensor = x + self.out(h.unflatten(2, (x.shape[2], x.shape[3])))
        return out


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32, returned in x's dtype."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        h = F.group_norm(x.to(torch.float32), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return h.to(x.dtype)


class Halve(nn.Module):
    """The mean of every 2×2 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        return F.avg_pool2d(x, 2)


class Double(nn.Module):
    """Every pixel twice in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded below and to the right only, as TensorFlow's SAME does on even sides.

    Or padded on all sides, as is usual in PyTorch.
    """

    HALVED: ClassVar[tuple[str, ...]] = ("conv",)

    def __init__(self, channels: int, symmetric_padding: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric_padding else 0)
        _xavier(self.conv, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        out: Tensor = self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a 3×3 convolution."""

    HALVED: ClassVar[tuple[str, ...]] = ("conv",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def conv3x3(c_in: int, c_out: int, *, gain: float = 1.0) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    return _xavier(nn.Conv2d(c_in, c_out, 3, padding=1), gain)


def conv1x1(c_in: int, c_out: int, *, gain: float = 1.0) -> nn.Conv2d:
    """A dense layer over channels at every pixel."""
    return _xavier(nn.Conv2d(c_in, c_out, 1), gain)


def dense(n_in: int, n_out: int) -> nn.Linear:
    """A dense layer [B, n_in] → [B, n_out]."""
    return _xavier(nn.Linear(n_in, n_out), 1.0)


def _levels(modules: nn.ModuleList) -> Iterable[Level]:
    return cast("Iterable[Level]", modules)


def _resampled(level: Level, h: Tensor, shifts: Iterator[Tensor]) -> Tensor:
    """``h`` in the size of the next level."""
    if isinstance(level.resample, ResidualBlock):
        out: Tensor = level.resample(h, next(shifts))
    else:
        out = level.resample(h)
    return out


def _xavier(layer: _Layer, gain: float) -> _Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
