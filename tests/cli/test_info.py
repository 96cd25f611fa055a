"""`ddpmx info`: what it shows of each kind of file, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpmx.formats.model_file import sha256
from oracles.conditioning import CLASSES, KINDS


def test_a_generated_png_says_what_drew_it(ddpmx, gaussian_onnx, tmp_path):
    ddpmx("generate", "--engine", gaussian_onnx, "-n", 2, "--first", 3, "--seed", 5, "--steps", 4, "--out", tmp_path)
    done = ddpmx("info", tmp_path / "00004.png")
    assert done.code == 0
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    wanted = {"image: 8×8", "seed: 5", "index: 4", "steps: 4", f"model: {sha256(gaussian_onnx)}", "precision: fp32"}
    assert wanted <= set(lines)
    values = json.loads(ddpmx("info", tmp_path / "00004.png", "--json").out)
    assert (values["kind"], values["size"], values["text"]["seed"]) == ("png", [8, 8], "5")


def test_a_png_of_another_program_is_only_a_png(ddpmx, refused, tmp_path):
    Image.new("L", (5, 3)).save(tmp_path / "a.png")
    assert "Note: it does not say that ddpmx has drawn it" in ddpmx("info", tmp_path / "a.png").out
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    assert "not a valid PNG" in refused("info", tmp_path / "a.png")


def test_an_onnx_file_is_described(ddpmx, gaussian_onnx):
    done = ddpmx("info", gaussian_onnx)
    assert done.code == 0
    for part in ("ONNX", "8×8", "T = 1000", "linear", "eps", "fp32", "opset"):
        assert part in done.out
    values = json.loads(ddpmx("info", gaussian_onnx, "--json").out)
    assert values["spec"]["shape"] == [3, 8, 8]
    assert values["inputs"] == {"x": "float32 ['batch', 3, 8, 8]", "t": "int32 ['batch']"}


def test_no_library_is_needed(gaussian_onnx):
    """Neither one that runs models nor one for a GPU."""
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "matplotlib"):
    sys.modules[name] = None
from ddpmx_cli.main import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code, "info", str(gaussian_onnx)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8×8" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(50), "neither"),
        (b"vtrt" + bytes(10), "not a valid TensorRT plan"),
        (b"\x08\x0a\x3a\xff", "not a valid ONNX"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "model").write_bytes(content)
    assert message in refused("info", tmp_path / "model")


def test_the_version_of_a_foreign_plan_is_shown(ddpmx, tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + bytes(100))
    done = ddpmx("info", tmp_path / "model.plan")
    assert done.code == 0
    assert "TensorRT 10.3.0.26" in done.out
    assert "does not say" in done.out


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_inputs_are_listed(ddpmx, conditioned_onnx, kind):
    out = " ".join(ddpmx("info", conditioned_onnx(kind)).out.split())
    assert (f"classes: {CLASSES}, 0…{CLASSES - 1}" in out) == (kind in ("classes", "all"))
    assert ("x̂_0 of the step before" in out) == (kind in ("itself", "all"))
    assert ("condition: 2 channels" in out) == (kind in ("condition", "all"))


def test_no_class_is_listed_with_the_classes(ddpmx, conditioned_onnx):
    out = " ".join(ddpmx("info", conditioned_onnx("classes", null_class=True)).out.split())
    assert f'classes: {CLASSES}, 0…{CLASSES - 1}; {CLASSES} is "no class" (guidance)' in out


def test_classes_are_listed_by_name(ddpmx, conditioned_onnx):
    names = tuple("abcde"[:CLASSES])
    out = " ".join(ddpmx("info", conditioned_onnx("classes", class_names=names)).out.split())
    assert f"classes: {CLASSES}: 0 a, 1 b, " in out


def test_an_array_of_betas_is_named(ddpmx, conditioned_onnx):
    betas = np.linspace(0.01, 0.3, 20)
    path = conditioned_onnx("itself", schedule="betas", betas=betas)
    assert "T = 20, an array of β (CRC " in ddpmx("info", path).out


def test_a_checkpoint_s_network_and_training_are_told(ddpmx, tmp_path):
    spec = {
        "model": {"shape": [1, 16, 16]},
        "network": {"type": "unet", "channels": 32, "multipliers": [1, 2], "classes": None},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    data = {"path": "/photos\x1b[31m", "images": 10000}
    train = {"batch": 64, "hflip": True}
    values = {"step": 1400, "settings": {"train": train, "loss": 0.0312, "data": data, "from": {"path": "/runs/a"}}}
    (tmp_path / "training.json").write_text(json.dumps(values))
    header = json.dumps({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    (tmp_path / "ema.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    lines = {" ".join(line.split()) for line in ddpmx("info", tmp_path).out.splitlines()}
    assert {
        "network: unet: channels 32; multipliers 1,2",
        "ema: 5 parameters",
        "trained: 1,400 steps of 64 images",
        "loss: 0.0312, a running mean",
        "data: 10,000 images of /photos\\x1b[31m, half of them mirrored",
        "begun with: the weights of /runs/a",
    } <= lines
