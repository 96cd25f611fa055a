"""The config of a U-Net: Ho's by default, with knobs for the networks derived from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpmx.errors import InputError, SpecError
from ddpmx.formats.spec import ModelSpec


@dataclass(frozen=True)
class UNetConfig:
    """The numbers that define a U-Net.

    The last group of fields are knobs in which the descendants of Ho's network differ from it. Most of them do not change
    the shapes of the weights, so only these numbers distinguish such networks.

    Attributes:
        in_channels: C of the image.
        out_channels: C of the output; twice ``in_channels`` for a prediction and a learned variance, C channels each.
        size: (H, W); each must be divisible by 2^(levels − 1).
        channels: width of the first level, and of the time embedding.
        multipliers: width of each level, as multiples of ``channels``.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: heights in pixels at which attention follows every block. The middle always has one.
        dropout: probability, inside each residual block.
        groups: of every group norm; each width must be divisible by it.
        norm_eps: ε of every group norm. TensorFlow's default is 1e-6, PyTorch's 1e-5.
        cos_first: the time embedding is cos ‖ sin, and not sin ‖ cos.
        frequency_shift: s in the embedding's frequencies 10000^(−i/(half − s)): 1 or 0.
        time_scale: t is multiplied by it before it is embedded; 1000/T where OpenAI's flag rescale_timesteps was set.
        symmetric_padding: convolutions of stride 2 are padded by 1 on all sides, and not below and to the right only.
        heads: number of heads of each attention, unless ``head_channels`` is set.
        head_channels: width of one head, so that an attention of width C has C / ``head_channels`` heads.
        scale_shift: t acts by norm2(h)·(1 + scale) + shift, and not by h + shift before norm2.
        resample_blocks: the size changes inside residual blocks of their own, in place of convolutions.
        average_pool: the size changes without convolutions: by the mean of 2×2 pixels, and by repeating them.
        classes: number of classes of y; None for a network without.
        null_class: whether y = classes stands for "no class".
        self_condition: whether x̂_0 of the step before is an input (Chen et al. 2022): C channels more of ``conv_in``.
        condition: channels of the condition image, which are further channels of ``conv_in``; None for a network without.
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
    norm_eps: float = 1e-6
    cos_first: bool = False
    frequency_shift: int = 1
    time_scale: float = 1.0
    symmetric_padding: bool = False
    heads: int = 1
    head_channels: int | None = None
    scale_shift: bool = False
    resample_blocks: bool = False
    average_pool: bool = False
    classes: int | None = None
    null_class: bool = False
    self_condition: bool = False
    condition: int | None = None

    def __post_init__(self) -> None:
        """Check that such a network can be built.

        Raises:
            InputError: it cannot.
        """
        self._check_types()
        halvings = 2 ** (len(self.multipliers) - 1)
        if any(side % halvings for side in self.size):
            raise InputError(
                f"{len(self.multipliers)} levels halve the image {len(self.multipliers) - 1} times, "
                f"and {self.size[0]}×{self.size[1]} cannot be halved that often",
                hint=f"sides divisible by {halvings} (--size, for a folder of images), or fewer levels (--mult)",
            )
        if self.channels < 4:
            raise InputError(
                "channels must be at least 4", note="the time embedding needs two frequencies of sin and cos"
            )
        for width in self.widths:
            if width % self.groups:
                raise InputError(
                    f"a width of {width} cannot be split into {self.groups} groups",
                    hint=f"channels divisible by {self.groups}, or other groups",
                )
        if self.heads != 1 and self.head_channels is not None:
            raise InputError(
                "heads and head_channels contradict each other", note="either the number of heads or the width of one"
            )
        for width in self.attention_widths:
            if width % (self.head_channels or self.heads):
                wanted = f"heads of {self.head_channels} channels" if self.head_channels else f"{self.heads} heads"
                raise InputError(f"an attention of width {width} cannot be split into {wanted}")
        if self.resample_blocks and self.average_pool:
            raise InputError(
                "resample_blocks and average_pool contradict each other",
                note="the size changes either inside residual blocks or between them",
            )

    def _check_types(self) -> None:
        sequences = (("size", 2), ("multipliers", None), ("attention", None))
        for name, length in sequences:
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or any(type(v) is not int or v < 1 for v in values):
                raise InputError(f"{name} must be whole numbers above 0, not {values!r}")
            if length is not None and len(values) != length:
                raise InputError(f"{name} must be {length} numbers, not {len(values)}")
            object.__setattr__(self, name, tuple(values))
        for name in (
            "in_channels",
            "out_channels",
            "channels",
            "blocks",
            "groups",
            "heads",
            "head_channels",
            "classes",
            "condition",
        ):
            value = getattr(self, name)
            if value is None and name in ("head_channels", "classes", "condition"):
                continue
            if type(value) is not int or not 1 <= value <= 65536:
                raise InputError(f"{name} must be a whole number from 1 to 65536, not {value!r}")
        if not self.multipliers or len(self.multipliers) > 12 or max(self.multipliers) > 64 or self.blocks > 64:
            raise InputError(
                "a U-Net has 1 to 12 levels of at most 64 blocks, and widths of at most 64 times the first"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if type(self.norm_eps) not in (int, float) or not 0 < self.norm_eps < 1:
            raise InputError(f"norm_eps must be above 0 and below 1, not {self.norm_eps!r}")
        if type(self.frequency_shift) is not int or self.frequency_shift not in (0, 1):
            raise InputError(f"frequency_shift must be 0 or 1, not {self.frequency_shift!r}")
        if type(self.time_scale) not in (int, float) or not (math.isfinite(self.time_scale) and self.time_scale > 0):
            raise InputError(f"time_scale must be a number above 0, not {self.time_scale!r}")
        for name in (
            "cos_first",
            "symmetric_padding",
            "scale_shift",
            "resample_blocks",
            "average_pool",
            "self_condition",
            "null_class",
        ):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.null_class and self.classes is None:
            raise InputError("null_class is for networks with classes, and this one has none")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def heights(self) -> tuple[int, ...]:
        """Height of the image at each level, in pixels."""
        return tuple(self.size[0] >> level for level in range(len(self.multipliers)))

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Widths at which there is attention, the middle's last."""
        widths = [width for width, height in zip(self.widths, self.heights, strict=True) if height in self.attention]
        return (*widths, self.widths[-1])

    @property
    def label_count(self) -> int:
        """How many values y may have: the classes, and one more with ``null_class``; 0 without classes."""
        return 0 if self.classes is None else self.classes + self.null_class

    @property
    def image_inputs(self) -> int:
        """Channels of all images that enter ``conv_in``: x, x0_prev and cond, in this order."""
        return self.in_channels * (2 if self.self_condition else 1) + (self.condition or 0)

    @property
    def learned_variance(self) -> bool:
        """Whether the network has a variance as its second output."""
        return self.out_channels == 2 * self.in_channels

    def check_attention(self) -> None:
        """Check that every height of :attr:`attention` is a level's. Networks of others may have some without effect.

        Raises:
            InputError: one is not.
        """
        if without := [height for height in self.attention if height not in self.heights]:
            suits = attention_heights(self.size, len(self.multipliers))
            raise InputError(
                f"attention {','.join(map(str, without))} has no effect: no level has that height",
                note=f"the levels are {', '.join(map(str, self.heights))} pixels high",
                hint=f"attention {suits[0]}" if suits else "no attention but in the middle, which always has it",
            )

    def describe(self) -> str:
        """The levels of the network as one line: size and width of each, and where attention is."""
        levels = [
            f"{self.size[0] >> level}×{self.size[1] >> level} ({width}{', attention' if height in self.attention else ''})"
            for level, (width, height) in enumerate(zip(self.widths, self.heights, strict=True))
        ]
        blocks = f"{self.blocks} block{'s' if self.blocks > 1 else ''} a level"
        return f"{' → '.join(levels)}, {blocks}, attention in the middle, dropout {self.dropout:g}"

    def heads_of(self, width: int) -> int:
        """How many heads an attention of this width has."""
        return self.heads if self.head_channels is None else width // self.head_channels

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: object) -> UNetConfig:
        """The config from the values of :meth:`to_json`; missing fields are Ho's.

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
                "the spec's network is not a U-Net", note=f"its fields should be {', '.join(sorted(known))}"
            )
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)


def attention_heights(size: tuple[int, int], levels: int) -> tuple[int, ...]:
    """Where attention belongs: at the level nearest to 16×16, as in the paper (appendix B).

    Nearest in the ratio of √(H·W); a level above 32×32 gets none, since the cost grows with (H·W)².

    Returns:
        Its height in pixels, or nothing if there is no such level. The middle has attention in any case.
    """
    sides = [(math.sqrt((size[0] >> level) * (size[1] >> level)), size[0] >> level) for level in range(levels)]
    small = [(abs(math.log2(side / 16)), side, height) for side, height in sides if 0 < side <= 32]
    return (min(small)[2],) if small else ()


def check_spec(config: UNetConfig, spec: ModelSpec) -> None:
    """Check that ``spec`` describes a network of ``config``.

    Raises:
        SpecError: they disagree.
    """
    if (config.in_channels, *config.size) != spec.shape:
        raise SpecError(
            "network and model disagree about the image",
            note=f"{[config.in_channels, *config.size]} and {list(spec.shape)}",
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise SpecError(
            f"the output of a network of images with {config.in_channels} channels has {config.in_channels}, "
            "or twice as many",
            note=f"this one has {config.out_channels}",
        )
    if config.learned_variance != spec.learns_variance:
        raise SpecError(
            "network and model disagree about the variance",
            note=f"{config.out_channels} channels for an image of {config.in_channels}, and variance {spec.variance!r}",
            hint="learned_range or learned if, and only if, the output has twice the image's channels",
        )
    if config.classes != spec.classes:
        raise SpecError("network and model disagree about the classes", note=f"{config.classes} and {spec.classes}")
    if config.null_class != spec.null_class:
        raise SpecError(
            'network and model disagree about "no class"', note=f"null_class {config.null_class} and {spec.null_class}"
        )
    if (config.self_condition, config.condition) != (spec.self_condition, spec.condition):
        raise SpecError(
            "network and model disagree about self-conditioning or the condition",
            note=f"{(config.self_condition, config.condition)} and {(spec.self_condition, spec.condition)}",
        )


def cifar10() -> UNetConfig:
    """The paper's CIFAR-10 network: 35,746,307 parameters."""
    return UNetConfig(3, 3, (32, 32))


def lsun256() -> UNetConfig:
    """The paper's network for 256×256 images (LSUN, CelebA-HQ): 113,673,219 parameters."""
    return UNetConfig(3, 3, (256, 256), multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
