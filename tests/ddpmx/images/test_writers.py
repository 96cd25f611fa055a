"""From [−1, 1] to pixels and picture files, and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx.errors import InputError, OutputError
from ddpmx.images import writers
from ddpmx.sampling.pixels import from_uint8, to_nhwc, to_uint8

LEVELS = np.arange(256, dtype=np.uint8)


def test_every_level_comes_back():
    np.testing.assert_array_equal(to_uint8(from_uint8(LEVELS)), LEVELS)


def test_truncation_would_lose_63_levels():
    """The control: the formula that is often used, in the same float32."""
    x = from_uint8(LEVELS)
    truncated = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert (truncated != LEVELS).sum() == 63


def test_pixels_change_half_way_between_two_levels():
    """Rounding has no bias; truncation has one."""
    exact = (np.arange(1, 256) - 0.5) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(np.float32(exact - 1e-4)), np.arange(255))
    np.testing.assert_array_equal(to_uint8(np.float32(exact + 1e-4)), np.arange(1, 256))


def test_values_out_of_range_are_clipped():
    x = np.float32([-1, -1.001, -9, -np.inf, 1, 1.001, 9, np.inf, 3e38])
    with np.errstate(over="ignore"):
        assert to_uint8(x).tolist() == [0, 0, 0, 0, 255, 255, 255, 255, 255]


def test_nan_is_black():
    assert to_uint8(np.float32([np.nan, -np.nan])).tolist() == [0, 0]


def test_pixels_are_symmetric_about_grey():
    assert from_uint8(np.uint8([0, 255])).tolist() == [-1, 1]
    assert to_uint8(np.float32([0])).tolist() == [128]


def test_channels_go_last():
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5) / 60 - 1
    u = to_nhwc(x)
    assert u.shape == (2, 4, 5, 3)
    assert u.dtype == np.uint8
    assert u[1, 2, 3, 0] == to_uint8(x[1, 0, 2, 3])


def test_a_grid_has_its_images_in_rows_on_white():
    tiles = np.stack([np.full((2, 3, 1), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    sheet = writers.grid(tiles, columns=3)
    _ = 255
    one, two, three, four, five = 10, 20, 30, 40, 50
    top = [_, one, one, one, _, two, two, two, _, three, three, three, _]
    low = [_, four, four, four, _, five, five, five, _, _, _, _, _]
    assert sheet[:, :, 0].tolist() == [[_] * 13, top, top, [_] * 13, low, low, [_] * 13]


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_a_grid_is_about_square(n, columns):
    sheet = writers.grid(np.zeros((n, 4, 4, 3), np.uint8), gap=0)
    assert sheet.shape == (4 * -(-n // columns), 4 * columns, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("zoom", [1, 3])
def test_a_png_comes_back(tmp_path, channels, zoom):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    writers.save_png(tmp_path / "a.png", picture, zoom=zoom)
    with Image.open(tmp_path / "a.png") as opened:
        back = np.asarray(opened)
    assert back.shape[:2] == (5 * zoom, 7 * zoom)
    np.testing.assert_array_equal(back.reshape(5 * zoom, 7 * zoom, channels)[::zoom, ::zoom], picture)
    np.testing.assert_array_equal(back[zoom - 1 :: zoom, zoom - 1 :: zoom], back[::zoom, ::zoom])


def test_a_grey_animation_comes_back(tmp_path):
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 6, 8, 1), np.uint8))
    writers.save_gif(tmp_path / "a.gif", frames, zoom=2, milliseconds=80)
    with Image.open(tmp_path / "a.gif") as opened:
        assert opened.n_frames == 4
        assert opened.info["loop"] == 0
        durations = []
        for index, frame in enumerate(frames):
            opened.seek(index)
            durations.append(opened.info["duration"])
            np.testing.assert_array_equal(np.asarray(opened.convert("L"))[::2, ::2], frame[:, :, 0])
    assert durations == [80, 80, 80, 1000]


def test_a_colour_animation_comes_back_if_its_colours_fit_a_palette(tmp_path):
    frames = [
        np.kron(np.uint8([[[r, g, 90]]]), np.ones((6, 8, 1), np.uint8)) for r, g in ((0, 255), (255, 0), (40, 80))
    ]
    writers.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as opened:
        for index, frame in enumerate(frames):
            opened.seek(index)
            np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), frame)


def test_images_that_are_no_pictures_are_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(InputError, match="2 channels"):
        writers.save_png(tmp_path / "a.png", np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(InputError, match="2 channels"):
        writers.save_gif(tmp_path / "a.gif", [np.zeros((4, 4, 2), np.uint8)])
    with pytest.raises(InputError, match="at least one frame"):
        writers.save_gif(tmp_path / "a.gif", [])
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        writers.save_png(tmp_path / "nowhere" / "a.png", np.zeros((4, 4, 1), np.uint8))


@pytest.mark.parametrize(("side", "zoom"), [(16, 32), (32, 16), (256, 2), (512, 1), (10_000, 1)])
def test_zoom_makes_small_pictures_visible(side, zoom):
    assert writers.zoom_for(side) == zoom


def test_image_names_sort_by_index(tmp_path):
    assert writers.image_path(tmp_path, 7).name == "00007.png"
    assert writers.image_path(tmp_path, 123456).name == "123456.png"
