"""diffusers' UNet2DModel as a twin of our network: an independent port of Ho et al. with most of the same options.

Also the names of its tensors here. google/ddpm-cifar10-32 is such a network. Needs torch and diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffusers import UNet2DModel
from torch import Tensor

from ddpm_export.networks.unet import UNetConfig
from oracles.random_weights import rerandomise

# ours → theirs
OUTSIDE = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "time.dense0": "time_embedding.linear_1",
    "time.dense1": "time_embedding.linear_2",
    "time.classes": "class_embedding",
}
BLOCK = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {"skip": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def twin(config: UNetConfig) -> UNet2DModel:
    """diffusers' network of the same configuration, with random weights of which none is near zero.

    It has no ``time_scale`` and no ``average_pool``, and knows heads by their width alone.
    """
    assert (config.time_scale, config.average_pool, config.heads) == (1, False, 1)
    heights = [config.size[0] >> level for level in range(len(config.multipliers))]
    attends = [height in config.attention for height in heights]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resample_blocks else ("DownBlock2D", "UpBlock2D")
    )
    resample = "resnet" if config.resample_blocks else "conv"
    model = UNet2DModel(
        sample_size=config.size[0],
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        down_block_types=tuple("AttnDownBlock2D" if attend else plain[0] for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)),
        layers_per_block=config.blocks,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,  # else, with scale_shift, the middle's attention has no norm
        norm_eps=config.norm_eps,
        act_fn="silu",
        attention_head_dim=config.head_channels,
        downsample_padding=1 if config.symmetric_padding else 0,
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        flip_sin_to_cos=config.cos_first,
        freq_shift=config.frequency_shift,
        num_class_embeds=config.classes,
        center_input_sample=False,
        time_embedding_type="positional",
        mid_block_scale_factor=1,
    )
    rerandomise(model)
    return model.eval().requires_grad_(False)


def names(config: UNetConfig) -> dict[str, str]:
    """Every module with weights: our name → theirs. Some exist only in some networks."""
    table = dict(OUTSIDE)
    n = 0

    def block(ours: str, theirs: str) -> None:
        nonlocal n
        table.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in BLOCK.items()})
        table[f"time.projections.{n}"] = f"{theirs}.time_emb_proj"
        n += 1

    for ours, theirs, stages in _levels(config):
        for j in range(stages):
            stage = ours.format(j=j)
            block(f"{stage}.block", f"{theirs}.resnets.{j}")
            table.update({f"{stage}.attention.{a}": f"{theirs}.attentions.{j}.{b}" for a, b in ATTENTION.items()})
        way, _, level = ours.partition(".stages")[0].partition(".")
        if way == "middle" or int(level) == len(config.multipliers) - 1:
            continue
        resample = f"{way}.{level}.resample", f"{theirs}.{way}samplers.0"
        if config.resample_blocks:
            block(*resample)
        else:
            table[f"{resample[0]}.conv"] = f"{resample[1]}.conv"
    return table


def carry(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Their tensors under our names. Each of theirs must be used."""
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


def _levels(config: UNetConfig) -> Iterator[tuple[str, str, int]]:
    """(pattern of our stages, their level, number of stages), in the order in which they run."""
    levels = range(len(config.multipliers))
    yield from ((f"down.{i}.stages.{{j}}", f"down_blocks.{i}", config.blocks) for i in levels)
    yield "middle.{j}", "mid_block", 2
    yield from ((f"up.{i}.stages.{{j}}", f"up_blocks.{i}", config.blocks + 1) for i in levels)
