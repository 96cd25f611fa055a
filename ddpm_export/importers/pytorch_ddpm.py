"""w86763777/pytorch-ddpm: Ho's network with PyTorch's norms and paddings, and an embedding that interleaves sin and cos.

``ckpt.pt`` is {net_model, ema_model, sched, optim, step, x_T}; the flags are in flagfile.txt beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_export.importers import wrappers
from ddpm_export.importers.keys import Columns, Row, Slot, config_error, layer, side, to_ours, unet_shapes, walk
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver, size_and_dropout
from ddpm_export.networks.unet import sinusoidal_embedding
from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.errors import FileFormatError

NAME = "pytorch-ddpm"

TABLE = "time_embedding.timembedding.0.weight"
"""[T, channels]: sin(t·f_0), cos(t·f_0), sin(t·f_1), …"""
MARKS = (TABLE,)

MODELS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {"size": (32, 32), "schedule": "linear", "prediction": "eps", "variance": "fixed_large", "dropout": 0.1}
}
"""The project's config/CIFAR10.txt."""

_PREDICTIONS = {"epsilon": "eps", "xstart": "x0"}
_VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names, in any container or bare."""
    found = wrappers.prefixes(contents, MARKS)
    return f"the weights are called {found[0]}downblocks.*, time_embedding.timembedding" if found else None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a file.

    Raises:
        FileFormatError, InputError: the tensors do not match such a network, or do not fit the options.
    """
    settings = SettingsResolver(options)
    weights = wrappers.take(contents, MARKS, options, settings)
    theirs = weights.chosen.tensors
    flags, source = _flagfile(contents)
    if published := settings.published(MODELS):
        flags, source = dict(published), "that model's config"
    timesteps = _check_table(theirs)
    config = _config(settings, theirs, wrappers.beside(contents.tensors, weights.chosen.prefix, "x_T"), flags, source)
    spec = settings.chain_spec(
        config,
        {**flags, "timesteps": timesteps},
        source,
        schedules=("linear",),
        predictions=("eps", "x0"),
        clip=None,
        clip_because="its code clips x̂_0 only after computing the mean from it",
    )
    table, shapes = rows(config), unet_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes, ignore=(TABLE,)) for network in weights.each())
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None)


def _flagfile(contents: CheckpointContents) -> tuple[dict[str, Any], str]:
    """The settings in flagfile.txt, whose lines are ``--name=value``, and their source."""
    file = contents.file.parent / "flagfile.txt"
    if not file.is_file() or file.stat().st_size > 1 << 16:
        return {}, ""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = dict(line.removeprefix("--").split("=", 1) for line in lines if line.startswith("--") and "=" in line)
    values: dict[str, Any] = {}
    try:
        if "img_size" in flags:
            values["size"] = (int(flags["img_size"]),) * 2
        for name, flag in {"beta_start": "beta_1", "beta_end": "beta_T", "dropout": "dropout"}.items():
            if flag in flags:
                values[name] = float(flags[flag])
    except ValueError as error:
        raise FileFormatError(f"{file}: a flag's value is not a number", note=str(error)) from error
    if flags.get("mean_type") == "xprev":
        raise FileFormatError(f"{file}: mean_type is xprev, which ddpmx cannot run", note="it can run ε, x_0 and v")
    if flags.get("mean_type") in _PREDICTIONS:
        values["prediction"] = _PREDICTIONS[flags["mean_type"]]
    if flags.get("var_type") in _VARIANCES:
        values["variance"] = _VARIANCES[flags["var_type"]]
    return values, "flagfile.txt"


def _check_table(theirs: Mapping[str, Tensor]) -> int:
    """T, from the embedding's table, after checking that it is the one which the formula gives.

    Raises:
        FileFormatError: it is another table.
    """
    if TABLE not in theirs or theirs[TABLE].ndim != 2 or theirs[TABLE].shape[1] < 4:
        raise FileFormatError(f"there is no table of time embeddings {TABLE!r}")
    table = theirs[TABLE].float()
    timesteps, channels = table.shape
    if not 1 <= timesteps <= 1_000_000 or channels % 2:
        raise config_error("a table of time embeddings", list(table.shape))
    expected = sinusoidal_embedding(torch.arange(timesteps), channels, frequency_shift=0)[
        :, list(_interleaved(channels))
    ]
    # float32 in another order of operations is off by t·2^−24
    if not (table - expected).abs().max() <= 1e-3:
        raise FileFormatError(
            f"the table {TABLE!r} is not sin and cos of 10000^(−i/half)·t",
            note=f"it is off by {float((table - expected).abs().max()):.3g}",
        )
    return timesteps


def _config(
    settings: SettingsResolver,
    theirs: Mapping[str, Tensor],
    noise: Tensor | None,
    flags: Mapping[str, Any],
    source: str,
) -> UNetConfig:
    """The numbers of the network, from the shapes of its weights; the image size from x_T, the noise of its samples."""
    channels = side(theirs, "head.weight", 0)
    widths: list[int] = []
    attends: list[bool] = []
    counts = [0]
    n = 0
    while (residual := f"downblocks.{n}.block1.2.weight" in theirs) or f"downblocks.{n}.main.weight" in theirs:
        if residual:
            if not counts[-1]:
                widths.append(side(theirs, f"downblocks.{n}.block1.2.weight", 0))
                attends.append(f"downblocks.{n}.attn.proj.weight" in theirs)
            counts[-1] += 1
        else:
            counts.append(0)
        n += 1
    if len(set(counts)) != 1 or not counts[0] or channels < 1 or any(width % channels for width in widths):
        raise config_error("blocks and widths", f"{counts} {widths}")
    seen = tuple(noise.shape[2:]) if noise is not None and noise.ndim == 4 else None
    known = {**flags, "size": seen} if seen else flags
    size, dropout = size_and_dropout(settings, widths, counts[0], known, source, size_source="x_T" if seen else source)
    return UNetConfig(
        in_channels=side(theirs, "head.weight", 1),
        out_channels=side(theirs, "tail.2.weight", 0),
        size=size,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=counts[0],
        attention=tuple(size[0] >> level for level, attention in enumerate(attends) if attention),
        dropout=dropout,
        norm_eps=1e-5,
        frequency_shift=0,
        symmetric_padding=True,
    )


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "time1": "time_embedding.timembedding.3",
    "conv_in": "head",
    "norm_out": "tail.0",
    "conv_out": "tail.2",
}
_RESIDUAL = {"norm1": "block1.0", "conv1": "block1.2", "norm2": "block2.0", "conv2": "block2.3"}
_ATTENTION = {"norm": "group_norm", "q": "proj_q", "k": "proj_k", "v": "proj_v", "out": "proj"}


def rows(config: UNetConfig) -> list[Row]:
    """The table of names."""
    table: list[Row] = []
    counts = {"down": 0, "middle": 0, "up": 0}
    half = config.channels // 2
    for slot in walk(config):
        if slot.kind == "time0":
            columns = Columns((*range(0, 2 * half, 2), *range(1, 2 * half, 2)))  # their sin, cos, sin … → sin ‖ cos
            table += layer("time_embedding.timembedding.1", slot.ours, columns)
        elif slot.part:
            at = f"{slot.part}blocks.{counts[slot.part]}"
            counts[slot.part] += 1
            table += _stage(slot, at) if slot.kind == "stage" else layer(f"{at}.main", f"{slot.ours}.conv")
        else:
            table += layer(_OUTSIDE[slot.kind], slot.ours)
    return table


def _stage(slot: Slot, at: str) -> list[Row]:
    table = [row for ours, theirs in _RESIDUAL.items() for row in layer(f"{at}.{theirs}", f"{slot.residual}.{ours}")]
    table += layer(f"{at}.temb_proj.1", slot.projection)
    if slot.skip:
        table += layer(f"{at}.shortcut", f"{slot.residual}.skip")
    if slot.attention:
        for ours, theirs in _ATTENTION.items():
            table += layer(f"{at}.attn.{theirs}", f"{slot.attention}.{ours}")
    return table


def _interleaved(channels: int) -> tuple[int, ...]:
    """Columns of sin ‖ cos in the order sin, cos, sin, cos, …"""
    return tuple(i // 2 + i % 2 * (channels // 2) for i in range(channels))
