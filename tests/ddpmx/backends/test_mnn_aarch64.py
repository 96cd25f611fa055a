"""MNN's backend on aarch64, in an emulator: float32 as on x86-64, and half on processors that can compute in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddpmx
from conftest import TESTS
from ddpmx.backends.base import Buffers
from ddpmx.backends.open import open_model
from ddpmx.errors import BackendError
from ddpmx.mnn import library
from ddpmx.mnn.build import build
from ddpmx.models import shipped
from ddpmx.parity.check import BOUNDS
from oracles import parity
from oracles.aarch64 import Python, Unavailable

NOT_VERIFIED = "not verified here: MNN on aarch64 ({})"
pytest.importorskip("onnxruntime", reason=NOT_VERIFIED.format("no onnxruntime to compare it with"))
try:
    library.load()
except BackendError as why:
    pytest.skip(NOT_VERIFIED.format(why.fact), allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64",
        reason=NOT_VERIFIED.format(f"by an emulator: this is {platform.machine()}, and the other tests ran on it"),
    ),
]

JOBS = TESTS / "oracles" / "mnn_jobs.py"
WITH_HALF, WITHOUT = "cortex-a76", "cortex-a72"  # as in a Raspberry Pi 5, and in a Raspberry Pi 4
IN_HALF, IN_FLOAT32 = (f"MNN {library.load().version()}, CPU{half}, 1 thread" for half in (" in half", ""))


@pytest.fixture(scope="module")
def aarch64() -> Python:
    version = ".".join(str(library.load().version()).split(".")[:3])
    try:
        return Python(f"MNN=={version}", f"numpy=={np.__version__}")
    except Unavailable as why:
        pytest.skip(NOT_VERIFIED.format(why))


def run(aarch64: Python, cpu: str, *jobs: Sequence[Any]) -> list[Any]:
    """The results of the jobs, functions of ``oracles/mnn_jobs.py``."""
    results: list[Any] = json.loads(aarch64(JOBS, json.dumps(jobs, default=str), cpu=cpu))
    return results


def hold(ladder: dict[str, Any], what: str, figure: Any, *, checks: int) -> None:
    """The ladder's figures against their bounds."""
    assert ladder["machine"] == "aarch64"
    assert len(ladder["checks"]) == checks
    for name, value, bound, at_least in ladder["checks"]:
        figure(f"MNN on aarch64, {what}: {name}", value, **{"at_least" if at_least else "at_most": bound})


def save_inputs(path: Path, x: np.ndarray, t: Sequence[int]) -> Path:
    np.savez(path, x=x, t=np.array(t, np.int32))
    return path


def by_onnx_runtime(model: Path | str, x: np.ndarray, t: Any) -> np.ndarray:
    spec, backend = open_model(model, threads=1)
    buffers = Buffers.of(len(x), spec.shape)
    buffers.x[...], buffers.t[...] = x, t
    backend.bind(buffers)
    backend.enqueue()
    backend.close()
    return buffers.out


def error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def apart(images: Path, model: Path) -> np.ndarray:
    """By how many levels the pixels of ``images`` differ from ONNX Runtime's."""
    with ddpmx.load(model, threads=1) as pipeline:
        expected = pipeline.generate(6, seed=5, sampler="ddim", steps=4)
    assert expected.std() > 10, "images, not a flat grey"
    return np.abs(np.load(images) - expected.astype(int))


@pytest.mark.long
def test_float32_and_half(aarch64, gaussian_onnx, tmp_path, figure):
    """A closed form in fp32, by the ladder and a chain, and the garments' trained U-Net in half; all in one process."""
    exact, record, garments = (tmp_path / name for name in ("gaussian.mnn", "gaussian.parity.npz", "garments.mnn"))
    build(gaussian_onnx, exact, part=2)
    build(shipped.find("garments"), garments, part=1)
    parity.make_reference().save(record)
    x, t = noise(1, 1, 16, 16), [500]
    inputs = save_inputs(tmp_path / "inputs.npz", x, t)
    ladder, same, description = run(
        aarch64,
        WITH_HALF,
        ("ladder", exact, record),
        ("images", exact, tmp_path / "images.npy"),
        ("outputs", garments, inputs, tmp_path / "out.npy"),
    )
    hold(ladder, exact.stem, figure, checks=10)
    assert ladder["backend"] == IN_FLOAT32, "a file in fp32 is never computed in half"
    assert same == {"threads": True, "parts": True}
    assert apart(tmp_path / "images.npy", gaussian_onnx).max() <= 1
    assert description == IN_HALF
    off = error(np.load(tmp_path / "out.npy"), by_onnx_runtime("garments", x, t))
    figure("MNN on aarch64, garments in half: relative error of ε", off, at_most=BOUNDS["fp16"].eps)
    assert off > 5e-4, "it was computed in half indeed"  # in float32 it is 8e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a trained network's files in fp32 and fp16, for MNN, and the record of PyTorch's outputs."""
    pytest.importorskip("torch", reason=NOT_VERIFIED.format("a trained network: no torch"))
    from ddpm_export.graph.onnx_export import export_network
    from ddpm_export.proof.record import record
    from oracles.tiny import train

    folder = tmp_path_factory.mktemp("tiny")
    module, spec = train(folder)
    record(module, spec, steps=20).save(folder / "tiny.parity.npz")
    export_network(module, spec, folder / "fp32.onnx")
    export_network(module, spec, folder / "fp16.onnx", precision="fp16")
    for precision in ("fp32", "fp16"):
        build(folder / f"{precision}.onnx")
    return folder


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize(("precision", "cpu"), [("fp32", WITH_HALF), ("fp16", WITHOUT), ("fp16", WITH_HALF)])
def test_a_trained_network(aarch64, tiny, figure, precision, cpu):
    model, half = tiny / f"{precision}.mnn", (precision, cpu) == ("fp16", WITH_HALF)
    what = f"trained, {precision}{' in half' if half else ''}"
    images = tiny / f"{precision}-{cpu}.npy"
    ladder, same = run(aarch64, cpu, ("ladder", model, tiny / "tiny.parity.npz"), ("images", model, images))
    hold(ladder, what, figure, checks=11)  # and the light judge of its images
    assert ladder["backend"] == (IN_HALF if half else IN_FLOAT32)
    assert (ladder["eps"] > BOUNDS["fp32"].eps) == (precision == "fp16"), "the weights are in half"
    assert (ladder["eps"] > 1e-3) == half, "it was computed in half, or was not"
    assert same == {"threads": True, "parts": True}
    levels = float(np.sqrt(np.mean(apart(images, model.with_suffix(".onnx")) ** 2.0)))
    figure(f"MNN on aarch64, {what}: four steps of DDIM, RMS of the pixels in levels", levels, at_most=1)


@pytest.mark.long
@pytest.mark.torch
def test_what_half_costs(aarch64, tmp_path, figure):
    """With random weights: what large tiles cost, and, at large t, the sines of the time embedding."""
    import torch

    from ddpm_export.graph.onnx_export import export_network
    from ddpm_export.networks.unet import UNet, UNetConfig
    from ddpmx.formats.spec import ModelSpec
    from oracles.random_weights import rerandomise

    torch.manual_seed(0)
    network = UNet(UNetConfig(1, 1, (8, 8), 32, (1, 2), 1, (4,), 0.0, 8)).eval().requires_grad_(False)
    rerandomise(network, 0)
    spec = ModelSpec((1, 8, 8))
    export_network(network, spec, tmp_path / "fp32.onnx")
    for name, time_table in (("sines", False), ("table", True)):
        export_network(network, spec, tmp_path / f"{name}.onnx", precision="fp16", time_table=time_table)
        build(tmp_path / f"{name}.onnx", part=4)
    x, t = noise(4, 1, 8, 8), [10, 10, 999, 999]
    inputs = save_inputs(tmp_path / "inputs.npz", x, t)
    wanted = {"sines": ("sines",), "table": ("table",), "large tiles": ("table", 3)}
    jobs = [
        ("outputs", tmp_path / f"{name}.mnn", inputs, tmp_path / f"{key}.npy", *level)
        for key, (name, *level) in wanted.items()
    ]
    assert run(aarch64, WITH_HALF, *jobs) == [IN_HALF] * 3
    expected = by_onnx_runtime(tmp_path / "fp32.onnx", x, t)
    out = {key: np.load(tmp_path / f"{key}.npy") for key in wanted}
    early, late = ({key: error(out[key][i], expected[i]) for key in out} for i in (slice(0, 2), slice(2, 4)))
    what = "MNN on aarch64, random weights in half"
    figure(f"{what}, relative error of ε, with a time table", max(early["table"], late["table"]), at_most=1e-2)
    figure(
        f"{what}, at t = 999: the error with sines by that with a table", late["sines"] / late["table"], at_least=1.5
    )
    assert early["sines"] < 1.3 * early["table"], "at small t they are equally good"
    figure(
        f"{what}: the error with large tiles by that with small ones",
        early["large tiles"] / early["table"],
        at_least=1.5,
    )
