"""Recorded outputs of denoising-diffusion-pytorch, and the weights and inputs they belong to. Needs no torch.

Weights are a function of a tensor's name, made of ddpmx's own noise, so they need not be recorded. See
``data/lucidrains/README.md``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose

FILE = Path(__file__).parents[1] / "data" / "lucidrains" / "answers.npz"
SEED = 1
SIZE = 8
TIMESTEPS = np.array([0, 10, 499, 777, 999])
"""The t of the recorded outputs."""


def numbers(name: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """N(0, 1), float32, a function of name and shape."""
    z = noise.normal(seed, np.array([zlib.crc32(name.encode())]), 0, Purpose.INITIAL, int(np.prod(shape)))
    return z.reshape(shape)


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED) -> dict[str, np.ndarray]:
    """Weights under which no mistake hides and activations stay near 1, by their names in a U-Net."""
    found = {}
    for name, shape in shapes.items():
        z = numbers(name, tuple(shape), seed)
        if name.endswith(".g") or ("norm" in name and name.endswith("weight")):
            z = 1 + np.float32(0.2) * z
        elif name.endswith("bias"):
            z = np.float32(0.2) * z
        elif len(shape) > 1 and not name.endswith("mem_kv"):
            z = z / np.float32(np.sqrt(np.prod(shape[1:])))
        found[name] = z
    return found


@dataclass(frozen=True)
class Case:
    """One network, or one chain, of a release.

    Attributes:
        name: release and network, in words.
        release: of denoising-diffusion-pytorch.
        unet: the arguments of its Unet.
        diffusion: the arguments of its GaussianDiffusion, or None for a U-Net alone.
        shapes: of the U-Net's weights, by name.
        buffers: of the GaussianDiffusion.
        outputs: of the network, [5, C or 2·C, 8, 8] at :data:`TIMESTEPS`; or of the chain, [2, 2, C, 8, 8]: two images
            half way and at its end. Empty where only the buffers were recorded.
    """

    name: str
    release: str
    unet: dict[str, Any]
    diffusion: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, np.ndarray]
    outputs: np.ndarray

    @property
    def channels(self) -> int:
        """Of the image."""
        channels: int = self.unet["channels"]
        return channels

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """x_t and x̂_0 of the step before, float32 [5, C, 8, 8] each."""
        shape = (len(TIMESTEPS), self.channels, SIZE, SIZE)
        return numbers("x", shape), np.clip(numbers("x0_prev", shape), -1, 1)


def cases(file: Path = FILE) -> dict[str, Case]:
    """All that was recorded, by name."""
    with np.load(file) as archive:
        index = json.loads(str(archive["index"]))
        return {
            name: Case(
                name,
                entry["release"],
                entry["unet"],
                entry["diffusion"],
                {key: tuple(shape) for key, shape in entry["shapes"].items()},
                {key: archive[f"{name}/{key}"] for key in entry["buffers"]},
                archive[f"{name}/answers"],
            )
            for name, entry in index.items()
        }
