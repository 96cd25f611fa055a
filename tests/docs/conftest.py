"""A folder as a reader of the pages has it: a trained run, its exports and their records, photos, a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import FASHION, Trained
from oracles.plans import make_plan

PHOTOS = 24


@pytest.fixture(scope="session")
def prepared(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/photos, model files and their records, images in three folders, mask.png, model.plan, other.onnx, spec.json."""
    import onnx

    from ddpm_export.proof.proof import record_checkpoint
    from ddpmx.formats.describe import describe

    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(trained.run, folder / "runs" / "photos")
    record = record_checkpoint(folder / "runs" / "photos", weights="ema", data=None, full=False)
    for file, stem in ((trained.fp32, "model"), (trained.fp16, "model-fp16")):
        shutil.copy(file, folder / f"{stem}.onnx")
        record.save(folder / f"{stem}.parity.npz")
    for name in ("photos", "blurred", "sorted/cats", "sorted/dogs"):
        (folder / name).mkdir(parents=True)
    with np.load(FASHION) as data:
        for i, image in enumerate(data["images"][:PHOTOS]):
            Image.fromarray(image).save(folder / "photos" / f"{i:03d}.png")
            Image.fromarray(image).reduce(2).resize((16, 16)).save(folder / "blurred" / f"{i:03d}.png")
            Image.fromarray(image).save(folder / "sorted" / ("cats", "dogs")[i % 2] / f"{i:03d}.png")
    hole = np.zeros((16, 16), np.uint8)
    hole[4:10, 4:12] = 255
    Image.fromarray(hole).save(folder / "mask.png")
    (folder / "model.plan").write_bytes(make_plan())
    foreign = onnx.load(trained.fp32)
    del foreign.metadata_props[:]
    onnx.save(foreign, folder / "other.onnx")
    (folder / "spec.json").write_text(json.dumps(describe(trained.fp32)["spec"]))
    return folder


@pytest.fixture
def reader(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``prepared``, which is the working folder."""
    folder = tmp_path / "reader"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder
