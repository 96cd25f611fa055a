"""Pictures as tasks read and write them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from ddpmx.errors import DataError, FileFormatError, InputError, OutputError
from ddpmx.formats.png_text import read_png_text
from ddpmx.images import pictures

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 255, (5, 7, 1), dtype=np.uint8)
OPAQUE = np.full((5, 7, 1), 255, np.uint8)
SAME = np.repeat(GREY[..., None], 3, axis=2)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


READ = {
    "grey for grey": (GREY, 1, GREY[..., None]),
    "colour for colour": (COLOUR, 3, COLOUR),
    "three equal channels for grey": (SAME, 1, GREY[..., None]),
    "grey for colour": (GREY, 3, SAME),
    "what is opaque for colour": (np.concatenate([COLOUR, OPAQUE], 2), 3, COLOUR),
    "what is opaque for grey": (np.concatenate([SAME, OPAQUE], 2), 1, GREY[..., None]),
    "colour for transparency": (COLOUR, 4, np.concatenate([COLOUR, OPAQUE], 2)),
    "transparency for transparency": (np.concatenate([COLOUR, ALPHA], 2),) * 1
    + (4, np.concatenate([COLOUR, ALPHA], 2)),
    "bits for grey": (GREY > 127, 1, ((GREY > 127) * np.uint8(255))[..., None]),
}


@pytest.mark.parametrize("case", READ)
def test_every_value_is_the_file_s(case, tmp_path):
    array, channels, wanted = READ[case]
    (found,) = pictures.read_pictures(saved(tmp_path / "x.png", array), channels)
    assert found.name == "x.png"
    assert found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels, wanted)


def test_a_palette_and_a_turned_picture(tmp_path):
    palette = Image.fromarray(COLOUR).quantize(4)
    palette.save(tmp_path / "p.png")
    (found,) = pictures.read_pictures(tmp_path / "p.png", 3)
    assert np.array_equal(found.pixels, np.asarray(palette.convert("RGB")))
    turned = Image.fromarray(GREY)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / "t.png", exif=exif)
    (found,) = pictures.read_pictures(tmp_path / "t.png", 1, size=(7, 5))
    assert np.array_equal(found.pixels[..., 0], np.rot90(GREY, -1))


REFUSED = {
    "colour for grey": (COLOUR, 1, {}, "it is a colour picture, and the model's images are grey"),
    "transparency for colour": (np.concatenate([COLOUR, ALPHA], 2), 3, {}, "it is transparent in places"),
    "grey for colour that is not made": (GREY, 3, {"widen": False}, "it is grey, and the model's images are of colour"),
    "opaque that is not made": (COLOUR, 4, {"widen": False}, "it has no transparency"),
    "another size": (
        GREY,
        1,
        {"size": (7, 5)},
        r"it is 5×7 \(height×width\), and the model takes 7×5 \(height×width\)",
    ),
    "16 bits": (GREY.astype(np.uint16) * 257, 1, {}, "pictures of mode I(;16)? have no range that is known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    array, channels, options, message = REFUSED[case]
    path = saved(tmp_path / "x.png", array)
    with pytest.raises(DataError, match=message) as error:
        pictures.read_pictures(path, channels, **options)
    assert error.value.fact.startswith(str(path))
    assert "8 bits" in error.value.hint


def test_an_animation_is_refused(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="it is an animation, and one picture is needed"):
        pictures.read_pictures(tmp_path / "a.gif", 1)


def test_a_folder_is_read_in_order_and_all_its_faults_are_named(tmp_path):
    saved(tmp_path / "b.png", GREY)
    saved(tmp_path / "a.png", GREY[::-1].copy())
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "inside").mkdir()
    assert [found.name for found in pictures.read_pictures(tmp_path, 1)] == ["a.png", "b.png"]
    saved(tmp_path / "c.png", COLOUR)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match="2 of 4 files cannot be taken") as error:
        pictures.read_pictures(tmp_path, 1)
    assert [item.partition(":")[0] for item in error.value.items] == ["c.png", "d.txt"]


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        pictures.read_pictures(tmp_path / "x.png", 1)
    with pytest.raises(FileFormatError, match="there are no pictures in it"):
        pictures.read_pictures(tmp_path, 1)
    with pytest.raises(InputError, match="have 2 channels"):
        pictures.read_pictures(tmp_path / "x.png", 2)


def test_too_large_a_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.png", GREY)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 34)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow's own limit, of which it warns up to its double
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="more than 0 megapixels"):
            pictures.read_pictures(path, 1)
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "MAX_BYTES", 34)
    with pytest.raises(InputError, match="do not fit into memory"):
        pictures.read_pictures(path, 1)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_targets(tmp_path):
    assert pictures.targets(tmp_path / "x.png", ["a.jpg"], whole_folder=False) == [tmp_path / "x.png"]
    assert pictures.targets(tmp_path, ["a.jpg", "b.png"], whole_folder=True) == [tmp_path / "a.png", tmp_path / "b.png"]
    for names, folder in ((["a.png", "b.png"], False), (["a.png"], True)):
        with pytest.raises(InputError, match="is one file, and there are"):
            pictures.targets(tmp_path / "x.png", names, whole_folder=folder)
    with pytest.raises(InputError, match=r"a\.jpg and a\.png would both become a\.png"):
        pictures.targets(tmp_path, ["a.jpg", "a.png"], whole_folder=True)


def test_only_what_a_task_has_written_is_replaced(tmp_path):
    ours, mine, source = tmp_path / "ours.png", tmp_path / "mine.png", tmp_path / "source.png"
    words = pictures.text("denoise", model="m", of="a\nb", given_t=3)
    assert words["of"] == "a?b"
    assert words["given-t"] == "3"
    for path in (mine, source):
        saved(path, GREY)
    pictures.save_pictures([ours], [GREY[..., None]], [words])
    assert read_png_text(ours)[1] == words
    pictures.check_replaceable(tmp_path, [ours, tmp_path / "new.png", tmp_path / "no" / "folder.png"], [source])
    with pytest.raises(OutputError, match="refusing to overwrite"):
        pictures.check_replaceable(tmp_path, [ours, mine], [source])
    pictures.check_replaceable(tmp_path, [ours, mine], [source], overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="it is made from this file"):
            pictures.check_replaceable(source, [source], [source], overwrite=overwrite)


@pytest.mark.parametrize("place", ["mine.txt", "mine.txt/folder"])
def test_a_file_is_no_folder(tmp_path, place):
    """Found before hours of work, and not after."""
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / place
    targets = pictures.targets(out, ["a", "b"], whole_folder=False)
    with pytest.raises(OutputError, match=r"mine\.txt: is a file, and a folder is needed"):
        pictures.check_replaceable(out, targets, [])


def test_the_pictures_of_a_task_do_not_go_among_generated_ones(tmp_path):
    """Both are 00000.png, 00001.png, …, and generate refuses the same in the other order."""
    drawn, source = tmp_path / "00007.png", tmp_path / "source.png"
    saved(source, GREY)
    pictures.save_pictures([drawn], [GREY[..., None]], [{"Software": "ddpmx 0.1.0", "seed": "0", "index": "7"}])
    with pytest.raises(OutputError, match="refusing to mix pictures of a task with the images of `ddpmx generate`"):
        pictures.check_replaceable(tmp_path, [tmp_path / "00000.png"], [source], overwrite=True)
    pictures.check_replaceable(tmp_path / "one.png", [tmp_path / "one.png"], [source])  # by its own name it may
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "run.json").write_text('{"ddpmx": "0.1.0", "run": {"seed": 0}}')
    with pytest.raises(OutputError, match="which is drawn in parts"):
        pictures.check_replaceable(parts, [parts / "a.png"], [source])
    pictures.save_pictures([drawn], [GREY[..., None]], [pictures.text("denoise", model="m")])
    pictures.check_replaceable(tmp_path, [tmp_path / "00000.png"], [source])


def test_all_are_written_or_none(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        pictures.save_pictures([tmp_path / "a.png", tmp_path / "b.png"], [GREY[..., None]] * 2, [{}, {}])
    with pytest.raises(InputError, match="cannot be saved as a picture"):
        pictures.save_pictures([tmp_path / "a.png", tmp_path / "c.png"], [GREY[..., None], SAME[..., :2]], [{}, {}])
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
