"""Conditions from files are what Python would pass; what does not fit is refused, all at once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx import ModelSpec
from ddpmx.errors import FileFormatError, InputError
from ddpmx.images.conditions import read_conditions

RGB, RGB_A, PAIR, NONE = (ModelSpec((1, 4, 6), condition=k) for k in (3, 4, 2, None))


def test_an_npz_is_taken_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    cond = rng.standard_normal((3, 2, 4, 6))
    np.savez(tmp_path / "a.npz", cond=cond, labels=np.arange(3))
    values, names, note = read_conditions(tmp_path / "a.npz", PAIR)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, cond.astype(np.float32))
    assert (names, note) == (["a.npz[0]", "a.npz[1]", "a.npz[2]"], None)
    np.savez(tmp_path / "b.npz", anything=np.full((1, 4, 6, 2), 255, np.uint8))  # pixels: 255 is 1
    np.testing.assert_array_equal(read_conditions(tmp_path / "b.npz", PAIR)[0], np.ones((1, 2, 4, 6)))


def test_a_folder_is_taken_by_name_and_transparency_is_white(tmp_path):
    Image.new("L", (6, 4), 0).save(tmp_path / "b.png")
    Image.new("RGBA", (6, 4), (255, 0, 255, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "c.bmp")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    values, names, note = read_conditions(tmp_path, RGB)
    assert note is None
    assert names == ["a.png", "b.png", "c.bmp"]
    np.testing.assert_array_equal(values[:, :, 0, 0], [[1, 1, 1], [-1, -1, -1], [1, -1, -1]])
    one = read_conditions(tmp_path / "c.bmp", RGB)
    np.testing.assert_array_equal(one.values, values[2:])
    np.testing.assert_array_equal(
        read_conditions(tmp_path / "a.png", RGB_A)[0][0, :, 0, 0], [1, -1, 1, -1]
    )  # with an alpha of its own, nothing is composed


def test_a_picture_that_says_how_to_be_turned_is_turned(tmp_path):
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown, turn it by 90° clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    values = read_conditions(tmp_path / "turned.png", ModelSpec((1, 4, 6), condition=1)).values
    np.testing.assert_array_equal(np.rint((values[0, 0] + 1) * 127.5), upright)


def test_pictures_of_another_size_are_brought_to_the_model_s(tmp_path):
    rng = np.random.default_rng(0)
    small, large = (Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((2, 3, 3), (40, 90, 3)))
    small.save(tmp_path / "a.png")
    large.save(tmp_path / "b.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "c.png")
    values, _, note = read_conditions(tmp_path, RGB)
    wanted = [
        small.resize((6, 4), Image.Resampling.BICUBIC),
        large.resize((6, 4), Image.Resampling.LANCZOS, (15, 0, 75, 40)),  # 3:2 of it, from the middle
    ]
    np.testing.assert_array_equal(
        np.rint((values[:2].transpose(0, 2, 3, 1) + 1) * 127.5), np.stack([np.asarray(each) for each in wanted])
    )
    assert note == "2 of 3 conditions are brought to 4×6 (height×width), as in training"


def test_of_an_animation_the_first_frame_is_taken_and_it_is_said(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    values, names, note = read_conditions(tmp_path, RGB)
    assert (names, note) == (["a.gif"], "of 1 that are animated the first frame is taken")
    assert values[0, :, 0, 0].tolist() == [1, -1, -1]


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    Image.new("I;16", (6, 4)).save(tmp_path / "deep.png")
    (tmp_path / "notes.txt").write_text("x")
    Image.new("RGB", (6, 4)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:45])
    with pytest.raises(FileFormatError, match="3 of 4 files") as caught:
        read_conditions(tmp_path, RGB)
    for name in ("deep.png", "notes.txt", "cut.png"):
        assert name in str(caught.value)


WRONG = {
    "no batch": np.zeros((2, 4, 6)),
    "empty": np.zeros((0, 2, 4, 6)),
    "turned": np.zeros((1, 2, 6, 4)),
    "NaN": np.full((1, 2, 4, 6), np.nan),
    "int64": np.zeros((1, 2, 4, 6), np.int64),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name):
    np.savez(tmp_path / "a.npz", cond=WRONG[name])
    with pytest.raises(InputError, match=r"a\.npz"):
        read_conditions(tmp_path / "a.npz", PAIR)


def test_what_cannot_be_a_condition_is_refused(tmp_path):
    with pytest.raises(InputError, match="takes no condition"):
        read_conditions(tmp_path, NONE)
    with pytest.raises(FileFormatError, match="no pictures"):
        read_conditions(tmp_path, RGB)
    with pytest.raises(FileFormatError):
        read_conditions(tmp_path / "nowhere", RGB)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(FileFormatError, match="no array 'cond'"):
        read_conditions(tmp_path / "two.npz", PAIR)
    np.savez(tmp_path / "objects.npz", cond=np.array([None], object))
    with pytest.raises(FileFormatError):
        read_conditions(tmp_path / "objects.npz", PAIR)
    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="1, 3 or 4 channels"):
        read_conditions(tmp_path / "a.png", PAIR)
