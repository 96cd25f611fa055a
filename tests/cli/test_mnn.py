"""MNN models on the command line: build --for mnn, then everything that takes a model file."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from ddpmx.errors import BackendError
from ddpmx.formats.mnn_file import read_mnn
from ddpmx.formats.model_file import sha256
from ddpmx.mnn import library
from oracles.mnn import mnn_file, network

try:
    library.load()
    NO_MNN = ""
except BackendError as why:
    NO_MNN = why.fact
needs_mnn = pytest.mark.skipif(bool(NO_MNN), reason=f"not verified here: MNN models on the command line ({NO_MNN})")


@pytest.fixture
def onnx(tmp_path, gaussian_onnx):
    return shutil.copy(gaussian_onnx, tmp_path / "model.onnx")


@pytest.fixture
def model(ddpmx, onnx, tmp_path):
    done = ddpmx("build", onnx, "--for", "mnn")
    assert done.code == 0, done
    return tmp_path / "model.mnn"


@needs_mnn
def test_a_build_says_what_it_made(ddpmx, onnx, tmp_path):
    done = ddpmx("build", onnx, "--for", "mnn", "-o", tmp_path / "a.mnn", "--part", 2, "--low-memory")
    version = library.load().version()
    assert f"→ {tmp_path / 'a.mnn'}: MNN {version}, 2 images in a call, in little memory; " in done.out
    record = read_mnn(tmp_path / "a.mnn").record
    assert (record.part, record.memory, record.onnx) == (2, "low", sha256(onnx))
    again = ddpmx("build", onnx, "--for", "mnn", "-o", tmp_path / "a.mnn", "--part", 2, "--low-memory")
    assert again.out.startswith(f"{tmp_path / 'a.mnn'} is up to date")


@needs_mnn
def test_a_model_draws_what_its_onnx_file_draws(ddpmx, model, onnx, tmp_path):
    for file, out in ((model, "a"), (onnx, "b")):
        assert ddpmx("generate", file, "-n", 3, "--steps", 20, "--seed", 4, "--out", tmp_path / out).code == 0
    for name in ("00000.png", "00002.png"):
        one, other = (np.asarray(Image.open(tmp_path / out / name)).astype(int) for out in ("a", "b"))
        assert np.abs(one - other).max() <= 1
    assert Image.open(tmp_path / "a" / "00001.png").info["model"] == sha256(model)


@needs_mnn
def test_parity_and_bench_take_it(ddpmx, model, tmp_path):
    done = ddpmx("parity", model, "--self-test", "--report", tmp_path / "r")
    assert done.code == 0, done
    assert "PASSED: consistent with itself" in done.out
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["mnn"]["sha256"] == sha256(model)
    assert report["mnn"]["source"] == "model.onnx"
    values = json.loads(ddpmx("bench", model, "--batch", "1,16", "--steps", 3, "--seconds", 0.1, "--json").out)
    assert values["file"]["kind"] == "mnn"
    assert [cell["batch"] for cell in values["cells"]] == [1, 16]
    assert values["cells"][1]["notes"] == ["in parts of 8", *values["cells"][1]["notes"][1:]]


def test_what_plans_take_is_refused(refused, onnx, tmp_path):
    for flags in ("--batch 1,2,4", "--level 3", "--tf32", "--target 8.6", "--refit", "--workspace 64"):
        error = refused("build", onnx, "--for", "mnn", *shlex.split(flags))
        assert error == (
            f"Error: {flags.split()[0]}: for plans of TensorRT only\nHint: leave it out, or leave out --for mnn\n"
        )
    assert "--for 'ncnn': not one of tensorrt and mnn" in refused("build", onnx, "--for", "ncnn")
    assert "--part is for MNN only" in refused("build", onnx, "--part", 2)
    assert "--low-memory is for MNN only" in refused("build", onnx, "--low-memory")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_info_needs_no_mnn(ddpmx, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "MNN", None)
    (tmp_path / "m.mnn").write_bytes(mnn_file())
    done = ddpmx("info", tmp_path / "m.mnn")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == f"{tmp_path / 'm.mnn'}: an MNN model, 0.6 kB"
    assert {"made with: MNN 3.6.1", "in a call: 4 images, at most", "memory: normal"} <= set(lines)
    (tmp_path / "other.mnn").write_bytes(network())
    assert "Note: the file does not say which diffusion model it is" in ddpmx("info", tmp_path / "other.mnn").out
    for arguments in (["generate"], ["parity", "--self-test"], ["bench"]):
        assert "MNN is not installed" in refused(*arguments, tmp_path / "m.mnn")
    assert "does not say which diffusion model" in refused("generate", tmp_path / "other.mnn")


def test_other_commands_refuse_it_by_its_kind(refused, onnx, tmp_path):
    (tmp_path / "m.mnn").write_bytes(mnn_file())
    assert "not an ONNX file" in refused("build", tmp_path / "m.mnn", "--for", "mnn", "-o", tmp_path / "x.mnn")
    assert "an MNN model, and not an ONNX file" in refused(
        "adopt", tmp_path / "m.mnn", "--like", onnx, "-o", tmp_path / "x.onnx"
    )
    assert "by MNN alone" in refused("generate", tmp_path / "m.mnn", "--provider", "cuda")
    assert "carries its own spec" in refused("generate", tmp_path / "m.mnn", "--spec", _spec(tmp_path))


def _spec(folder):
    from oracles import gaussian

    (folder / "spec.json").write_text(json.dumps(gaussian.SPEC.to_json()))
    return folder / "spec.json"
