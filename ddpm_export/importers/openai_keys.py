"""The names of OpenAI's tensors, the same in improved-diffusion and guided-diffusion.

Their modules are in two numbered lists, in the order in which they run. Attention and upsampling follow a residual block
in the same item of the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ddpm_export.importers.keys import OneToOne, Row, Slot, SplitQkv, layer, walk
from ddpm_export.networks.unet_config import UNetConfig

_OUTSIDE = {
    "time0": "time_embed.0",
    "time1": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}

CONV1D = OneToOne(lambda w: w.reshape(*w.shape[:2], w.shape[2], 1), lambda w: w.squeeze(3))
"""A convolution over positions [out, in, 1] ↔ a 1×1 convolution [out, in, 1, 1]."""


class _Place(NamedTuple):
    """The names of a stage or a resampling in their lists of modules."""

    block: str
    attention: str


def rows(config: UNetConfig, new_order: bool = False) -> list[Row]:
    """The table of names; ``new_order`` for ``use_new_attention_order``."""
    table: list[Row] = []
    for slot, place in _places(config):
        if place is None:
            if slot.kind == "classes":
                table.append(Row(("label_emb.weight",), (f"{slot.ours}.weight",)))
            else:
                table += layer(_OUTSIDE[slot.kind], slot.ours)
        elif slot.residual:
            table += _residual(slot, place.block)
            if slot.attention:
                split = SplitQkv(config.heads_of(slot.c_out), new_order)
                table += _attention(slot, place.attention, split)
        elif not config.average_pool:
            table += layer(f"{place.block}.{'op' if slot.kind == 'downsample' else 'conv'}", f"{slot.ours}.conv")
    return table


def _places(config: UNetConfig) -> Iterator[tuple[Slot, _Place | None]]:
    """Every part of the network with its place: their indices count what runs in input_blocks and in output_blocks."""
    inputs, outputs, behind = 0, -1, 1
    for slot in walk(config):
        if slot.part == "middle":
            yield slot, _Place(f"middle_block.{2 * slot.block}", "middle_block.1")
        elif slot.part == "down":
            inputs += 1
            yield slot, _Place(f"input_blocks.{inputs}.0", f"input_blocks.{inputs}.1")
        elif slot.kind == "upsample":  # in the list of the stage before, behind its attention
            yield slot, _Place(f"output_blocks.{outputs}.{behind}", "")
        elif slot.part == "up":
            outputs, behind = outputs + 1, 2 if slot.attention else 1
            yield slot, _Place(f"output_blocks.{outputs}.0", f"output_blocks.{outputs}.1")
        else:
            yield slot, None


def _residual(slot: Slot, block: str) -> list[Row]:
    table = [row for ours, name in _BLOCK.items() for row in layer(f"{block}.{name}", f"{slot.residual}.{ours}")]
    table += layer(f"{block}.emb_layers.1", slot.projection)
    if slot.skip:
        table += layer(f"{block}.skip_connection", f"{slot.residual}.skip")
    return table


def _attention(slot: Slot, attention: str, split: SplitQkv) -> list[Row]:
    table = layer(f"{attention}.norm", f"{slot.attention}.norm")
    for part in ("weight", "bias"):
        table.append(
            Row((f"{attention}.qkv.{part}",), tuple(f"{slot.attention}.{name}.{part}" for name in "qkv"), split)
        )
    return table + layer(f"{attention}.proj_out", f"{slot.attention}.out", CONV1D)
