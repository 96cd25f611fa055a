"""Compressed on x86-64 and decompressed on aarch64, in an emulator, and the other way round."""

from __future__ import annotations

import platform

import numpy as np
import pytest

import ddpmx
from conftest import TESTS
from ddpmx.tasks.codec import compress, decompress
from oracles.aarch64 import Python, Unavailable

NOT_VERIFIED = "not verified here: compressed files on aarch64 ({})"
onnxruntime = pytest.importorskip("onnxruntime", reason=NOT_VERIFIED.format("no onnxruntime"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        platform.machine() != "x86_64",
        reason=NOT_VERIFIED.format(f"by an emulator: this is {platform.machine()}, and the other tests ran on it"),
    ),
]


@pytest.fixture(scope="module")
def aarch64() -> Python:
    try:
        return Python(f"numpy=={np.__version__}", f"onnxruntime=={onnxruntime.__version__}")
    except Unavailable as why:
        pytest.skip(NOT_VERIFIED.format(why))


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """A trained network."""
    pytest.importorskip("torch", reason=NOT_VERIFIED.format("no torch"))
    from ddpm_export.graph.onnx_export import export_network
    from oracles.tiny import train

    folder = tmp_path_factory.mktemp("tiny")
    module, spec = train(folder)
    export_network(module, spec, folder / "fp32.onnx")
    images = np.load(folder / "images.npz")["images"][:6]
    return folder / "fp32.onnx", images.reshape(6, 8, 8, 1)


def on_aarch64(aarch64, model, folder, *jobs):
    said = aarch64(TESTS / "oracles" / "codec_jobs.py", str(model), str(folder), *jobs, cpu="cortex-a76")
    assert said.startswith("aarch64 ")


@pytest.mark.torch
def test_files_are_the_same_images(aarch64, fp32, tmp_path, figure):
    model, images = fp32
    np.save(tmp_path / "images.npy", images)
    with ddpmx.load(model, threads=1) as pipeline:
        there = compress(pipeline, images, rate=1, book=10, steps=12)
        (tmp_path / "there.ddpm").write_bytes(there.data)
        (tmp_path / "lossless.ddpm").write_bytes(compress(pipeline, images, lossless=True, book=10, steps=12).data)
        on_aarch64(aarch64, model, tmp_path, "there", "lossless", "here")
        back = decompress(pipeline, (tmp_path / "here.ddpm").read_bytes())
    for what, a, b in (
        ("decoded on aarch64", np.load(tmp_path / "there.npy"), there.pixels),
        ("coded on aarch64", np.load(tmp_path / "here.npy"), back.pixels),
    ):
        figure(f"levels that are the same, {what}", float((a == b).mean()), at_least=0.999)
    assert np.array_equal(np.load(tmp_path / "lossless.npy"), images)


def test_of_an_fp16_model_they_are_nearly_the_same(aarch64, tmp_path, figure):
    """Which ONNX Runtime computes in half on that processor, and in float32 on x86-64."""
    file = TESTS.parent / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"
    images = np.load(file)["images"][:2, ..., None]
    with ddpmx.load("garments", threads=1) as pipeline:
        there = compress(pipeline, images, rate=0.5, book=10, steps=5)
    (tmp_path / "there.ddpm").write_bytes(there.data)
    on_aarch64(aarch64, "garments", tmp_path, "there")
    apart = np.abs(np.load(tmp_path / "there.npy").astype(int) - there.pixels)
    figure("levels that are the same, in half", float((apart == 0).mean()), at_least=0.8)
    figure("levels by which they differ, in half", int(apart.max()), at_most=2)
