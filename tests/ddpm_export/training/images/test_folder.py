"""Everything that is wrong with a folder is said at once; large files are allowed on request."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import load_dataset
from ddpm_export.training.images import decode, threads
from ddpmx.errors import DataError

RNG = np.random.default_rng(0)


def fill(folder: Path, count: int, size: int = 32) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{index:03}.jpg")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def error_of(folder: Path, **how) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(folder, **how)
    return caught.value


@pytest.mark.parametrize("how", [{}, {"size": (8, 8), "channels": 3}], ids=["as they are", "converted"])
def test_all_damaged_files_are_named_at_once(tmp_path, how):
    fill(tmp_path, 12)
    for index in (2, 5, 7):
        cut(tmp_path / f"{index:03}.jpg")
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    error = error_of(tmp_path, **how)
    assert error.fact == f"{tmp_path}: 5 of 14 files cannot be read as images"
    assert [item.split(":")[0] for item in error.items] == ["002.jpg", "005.jpg", "007.jpg", "gone.png", "page.png"]
    assert all(item in str(error) for item in error.items)


def test_a_mixture_is_said_with_the_damaged_files(tmp_path):
    fill(tmp_path, 6)
    cut(tmp_path / "003.jpg")
    cut(tmp_path / "004.jpg")
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    error = error_of(tmp_path)
    for part in ("2 different sizes", "different modes", "2 of 7 files"):
        assert part in error.fact
    for flag in ("--size", "--channels", "remove them"):
        assert flag in error.hint
    assert [item.split(":")[0] for item in error.items] == ["003.jpg", "004.jpg"]


def test_a_long_list_ends_with_a_count(tmp_path):
    tmp_path.joinpath("a.png").touch()
    for index in range(150):
        (tmp_path / f"{index:03}.png").write_text("x")
    text = str(error_of(tmp_path))
    assert "151 of 151" in text
    assert "099.png" in text
    assert "… and 51 more" in text


def test_a_large_sheet_is_read_if_the_user_allows_it(tmp_path, monkeypatch):
    Image.new("1", (14000, 13000), 1).save(tmp_path / "a.png")
    error = error_of(tmp_path, size=(4, 4))
    assert "182 megapixels" in error.note
    assert "--max-megapixels 182" in error.hint
    assert "remove" not in error.hint
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's, of "decompression bombs"
        images = load_dataset(tmp_path, size=(4, 4), max_pixels=182_000_000).images
    assert images.min() == images.max() == 255
    assert Image.MAX_IMAGE_PIXELS is not None, "Pillow's own limit is as it was"


def test_threads_give_what_one_after_another_gives(tmp_path, monkeypatch):
    fill(tmp_path, 40)
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    alone = load_dataset(tmp_path, size=(8, 8)).images
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    seen = []
    images = load_dataset(tmp_path, size=(8, 8), progress=lambda *counts: seen.append(counts)).images
    assert np.array_equal(images, alone)
    assert seen == [(index + 1, 40) for index in range(40)]


def test_an_interruption_ends_the_threads_soon(tmp_path, monkeypatch):
    fill(tmp_path, 60, size=8)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    begun = []
    work = decode.read_image
    monkeypatch.setattr(
        "ddpm_export.training.images.folder.read_image",
        lambda *how, **more: begun.append(how[0]) or work(*how, **more),
    )

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_dataset(tmp_path, progress=stop)
    assert len(begun) < 30


def test_animations_are_said_to_be_read_in_part(tmp_path):
    frames = [Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    dataset = load_dataset(tmp_path)
    assert len(dataset) == 1
    assert "1 image: 1 animated (first frame)" in dataset.notes


@pytest.mark.parametrize(("field", "white"), [(65535, 4095), (4095, 4095), (1023, 1023)])
def test_a_greymap_s_white_is_its_field_unless_that_says_two_bytes_alone(tmp_path, field, white):
    values = np.linspace(0, white, 64).round().astype(">u2").reshape(8, 8)
    for i in range(3):
        (tmp_path / f"{i}.pgm").write_bytes(b"P5\n8 8\n%d\n" % field + values.tobytes())
    images = load_dataset(tmp_path).images
    np.testing.assert_allclose(images[0, ..., 0], values.astype(float) * 255 / white, atol=1)
