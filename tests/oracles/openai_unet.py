"""Recorded outputs of OpenAI's own networks: ``UNetModel`` of improved-diffusion and of guided-diffusion.

Their code is not here; ``tests/data/openai_unet.npz`` holds its outputs. To make the file again, from checkouts of
github.com/openai/guided-diffusion (commit 22e0df8) and github.com/openai/improved-diffusion (commit 1bc7bbb):

    PYTHONPATH=runtime:.:tests:GUIDED:IMPROVED python -m oracles.openai_unet

Weights are drawn by name under our names, and carried to theirs, so that both sides have the same ones. Needs torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_export.networks.unet import UNet, UNetConfig

FILE = Path(__file__).parent.parent / "data" / "openai_unet.npz"
TIMESTEPS = 4000
T = np.array([0, 1, 37, 500, 1234, 2048, 3001, 3999], np.int32)
Y = np.array([0, 4, 1, 2, 3, 0, 4, 2], np.int32)


@dataclass(frozen=True)
class Case:
    """One network: the project, its flags there beside the common ones, and the same as our configuration."""

    package: str
    flags: Mapping[str, Any]
    config: UNetConfig
    rescale_timesteps: bool = False


_COMMON = UNetConfig(
    3, 6, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32,
    norm_eps=1e-5, cos_first=True, frequency_shift=0, symmetric_padding=True,
)  # fmt: skip


def _config(**knobs: Any) -> UNetConfig:
    return dataclasses.replace(_COMMON, **knobs)


_UPDOWN = {"resblock_updown": True, "use_scale_shift_norm": True, "num_head_channels": 16, "num_classes": 5}
_OUR_UPDOWN = _config(resample_blocks=True, scale_shift=True, head_channels=16, classes=5)

CASES = {
    "improved, scale-shift, 4 heads, t·1000/4000": Case(
        "improved",
        {"use_scale_shift_norm": True, "num_heads": 4},
        _config(scale_shift=True, heads=4, time_scale=1000 / TIMESTEPS),
        rescale_timesteps=True,
    ),
    "improved, plain, one head, classes": Case("improved", {"num_heads": 1, "num_classes": 5}, _config(classes=5)),
    "guided, resblock_updown, classes, legacy qkv": Case("guided", _UPDOWN, _OUR_UPDOWN),
    "guided, resblock_updown, classes, new qkv": Case(
        "guided", {**_UPDOWN, "use_new_attention_order": True}, _OUR_UPDOWN
    ),
    "guided, no convolutions between levels": Case(
        "guided", {"conv_resample": False, "num_heads": 2}, _config(average_pool=True, heads=2)
    ),
}


@torch.no_grad()
def network(case: Case) -> UNet:
    """Ours, with weights that depend on their names and shapes alone, and keep activations near 1."""
    model = UNet(case.config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # RandomState, whose stream NumPy promises never to change
        values = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape))
        spread = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.2
        parameter.copy_(spread * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def images(case: Case) -> np.ndarray:
    """float32 [8, C, H, W]."""
    shape = (len(T), case.config.in_channels, *case.config.size)
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


# --- recording -------------------------------------------------------------------------------------------------------


def theirs(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Their network, and our weights under their names."""
    module = importlib.import_module(f"{case.package}_diffusion.unet")
    config = case.config
    shape = {"image_size": config.size[0]} if case.package == "guided" else {}
    model = module.UNetModel(
        **shape,
        in_channels=config.in_channels,
        model_channels=config.channels,
        out_channels=config.out_channels,
        num_res_blocks=config.blocks,
        attention_resolutions=tuple(config.size[0] // height for height in config.attention),
        channel_mult=config.multipliers,
        **case.flags,
    )
    state = network(case).state_dict()
    return model.eval(), _carried(state, config, new_order=case.flags.get("use_new_attention_order", False))


_BLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "skip": "skip_connection"}  # fmt: skip
_OUTSIDE = {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2", "time.dense0": "time_embed.0",
            "time.dense1": "time_embed.2", "time.classes": "label_emb"}  # fmt: skip


def _carried(state: Mapping[str, Tensor], config: UNetConfig, *, new_order: bool) -> dict[str, Tensor]:
    left, carried = dict(state), {}
    projection = iter(range(1000))

    def move(ours: str, to: str) -> None:
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in left:
                carried[f"{to}.{part}"] = left.pop(f"{ours}.{part}")

    def block(ours: str, to: str) -> None:
        for a, b in _BLOCK.items():
            move(f"{ours}.{a}", f"{to}.{b}")
        move(f"time.projections.{next(projection)}", f"{to}.emb_layers.1")

    def attention(ours: str, to: str) -> bool:
        if f"{ours}.q.weight" not in left:
            return False
        move(f"{ours}.norm", f"{to}.norm")
        for part in ("weight", "bias"):
            qkv = [left.pop(f"{ours}.{name}.{part}").flatten(1) if part == "weight"
                   else left.pop(f"{ours}.{name}.{part}")[:, None] for name in "qkv"]  # fmt: skip
            rows = torch.stack(qkv)  # [3, C, …]
            if not new_order:  # all of the first head, all of the second …
                heads = config.heads_of(rows.shape[1])
                rows = rows.unflatten(1, (heads, -1)).transpose(0, 1)
            rows = rows.reshape(3 * qkv[0].shape[0], -1)
            carried[f"{to}.qkv.{part}"] = rows[:, :, None] if part == "weight" else rows[:, 0]
        carried[f"{to}.proj_out.weight"] = left.pop(f"{ours}.out.weight").flatten(2)
        carried[f"{to}.proj_out.bias"] = left.pop(f"{ours}.out.bias")
        return True

    for a, b in _OUTSIDE.items():
        move(a, b)
    levels, n = len(config.multipliers), 0
    for i in range(levels):
        for j in range(config.blocks):
            n += 1
            block(f"down.{i}.stages.{j}.block", f"input_blocks.{n}.0")
            attention(f"down.{i}.stages.{j}.attention", f"input_blocks.{n}.1")
        if i < levels - 1:
            n += 1
            if config.resample_blocks:
                block(f"down.{i}.resample", f"input_blocks.{n}.0")
            move(f"down.{i}.resample.conv", f"input_blocks.{n}.0.op")
    block("middle.0.block", "middle_block.0")
    attention("middle.0.attention", "middle_block.1")
    block("middle.1.block", "middle_block.2")
    n = 0
    for i in range(levels):
        for j in range(config.blocks + 1):
            block(f"up.{i}.stages.{j}.block", f"output_blocks.{n}.0")
            place = 1 + attention(f"up.{i}.stages.{j}.attention", f"output_blocks.{n}.1")
            if j == config.blocks and i < levels - 1:
                if config.resample_blocks:
                    block(f"up.{i}.resample", f"output_blocks.{n}.{place}")
                move(f"up.{i}.resample.conv", f"output_blocks.{n}.{place}.conv")
            n += 1
    assert not left, sorted(left)
    return carried


@torch.no_grad()
def main() -> None:
    """Run their code and write the file."""
    outputs = {}
    for name, case in CASES.items():
        model, state = theirs(case)
        model.load_state_dict(state)  # strict: nothing missing, nothing too many
        respace = importlib.import_module(f"{case.package}_diffusion.respace")
        wrapped = respace._WrappedModel(model, list(range(TIMESTEPS)), case.rescale_timesteps, TIMESTEPS)
        labels = {} if case.config.classes is None else {"y": torch.from_numpy(Y).long()}
        output = wrapped(torch.from_numpy(images(case)), torch.from_numpy(T).long(), **labels).numpy()
        ours = network(case)(torch.from_numpy(images(case)), torch.from_numpy(T), *(v.int() for v in labels.values()))
        error = np.abs(torch.cat(ours, dim=1).numpy() - output).max()
        print(f"{name}: max |Δ| / max |output| = {error / np.abs(output).max():.2g}, RMS {output.std():.3g}")
        outputs[name] = output
    np.savez_compressed(FILE, **outputs)


if __name__ == "__main__":
    main()
