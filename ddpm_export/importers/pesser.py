"""pesser/pytorch_diffusion (Ho's checkpoints, converted) and ermongroup/ddim: the same network under the same names.

Files are a bare state dict, or DDIM's list [model, optimiser, epoch, step, ema].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_export.importers import wrappers
from ddpm_export.importers.keys import Row, Slot, config_error, layer, side, to_ours, to_theirs, unet_shapes, walk
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver, size_and_dropout
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.tensor_files import save_state_dict
from ddpmx.errors import InputError

NAME = "pesser"

_CIFAR10 = {"size": (32, 32), "timesteps": 1000, "schedule": "linear", "variance": "fixed_large", "dropout": 0.1}
_LSUN = {"size": (256, 256), "timesteps": 1000, "schedule": "linear", "variance": "fixed_small", "dropout": 0.0}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": _CIFAR10,
    "celeba": {**_CIFAR10, "size": (64, 64)},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_church": _LSUN,
}
"""The configs of both projects, by the model's name."""

KNOWN_FILES: Mapping[str, str] = {
    "82ed3067fd1002f5cf4c339fb80c4669": "cifar10",
    "1fa350b952534ae442b1d5235cce5cd3": "cifar10",
    "f70280ac0e08b8e696f42cb8e948ff1c": "lsun_bedroom",
    "1921fa46b66a3665e450e42f36c2720f": "lsun_bedroom",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "lsun_cat",
    "646f23f4821f2459b8bafc57fd824558": "lsun_cat",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "lsun_church",
    "fdc68a23938c2397caba4a260bc2445f": "lsun_church",
}
"""MD5 of the published files, as pytorch_diffusion lists them, and the model that each holds."""

MARKS = ("down.0.block.0.temb_proj.weight", "temb.dense.0.weight")
DDIM_AVERAGE = "4."
"""DDIM's list has the model as item 0 and its average as item 4."""


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names, in any container, DDIM's list among them, or bare."""
    found = wrappers.prefixes(contents, MARKS)
    return f"the weights are called {found[0]}down.0.block.0.*, temb.dense.0" if found else None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a file.

    Raises:
        FileFormatError, InputError: the tensors do not match such a network, or do not fit the options.
    """
    settings = SettingsResolver(options)
    weights = wrappers.take(contents, MARKS, options, settings, averages=(DDIM_AVERAGE,))
    theirs = weights.chosen.tensors
    bare = contents.kind == "torch" and not weights.chosen.prefix
    known = KNOWN_FILES.get(contents.md5) if bare else None
    published = settings.published(MODELS, known=known, source="a published file, by its MD5")
    config = _config(settings, theirs, published)
    spec = settings.chain_spec(
        config,
        published,
        "that model's config",
        schedules=("linear", "quad", "const", "warmup10", "warmup50", "jsd", "sigmoid_beta"),
        predictions=("eps",),
        clip=1.0,
        clip_because="its ancestral chain clips",
    )
    table, shapes = rows(config), unet_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes, ignore=("logvar",)) for network in weights.each())
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None)


def _config(settings: SettingsResolver, theirs: Mapping[str, Tensor], published: Mapping[str, Any]) -> UNetConfig:
    """The numbers of the network, from the shapes of its weights."""
    levels = blocks = 0
    while f"down.{levels}.block.0.conv1.weight" in theirs:
        levels += 1
    while f"down.0.block.{blocks}.conv1.weight" in theirs:
        blocks += 1
    channels = side(theirs, "conv_in.weight", 0)
    widths = [side(theirs, f"down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    if channels < 1 or any(width % channels for width in widths):
        raise config_error("widths", widths)
    attends = [f"down.{level}.attn.0.q.weight" in theirs for level in range(levels)]
    size, dropout = size_and_dropout(settings, widths, blocks, published, "that model's config", attends=attends)
    return UNetConfig(
        in_channels=side(theirs, "conv_in.weight", 1),
        out_channels=side(theirs, "conv_out.weight", 0),
        size=size,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=tuple(size[0] >> level for level in range(levels) if attends[level]),
        dropout=dropout,
        average_pool=levels > 1 and "down.0.downsample.conv.weight" not in theirs,
    )


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "time0": "temb.dense.0",
    "time1": "temb.dense.1",
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
}


def rows(config: UNetConfig) -> list[Row]:
    """The table of names."""
    table: list[Row] = []
    for slot in walk(config):
        if slot.kind == "stage":
            table += _stage(slot)
        elif slot.kind in ("downsample", "upsample"):
            if not config.average_pool:
                table += layer(f"{slot.part}.{slot.level}.{slot.kind}.conv", f"{slot.ours}.conv")
        else:
            table += layer(_OUTSIDE[slot.kind], slot.ours)
    return table


def _stage(slot: Slot) -> list[Row]:
    if slot.part == "middle":
        block, attention = f"mid.block_{slot.block + 1}", "mid.attn_1"
    else:
        block, attention = (f"{slot.part}.{slot.level}.{kind}.{slot.block}" for kind in ("block", "attn"))
    table = [
        row
        for name in ("norm1", "conv1", "norm2", "conv2")
        for row in layer(f"{block}.{name}", f"{slot.residual}.{name}")
    ]
    table += layer(f"{block}.temb_proj", slot.projection)
    if slot.skip:
        table += layer(f"{block}.nin_shortcut", f"{slot.residual}.skip")
    if slot.attention:
        for name, ours in {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}.items():
            table += layer(f"{attention}.{name}", f"{slot.attention}.{ours}")
    return table


# --- writing ---------------------------------------------------------------------------------------------------------

_FIXED: Mapping[str, object] = {
    "groups": 32,
    "norm_eps": 1e-6,
    "cos_first": False,
    "frequency_shift": 1,
    "time_scale": 1,
    "symmetric_padding": False,
    "heads": 1,
    "head_channels": None,
    "scale_shift": False,
    "resample_blocks": False,
    "classes": None,
}


def write(imported: Imported, folder: Path) -> None:
    """Write ``model.ckpt``, a bare state dict.

    Raises:
        InputError: that code cannot compute this network.
    """
    config = imported.config
    if not isinstance(config, UNetConfig):
        raise InputError("pytorch_diffusion's code cannot compute this network", note="it is not a U-Net of Ho's kind")
    for name, fixed in _FIXED.items():
        if getattr(config, name) != fixed:
            raise InputError(
                f"pytorch_diffusion's U-Net cannot compute {name} = {getattr(config, name)}", note=f"only {fixed}"
            )
    if config.size[0] != config.size[1]:
        raise InputError("pytorch_diffusion's code takes square images only")
    if imported.spec.prediction != "eps" or config.learned_variance:
        raise InputError("pytorch_diffusion's chain takes ε and a fixed variance only")
    save_state_dict(folder / "model.ckpt", to_theirs(rows(config), imported.tensors))
