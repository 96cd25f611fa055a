"""The same network twice: diffusers' UNet2DModel in the configuration of google/ddpm-cifar10-32, an independent port of
Ho et al., and how its tensors are called here. Needs torch and diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffusers import UNet2DModel
from torch import Tensor

from ddpm_export.unet import UNetConfig
from oracles.random_weights import rerandomise

# ours → theirs; {i} is a level, {j} a stage within it, {n} counts all residual blocks in the order in which they run
OUTSIDE = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "time.dense0": "time_embedding.linear_1",
    "time.dense1": "time_embedding.linear_2",
}
STAGES = {"down.{i}.stages.{j}": "down_blocks.{i}", "middle.{j}": "mid_block", "up.{i}.stages.{j}": "up_blocks.{i}"}
BLOCK = {
    "block.norm1": "resnets.{j}.norm1",
    "block.conv1": "resnets.{j}.conv1",
    "block.norm2": "resnets.{j}.norm2",
    "block.conv2": "resnets.{j}.conv2",
    "block.skip": "resnets.{j}.conv_shortcut",
    "attention.norm": "attentions.{j}.group_norm",
    "attention.q": "attentions.{j}.to_q",
    "attention.k": "attentions.{j}.to_k",
    "attention.v": "attentions.{j}.to_v",
    "attention.out": "attentions.{j}.to_out.0",
}
PROJECTION = {"time.projections.{n}": "resnets.{j}.time_emb_proj"}
RESAMPLE = {"down.{i}.resample.conv": "down_blocks.{i}.downsamplers.0.conv",
            "up.{i}.resample.conv": "up_blocks.{i}.upsamplers.0.conv"}  # fmt: skip


def twin(config: UNetConfig) -> UNet2DModel:
    """diffusers' network of the same numbers, with random weights of which none is near zero."""
    heights = [config.size[0] >> level for level in range(len(config.multipliers))]
    attends = [height in config.attention for height in heights]
    model = UNet2DModel(
        sample_size=config.size[0],
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.multipliers),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=config.blocks,
        norm_num_groups=config.groups,
        norm_eps=1e-6,
        act_fn="silu",
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        center_input_sample=False,
        time_embedding_type="positional",
        mid_block_scale_factor=1,
    )
    rerandomise(model)
    return model.eval().requires_grad_(False)


def names(config: UNetConfig) -> dict[str, str]:
    """Every module with weights: our name → theirs."""
    table = dict(OUTSIDE)
    for n, (ours, theirs, i, j) in enumerate(_stages(config)):
        at = {"i": i, "j": j, "n": n}
        theirs = theirs.format(**at)
        table.update({f"{ours.format(**at)}.{a}": f"{theirs}.{b.format(**at)}" for a, b in BLOCK.items()})
        table.update({a.format(**at): f"{theirs}.{b.format(**at)}" for a, b in PROJECTION.items()})
    for i in range(len(config.multipliers) - 1):
        table.update({a.format(i=i): b.format(i=i) for a, b in RESAMPLE.items()})
    return table


def carry(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Their tensors under our names. Every one of theirs finds its place."""
    carried = {}
    used = set()
    for ours, theirs in names(config).items():
        for part in ("weight", "bias"):
            tensor = state.get(f"{theirs}.{part}")
            if tensor is None:  # a skip without a convolution, a stage without attention
                continue
            used.add(f"{theirs}.{part}")
            # their q, k, v and out are dense layers over channels, ours are 1×1 convolutions
            dense = ".attention." in ours and tensor.ndim == 2
            carried[f"{ours}.{part}"] = tensor[:, :, None, None] if dense else tensor
    assert used == set(state), sorted(set(state) - used)
    return carried


def _stages(config: UNetConfig) -> Iterator[tuple[str, str, int, int]]:
    """(our pattern, their pattern, level, stage) of every residual block, in the order in which they run."""
    down, middle, up = STAGES.items()
    levels = range(len(config.multipliers))
    yield from ((*down, i, j) for i in levels for j in range(config.blocks))
    yield from ((*middle, 0, j) for j in range(2))
    yield from ((*up, i, j) for i in levels for j in range(config.blocks + 1))
