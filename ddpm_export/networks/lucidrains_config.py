"""The config of a U-Net of denoising-diffusion-pytorch: plain numbers, for a checkpoint's ``spec.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ddpmx.diffusion.schedule import is_number
from ddpmx.errors import InputError, SpecError
from ddpmx.formats.spec import ModelSpec

BlockNorm = Literal["rms", "group"]
AttentionNorm = Literal["rms", "layer"]
Standardised = Literal["no", "plus", "least"]


@dataclass(frozen=True)
class LucidrainsConfig:
    """The numbers that define such a network.

    Attributes:
        in_channels: C of the image; with self-conditioning the first convolution takes 2·C.
        out_channels: C, or 2·C for a learned variance.
        size: (H, W); each must be divisible by 2^(levels − 1).
        channels: the unit of width; the time embedding is four times as wide.
        stem: width of the first convolution, ``channels`` if None.
        multipliers: width of each level, as multiples of ``channels``.
        self_condition: the network takes the x̂_0 of the step before as a second image.
        full_attention: for each level, whether its attention compares all pixels (softmax) or is linear.
        heads: of the attention of each level. The middle, which always compares all pixels, takes the last one's.
        head_channels: of each head, level by level.
        memory: learnt keys and values of each attention (releases from 1.9 on), 0 for none.
        fourier: width of a random or learnt Fourier embedding of t, or None for the sinusoidal one.
        theta: of the sinusoidal embedding; its lowest frequency is 1/theta.
        block_norm: in residual blocks, ``rms`` (releases from 2.0 on) or ``group``.
        groups: of the group norms.
        attention_norm: around attention, ``rms`` (from 1.7.0 on) or ``layer``.
        standardised: whether a block's convolutions standardise their weights, and how they keep from dividing by 0: by
            √(var + 1e-5) (``plus``, before 1.7.0) or √max(var, 1e-5) (``least``, before 1.7.2).
        divided: linear attention divides its values by H·W (before 1.7.4).
    """

    in_channels: int
    out_channels: int
    size: tuple[int, int]
    channels: int = 64
    stem: int | None = None
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    self_condition: bool = False
    full_attention: tuple[bool, ...] = (False, False, False, True)
    heads: tuple[int, ...] = (4, 4, 4, 4)
    head_channels: tuple[int, ...] = (32, 32, 32, 32)
    memory: int = 4
    fourier: int | None = None
    theta: float = 10000.0
    block_norm: BlockNorm = "rms"
    groups: int = 8
    attention_norm: AttentionNorm = "rms"
    standardised: Standardised = "no"
    divided: bool = False

    def __post_init__(self) -> None:
        """Check that such a network can be built.

        Raises:
            InputError: it cannot.
        """
        levels = len(self.multipliers) if isinstance(self.multipliers, (list, tuple)) else 0
        lengths = {"size": 2, "multipliers": levels, "heads": levels, "head_channels": levels, "full_attention": levels}
        for name, length in lengths.items():
            values, kind = getattr(self, name), bool if name == "full_attention" else int
            fine = isinstance(values, (list, tuple)) and all(
                type(v) is kind and (kind is bool or v >= 1) for v in values
            )
            if not fine:
                what = "true or false" if kind is bool else "whole numbers above 0"
                raise InputError(f"{name} must be {what}, not {values!r}")
            if len(values) != length:
                raise InputError(f"{name} must be {length} values, not {len(values)}")
            object.__setattr__(self, name, tuple(values))
        for name in ("in_channels", "out_channels", "channels", "groups", "stem", "fourier"):
            value = getattr(self, name)
            if value is None and name in ("stem", "fourier"):
                continue
            if type(value) is not int or not 1 <= value <= 65536:
                raise InputError(f"{name} must be a whole number from 1 to 65536, not {value!r}")
        if type(self.memory) is not int or not 0 <= self.memory <= 65536:
            raise InputError(f"memory must be a whole number from 0 to 65536, not {self.memory!r}")
        for name in ("self_condition", "divided"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}")
        choices_of = {"block_norm": BlockNorm, "attention_norm": AttentionNorm, "standardised": Standardised}
        for name, choices in ((name, get_args(kind)) for name, kind in choices_of.items()):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}", hint=f"one of: {', '.join(choices)}")
        if not is_number(self.theta) or self.theta <= 1:
            raise InputError(f"theta must be a number above 1, not {self.theta!r}")
        if not 1 <= levels <= 12 or max(*self.multipliers, *self.heads) > 64 or max(self.head_channels) > 1024:
            raise InputError(
                "this U-Net has 1 to 12 levels of at most 64 times the first width, and at most 64 heads of 1024 channels"
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise InputError(
                f"the output must have {self.in_channels} channels, or twice as many with a learned variance, "
                f"not {self.out_channels}"
            )
        if self.channels < 4 or self.channels % 2 or (self.fourier or 2) % 2:
            raise InputError("channels must be even and at least 4, and fourier even: sines and cosines come in pairs")
        halvings = 2 ** (levels - 1)
        if any(side % halvings for side in self.size):
            raise InputError(
                f"{levels} levels halve the image {levels - 1} times, "
                f"and {self.size[0]}×{self.size[1]} cannot be halved that often",
                hint=f"sides divisible by {halvings}",
            )
        if self.block_norm == "group" and any(width % self.groups for width in self.widths):
            raise InputError(
                f"widths of {', '.join(map(str, self.widths))} cannot all be split into {self.groups} groups"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the first convolution and of each level behind it."""
        return (self.stem or self.channels, *(self.channels * multiplier for multiplier in self.multipliers))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: object) -> LucidrainsConfig:
        """The config from the values of :meth:`to_json`.

        Raises:
            SpecError: not such an object.
            InputError: numbers of which no network can be built.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        required = {"in_channels", "out_channels", "size"}
        if not isinstance(values, Mapping) or set(values) - known or required - set(values):
            raise SpecError(
                "the spec's network is not a U-Net of denoising-diffusion-pytorch",
                note=f"its fields should be {', '.join(sorted(known))}",
            )
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)


def check_spec(config: LucidrainsConfig, spec: ModelSpec) -> None:
    """Check that ``spec`` describes a network of ``config``.

    Raises:
        SpecError: they disagree.
    """
    pairs = (
        ("the image", (config.in_channels, *config.size), spec.shape),
        ("a learned variance", config.out_channels != config.in_channels, spec.learns_variance),
        ("self-conditioning", config.self_condition, spec.self_condition),
        ("classes", None, spec.classes),
        ("a condition", None, spec.condition),
    )
    for what, network, model in pairs:
        if network != model:
            raise SpecError(f"network and model disagree about {what}", note=f"{network} and {model}")
