"""Transparency, greys of more than 8 bits, and JPEGs decoded at the size that is needed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import load_dataset
from ddpm_export.training.images.decode import own_limit, read_image
from ddpm_export.training.images.source import Source
from ddpmx.errors import DataError, InputError

RNG = np.random.default_rng(0)
ALPHA = np.zeros((8, 8), np.uint8)
ALPHA[2:6, 2:6] = 255
ALPHA[0, 0] = 128
HIDDEN = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
HIDDEN[2:6, 2:6] = (200, 100, 50)
GREY = np.full((8, 8), 90, np.uint8)


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, ...]) -> np.ndarray:
    """Porter & Duff's "over", in float64."""
    a = alpha[..., None] / 255
    return colour * a + np.array(background) * (1 - a)


def save(folder: Path, kind: str) -> None:
    rgba = Image.fromarray(np.dstack([HIDDEN, ALPHA]))
    if kind == "RGBA.png":
        rgba.save(folder / "a.png")
    elif kind == "RGBA.webp":
        rgba.save(folder / "a.webp", lossless=True, exact=True)
    elif kind == "RGBA.tif":
        rgba.save(folder / "a.tif")
    elif kind == "LA.png":
        Image.fromarray(np.dstack([GREY, ALPHA]), "LA").save(folder / "a.png")
    else:
        # a palette: entry 0 is magenta and transparent, entry 1 is what is seen
        picture = Image.fromarray((ALPHA == 255).astype(np.uint8), "P")
        picture.putpalette([255, 0, 255, 200, 100, 50])
        picture.save(folder / f"a.{kind[2:]}", transparency=0)


def test_images_that_are_nothing_but_background_are_counted(tmp_path):
    drawing = np.full((8, 8, 4), 255, np.uint8)
    drawing[:4, :, 3] = 0
    Image.fromarray(drawing).save(tmp_path / "white.png")
    drawing[4, 0, :3] = 0
    Image.fromarray(drawing).save(tmp_path / "seen.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "opaque.png")
    lost = [note for note in load_dataset(tmp_path, channels=3).notes if "of one colour" in note]
    assert [note.split(": ")[0] for note in lost] == ["1 of the 2 images with transparency are of one colour on white"]
    for other in ({"channels": 3, "background": (0, 0, 0)}, {"channels": 4}):
        assert not any("of one colour" in note for note in load_dataset(tmp_path, **other).notes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", [None, (0, 0, 0), (10, 20, 30)], ids=str)
@pytest.mark.parametrize("kind", ["RGBA.png", "RGBA.webp", "RGBA.tif", "LA.png", "P.gif", "P.png"])
def test_transparent_parts_lie_on_the_background(tmp_path, kind, background, channels):
    save(tmp_path, kind)
    dataset = load_dataset(tmp_path, channels=channels, background=background)
    seen, alpha = HIDDEN, ALPHA
    if kind == "LA.png":
        seen = np.dstack([GREY] * 3)
    elif kind.startswith("P"):
        alpha = np.where(ALPHA == 255, 255, 0)
    wanted = over(seen, alpha, background or (255, 255, 255))
    if channels == 1:
        wanted = wanted @ [[0.299], [0.587], [0.114]]  # ITU-R 601-2, as Pillow says
    assert np.abs(dataset.images[0] - wanted).max() <= 1.01
    assert "--background" in dataset.notes[0]


def test_one_colour_can_mean_transparent(tmp_path):
    """tRNS of a PNG without an alpha channel, in 8 and in 16 bits."""
    values = np.full((8, 8), 40, np.uint8)
    values[0] = 7
    Image.fromarray(values).save(tmp_path / "a.png", transparency=7)
    images = load_dataset(tmp_path, channels=1).images[0, ..., 0]
    assert images[0].tolist() == [255] * 8
    assert images[1:].min() == images[1:].max() == 40
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "a.png").write_bytes(png16(values.astype(np.uint16) * 257, 0, transparent=7 * 257))
    assert np.array_equal(load_dataset(wide, channels=1).images[0, ..., 0], images)


def test_resizing_mixes_no_hidden_colour_in(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 0] = 255  # red, all of it transparent but for a white square
    rgba[16:48, 16:48] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert load_dataset(tmp_path, size=(8, 8), channels=3).images.min() >= 254


def test_a_background_without_effect_is_refused(tmp_path):
    save(tmp_path, "RGBA.png")
    with pytest.raises(InputError, match="--background has no effect"):
        load_dataset(tmp_path, background=(0, 0, 0))
    assert "--channels 3" in load_dataset(tmp_path).notes[0]


# --- greys of more than 8 bits ---------------------------------------------------------------------------------------


def png16(values: np.ndarray, colour_type: int, transparent: int | None = None) -> bytes:
    """A PNG of 16 bits, which Pillow writes only as grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    hole = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + head + hole + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "suffix"), [(8, "png"), (10, "tif"), (12, "png"), (12, "tif"), (14, "png")])
def test_white_is_full_scale_of_the_bits_that_are_used(tmp_path, bits, suffix):
    full = 2**bits - 1
    ramp = np.linspace(0, full * 0.9, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    Image.fromarray(ramp // 2).save(tmp_path / f"b.{suffix}")  # darker: it must not get a white of its own
    dataset = load_dataset(tmp_path)
    assert dataset.source.white == full
    assert np.abs(dataset.images[0, ..., 0] - ramp * (255 / full)).max() < 1
    assert np.abs(dataset.images[1, ..., 0] - ramp // 2 * (255 / full)).max() < 1
    assert f"numbers from 0 to {ramp.max()}, white is {full}" in dataset.notes[0]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_the_user_says_which_number_is_white(tmp_path, dtype):
    values = np.linspace(0, 2, 64).reshape(8, 8) * (1000 if dtype is np.int32 else 1)
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    white = 1000 if dtype is np.int32 else 1.0
    image = load_dataset(tmp_path, white=white).images[0, ..., 0]
    assert np.abs(image - np.minimum(values.astype(dtype) * (255 / white), 255)).max() <= 1
    assert image[4:].min() > 250, "what is larger is white too"
    with pytest.raises(DataError, match="numbers from 0 to 2"):
        load_dataset(tmp_path)


def test_white_for_an_npz(tmp_path):
    values = RNG.integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=values.astype(np.float32) / 255)
    dataset = load_dataset(tmp_path / "a.npz", white=1)
    assert np.array_equal(dataset.images, values)
    assert dataset.source.white == 1
    np.savez(tmp_path / "bits.npz", images=(values > 99).astype(np.uint8))
    assert np.array_equal(load_dataset(tmp_path / "bits.npz", white=1).images, (values > 99) * 255)
    np.savez(tmp_path / "b.npz", images=values.astype(np.float32) / 127.5 - 1)
    with pytest.raises(DataError, match="below 0"):
        load_dataset(tmp_path / "b.npz", white=1)


def test_greymaps_say_themselves_which_number_is_white(tmp_path):
    values = np.linspace(0, 1000, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "a.pgm").write_bytes(b"P5\n8 8\n4095\n" + values.astype(">u2").tobytes())
    dataset = load_dataset(tmp_path)
    assert np.abs(dataset.images[0, ..., 0] - values * (255 / 4095)).max() <= 1
    assert dataset.notes == ()


@pytest.mark.parametrize("colour_type", [2, 4, 6], ids=["RGB", "LA", "RGBA"])
def test_colours_of_which_only_the_lower_bits_are_used_are_refused(tmp_path, colour_type):
    values = RNG.integers(0, 4096, (8, 8, {2: 3, 4: 2, 6: 4}[colour_type]))
    values[0, 0, 0] = 4095
    if colour_type != 2:
        values[..., -1] = 65535  # opaque
    (tmp_path / "a.png").write_bytes(png16(values.astype(np.uint16), colour_type))
    with pytest.raises(DataError, match="upper 8 reach 15 of 255"):
        load_dataset(tmp_path)
    (tmp_path / "a.png").write_bytes(png16(np.minimum(values * 16, 65535).astype(np.uint16), colour_type))
    assert load_dataset(tmp_path).images.max() == 255


def test_white_without_effect_is_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--white has no effect"):
        load_dataset(tmp_path, white=4095)


# --- JPEG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photo_is_decoded_at_the_size_it_is_needed(tmp_path, monkeypatch, orientation, figure):
    """The same picture as from all its pixels, from at least twice as many as are needed in each direction."""
    noise = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise.save(tmp_path / "a.jpg", quality=92, exif=exif)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *how: sizes.append(image.size) or resize(image, *how))
    with own_limit():
        whole = read_image(tmp_path / "a.jpg", (24, 20), 3, Source(tmp_path, reading=1)).astype(int)
        draft = read_image(tmp_path / "a.jpg", (24, 20), 3, Source(tmp_path)).astype(int)
    (w, h), (small_w, small_h) = sizes
    assert (w // small_w, h // small_h) == (8, 8)
    figure(
        f"JPEG decoded at 1/8, orientation {orientation}: mean |Δ| of 255", np.abs(draft - whole).mean(), at_most=0.5
    )
    assert np.abs(draft - whole).max() <= 4


def test_a_photo_that_is_hardly_reduced_is_decoded_whole(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    with own_limit():
        one, two = (read_image(tmp_path / "a.jpg", (24, 24), 3, Source(tmp_path, reading=r)) for r in (1, 2))
    assert np.array_equal(one, two)
