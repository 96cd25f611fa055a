"""The ε-network of Ho, Jain, Abbeel 2020 (appendix B): a U-Net with group norm, attention and a sinusoidal time embedding.

Two named sizes, :func:`cifar10` and :func:`lsun256`, are the paper's. A network is described by :class:`UNetConfig`,
plain numbers that go into a checkpoint's ``spec.json``.

Everything that depends on t alone lives in one module, :class:`TimeShifts`, which gives every residual block the vector
that it adds. So it can stay in float32 while the rest is half, and be replaced by a table at export.

Norms and softmax compute in float32 whatever the precision around them: their sums overflow or lose digits in half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmx.errors import InputError, SpecError

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)

ZERO_GAIN = 1e-5
"""Ho et al. initialise "zero" layers with a variance scale of 1e-10, which is a gain of 1e-5 and not quite zero."""


@dataclass(frozen=True)
class UNetConfig:
    """The numbers that make a U-Net.

    Attributes:
        in_channels: C of the image.
        out_channels: C of the answer.
        size: (H, W); each must be divisible by 2^(levels − 1).
        channels: width of the first level, and of the time embedding.
        multipliers: width of each level, as multiples of ``channels``.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: heights in pixels at which attention follows every block. The middle always has one.
        dropout: probability, inside each residual block.
        groups: of every group norm; each width must be divisible by it.
    """

    in_channels: int
    out_channels: int
    size: tuple[int, int]
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    groups: int = 32

    def __post_init__(self) -> None:
        """Check that such a network can be built.

        Raises:
            InputError: it cannot.
        """
        sequences = (("size", 2), ("multipliers", None), ("attention", None))
        for name, length in sequences:
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or any(type(v) is not int or v < 1 for v in values):
                raise InputError(f"{name} must be whole numbers above 0, not {values!r}")
            if length is not None and len(values) != length:
                raise InputError(f"{name} must be {length} numbers, not {len(values)}")
            object.__setattr__(self, name, tuple(values))
        for name in ("in_channels", "out_channels", "channels", "blocks", "groups"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 65536:
                raise InputError(f"{name} must be a whole number from 1 to 65536, not {value!r}")
        if not self.multipliers or len(self.multipliers) > 12 or max(self.multipliers) > 64 or self.blocks > 64:
            raise InputError(
                "a U-Net has 1 to 12 levels of at most 64 blocks, and widths of at most 64 times the first"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        halvings = 2 ** (len(self.multipliers) - 1)
        if any(side % halvings for side in self.size):
            raise InputError(
                f"{len(self.multipliers)} levels halve the image {len(self.multipliers) - 1} times, "
                f"and {self.size[0]}×{self.size[1]} cannot be halved that often",
                hint=f"sides divisible by {halvings} (ddpmx train --size), or fewer levels (--mult)",
            )
        if self.channels < 4:
            raise InputError(
                "channels must be at least 4", note="the time embedding needs two frequencies of sin and cos"
            )
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.groups:
                raise InputError(
                    f"a width of {self.channels * multiplier} cannot be split into {self.groups} groups",
                    hint=f"channels divisible by {self.groups}, or other groups",
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: object) -> UNetConfig:
        """What :meth:`to_json` made.

        Raises:
            SpecError: not such an object.
            InputError: numbers of which no network can be built.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if (
            not isinstance(values, Mapping)
            or set(values) - known
            or {"in_channels", "out_channels", "size"} - set(values)
        ):
            raise SpecError(
                "the spec's network is not a U-Net's", note=f"its fields should be {', '.join(sorted(known))}"
            )
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)


def cifar10() -> UNetConfig:
    """The paper's CIFAR-10 network: 35,746,307 parameters."""
    return UNetConfig(3, 3, (32, 32))


def lsun256() -> UNetConfig:
    """The paper's network for 256×256 images (LSUN, CelebA-HQ): 113,673,219 parameters."""
    return UNetConfig(3, 3, (256, 256), multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)


class UNet(nn.Module):
    """ε_θ(x_t, t).

    ``forward(x, t)`` takes x float32 [B, C, H, W] and t int [B] in 0…T−1, and gives float32 [B, C, H, W].
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        height = config.size[0]
        block_widths: list[int] = []  # of every residual block, in the order in which they run

        def stage(c_in: int, c_out: int, attention: bool) -> Stage:
            block_widths.append(c_out)
            return Stage(c_in, c_out, attention, config)

        self.conv_in = conv3x3(config.in_channels, config.channels)
        self.down = nn.ModuleList()
        skips = [c := config.channels]
        for level, width in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(stage(c, width, height in config.attention))
                skips.append(c := width)
            last = level == len(widths) - 1
            self.down.append(Level(stages, nn.Identity() if last else Downsample(c)))
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
            self.up.append(Level(stages, nn.Identity() if level == 0 else Upsample(c)))
            height *= 2
        self.norm_out = GroupNorm32(config.groups, c)
        self.conv_out = conv3x3(c, config.out_channels, gain=ZERO_GAIN)
        self.time: nn.Module = TimeShifts(config.channels, block_widths)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's answer for each image at its own t."""
        shifts = iter(self.time(t))
        # conv_in and conv_out stay in float32 when the body is half: first and last layers cost little and matter most
        h = self.conv_in(x).to(self._body_dtype())
        skips = [h]
        for level in _levels(self.down):
            for stage in level.stages:
                h = stage(h, next(shifts))
                skips.append(h)
            if not isinstance(level.resample, nn.Identity):
                h = level.resample(h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, next(shifts))
        for level in _levels(self.up):
            for stage in level.stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), next(shifts))
            h = level.resample(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h.to(self.conv_out.weight.dtype))))
        return out

    def _body_dtype(self) -> torch.dtype:
        stage = self.middle[0]
        assert isinstance(stage, Stage)
        return stage.block.conv1.weight.dtype


class TimeShifts(nn.Module):
    """t → what each residual block adds after its first convolution: a tuple of float32 [B, width], one per block.

    Sinusoidal embedding, two dense layers shared by all blocks, one dense layer per block.
    """

    def __init__(self, channels: int, block_widths: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.dense0 = dense(channels, 4 * channels)
        self.dense1 = dense(4 * channels, 4 * channels)
        self.projections = nn.ModuleList(dense(4 * channels, width) for width in block_widths)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """For t int [B]."""
        h = sinusoidal_embedding(t, self.channels)
        h = F.silu(self.dense1(F.silu(self.dense0(h))))
        return tuple(projection(h) for projection in self.projections)


def sinusoidal_embedding(t: Tensor, channels: int) -> Tensor:
    """sin(t·f_i) ‖ cos(t·f_i) with f_i = 10000^(−i/(half − 1)), i = 0…half−1, half = channels // 2. Float32 [B, channels].

    sin comes first and the divisor is half − 1: descendants of this network differ in both. Always float32, since in
    half precision t·f is off by up to half a radian at t ≥ 512.
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, channels % 2))


class Stage(nn.Module):
    """One residual block, and the attention that follows it where there is one."""

    def __init__(self, c_in: int, c_out: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, config)
        self.attention: nn.Module = Attention(c_out, config.groups) if attention else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """For x [B, c_in, H, W] and shift [B, c_out]."""
        h: Tensor = self.attention(self.block(x, shift))
        return h


class Level(nn.Module):
    """The stages of one resolution, and the way to the next."""

    def __init__(self, stages: nn.ModuleList, resample: nn.Module) -> None:
        super().__init__()
        self.stages = stages
        self.resample = resample


class ResidualBlock(nn.Module):
    """x ↦ skip(x) + conv2(drop(silu(norm2(conv1(silu(norm1(x))) + shift))))."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm32(config.groups, c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = GroupNorm32(config.groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(c_out, c_out, gain=ZERO_GAIN)
        self.skip: nn.Module = nn.Identity() if c_in == c_out else conv1x1(c_in, c_out)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """For x [B, c_in, H, W] and shift [B, c_out]."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = h + shift[:, :, None, None].to(h.dtype)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """One head over all H·W positions: x ↦ x + out(softmax(q·kᵀ/√C)·v)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(groups, channels)
        self.q = conv1x1(channels, channels)
        self.k = conv1x1(channels, channels)
        self.v = conv1x1(channels, channels)
        self.out = conv1x1(channels, channels, gain=ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, H·W]
        # q is scaled before the product, so that in half precision the product stays small
        scores = (q * x.shape[1] ** -0.5).transpose(1, 2) @ k
        weights = scores.to(torch.float32).softmax(dim=-1).to(v.dtype)
        h = (v @ weights.transpose(1, 2)).unflatten(2, (x.shape[2], x.shape[3]))
        out: Tensor = x + self.out(h)
        return out


class GroupNorm32(nn.GroupNorm):
    """Group norm with ε = 1e-6 (TensorFlow's default; PyTorch's is 1e-5), computed in float32, given back in x's dtype."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, C, H, W]."""
        h = F.group_norm(x.to(torch.float32), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return h.to(x.dtype)


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded below and to the right only, as TensorFlow's SAME does on even sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        _xavier(self.conv, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a 3×3 convolution."""

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


def _levels(modules: nn.ModuleList) -> Iterable[Level]:
    return cast("Iterable[Level]", modules)


def dense(n_in: int, n_out: int) -> nn.Linear:
    """A dense layer."""
    return _xavier(nn.Linear(n_in, n_out), 1.0)


def _xavier(layer: _Layer, gain: float) -> _Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
