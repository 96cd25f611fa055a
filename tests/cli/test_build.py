"""Plans on the command line: built by `ddpmx build`, and refused by `ddpmx generate` if they cannot run."""

from __future__ import annotations

import shutil

import pytest

from ddpmx.backends import trt
from ddpmx.device.discovery import Gpus
from ddpmx.formats import plan_file
from oracles.plans import make_plan


def test_generate_names_the_onnx_file_to_use_instead_of_a_plan(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(trt, "gpus", lambda: Gpus(trouble="there is no NVIDIA driver"))
    (tmp_path / "model.plan").write_bytes(make_plan())
    error = refused("generate", "--engine", tmp_path / "model.plan", "--out", tmp_path / "out")
    for part in ("there is none here", "TensorRT-RTX 1.7.1.116", "model.onnx in its place"):
        assert part in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "not a valid TensorRT plan"),
        (lambda data: data.replace(b"timesteps", b"timestep_"), "damaged"),
        (lambda data: data.replace(b"ddpmx1 ", b"xxxxxx ").replace(b"engine1 ", b"xxxxxxx "), "does not say"),
    ],
)
def test_generate_refuses_a_damaged_plan(refused, tmp_path, damage, message):
    (tmp_path / "model.plan").write_bytes(damage(make_plan()))
    assert message in refused("generate", "--engine", tmp_path / "model.plan", "--out", tmp_path / "out")


def test_build_builds_and_then_reuses(ddpmx, tmp_path, gaussian_onnx):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: `ddpmx build` (no TensorRT-RTX)")
    path = tmp_path / "model.onnx"
    shutil.copy(gaussian_onnx, path)
    command = ("build", path, "--library", "tensorrt-rtx", "--batch", "1,2,4", "--timing-cache", tmp_path / "cache")
    done = ddpmx(*command)
    assert done.code == 0, done.err
    for part in ("TensorRT-RTX", "SM 8.0+", "batch 1…4", "precision: "):
        assert part in done.out
    assert plan_file.read_plan(tmp_path / "model.plan").engine.batch == (1, 2, 4)
    assert "is up to date" in ddpmx(*command).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,2"), "three numbers"),
        (("--batch", "4,2,1"), "ascending"),
        (("--batch", "0,1,2"), "ascending"),
        (("--batch", "a,b,c"), "--batch"),
        (("--target", "sm86"), "compute capability"),
        (("--level", "6"), "level"),
        (("--workspace", "0"), "workspace"),
        (("--library", "cudnn"), "--library"),
    ],
)
def test_build_refuses_bad_flags(refused, tmp_path, gaussian_onnx, arguments, message):
    assert message in refused("build", gaussian_onnx, "-o", tmp_path / "model.plan", *arguments)
    assert list(tmp_path.iterdir()) == []
