"""The model that comes along: found by its name, from anywhere, and a file of that name stays reachable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.errors import FileFormatError
from ddpmx.formats.describe import describe
from ddpmx.models.shipped import SHIPPED, beside, find


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_whole_and_draws(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = describe(name)
    assert values["spec"]["weights"]
    assert values["bytes"] < 4e6
    pytest.importorskip("onnxruntime", reason="not verified here: that the shipped model draws (no ONNX Runtime)")
    with ddpmx.load(name, threads=1) as pipeline:
        images = pipeline.generate(2, steps=3)
    assert images.shape[0] == 2
    assert np.ptp(images) > 50


def test_names_come_first_and_then_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garments").write_bytes(b"mine")
    assert find("garments").suffix == ".onnx"
    assert find("./garments") == find(Path("garments")) == Path("garments")
    assert find("other/model.onnx") == Path("other/model.onnx")
    (tmp_path / "word").mkdir()
    assert find("word") == Path("word")
    with pytest.raises(FileFormatError, match="nor a file") as caught:
        find("garmets")
    assert "garments" in str(caught.value.hint)


def test_what_belongs_to_a_shipped_model_is_not_written_into_the_package():
    assert beside("garments", ".plan") == Path("garments.plan")
    assert beside("a/model.onnx", ".plan") == Path("a/model.plan")
    for folder in (".", "/", Path()):
        with pytest.raises(FileFormatError, match="is a folder"):
            beside(folder, ".plan")
    with pytest.raises(FileFormatError, match="is empty"):
        find("")
