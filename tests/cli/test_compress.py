"""`ddpmx compress` and `ddpmx decompress`, on a model that is known in closed form."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import FASHION
from ddpmx.formats import compressed
from ddpmx.formats.png_text import read_png_text
from oracles.gaussian import MU, S

QUICK = ("--steps", 6, "--book", 9)


@pytest.fixture
def photos(tmp_path):
    """A folder with three pictures of the model's kind."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name in "abc":
        x = (MU + S * rng.standard_normal(MU.shape)).transpose(1, 2, 0)
        Image.fromarray(np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_there_and_back(ddpmx, refused, gaussian_onnx, photos, tmp_path):
    file, out = tmp_path / "x.ddpm", tmp_path / "out"
    done = ddpmx("compress", photos, "-o", file, "--model", gaussian_onnx, "--stop", 80, *QUICK)
    assert (done.code, done.err) == (0, ""), done
    assert f"{file.stat().st_size} bytes" in done.out
    done = ddpmx("decompress", file, "-o", out, "--model", gaussian_onnx)
    assert (done.code, done.err) == (0, ""), done
    assert names(out) == ["00000.png", "00001.png", "00002.png"]
    errors = [pixels(out / f"0000{i}.png") - pixels(photos / f"{name}.png") for i, name in enumerate("abc")]
    assert np.sqrt(np.mean(np.square(errors))) < 127.5 * S  # better than the mean of all images
    assert read_png_text(out / "00001.png")[1]["task"] == "decompress"
    about = ddpmx("info", file).out
    assert "compressed images" in about
    assert "3 of 8×8, 3 channels, lossy" in about
    assert json.loads(ddpmx("info", file, "--json").out)["stop"] == 80
    assert ddpmx("compress", photos, "-o", file, "--model", gaussian_onnx, "--stop", 300, *QUICK).code == 0  # replaced
    assert "no such file" in refused("decompress", tmp_path / "none", "-o", out, "--model", gaussian_onnx).lower()


def test_lossless_and_a_beginning(ddpmx, gaussian_onnx, photos, tmp_path):
    file = tmp_path / "x.ddpm"
    common = ("--model", gaussian_onnx)
    assert ddpmx("compress", photos / "b.png", "-o", file, *common, "--lossless", *QUICK).code == 0
    assert ddpmx("decompress", file, "-o", tmp_path / "b.png", *common).code == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(photos / "b.png"))
    file.write_bytes(file.read_bytes()[:-5])
    done = ddpmx("decompress", file, "-o", tmp_path / "c.png", *common)
    assert done.code == 0
    assert "the file is the beginning of one" in done.out
    assert "the beginning of a file: it decodes to coarser images" in ddpmx("info", file).out
    cut = tmp_path / "cut.ddpm"
    said = []
    for length in range(100, 60, -1):  # the header's end is among them
        cut.write_bytes(file.read_bytes()[:length])
        said.append(ddpmx("info", cut).out)
    assert any("the beginning of a file: nothing of it decodes" in text for text in said)


def test_refused_and_nothing_is_written(refused, gaussian_onnx, photos, tmp_path):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "mine.txt").write_text("mine")
    out, model = tmp_path / "x.ddpm", ("--model", gaussian_onnx)
    for arguments, message in (
        ((photos, "-o", out), "Missing option"),
        ((tmp_path / "large.png", "-o", out, *model), "it is 9×8 (height×width), and the model takes 8×8"),
        ((photos, "-o", tmp_path / "mine.txt", *model), "not compressed images of ddpmx"),
        ((photos, "-o", out, *model, "--rate", 1, "--rmse", 2), "exclude each other"),
        ((photos, "-o", out, *model, "--rate", -1), "rate must be a finite number above 0"),
        ((photos, "-o", out, *model, "--rmse", "inf"), "rmse must be a finite number above 0, not inf"),
        ((photos, "-o", out, *model, "--stop", 5000), "stop must be from 0 to"),
    ):
        assert message in refused("compress", *arguments)
    (tmp_path / "y.ddpm").write_bytes(compressed.MAGIC + bytes(40))
    for name, message in (("y.ddpm", "damaged"), ("mine.txt", "not compressed images")):
        assert message in refused("decompress", tmp_path / name, "-o", tmp_path / "out", *model)
    assert names(tmp_path) == ["large.png", "mine.txt", "photos", "y.ddpm"]


def test_hostile_files_are_refused_and_nothing_is_written(ddpmx, refused, gaussian_onnx, photos, tmp_path):
    file, out, model = tmp_path / "x.ddpm", tmp_path / "out", ("--model", gaussian_onnx)
    assert ddpmx("compress", photos, "-o", file, *model, "--stop", 300, *QUICK).code == 0
    good = file.read_bytes()
    header, begin = compressed.parse(good).header, 16 + int.from_bytes(good[8:12], "little")
    rest = good[begin:]
    for data, message in (
        (good[:begin], f"{file}: ends before its first section"),
        (good[: begin + 9], f"{file}: ends before its first section"),
        (good.replace(b"DDPMXC2", b"DDPMXC1"), f"{file}: compressed images of format 1"),
        (good[: begin - 1], "ends within its header"),
        (good[:-1] + bytes([good[-1] ^ 1]), "has the wrong CRC"),
        (compressed.write_header(replace(header, n=1 << 19, group=1)) + rest, "too few for 524288 images"),
        (compressed.write_header(replace(header, n=1 << 30, group=1)) + rest, "images: 1073741824, and not from"),
        (compressed.write_header(replace(header, weights="ab" * 16)) + rest, f"{file}: compressed by another model"),
        (compressed.write_header(replace(header, shape=(3, 8, 9))) + rest, "compressed by another model"),
        (
            compressed.write_header(replace(header, labels=(1, 2, 3))) + rest,
            f"{file}: it has labels that the model does not",
        ),
        (
            compressed.write_header(replace(header, errors=(255,) * len(header.errors))) + rest,
            f"{file}: the compressed numbers end too early, or are damaged",
        ),
    ):
        file.write_bytes(data)
        assert message in refused("decompress", file, "-o", out, *model)
        assert names(tmp_path) == ["photos", "x.ddpm"]
    file.write_bytes(good)
    (tmp_path / "afile").write_text("mine")
    for place in ("afile", "afile/one"):
        words = refused("decompress", file, "-o", tmp_path / place, *model)
        assert f"{tmp_path / 'afile'}: is a file, and a folder is needed to write to" in words
    assert (tmp_path / "afile").read_text() == "mine"


def test_a_model_in_half_is_computed_in_float32(ddpmx, tmp_path):
    pytest.importorskip("onnxruntime", reason="not verified here: a model in half (no onnxruntime)")
    image = np.load(FASHION)["images"][0]
    Image.fromarray(image).save(tmp_path / "a.png")
    file, common = tmp_path / "x.ddpm", ("--model", "garments")
    done = ddpmx("compress", tmp_path / "a.png", "-o", file, *common, "--lossless", "--stop", 300, *QUICK)
    assert "CPUExecutionProvider, in float32" in done.out, done
    assert ", fp16, computed in fp32" in ddpmx("info", file).out
    about = json.loads(ddpmx("info", file, "--json").out)
    assert (about["precision"], about["arithmetic"]) == ("fp16", "fp32")
    assert ddpmx("decompress", file, "-o", tmp_path / "b.png", *common).code == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), image)
