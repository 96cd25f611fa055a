"""What a user can say of a new run: by a preset, in a TOML file, by flags. The later of them wins.

``RunConfig`` is the result, and ``config.toml`` of a run holds it: ``ddpmx train --config runs/x/config.toml`` begins the
same training again. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ddpm_export.networks.unet_config import UNetConfig, attention_heights
from ddpm_export.training.images.source import as_pixels, parse_colour
from ddpm_export.training.objective_names import Loss, TimestepSampling
from ddpm_export.training.settings import TrainSettings, check_steps
from ddpmx.diffusion.samplers import Prediction, Variance
from ddpmx.diffusion.schedule import scaled_params
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

CONFIG = "config.toml"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class RunConfig:
    """Every choice of a new run. The defaults are the paper's for CIFAR-10, as of :class:`TrainSettings`.

    Attributes:
        steps: optimiser steps in all.
        size: (H, W) to which a folder's images are brought; None for the size that they have.
        channels: 1, 3 or 4: what a folder's images are converted to; None for what they are.
        classes: whether the images have classes: their folders, or labels in an ``.npz``.
        timesteps, schedule, scale_betas: T and β_t, ``scale_betas`` times 1000/T.
        prediction, variance: see :class:`ddpmx.ModelSpec`.
        width, mult, blocks, attention, dropout, groups: the network, see :class:`UNetConfig`. Without ``attention`` it is
            at the level nearest to 16×16.
        self_condition: whether the network takes its last x̂_0.
        batch … holdout: see :class:`TrainSettings`; ``flip`` is its ``hflip``, and ``lr_decay`` whether the rate falls to 0
            over ``steps``. Without ``label_dropout`` it is 0.1 where there are classes.
    """

    steps: int = 800_000
    size: tuple[int, int] | None = None
    channels: int | None = None
    classes: bool = False
    timesteps: int = 1000
    schedule: str = "linear"
    scale_betas: bool = False
    prediction: Prediction = "eps"
    variance: Variance = "fixed_large"
    width: int = 128
    mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] | None = None
    dropout: float = 0.1
    groups: int = 32
    self_condition: bool = False
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 5000
    lr_decay: bool = False
    grad_clip: float = 1.0
    ema: float = 0.9999
    ema_ramp: bool = True
    flip: bool = False
    crop: tuple[int, int] | None = None
    seed: int = 0
    bf16: bool = False
    loss: Loss = "simple"
    timestep_sampling: TimestepSampling = "uniform"
    min_snr: float | None = None
    label_dropout: float | None = None
    accumulate: int = 1
    holdout: int = 0

    def settings(self) -> TrainSettings:
        """The settings of the training.

        Raises:
            InputError: one is out of its range.
        """
        check_steps(self.steps)
        dropout = self.label_dropout
        if dropout and not self.classes:
            raise InputError("label_dropout has no effect without classes", hint="classes, or omit it")
        return TrainSettings(
            batch=self.batch,
            lr=self.lr,
            warmup=self.warmup,
            grad_clip=self.grad_clip,
            ema=self.ema,
            ema_ramp=self.ema_ramp,
            hflip=self.flip,
            seed=self.seed,
            bf16=self.bf16,
            loss=self.loss,
            timestep_sampling=self.timestep_sampling,
            min_snr=self.min_snr,
            label_dropout=(0.1 if self.classes else 0.0) if dropout is None else dropout,
            crop=self.crop,
            accumulate=self.accumulate,
            lr_decay=self.steps if self.lr_decay else 0,
            holdout=self.holdout,
        )

    def spec(self, shape: tuple[int, int, int], classes: int | None, condition: int | None) -> ModelSpec:
        """The model.

        Args:
            shape: (C, H, W) of the images.
            classes: how many classes they have.
            condition: how many channels their condition has.

        Raises:
            SpecError, InputError: the choices contradict each other.
        """
        return ModelSpec(
            (shape[0], *(self.crop or shape[1:])),
            self.timesteps,
            self.schedule,
            scaled_params(self.schedule, self.timesteps) if self.scale_betas else {},
            prediction=self.prediction,
            variance=self.variance,
            classes=classes,
            null_class=classes is not None and self.label_dropout != 0,
            self_condition=self.self_condition,
            condition=condition,
        )

    def network(self, spec: ModelSpec) -> UNetConfig:
        """The network of a model.

        Raises:
            InputError: numbers of which no network can be built.
        """
        c, height, width = spec.shape
        attention = attention_heights((height, width), len(self.mult)) if self.attention is None else self.attention
        try:
            network = UNetConfig(
                in_channels=c,
                out_channels=len(spec.outputs) * c,
                size=(height, width),
                channels=self.width,
                multipliers=self.mult,
                blocks=self.blocks,
                attention=attention,
                dropout=self.dropout,
                groups=self.groups,
                classes=spec.classes,
                null_class=spec.null_class,
                self_condition=spec.self_condition,
                condition=spec.condition,
            )
        except InputError as error:
            for theirs, ours in (("channels must", "width must"), ("multipliers must", "mult must")):
                if error.fact.startswith(theirs):
                    raise InputError(error.fact.replace(theirs, ours, 1), note=error.note, hint=error.hint) from error
            raise
        network.check_attention()
        return network

    def to_toml(self, comment: str = "") -> str:
        """The text of a ``config.toml``; choices that were left open are left out."""
        lines = [f"# {line}" for line in comment.splitlines()]
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                lines.append(f"{name.replace('_', '-')} = {_toml(value)}")
        return "\n".join(lines) + "\n"


PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tiny": (
        "1.1 million parameters, 3,000 steps: an evening's try without a GPU",
        {
            "steps": 3000,
            "width": 32,
            "mult": (1, 2, 2),
            "blocks": 1,
            "dropout": 0.0,
            "groups": 8,
            "batch": 64,
            "lr": 1e-3,
            "warmup": 100,
            "ema": 0.998,
        },
    ),
    "small": (
        "14.5 million parameters, 60,000 steps: a few hours on a GPU",
        {
            "steps": 60_000,
            "width": 96,
            "mult": (1, 2, 2),
            "blocks": 2,
            "dropout": 0.1,
            "batch": 64,
            "lr": 4e-4,
            "warmup": 1000,
            "ema": 0.9995,
        },
    ),
    "cifar10": ("the paper's network for 32×32: 36 million parameters, 800,000 steps (the paper mirrors: flip)", {}),
    "256": (
        "the paper's network for 256×256: 114 million parameters, 500,000 steps",
        {
            "steps": 500_000,
            "mult": (1, 1, 2, 2, 4, 4),
            "dropout": 0.0,
            "batch": 64,
            "lr": 2e-5,
            "variance": "fixed_small",
        },
    ),
}
"""Each preset: what it is, and the choices in which it differs from :class:`RunConfig`'s defaults."""

PRESET_SIZES: Mapping[str, int] = {"tiny": 32, "small": 64, "cifar10": 32, "256": 256}
"""Height and width to which a folder's images are brought, unless they are all of one size that is not larger."""


def default_preset(gpu: bool) -> str:
    """The preset where none is named."""
    return "cifar10" if gpu else "tiny"


def resolve(preset: str, *choices: Mapping[str, Any]) -> RunConfig:
    """A preset, and choices over it, the last of them first.

    Args:
        preset: its name.
        *choices: by the names of :class:`RunConfig`'s fields.

    Raises:
        InputError: there is no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}", hint=f"one of: {', '.join(PRESETS)}")
    values = dict(PRESETS[preset][1])
    for more in choices:
        values.update(more)
    return RunConfig(**values)


def read_config(path: Path) -> dict[str, Any]:
    """The choices in a TOML file, by the names of fields. ``preset``, and where and how images are read, may be among them.

    Paths in it are relative to the file.

    Raises:
        FileFormatError: it is missing, or not TOML.
        InputError: a key that does not exist, or a value of another type.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        values = tomllib.loads(content.decode())
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FileFormatError(f"{path}: not a configuration in TOML", note=text[:200]) from error
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in _KINDS:
            close = difflib.get_close_matches(name, _KINDS, 1)
            raise InputError(
                f"{path}: there is no key {key!r}",
                hint=f"{close[0].replace('_', '-')}?" if close else "the keys are the flags of ddpmx train",
            )
        if name in found:
            raise InputError(f"{path}: {key!r} is there twice", note="with a hyphen and with an underscore")
        found[name] = _checked(path, key, value, _KINDS[name])
        if name in ("data", "condition"):
            found[name] = str(path.parent / found[name])
        try:
            if name in _READ:
                _READ[name](found[name])
        except InputError as error:
            raise InputError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from None
    return found


def write_config(
    run: Path, config: RunConfig, *, data: Path, reading: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write ``config.toml`` into a run: the resolved choices, where the images are, and how they are read.

    Args:
        run: its folder.
        config: the choices.
        data: the images.
        reading: keys of the file beside those of :class:`RunConfig`: ``condition``, ``background``, …

    Raises:
        OutputError: it cannot be written.
    """
    from ddpmx.formats.atomic import atomic_write

    text = config.to_toml("The resolved configuration of this run: ddpmx train --config FILE begins it again.")
    for name, value in {"data": str(data.resolve()), **reading}.items():
        text += f"{name.replace('_', '-')} = {_toml(value)}\n"
    with atomic_write(run / CONFIG) as stream:
        stream.write(text.encode())


_KINDS: dict[str, str] = {
    **{field.name: str(field.type) for field in dataclasses.fields(RunConfig)},
    **dict.fromkeys(("data", "condition", "preset", "background"), "str"),
    "white": "float",
    "max_megapixels": "float",
    "skip_broken": "bool",
}
"""The keys of a configuration file and the type of each: :class:`RunConfig`'s fields, and how images are read."""


_READ: dict[str, Callable[[Any], object]] = {"background": parse_colour, "max_megapixels": as_pixels}
"""What reads the values of which keys, when they are needed: a wrong one is refused with the file's name."""


def _checked(path: Path, key: str, value: object, kind: str) -> Any:
    """A value of a configuration file as the type of its field."""
    if kind.startswith("tuple"):
        if type(value) is int:
            return (value, value) if "..." not in kind else (value,)
        if isinstance(value, str) and "..." not in kind and (sides := re.fullmatch(r"(\d+)x(\d+)", value)):
            return int(sides[1]), int(sides[2])
        if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
        wanted = "whole numbers in brackets"
    elif kind.startswith("int"):
        if type(value) is int:
            return value
        wanted = "a whole number"
    elif kind.startswith("float"):
        if type(value) in (int, float):
            return float(value)  # type: ignore[arg-type]
        wanted = "a number"
    elif kind == "bool":
        if type(value) is bool:
            return value
        wanted = "true or false"
    else:
        if isinstance(value, str):
            return value
        wanted = "text"
    raise InputError(f"{path}: {key} must be {wanted}, not {value!r}")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
