"""`ddpmx generate` and `ddpmx info` of models that are told more than x and t."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx import pipeline
from ddpmx.formats import onnx_file
from oracles import told
from oracles.told import CLASSES, KINDS, spec_of

pytest.importorskip("onnxruntime", reason="not verified here: chains of files on the command line (no ONNX Runtime)")


@pytest.fixture
def file(tmp_path):
    def make(kind, **changes):
        spec = spec_of(kind, **changes)
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(told.onnx(spec, metadata=onnx_file.metadata(spec)))
        return path

    return make


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]


def test_labels_take_turns_by_the_image_s_index(ddpmx, tmp_path, file):
    path = file("classes")
    common = ["generate", "--engine", path, "--seed", 4]
    assert ddpmx(*common, "-n", 5, "--labels", "0,4,2", "--out", tmp_path / "all").code == 0
    assert ddpmx(*common, "-n", 2, "--first", 3, "--labels", "0,4,2", "--out", tmp_path / "part").code == 0
    with pipeline.load(path) as p:
        wanted = p.generate(5, seed=4, labels=[0, 4, 2, 0, 4])
    np.testing.assert_array_equal(pixels(tmp_path / "all"), wanted)
    np.testing.assert_array_equal(pixels(tmp_path / "part"), wanted[3:])


def test_one_label_for_all(ddpmx, tmp_path, file):
    path = file("classes")
    assert ddpmx("generate", "--engine", path, "-n", 2, "--label", 3, "--out", tmp_path / "out").code == 0
    with pipeline.load(path) as p:
        np.testing.assert_array_equal(pixels(tmp_path / "out"), p.generate(2, labels=3))


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("classes", [], f"{CLASSES} classes, and none is named"),
        ("classes", ["--label", CLASSES], f"there is no class {CLASSES}"),
        ("classes", ["--label", -1], "there is no class -1"),
        ("classes", ["--labels", "0,7"], "there is no class 7"),
        ("classes", ["--labels", "0,,1"], "are no whole numbers"),
        ("classes", ["--labels", "cat"], "are no whole numbers"),
        ("classes", ["--labels", ""], "are no whole numbers"),
        ("classes", ["--label", 0, "--labels", "0,1"], "--label is one class"),
        ("classes", ["-n", 10**12, "--label", 0], "n must be"),
        ("itself", ["--label", 0], "no classes"),
        ("condition", [], "by a condition, which this command cannot give"),
    ],
)
def test_what_cannot_be_told_is_one_clear_error(ddpmx, tmp_path, file, kind, flags, message):
    done = ddpmx("generate", "--engine", file(kind), *flags, "--out", tmp_path / "out")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_the_network_is_told(ddpmx, file, kind):
    out = " ".join(ddpmx("info", file(kind)).out.split())
    assert (f"classes: {CLASSES}, 0…{CLASSES - 1}" in out) == (kind in ("classes", "all"))
    assert ("x̂_0 of the step before" in out) == (kind in ("itself", "all"))
    assert ("condition: 2 channels" in out) == (kind in ("condition", "all"))


def test_info_names_an_array_of_betas(ddpmx, file):
    betas = np.linspace(0.01, 0.3, 20)
    path = file("itself", schedule="betas", betas=betas)
    assert "T = 20, an array of β (CRC " in ddpmx("info", path).out
