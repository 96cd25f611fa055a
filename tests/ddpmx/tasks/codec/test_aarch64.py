"""Compressed on x86-64 and decompressed on aarch64, in an emulator, and the other way round."""

from __future__ import annotations

import platform

import numpy as np
import pytest

import ddpmx
from conftest import FASHION, TESTS
from ddpmx.errors import BackendError
from ddpmx.models import shipped
from ddpmx.tasks.codec import compress, decompress
from oracles.aarch64 import Python, Unavailable
from oracles.codec_jobs import save_eps

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


@pytest.fixture
def garments(tmp_path):
    """A folder with two garments in ``images.npy``, and the two."""
    images = np.load(FASHION)["images"][:2, ..., None]
    np.save(tmp_path / "images.npy", images)
    return tmp_path, images


def check_both_ways(figure, folder, images, there, pipeline, what):
    back = decompress(pipeline, (folder / "here.ddpm").read_bytes())
    for way, a, b in (
        ("decoded on aarch64", np.load(folder / "there.npy"), there.pixels),
        ("coded on aarch64", np.load(folder / "here.npy"), back.pixels),
    ):
        figure(f"levels that are the same, {what}, {way}", float((a == b).mean()), at_least=0.999)
    assert np.array_equal(np.load(folder / "lossless.npy"), images)


def test_of_an_fp16_model_too(aarch64, garments, figure):
    """ONNX Runtime would compute it in half on that processor, and mostly in float32 on x86-64."""
    folder, images = garments
    with ddpmx.load("garments", threads=1) as pipeline:
        there = compress(pipeline, images, rate=0.5, book=10, steps=5)
        (folder / "there.ddpm").write_bytes(there.data)
        exact = compress(pipeline, images, lossless=True, book=10, steps=5)
        (folder / "lossless.ddpm").write_bytes(exact.data)
        on_aarch64(aarch64, "garments", folder, "there", "lossless", "here", "eps")
        check_both_ways(figure, folder, images, there, pipeline, "fp16")
        eps = dict(np.load(folder / "eps.npz"))
        save_eps(pipeline, folder)
    here = np.load(folder / "eps.npz")["float32"]
    figure("ε in float32 on aarch64, fp16: relative error", error(eps["float32"], here), at_most=2e-6)
    assert error(eps["as_it_is"], here) > 2e-4, "control: as it is, the file is computed in half there"


def error(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def test_of_an_fp16_model_by_mnn(garments, figure, tmp_path_factory):
    """On a processor where MNN would compute it in half. The coder here is ONNX Runtime: the libraries agree, too."""
    from ddpmx.mnn import library
    from ddpmx.mnn.build import build

    try:
        version = ".".join(str(library.load().version()).split(".")[:3])
        aarch64 = Python(f"MNN=={version}", f"numpy=={np.__version__}")
    except (BackendError, Unavailable) as why:
        pytest.skip(NOT_VERIFIED.format(why))
    folder, images = garments
    model = tmp_path_factory.mktemp("mnn") / "garments.mnn"
    build(shipped.find("garments"), model, part=1)
    with ddpmx.load("garments", threads=1) as pipeline:
        there = compress(pipeline, images, rate=0.5, book=10, steps=5)
        (folder / "there.ddpm").write_bytes(there.data)
        exact = compress(pipeline, images, lossless=True, book=10, steps=5)
        (folder / "lossless.ddpm").write_bytes(exact.data)
        on_aarch64(aarch64, model, folder, "there", "lossless", "here", "eps")
        check_both_ways(figure, folder, images, there, pipeline, "fp16 by MNN")
    eps = np.load(folder / "eps.npz")
    assert error(eps["as_it_is"], eps["float32"]) > 2e-4, "control: as it is, the file is computed in half there"
