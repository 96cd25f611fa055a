"""`ddpmx denoise`, on a model that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx import load
from ddpmx.formats.png_text import read_png_text
from ddpmx.tasks.denoise import denoise


@pytest.fixture
def noisy(tmp_path):
    """A folder with three pictures of the model's size and a larger one."""
    folder, rng = tmp_path / "noisy", np.random.default_rng(0)
    folder.mkdir()
    for name, size in {"a": (8, 8), "b": (8, 8), "c": (8, 8), "large": (11, 19)}.items():
        picture = np.clip(127.5 + 40 * rng.standard_normal((*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("flags", [("--sigma", 20), ("--blind",), (), ("--sigma", 20, "--sample", "--seed", 3)])
def test_a_folder_is_denoised(ddpmx, gaussian_onnx, noisy, tmp_path, flags):
    out = tmp_path / "clean"
    done = ddpmx("denoise", gaussian_onnx, noisy, "-o", out, *flags)
    assert (done.code, done.err) == (0, ""), done
    assert names(out) == ["a.png", "b.png", "c.png", "large.png"]
    sigma = 20 if "--sigma" in flags else None
    with load(gaussian_onnx) as pipeline:
        for number, name in enumerate(names(out)):
            wanted = denoise(
                pipeline, pixels(noisy / name)[None], sigma, sample="--sample" in flags, seed=3, first=number
            )
            assert np.array_equal(pixels(out / name), wanted.pixels[0])
            text = read_png_text(out / name)[1]
            assert (text["task"], text["of"], text["t"]) == ("denoise", name, str(wanted.t[0]))
            assert float(text["sigma"]) == pytest.approx(wanted.sigma[0], rel=1e-3)
            assert ("seed" in text) == ("--sample" in flags)
            assert f"{name}: σ = {wanted.sigma[0]:.1f}" in done.out
    assert ("(measured)" in done.out) == (sigma is None)


def test_one_picture_and_what_is_there_already(ddpmx, refused, gaussian_onnx, noisy, tmp_path):
    common = ("denoise", gaussian_onnx, noisy / "a.png", "--sigma", 20, "-o")
    out = tmp_path / "new" / "clean.png"
    for _ in range(2):  # once more: what a task has written is replaced
        assert ddpmx(*common, out).code == 0
    assert "task:        denoise" in ddpmx("info", out).out
    assert ddpmx(*common, tmp_path / "folder").code == 0
    assert pixels(tmp_path / "folder" / "a.png").tolist() == pixels(out).tolist()
    before = (noisy / "b.png").read_bytes()
    assert "not a picture that a task of ddpmx has written" in refused(*common, noisy / "b.png")
    assert "it is made from this file" in refused(*common, noisy, "--overwrite")
    assert (noisy / "b.png").read_bytes() == before
    assert ddpmx(*common, noisy / "b.png", "--overwrite").code == 0


def test_refused_and_nothing_is_written(refused, gaussian_onnx, noisy, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "grey.png")
    out = tmp_path / "out"
    for arguments, message in (
        ((noisy, "-o", tmp_path / "x.png"), "there are 4 pictures to write"),
        ((noisy / "a.png", "-o", tmp_path / "x.jpg"), "written as PNG"),
        ((tmp_path / "nothing.png", "-o", out), "no such file"),
        ((gaussian_onnx, "-o", out), "no picture that Pillow can read"),
        ((tmp_path / "grey.png", "-o", out), "it is grey, and the model's images are of colour"),
        ((noisy, "-o", out, "--sigma", 20, "--blind"), "--sigma and --blind exclude each other"),
        ((noisy, "-o", out, "--sigma", -1), "must be 0 or more"),
        ((noisy, "-o", out, "--sigma", 1e6), "knows no image with so much noise"),
        ((noisy, "-o", out, "--overlap", 8), "overlap must be from 0 to 7 pixels"),
        ((noisy, "-o", out, "--label", 1), "the model has no classes"),
        ((noisy, "-o", out, "--seed", -1), "the seed must be"),
        ((noisy,), "Missing option"),
    ):
        assert message in refused("denoise", gaussian_onnx, *arguments)
    assert names(tmp_path) == ["grey.png", "noisy"]
    assert names(noisy) == ["a.png", "b.png", "c.png", "large.png"]
