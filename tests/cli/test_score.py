"""`ddpmx score`, on a model that is known in closed form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ddpmx import load
from ddpmx.formats.noise_file import Noise
from ddpmx.formats.png_text import read_png_text
from ddpmx.tasks import flow, score
from ddpmx.tasks.invert import invert
from oracles import gaussian


@pytest.fixture
def photos(tmp_path):
    """Two pictures that the model may have drawn."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a", "b"):
        x = gaussian.MU + gaussian.S * rng.standard_normal(gaussian.SHAPE)
        Image.fromarray(np.floor(127.5 * x.transpose(1, 2, 0) + 128).clip(0, 255).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_images_are_drawn_by_the_sde(ddpmx, gaussian_onnx, tmp_path):
    common = ("score", "draw", gaussian_onnx, "--steps", 20, "--seed", 3)
    assert ddpmx(*common, "-n", 3, "-o", tmp_path / "sde").code == 0
    done = ddpmx(*common, "-n", 2, "--first", 4, "--corrections", 2, "-o", tmp_path / "pc")
    assert (done.code, "2 images by pc in" in done.out) == (0, True), done
    with load(gaussian_onnx) as pipeline:
        np.testing.assert_array_equal(pixels(tmp_path / "sde"), score.sde(pipeline, 3, steps=20, seed=3))
        wanted = score.sde(pipeline, 2, first=4, steps=20, corrections=2, seed=3)
        np.testing.assert_array_equal(pixels(tmp_path / "pc"), wanted)
    text = read_png_text(tmp_path / "pc" / "00005.png")[1]
    assert (text["task"], text["seed"], text["index"]) == ("score draw, pc", "3", "5")
    assert (text["steps"], text["corrections"], text["ratio"], text["precision"]) == ("20", "2", "0.16", "fp32")


def test_arrays_of_others_stay(ddpmx, refused, gaussian_onnx, photos, tmp_path):
    mine, noise = tmp_path / "mine.npz", tmp_path / "noise.npz"
    np.savez(mine, images=np.zeros(3))
    before = mine.read_bytes()
    common = ("score", "encode", gaussian_onnx, photos, "--ddim", 4, "-o")
    assert "not the noise of images" in refused(*common, mine)
    assert mine.read_bytes() == before
    assert [ddpmx(*common, noise).code for _ in range(2)] == [0, 0]  # its own it replaces
    said = ddpmx("info", noise).out
    assert "2 images of 8×8, 3 channels, by ddim of 4 steps, linspace spacing" in said
    assert "a.png, b.png" in said


def test_images_are_drawn_by_the_ode(ddpmx, gaussian_onnx, tmp_path):
    pytest.importorskip("scipy", reason="not verified here: the probability-flow ODE (no scipy)")
    common = ("score", "draw", gaussian_onnx, "--ode", "--tolerance", "1e-3")
    assert ddpmx(*common, "-n", 1, "--seed", 3, "-o", tmp_path / "x.png").code == 0
    with load(gaussian_onnx) as pipeline:
        wanted = flow.sample(pipeline, 1, seed=3, tolerance=1e-3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), wanted[0])


def test_pictures_become_noise_and_come_back(ddpmx, refused, gaussian_onnx, photos, tmp_path):
    pytest.importorskip("scipy", reason="not verified here: the probability-flow ODE (no scipy)")
    noise = tmp_path / "noise.npz"
    for way, most in (((), 2), (("--ddim", 30, "--iterations", 30), 1)):
        assert ddpmx("score", "encode", gaussian_onnx, photos, "-o", noise, *way).code == 0
        assert Noise.load(noise).names == ("a.png", "b.png")
        done = ddpmx("score", "decode", gaussian_onnx, noise, "-o", tmp_path / "again")
        assert (done.code, f"by {'ddim' if way else 'ode'} in" in done.out) == (0, True), done
        assert np.abs(pixels(tmp_path / "again").astype(int) - pixels(photos)).max() <= most
    with load(gaussian_onnx) as pipeline:
        wanted = invert(pipeline, pixels(photos), steps=30, iterations=30)
    np.testing.assert_array_equal(Noise.load(noise).x, wanted)
    other = tmp_path / "other.npz"
    read = Noise.load(noise)
    Noise(read.x, read.names, "0" * 64, "ddim", 30, "linspace").save(other)
    assert "is of another model" in refused("score", "decode", gaussian_onnx, other, "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_log_p_is_estimated(ddpmx, refused, gaussian_onnx, photos):
    pytest.importorskip("scipy", reason="not verified here: the probability-flow ODE (no scipy)")
    pytest.importorskip("torch", reason="not verified here: images as training reads them (no torch)")
    done = ddpmx("score", "nll", gaussian_onnx, photos, "--json", "--tolerance", "1e-3", "--seed", 2)
    values = json.loads(done.out)
    with load(gaussian_onnx) as pipeline:
        wanted = flow.encode(pipeline, pixels(photos), likelihood=True, tolerance=1e-3, seed=2).bits_per_dim
    assert values["images"] == pytest.approx(wanted.tolist())
    assert values["standard_error"] == pytest.approx(np.std(wanted, ddof=1) / np.sqrt(2))
    said = ddpmx("score", "nll", gaussian_onnx, photos, "--images", 1, "--tolerance", "1e-2").out
    assert "1 of 2 images" in said
    assert "±" not in said
    assert "nowhere" in refused("score", "nll", gaussian_onnx, "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("draw", "--ode", "--steps", 5, "-o", "x"), "--steps and --corrections are of the SDE"),
        (("draw", "--corrections", -1, "-o", "x"), "corrections must be"),
        (("draw", "--steps", 0, "-o", "x"), "steps must be"),
        (("draw", "-n", 2, "-o", "x.png"), "x.png is one file"),
        (("draw", "--label", "cat", "-o", "x"), "no classes"),
        (("encode", "photos", "-o", "noise.png"), "noise"),
        (("encode", "photos", "-o", "x.npz", "--ddim", 0), "steps must be"),
        (("encode", "photos", "-o", "x.npz", "--ddim", 5, "--spacing", "even"), "no spacing"),
        (("encode", "photos", "-o", "x.npz", "--tolerance", 5), "tolerance must be"),
        (("encode", "nowhere", "-o", "x.npz"), "nowhere"),
        (("decode", "photos/a.png", "-o", "x"), "a.png"),
    ],
)
def test_wrong_input_is_one_clear_error(refused, gaussian_onnx, photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert message in refused("score", arguments[0], gaussian_onnx, *arguments[1:])
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
