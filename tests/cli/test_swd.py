"""`ddpmx eval swd`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ddpmx.images.swd import sliced_wasserstein

RNG = np.random.default_rng(0)
SAMPLES, REAL = (RNG.integers(0, 256, (n, 16, 16), np.uint8) for n in (6, 9))


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=3)


@pytest.fixture
def samples(tmp_path):
    """What `generate --grid` leaves."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, picture in enumerate(SAMPLES):
        Image.fromarray(picture).save(folder / f"{number:05}.png")
    Image.new("L", (99, 70)).save(folder / "grid.png")
    return folder


@pytest.fixture
def real(tmp_path):
    np.savez(tmp_path / "real.npz", images=REAL, labels=np.arange(9))
    return tmp_path / "real.npz"


def test_samples_are_compared_with_real_images(ddpmx, samples, real):
    done = ddpmx("eval", "swd", samples, real, "--json", "--seed", 3)
    values = json.loads(done.out)
    wanted = sliced_wasserstein(rgb(SAMPLES), rgb(REAL), seed=3)
    assert values["swd"] == pytest.approx(wanted.mean)
    assert values["by_size"] == pytest.approx({"16": wanted.distances[0]})
    assert values["images"] == 6
    assert values["halves_of_reference"] == pytest.approx(
        sliced_wasserstein(rgb(REAL[:8:2]), rgb(REAL[1:8:2]), seed=3).mean
    )
    said = ddpmx("eval", "swd", samples, real, "--seed", 3).out
    assert f"× 1000   {wanted.mean:.1f}   (16: {wanted.mean:.1f})" in said
    assert "4 images of each" in said


def test_wrong_input_is_one_clear_error(refused, samples, real, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name, size in (("a", (16, 16)), ("b", (17, 16))):
        Image.new("L", size).save(tmp_path / "mixed" / f"{name}.png")
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    np.savez(tmp_path / "four.npz", x=np.zeros((3, 16, 16, 4), np.uint8))
    for arguments, message in (
        ((samples, tmp_path / "nowhere"), "nowhere"),
        ((samples, tmp_path / "empty"), "no images in this folder"),
        ((tmp_path / "mixed", real), "2 different sizes"),
        ((samples, tmp_path / "none.npz"), "no array of images"),
        ((samples, tmp_path / "four.npz"), "images of 4 channels"),
        ((samples, real, "--seed", -1), "seed must be"),
        ((samples, samples / "grid.png"), "neither a folder nor an .npz"),
    ):
        assert message in refused("eval", "swd", *arguments)
