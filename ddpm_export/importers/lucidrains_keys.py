"""The names of denoising-diffusion-pytorch's U-Net, and the layout of its tensors, as a two-way table."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_export.importers.keys import OneToOne, Row, layer
from ddpm_export.networks.lucidrains_config import LucidrainsConfig
from ddpm_export.networks.lucidrains_unet import LucidrainsUNet


def _gain(theirs: Tensor) -> Tensor:
    if theirs.ndim != 4 or theirs.shape[0] != 1 or theirs.shape[2:] != (1, 1):
        raise ValueError("expected a gain of shape [1, C, 1, 1]")
    return theirs.reshape(-1)


def _unshuffled(theirs: Tensor) -> Tensor:
    if theirs.ndim != 4 or theirs.shape[1] % 4 or theirs.shape[2:] != (1, 1):
        raise ValueError("expected a 1×1 convolution of 4·C channels")
    return theirs.reshape(theirs.shape[0], -1, 2, 2)


GAIN = OneToOne(_gain, lambda w: w.reshape(1, -1, 1, 1))
UNSHUFFLED = OneToOne(_unshuffled, lambda w: w.reshape(w.shape[0], -1, 1, 1))
"""A 1×1 convolution behind pixel-unshuffle, [out, 4·in, 1, 1], is a 2×2 one of stride 2, [out, in, 2, 2]."""


def rows(config: LucidrainsConfig, *, wrapped: bool = False) -> list[Row]:
    """The table of all tensors of the network. ``wrapped``: attention is inside ``fn.fn``, as before release 1.8."""
    counted = iter(range(1 << 30))
    table: list[Row] = []

    def block(theirs: str, ours: str, *, skip: bool) -> None:
        table.extend(layer(f"{theirs}.mlp.1", f"time.projections.{next(counted)}"))
        for i in (1, 2):
            table.extend(layer(f"{theirs}.block{i}.proj", f"{ours}.conv{i}"))
            if config.block_norm == "rms":
                table.append(Row((f"{theirs}.block{i}.norm.g",), (f"{ours}.norm{i}.weight",), GAIN))
            else:
                table.extend(layer(f"{theirs}.block{i}.norm", f"{ours}.norm{i}"))
        if skip:
            table.extend(layer(f"{theirs}.res_conv", f"{ours}.skip"))

    def attention(theirs: str, ours: str, *, full: bool) -> None:
        outer, inner = (f"{theirs}.fn", f"{theirs}.fn.fn") if wrapped else (theirs, theirs)
        table.append(Row((f"{outer}.norm.g",), (f"{ours}.norm.weight",), GAIN))
        table.append(Row((f"{inner}.to_qkv.weight",), (f"{ours}.qkv.weight",)))
        if config.memory:
            table.append(Row((f"{inner}.mem_kv",), (f"{ours}.memory",)))
        table.extend(layer(f"{inner}.to_out" if full else f"{inner}.to_out.0", f"{ours}.out"))
        if not full:
            table.append(Row((f"{inner}.to_out.1.g",), (f"{ours}.norm_out.weight",), GAIN))

    table += layer("init_conv", "conv_in")
    if config.fourier is not None:
        table.append(Row(("time_mlp.0.weights",), ("time.frequencies",)))
    table += layer("time_mlp.1", "time.dense0") + layer("time_mlp.3", "time.dense1")
    last = len(config.multipliers) - 1
    for level in range(last + 1):
        theirs, ours = f"downs.{level}", f"down.{level}"
        for i in (0, 1):
            block(f"{theirs}.{i}", f"{ours}.block{i + 1}", skip=False)
        attention(f"{theirs}.2", f"{ours}.attention", full=config.full_attention[level])
        shuffles = level != last
        table += layer(
            f"{theirs}.3.1" if shuffles else f"{theirs}.3",
            f"{ours}.resample",
            *([UNSHUFFLED] if shuffles else []),
        )
    block("mid_block1", "middle.block1", skip=False)
    attention("mid_attn", "middle.attention", full=True)
    block("mid_block2", "middle.block2", skip=False)
    for index in range(last + 1):
        theirs, ours = f"ups.{index}", f"up.{index}"
        for i in (0, 1):
            block(f"{theirs}.{i}", f"{ours}.block{i + 1}", skip=True)
        attention(f"{theirs}.2", f"{ours}.attention", full=config.full_attention[last - index])
        table += layer(f"{theirs}.3.1" if index != last else f"{theirs}.3", f"{ours}.resample")
    block("final_res_block", "block_out", skip=True)
    return [*table, *layer("final_conv", "conv_out")]


def network_shapes(config: LucidrainsConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of such a network. No memory is taken for the tensors."""
    with torch.device("meta"):
        network = LucidrainsUNet(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
