"""diffusers' UNet2DModel with a DDPM or DDIM scheduler: a folder with config.json, and weights as safetensors or .bin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ddpm_export.importers.diffusers_config import read_chain, read_network, scheduler_json, unet_json
from ddpm_export.importers.keys import SQUEEZE, Row, Slot, layer, to_ours, to_theirs, unet_shapes, walk
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.tensor_files import save_tensors
from ddpmx.errors import FileFormatError, InputError

NAME = "diffusers"


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names of the weights; config.json is checked later."""
    if any(name.startswith("down_blocks.") for name in contents.tensors) and (
        "time_embedding.linear_1.weight" in contents.tensors
    ):
        return "the weights are called down_blocks.*, time_embedding.linear_1"
    return None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a folder, and the chain of its scheduler.

    Raises:
        FileFormatError, InputError: there is no config.json, it describes a network that this graph cannot express, or
            the weights do not match it.
    """
    if "_class_name" not in contents.config and "block_out_channels" not in contents.config:
        raise FileFormatError(
            f"{contents.path}: weights of diffusers without their config.json",
            note="the shapes of the weights show neither number of heads nor padding nor time embedding",
            hint="name the folder that has config.json beside them",
        )
    if options.weights == "raw" and contents.file.parent.name == "unet_ema":
        raise InputError(
            f"{contents.file.parent}: these are the averaged weights",
            hint=f"name {contents.file.parent.with_name('unet')}",
        )
    settings = SettingsResolver(options)
    config = read_network(settings, contents.config)
    spec = read_chain(settings, contents, config)
    old = any(name.endswith(".proj_attn.weight") for name in contents.tensors)
    settings.add_fact("weights", len(contents.tensors), _weights_source(contents))
    tensors = to_ours(rows(config, old_attention=old), contents.tensors, shapes=unet_shapes(config))
    return settings.finish(NAME, config, spec, tensors)


def _weights_source(contents: CheckpointContents) -> str:
    """The file of the weights below the given path; whether they are averaged, and which variant, by folder and name."""
    file = contents.file
    source = str(file.relative_to(contents.path)) if file.is_relative_to(contents.path) else file.name
    if file.parent.name == "unet_ema":
        source += ", averaged"
    if variant := file.stem.partition(".")[2]:
        source += f", the variant {variant}"
    return source


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
