"""What people have in their folders: photos on their side, print colours, animations, newer formats, broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Source, load_dataset, load_source
from ddpm_export.training.images import cache, decode, find
from ddpmx.errors import DataError, FileFormatError, InputError

RNG = np.random.default_rng(0)
CORNERS = [[(200, 30, 30), (30, 200, 30)], [(30, 30, 200), (200, 200, 200)]]
FLAT = np.kron(np.array(CORNERS, np.uint8), np.ones((24, 32, 1), np.uint8))
"""48×64: four flat parts, which survive lossy formats, and no symmetry."""

AVIF = pytest.mark.skipif(not features.check("avif"), reason="not verified here: AVIF (Pillow before 11.3)")


def loaded(path: Path, **how) -> np.ndarray:
    return load_dataset(path, **how).images


def near(image: np.ndarray, wanted: np.ndarray, by: int = 6) -> bool:
    """Whether the middle of each corner has its colour."""
    h, w = image.shape[0] // 4, image.shape[1] // 4
    corners = np.s_[h :: 2 * h, w :: 2 * w]
    return image.shape == wanted.shape and int(np.abs(image[corners].astype(int) - wanted[corners]).max()) <= by


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", pytest.param("avif", marks=AVIF)])
@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photos_are_turned_as_they_are_looked_at(tmp_path, suffix, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(FLAT).save(tmp_path / f"a.{suffix}", exif=exif)
    assert near(loaded(tmp_path)[0], np.rot90(FLAT, turned), by=12)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_print_colours_become_rgb(tmp_path, suffix):
    cmyk = np.dstack([255 - FLAT, np.zeros((48, 64), np.uint8)])
    how = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(cmyk, "CMYK").save(tmp_path / f"a.{suffix}", **how)
    assert near(loaded(tmp_path)[0], FLAT)


def test_a_palette_with_a_transparent_colour_lies_on_the_background(tmp_path):
    numbers = np.zeros((8, 8), np.uint8)
    numbers[2:6] = 1
    picture = Image.fromarray(numbers, "P")
    picture.putpalette([255, 0, 255, 10, 20, 30])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128]))  # half transparent is possible in PNG only
    image = loaded(tmp_path, channels=3, background=(0, 0, 0))[0]
    assert image[0, 0].tolist() == [0, 0, 0]
    assert np.abs(image[3, 3].astype(int) - np.array([10, 20, 30]) * 128 / 255).max() <= 1


@pytest.mark.parametrize("kind", ["gif", "webp", "png", pytest.param("avif", marks=AVIF)])
def test_of_an_animation_the_first_frame_is_read_and_said(tmp_path, kind):
    frames = [Image.fromarray(FLAT), *(Image.fromarray(255 - FLAT) for _ in range(2))]
    exact = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100, **exact)
    dataset = load_dataset(tmp_path, channels=3)
    assert near(dataset.images[0], FLAT, by=12)
    assert "1 image: 1 animated (first frame)" in dataset.notes


@AVIF
def test_avif_is_read_from_reading_3_on(tmp_path):
    Image.fromarray(FLAT).save(tmp_path / "a.avif", quality=95)
    (tmp_path / "a.avif").rename(tmp_path / "a")  # by its content
    Image.fromarray(255 - FLAT).save(tmp_path / "b.png")
    assert near(loaded(tmp_path)[0], FLAT, by=12)
    before = load_source(Source(tmp_path, reading=2))
    assert len(before) == 1
    assert before.notes == ("1 image; not read: 1 without a suffix (a)",)


def test_heic_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "plugins", frozenset)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    (tmp_path / "a.heic").write_bytes(heic)
    (tmp_path / "b").write_bytes(heic.replace(b"ftypheic", b"ftypavif"))
    with pytest.raises(DataError, match="no images") as caught:
        load_dataset(tmp_path)
    assert "1 .heic (pip install 'pillow-heif' reads them)" in (caught.value.note or "")
    Image.fromarray(FLAT).save(tmp_path / "c.png")
    (note,) = load_dataset(tmp_path).notes
    assert "1 without a suffix (pip install 'pillow>=11.3' reads them)" in note
    (tmp_path / "video.mp4").write_bytes(heic.replace(b"ftypheic", b"ftypisom"))
    assert "1 .mp4 (video.mp4)" in load_dataset(tmp_path).notes[0]


@pytest.mark.skipif("HEIF" not in decode.plugins(), reason="not verified here: HEIC (no pillow-heif)")
def test_heic_is_read_where_it_can_be(tmp_path):
    Image.fromarray(FLAT).save(tmp_path / "a.heic", "HEIF", quality=95)
    assert near(loaded(tmp_path)[0], FLAT, by=12)


def test_one_line_says_what_is_odd_about_how_many(tmp_path):
    for index in range(5):
        Image.fromarray(FLAT).save(tmp_path / f"{index}.png")
    for index in range(2):
        Image.fromarray(np.dstack([FLAT, FLAT[..., 0]])).save(tmp_path / f"clear{index}.png")
    Image.fromarray(FLAT[:4, :4]).save(tmp_path / "small.png")
    Image.fromarray(FLAT).save(tmp_path / "moves.gif", save_all=True, append_images=[Image.fromarray(255 - FLAT)])
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    assert load_dataset(tmp_path, size=(8, 8), channels=3).notes == (
        "9 images: 2 with transparency (it becomes white, --background), 1 animated (first frame), "
        "1 smaller than 8×8 (enlarged); not read: 1 .mp4 (video.mp4)",
    )


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> Path:
    """Six images in two folders, and three files that are none: cut off, of another kind, and too large."""
    data = tmp_path / "data"
    for folder in ("cat", "dog"):
        (data / folder).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).save(data / folder / f"{index}.png")
    whole = (data / "cat" / "0.png").read_bytes()
    (data / "cat" / "1cut.png").write_bytes(whole[:120])
    (data / "dog" / "page.jpg").write_text("<html>")
    Image.new("1", (99, 99)).save(data / "dog" / "large.png")
    return data


HOW = {"max_pixels": 9000, "channels": 3}


@pytest.mark.parametrize("limit", [None, 100], ids=["in memory", "on disk"])
def test_broken_files_are_left_out_by_name(broken, tmp_path, limit):
    with pytest.raises(DataError, match="3 of 9 files cannot be read"):
        load_dataset(broken, **HOW)
    run = tmp_path / "run"
    dataset = load_dataset(broken, **HOW, skip_broken=True, classes=True, memory_limit=limit, keep=run)
    wanted = np.stack([np.asarray(Image.open(broken / f)) for f in ("cat/0.png", "cat/1.png", "cat/2.png")])
    assert np.array_equal(dataset.take(np.arange(3)), wanted)
    assert len(dataset) == 6
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (note,) = (note for note in dataset.notes if note.startswith("left out, since they cannot be read (--skip-broken)"))
    assert all(
        name in note for name in ("cat/1cut.png (", "dog/page.jpg (not an image)", "dog/large.png (1 megapixels")
    )
    assert (run / cache.NAME).exists() == (limit is not None)
    source = Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")
    for cached in (None, run / cache.NAME):
        again = load_source(source, cached=cached, memory_limit=limit)
        assert again.fingerprint() == dataset.fingerprint()
        assert note in again.notes
    with pytest.raises(FileFormatError):
        Source.from_json(source.to_json() | {"skip_broken": 1}, "run")


def test_the_conditions_of_broken_files_are_left_out_with_them(broken, tmp_path):
    for file in broken.rglob("*.*"):
        condition = tmp_path / "conditions" / file.relative_to(broken).with_suffix(".png")
        condition.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), len(file.name)).save(condition)
    dataset = load_dataset(broken, **HOW, skip_broken=True, condition=tmp_path / "conditions")
    assert dataset.conditions is not None
    assert dataset.conditions.take(np.arange(6))[:, 0, 0, 0].tolist() == [5] * 6
    (tmp_path / "conditions" / "cat" / "2.png").write_text("no image")
    with pytest.raises(DataError, match=r"2\.png: not an image"):
        load_dataset(broken, **HOW, skip_broken=True, condition=tmp_path / "conditions")


def test_nothing_but_broken_files_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match="not an image that can be read"):
        load_dataset(tmp_path, skip_broken=True)
    np.savez(tmp_path / "a.npz", FLAT[None])
    with pytest.raises(InputError, match="--skip-broken is for image files"):
        load_dataset(tmp_path / "a.npz", skip_broken=True)
