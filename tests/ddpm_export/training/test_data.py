"""Images in, uint8 [N, H, W, C] out, and one clear error for everything else."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training import arrays
from ddpm_export.training.data import Dataset, Source, load_dataset
from ddpmx.errors import DataError, FileFormatError, InputError

pytestmark = pytest.mark.torch

GREY = np.arange(16 * 12, dtype=np.uint8).reshape(16, 12)  # not square: H and W cannot be swapped unnoticed
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
RGBA = np.concatenate([RGB, 200 - GREY[..., None]], axis=2)
RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
"""All 256 levels, as 16 bits."""


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def put(path: Path, picture: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path)
    return path


def refused(path: Path, kind: type[Exception] = DataError, **how) -> str:
    """The whole text of the error, which begins with the path."""
    with pytest.raises(kind) as caught:
        load_dataset(path, **how)
    error = caught.value
    assert str(path) in error.fact
    assert "\n" not in error.fact
    assert error.note or error.hint, "a bare fact does not say what to do"
    return str(error)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("picture", "channels"), [(GREY, 1), (RGB, 3), (RGBA, 4)], ids=["grey", "RGB", "RGBA"])
def test_a_folder_gives_its_pixels_as_they_are(folder, picture, channels):
    put(folder / "a.png", picture)
    put(folder / "b.png", picture[::-1].copy())
    dataset = load_dataset(folder)
    assert dataset.images.dtype == np.uint8
    assert dataset.shape == (channels, 16, 12)
    assert len(dataset) == 2
    assert np.array_equal(dataset.images[0], picture.reshape(16, 12, channels))
    assert np.array_equal(dataset.images[1], picture[::-1].reshape(16, 12, channels))


def test_palettes_become_rgb_and_bits_become_grey(folder, tmp_path):
    put(folder / "palette.gif", Image.fromarray(RGB).quantize(256))
    with Image.open(folder / "palette.gif") as image:
        assert image.mode == "P"
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_dataset(folder).images[0], wanted)
    bits = put(tmp_path / "bits" / "a.png", GREY > 90).parent
    assert np.array_equal(load_dataset(bits).images[0, ..., 0], np.where(GREY > 90, 255, 0))


def test_grey_with_alpha_keeps_its_alpha(folder):
    put(folder / "a.png", Image.fromarray(np.stack([GREY, 255 - GREY], axis=2), "LA"))
    assert np.array_equal(load_dataset(folder).images[0], np.stack([GREY, GREY, GREY, 255 - GREY], axis=2))


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif"])
def test_grey_of_16_bits_is_scaled_to_8(folder, name, channels):
    """Pillow's own conversion clips instead: every level above 255 of 65535 would be white."""
    put(folder / name, Image.fromarray(RAMP.astype(">u2") if name.startswith("big") else RAMP))
    dataset = load_dataset(folder, channels=channels)
    assert dataset.shape == (channels or 1, 16, 16)
    assert np.abs(dataset.images[0].astype(int) - np.arange(256).reshape(16, 16, 1)).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32], ids=["I", "F"])
def test_numbers_without_a_known_white_are_refused(folder, dtype):
    """As for a float .npz: the file does not show whether 1.0, 255 or 65535 is white."""
    put(folder / "a.tif", Image.fromarray(RAMP.astype(dtype)))
    with pytest.raises(DataError, match=r"a\.tif"):
        load_dataset(folder)


def test_subfolders_are_read_in_the_order_of_their_names(folder):
    for value, name in enumerate(["a/z.png", "b.PNG", "c/d/a.jpeg", "c/d/b.bmp"]):
        put(folder / name, np.full((4, 4), 40 * value, np.uint8))
    assert load_dataset(folder).images[:, 0, 0, 0].tolist() == [0, 40, 80, 120]


def test_hidden_files_and_other_files_are_passed_over(folder):
    put(folder / "a.png", GREY)
    (folder / "notes.txt").write_text("not an image")
    for name in ("._a.png", ".thumbnails/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    assert len(load_dataset(folder)) == 1


def test_progress_counts_the_images(folder):
    for index in range(3):
        put(folder / f"{index}.png", GREY)
    seen = []
    load_dataset(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- --size and --channels -------------------------------------------------------------------------------------------


def assert_all_but_200(image: np.ndarray) -> None:
    """The filter that scales sees a little of what was cut off. Half a pixel of it would show as 100."""
    assert np.abs(image - 200).max() <= 15


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "high"])
@pytest.mark.parametrize("zoom", [1, 2, 3])
def test_size_keeps_the_middle(folder, wide, zoom):
    """A grey square between black bands: the square is left, whatever it is scaled by."""
    image = np.zeros((8, 24), np.uint8)
    image[:, 8:16] = 200
    image = image.repeat(zoom, 0).repeat(zoom, 1)
    put(folder / "a.png", image if wide else image.T.copy())
    (square,) = load_dataset(folder, size=(8, 8)).images.astype(int)
    assert_all_but_200(square)
    assert np.array_equal(square, square[::-1, ::-1]), "as much is cut off on one side as on the other"


def test_size_is_height_by_width_and_keeps_proportions(folder):
    image = np.zeros((30, 30), np.uint8)
    image[10:20] = 200  # a band across: the middle third, all of it when a third of the height is kept
    put(folder / "a.png", image)
    (whole,) = load_dataset(folder, size=(5, 15)).images.astype(int)
    assert whole.shape == (5, 15, 1)
    assert_all_but_200(whole)


def test_size_leaves_images_alone_that_have_it(folder):
    put(folder / "a.png", RGB)
    assert np.array_equal(load_dataset(folder, size=(16, 12)).images[0], RGB)


def test_size_brings_different_images_together(folder):
    put(folder / "a.png", np.full((9, 5), 7, np.uint8))
    put(folder / "b.png", np.full((3, 4), 9, np.uint8))
    images = load_dataset(folder, size=(6, 6)).images
    assert images[0].min() == images[0].max() == 7
    assert images[1].min() == images[1].max() == 9


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_brings_different_modes_together(folder, channels):
    put(folder / "a.png", GREY)
    put(folder / "b.png", RGB)
    put(folder / "c.png", RGBA)
    images = load_dataset(folder, channels=channels).images
    assert images.shape == (3, 16, 12, channels)
    assert np.array_equal(images[0, ..., 0], GREY)
    if channels == 4:
        assert images[1, ..., 3].min() == 255, "what has no alpha is opaque"
        assert np.array_equal(images[2], RGBA)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8, 65537)])
def test_sizes_out_of_range(folder, size):
    with pytest.raises(InputError, match="size"):
        load_dataset(folder, size=size)


@pytest.mark.parametrize("channels", [0, 2, 5, -1])
def test_channels_out_of_range(folder, channels):
    with pytest.raises(InputError, match="channels"):
        load_dataset(folder, channels=channels)


# --- .npz ------------------------------------------------------------------------------------------------------------

NHWC = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("array", "images"),
    [
        (NHWC[..., 0], NHWC[..., :1]),
        (NHWC[..., :1], NHWC[..., :1]),
        (NHWC, NHWC),
        (NHWC.transpose(0, 3, 1, 2), NHWC),
        (NHWC[..., :1].transpose(0, 3, 1, 2), NHWC[..., :1]),
    ],
    ids=["N,H,W", "N,H,W,1", "N,H,W,3", "N,3,H,W", "N,1,H,W"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_layouts(tmp_path, array, images, save):
    save(tmp_path / "a.npz", anything=array)
    dataset = load_dataset(tmp_path / "a.npz")
    assert np.array_equal(dataset.images, images)
    assert dataset.images.flags.c_contiguous


def test_labels_beside_the_images_are_passed_over(tmp_path):
    np.savez(tmp_path / "a.npz", images=NHWC, labels=np.arange(5))
    assert np.array_equal(load_dataset(tmp_path / "a.npz").images, NHWC)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no array of images"),
        ({"labels": np.arange(5)}, "labels [5]"),
        ({"a": NHWC, "b": NHWC}, "more than one array"),
        ({"a": NHWC / np.float32(255)}, "is float32, not uint8"),
        ({"a": NHWC.astype(np.int64)}, "is int64, not uint8"),
        ({"a": NHWC[..., :2]}, "the shape [5, 8, 6, 2]"),
        ({"a": NHWC[:0]}, "the shape [0, 8, 6, 3]"),
        ({"a": NHWC[:, :, :0]}, "the shape [5, 8, 0, 3]"),
    ],
    ids=["empty", "labels only", "two", "float", "int64", "two channels", "no images", "no pixels"],
)
def test_npz_without_one_array_of_images(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    assert says in refused(tmp_path / "a.npz")


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_in_an_npz_is_never_run(tmp_path):
    marker, path = tmp_path / "was here", tmp_path / "a.npz"
    np.savez(path, images=np.array([Hostile(marker)], dtype=object))
    refused(path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)["images"]
    assert marker.exists(), "the file was as hostile as meant"


def test_a_pickle_named_npz_is_never_run(tmp_path):
    marker, path = tmp_path / "was here", tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Hostile(marker)))
    refused(path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)
    assert marker.exists()


def damaged(kind: str) -> bytes:
    whole = io.BytesIO()
    np.savez_compressed(whole, images=NHWC)
    data = whole.getvalue()
    return {
        "empty file": b"",
        "web page": b"<html>not found</html>",
        "half": data[: len(data) // 2],
        "without its directory": data[:-40],
        "flipped bits": data[:200] + bytes(b ^ 0xFF for b in data[200:240]) + data[240:],
        "npy": npy(),
    }[kind]


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, NHWC)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["empty file", "web page", "half", "without its directory", "flipped bits", "npy"])
def test_damaged_npz(tmp_path, kind):
    path = tmp_path / "a.npz"
    path.write_bytes(damaged(kind))
    refused(path)


def test_an_npz_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((4, 256, 256), np.uint8))
    monkeypatch.setattr(arrays, "MAX_BYTES", 200_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    assert path.stat().st_size < 2_000
    assert "unpacks to" in refused(path)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"size": (8, 8)}, "--size is for"),
        ({"channels": 3}, "--channels is for"),
        ({"max_pixels": 100, "skip_broken": True}, "--max-megapixels and --skip-broken are for"),
    ],
)
def test_an_npz_is_taken_as_it_is(tmp_path, how, named):
    np.savez(tmp_path / "a.npz", NHWC)
    with pytest.raises(InputError, match=f"^{named} image files; an array is taken as it is"):
        load_dataset(tmp_path / "a.npz", **how)


# --- what is no dataset ----------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    assert "no such file" in refused(tmp_path / "missing")


def test_neither_a_folder_nor_an_npz(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "neither a folder nor an .npz, .npy or .tar" in refused(tmp_path / "a.zip")


def test_a_folder_without_images(folder):
    (folder / "readme.md").write_text("nothing to see")
    assert ".png" in refused(folder)


@pytest.mark.parametrize("how", [{}, {"size": (16, 12), "channels": 1}], ids=["as it is", "converted"])
@pytest.mark.parametrize("content", ["text", "empty", "cut off"])
def test_a_file_with_only_the_name_of_an_image(folder, content, how):
    put(folder / "a.png", GREY)
    whole = (folder / "a.png").read_bytes()
    bad = folder / "sub" / "b.png"
    bad.parent.mkdir()
    bad.write_bytes({"text": b"hello", "empty": b"", "cut off": whole[: len(whole) * 2 // 3]}[content])
    with pytest.raises(DataError) as caught:
        load_dataset(folder, **how)
    assert caught.value.fact.startswith(f"{bad}:"), "the one bad file of thousands is named"
    assert caught.value.hint


def test_different_sizes_are_counted(folder):
    for index in range(3):
        put(folder / f"{index}.png", np.zeros((8, 6), np.uint8))
    put(folder / "odd.png", np.zeros((6, 8), np.uint8))
    text = refused(folder)
    assert "3 of 8×6, 1 of 6×8" in text
    assert "--size" in text


def test_different_modes_are_counted(folder):
    put(folder / "a.png", GREY)
    put(folder / "b.png", RGB)
    put(folder / "c.png", RGB)
    text = refused(folder)
    assert "2 RGB, 1 L" in text
    assert "--channels" in text


# --- what a run remembers --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_pixels_and_shape_not_of_the_place(tmp_path):
    def fingerprint(images: np.ndarray, place: str = "here") -> str:
        return Dataset(images, Source(tmp_path / place)).fingerprint()

    once = fingerprint(NHWC)
    assert fingerprint(NHWC.copy(), "there") == once
    other = NHWC.copy()
    other[3, 2, 1, 0] ^= 1
    assert fingerprint(other) != once
    assert fingerprint(NHWC.reshape(5, 6, 8, 3)) != once
    assert fingerprint(NHWC[::-1]) != once


def test_a_source_survives_json(tmp_path):
    for source in (Source(tmp_path), Source(tmp_path, (8, 6), 3)):
        assert Source.from_json(json.loads(json.dumps(source.to_json())), "run") == source


def test_the_source_records_the_arguments(folder):
    put(folder / "a.png", GREY)
    assert load_dataset(folder, size=(8, 8), channels=3).source == Source(folder, (8, 8), 3)


@pytest.mark.parametrize(
    "junk", [None, [], "x", {}, {"path": 3, "size": None, "channels": None}, {"path": "x", "size": 5, "channels": 1}]
)
def test_a_damaged_source_names_the_run(junk):
    with pytest.raises(FileFormatError, match="runs/x"):
        Source.from_json(junk, "runs/x")
