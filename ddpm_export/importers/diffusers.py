"""diffusers' UNet2DModel with a DDPM or DDIM scheduler: a folder with config.json, and weights as safetensors or .bin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ddpm_export.importers import wrappers
from ddpm_export.importers.diffusers_config import latent_sign, read_chain, read_network, scheduler_json, unet_json
from ddpm_export.importers.keys import SQUEEZE, Row, Slot, layer, to_ours, to_theirs, unet_shapes, walk
from ddpm_export.importers.reading.contents import EMA_FOLDER, CheckpointContents, with_configs
from ddpm_export.importers.settings import Imported, Options, SettingsResolver
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.tensor_files import save_tensors
from ddpmx.errors import FileFormatError, InputError

NAME = "diffusers"
MARKS = ("time_embedding.linear_1.weight", "down_blocks.0.")


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names of the weights; config.json is checked later."""
    found = wrappers.prefixes(contents, MARKS)
    return f"the weights are called {found[0]}down_blocks.*, time_embedding.linear_1" if found else None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a folder, and the chain of its scheduler.

    Raises:
        FileFormatError, InputError: there is no config.json, it describes a network that this graph cannot express, or
            the weights do not match it.
    """
    contents = with_configs(contents)
    if "_class_name" not in contents.config and "block_out_channels" not in contents.config:
        raise FileFormatError(
            f"{contents.path}: weights of diffusers without their config.json",
            note="the shapes of the weights show neither number of heads nor padding nor time embedding",
            hint=f"put config.json into {contents.file.parent}; in diffusers unet.save_config(FOLDER) writes it",
        )
    averaged = contents.file.parent if contents.file.parent.name == EMA_FOLDER else None
    raw_folder = None if averaged is None else averaged.with_name("unet")
    if options.weights == "raw" and raw_folder is not None and not contents.path.samefile(raw_folder.parent):
        raise InputError(
            f"{averaged}: these are the averaged weights",
            hint=f"name {raw_folder}" if raw_folder.is_dir() else "there are no others beside them",
        )
    settings = SettingsResolver(options)
    config = read_network(settings, contents.config)
    spec = read_chain(settings, contents, config)
    averages = [EMA_FOLDER + ".", *([""] if contents.file.parent.name == EMA_FOLDER else [])]
    weights = wrappers.take(contents, MARKS, options, settings, averages=averages)
    old = any(name.endswith(".proj_attn.weight") for name in weights.chosen.tensors)
    table, shapes = rows(config, old_attention=old), unet_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes) for network in weights.each())
    sign = latent_sign(contents.configs.get("scheduler_config.json", {}))
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None, latent_sign=sign)


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "time0": "time_embedding.linear_1",
    "time1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn"}


def rows(config: UNetConfig, *, old_attention: bool = False) -> list[Row]:
    """The table of names; ``old_attention`` for those before diffusers 0.15."""
    top = len(config.multipliers) - 1
    attention = _OLD_ATTENTION if old_attention else _ATTENTION
    table: list[Row] = []
    for slot in walk(config):
        if slot.kind == "classes":
            table.append(Row(("class_embedding.weight",), (f"{slot.ours}.weight",)))
        elif slot.kind == "stage":
            at = {"down": f"down_blocks.{slot.level}", "middle": "mid_block", "up": f"up_blocks.{top - slot.level}"}
            table += _stage(slot, at[slot.part], attention)
        elif slot.kind == "downsample":
            table += layer(f"down_blocks.{slot.level}.downsamplers.0.conv", f"{slot.ours}.conv")
        elif slot.kind == "upsample":
            table += layer(f"up_blocks.{top - slot.level}.upsamplers.0.conv", f"{slot.ours}.conv")
        else:
            table += layer(_OUTSIDE[slot.kind], slot.ours)
    return table


def _stage(slot: Slot, at: str, attention: Mapping[str, str]) -> list[Row]:
    resnet = f"{at}.resnets.{slot.block}"
    table = [
        row
        for name in ("norm1", "conv1", "norm2", "conv2")
        for row in layer(f"{resnet}.{name}", f"{slot.residual}.{name}")
    ]
    table += layer(f"{resnet}.time_emb_proj", slot.projection)
    if slot.skip:
        table += layer(f"{resnet}.conv_shortcut", f"{slot.residual}.skip")
    if slot.attention:
        for ours, theirs in attention.items():
            op = {} if ours == "norm" else {"weight": SQUEEZE}
            table += layer(f"{at}.attentions.{slot.block}.{theirs}", f"{slot.attention}.{ours}", **op)
    return table


# --- writing ---------------------------------------------------------------------------------------------------------


def write(imported: Imported, folder: Path) -> None:
    """Write a pipeline's folder: model_index.json, unet/, scheduler/. ``DDPMPipeline.from_pretrained`` reads it.

    Raises:
        InputError: UNet2DModel cannot compute this network, or DDPMScheduler this chain.
    """
    config, spec = imported.config, imported.spec
    unet, scheduler = unet_json(config), scheduler_json(spec)
    tensors = to_theirs(rows(config), imported.tensors)
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    save_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for name, values in {
        "model_index.json": index,
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
    }.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
