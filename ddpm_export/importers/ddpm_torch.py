"""tqch/ddpm-torch: Ho's network with one projection for q, k and v.

A checkpoint is {model, optimizer, scheduler, ema: {decay, shadow, num_updates}, epoch}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_export.importers import wrappers
from ddpm_export.importers.keys import Row, Slot, SplitQkv, config_error, layer, side, to_ours, unet_shapes, walk
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver, size_and_dropout
from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.errors import FileFormatError

NAME = "ddpm-torch"

_CHAIN = {"timesteps": 1000, "schedule": "linear", "prediction": "eps"}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {**_CHAIN, "size": (32, 32), "variance": "fixed_large", "dropout": 0.1},
    "celeba": {**_CHAIN, "size": (64, 64), "variance": "fixed_small", "dropout": 0.0},
    "celebahq": {**_CHAIN, "size": (256, 256), "variance": "fixed_small", "dropout": 0.0},
}
"""The project's configs/*.json, by the model's name."""

_MARK = "in_conv.weight"
MARKS = (_MARK, "downsamples.level_0.")


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names, in any container or bare."""
    found = wrappers.prefixes(contents, MARKS)
    return f"the weights are called {found[0]}downsamples.level_0.*, in_conv" if found else None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a file.

    Raises:
        FileFormatError, InputError: the tensors do not match such a network, or do not fit the options.
    """
    settings = SettingsResolver(options)
    weights = wrappers.take(contents, MARKS, options, settings)
    published = settings.published(MODELS)
    config = _config(settings, weights.chosen.tensors, published)
    spec = settings.chain_spec(
        config,
        published,
        "that model's config",
        schedules=("linear", "quad", "warmup10", "warmup50", "jsd"),
        predictions=("eps", "x0"),
        clip=1.0,
        clip_because="its ancestral chain clips",
    )
    table, shapes = rows(config), unet_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes) for network in weights.each())
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None)


def _config(settings: SettingsResolver, theirs: Mapping[str, Tensor], published: Mapping[str, Any]) -> UNetConfig:
    """The numbers of the network, from the shapes of its weights."""
    levels = blocks = 0
    attends: list[bool] = []
    widths: list[int] = []
    while True:
        plain, attending = (f"downsamples.level_{levels}.0.{inside}conv1.weight" for inside in ("", "0."))
        if plain not in theirs and attending not in theirs:
            break
        attends.append(attending in theirs)
        widths.append(side(theirs, attending if attends[-1] else plain, 0))
        levels += 1
    if not levels:
        raise config_error("levels", 0)
    inside = "0." if attends[0] else ""
    while f"downsamples.level_0.{blocks}.{inside}conv1.weight" in theirs:
        blocks += 1
    channels = side(theirs, _MARK, 0)
    if channels < 1 or any(width % channels for width in widths):
        raise config_error("widths", widths)
    c_in, c_out = side(theirs, _MARK, 1), side(theirs, "out_conv.2.weight", 0)
    if c_out == 2 * c_in:
        raise FileFormatError(
            "the network learned its variance, which is not read from these checkpoints",
            note="model_var_type is learned: the output has twice the image's channels",
        )
    size, dropout = size_and_dropout(settings, widths, blocks, published, "that model's config", attends=attends)
    return UNetConfig(
        in_channels=c_in,
        out_channels=c_out,
        size=size,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=tuple(size[0] >> level for level in range(levels) if attends[level]),
        dropout=dropout,
        average_pool=levels > 1 and f"downsamples.level_0.{blocks}.1.weight" not in theirs,
    )


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "time0": "embed.0",
    "time1": "embed.2",
    "conv_in": "in_conv",
    "norm_out": "out_conv.0",
    "conv_out": "out_conv.2",
}


def rows(config: UNetConfig) -> list[Row]:
    """The table of names."""
    table: list[Row] = []
    for slot in walk(config):
        if slot.kind == "stage":
            table += _stage(slot)
        elif slot.kind == "downsample":
            if not config.average_pool:
                table += layer(f"downsamples.level_{slot.level}.{config.blocks}.1", f"{slot.ours}.conv")
        elif slot.kind == "upsample":
            if not config.average_pool:
                table += layer(f"upsamples.level_{slot.level}.{config.blocks + 1}.1", f"{slot.ours}.conv")
        else:
            table += layer(_OUTSIDE[slot.kind], slot.ours)
    return table


def _stage(slot: Slot) -> list[Row]:
    if slot.part == "middle":
        block, attention = f"middle.{2 * slot.block}", "middle.1"
    else:
        at = f"{slot.part}samples.level_{slot.level}.{slot.block}"
        block, attention = (f"{at}.0", f"{at}.1") if slot.attention else (at, "")
    table = [
        row
        for name in ("norm1", "conv1", "norm2", "conv2")
        for row in layer(f"{block}.{name}", f"{slot.residual}.{name}")
    ]
    table += layer(f"{block}.fc", slot.projection)
    if slot.skip:
        table += layer(f"{block}.skip", f"{slot.residual}.skip")
    if slot.attention:
        table += layer(f"{attention}.norm", f"{slot.attention}.norm")
        table += layer(f"{attention}.project_out", f"{slot.attention}.out")
        for part in ("weight", "bias"):
            ours = tuple(f"{slot.attention}.{name}.{part}" for name in "qkv")
            table.append(Row((f"{attention}.project_in.{part}",), ours, SplitQkv(1, new_order=True, sides=2)))
    return table
