"""Imported by the server of ``children.py`` alone: a training of two steps imports what every one imports, for seconds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from ddpm_export.training import api

with tempfile.TemporaryDirectory() as folder:
    images = Path(folder) / "noise.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8))
    network = {"width": 8, "groups": 4, "mult": (1,), "blocks": 1, "attention": (), "batch": 2}
    api.train(images, Path(folder) / "run", preset="tiny", device="cpu", steps=2, timesteps=20, **network)

if Path("/proc/self/task").is_dir():
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked from here would inherit locks without their threads"
