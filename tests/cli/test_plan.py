"""The command line with a plan, on a fake TensorRT and a fake driver that runs the real kernels on the host."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ddpmx.diffusion.samplers import make_table
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles.cuda_on_host import Toy
from oracles.plans import SPEC

STEPS = 4


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ddpmx"


def expected(n, seed):
    table = make_table(SPEC.make_schedule(), SPEC.prediction, SPEC.variance, steps=STEPS)
    drawn = np.arange(n)
    *_, step = chain.run(
        Toy(SPEC.shape), table, chain.initial(seed, drawn, SPEC.shape), seed=seed, images=drawn, clip=SPEC.clip
    )
    return to_nhwc(step.x0)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["auto", "while", "graph", "plain"])
def test_generate(ddpmx, plan, fake_tensorrt, tmp_path, cache, executor):
    out = tmp_path / "samples"
    done = ddpmx("generate", "--engine", plan, "-n", 3, "--seed", 7, "--steps", STEPS, "--out", out, "--grid",
                 "--sampler", "ancestral", "--executor", executor)  # fmt: skip
    assert done.code == 0, done.err
    got = np.stack([np.asarray(Image.open(out / f"0000{i}.png")) for i in range(3)])
    assert got.tobytes() == expected(3, 7).tobytes()
    name = "while" if executor == "auto" else executor
    assert f"on TensorRT-RTX 1.7.1.116 on NVIDIA RTX 4090, SM 8.9, executor {name}" in done.out
    assert [file.suffix for file in cache.iterdir()] == [".runtime"]  # the kernels that TensorRT-RTX compiled


def test_generate_with_an_animation(ddpmx, plan, fake_tensorrt, tmp_path):
    done = ddpmx("generate", "--engine", plan, "-n", 2, "--steps", STEPS, "--out", tmp_path / "s", "--animate")
    assert done.code == 0, done.err
    assert (tmp_path / "s" / "x0.gif").stat().st_size > 0


def test_parity(ddpmx, plan, fake_tensorrt, tmp_path):
    done = ddpmx("parity", plan, "--self-test", "--report", tmp_path / "report")
    assert done.code == 0, done.err
    for executor in ("plain", "graph", "while"):
        assert f"✓ executor {executor} against the chain in NumPy" in done.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["engine"]["flavour"] == "TensorRT-RTX"
    assert len(report["engine"]["sha256"]) == 64
    assert "TF32 off" in (tmp_path / "report" / "report.md").read_text()


def test_an_executor_with_wrong_pixels_fails_parity(ddpmx, plan, fake_tensorrt, tmp_path, monkeypatch):
    from ddpmx.cuda.device_chain import DeviceChain

    run = DeviceChain.run
    monkeypatch.setattr(DeviceChain, "run", lambda self, **arguments: run(self, **arguments) + np.uint8(1))
    done = ddpmx("parity", plan, "--self-test", "--report", tmp_path / "report")
    assert done.code == 1
    assert "FAILED" in done.err


def test_an_unknown_executor(refused, plan, fake_tensorrt, gaussian_onnx):
    assert "auto, while, graph, plain" in refused("generate", "--engine", plan, "--executor", "fast")
    assert "runs a chain on a GPU" in refused("generate", "--engine", gaussian_onnx, "--executor", "while")


def test_a_refusal_of_tensorrt_is_reported(refused, plan, fake_tensorrt, tmp_path):
    fake_tensorrt.refuse = {"execute"}
    error = refused("generate", "--engine", plan, "-n", 1, "--out", tmp_path / "s")
    assert "refuses to run the network" in error
    assert "[execute] refused" in error
