"""Files are images by what is in them; linked folders are read once; what is left out is said."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.images.find import find_images

PICTURE = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


def put(path: Path, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, kind)
    return path


def names(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_images(folder).files]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("name", ["a", "a.dat", "a.jfif"])
def test_every_format_is_known_by_its_content(tmp_path, kind, name):
    put(tmp_path / name, kind)
    wanted = [] if (kind, name) == ("TIFF", "a.dat") else [name]  # cameras' raw files begin as TIFF does
    assert names(tmp_path) == wanted


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / ".thumbnail.png")
    for name, content in (
        ("labels.csv", "BM is not a bitmap"),
        ("notes.txt", "P6 is not a pixmap"),
        ("more.txt", ""),
        ("photo.heic", "x"),
    ):
        (tmp_path / name).write_text(content)
    put(tmp_path / "raw.nef", "TIFF")
    (tmp_path / "gone").symlink_to(tmp_path / "missing")
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["a.png"]
    said = found.describe()
    assert said == (
        "not read: 2 .txt, 1 .csv, 1 .heic, 1 .nef, 1 hidden by a dot (.thumbnail.png), 1 links to nothing (gone)"
    )
    (tmp_path / "sub").mkdir()
    assert find_images(tmp_path / "sub").describe() is None


@pytest.mark.parametrize("run", [".", "run"])
@pytest.mark.parametrize("mark", ["checkpoints/00000001/spec.json", "images-cache.npz"])
def test_the_grids_of_a_run_among_its_images_are_left_out(tmp_path, run, mark):
    put(tmp_path / "a.png")
    put(tmp_path / run / "samples" / "mine.png")
    put(tmp_path / run / "samples" / "grid-00000001.png")
    before = [name for name in names(tmp_path) if "grid" not in name]
    assert len(names(tmp_path)) == 3, "no run: samples is any folder"  # control
    (tmp_path / run / mark).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / run / mark).write_text("{}")
    assert names(tmp_path) == before
    assert "1 pictures that a run has drawn (grid-00000001.png)" in find_images(tmp_path).describe()


def test_linked_folders_are_read_like_others(tmp_path):
    for index in range(3):
        put(tmp_path / "elsewhere" / "dogs" / "deep" / f"{index}.png")
    data = tmp_path / "data"
    put(data / "cats" / "0.png")
    (data / "dogs").symlink_to(tmp_path / "elsewhere" / "dogs")
    assert names(data) == ["cats/0.png", "dogs/deep/0.png", "dogs/deep/1.png", "dogs/deep/2.png"]


def test_links_in_a_circle_end(tmp_path):
    put(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["0.png"]
    assert "a folder that is read already (up)" in found.describe()


def test_a_folder_with_several_names_counts_once(tmp_path):
    """Linked twice, linked beside itself, and linked with a folder inside it that is linked as well."""
    put(tmp_path / "data" / "zebra" / "0.png")
    put(tmp_path / "far" / "in" / "1.png")
    for name, target in (("b", "far"), ("a", "far/in"), ("again", "data/zebra"), ("c", "far")):
        (tmp_path / "data" / name).symlink_to(tmp_path / target)
    found = find_images(tmp_path / "data")
    assert sorted(os.path.realpath(file) for file in found.files) == [
        os.path.realpath(tmp_path / "data" / "zebra" / "0.png"),
        os.path.realpath(tmp_path / "far" / "in" / "1.png"),
    ]
    assert tmp_path / "data" / "zebra" / "0.png" in found.files, "a folder in its own place keeps its name"


def test_what_should_be_an_image_and_cannot_be_read_is_not_left_out(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "missing.jpg")
    assert [(path.name, why) for path, why in find_images(tmp_path).unreadable] == [("gone.jpg", "a link to nothing")]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert find_images(tmp_path).files == []


def test_a_folder_that_may_be_listed_and_not_entered_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "shut" / name).write_bytes(b"")
    is_dir = Path.is_dir

    def refused(path, **how):
        if path.parent.name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path, **how)

    monkeypatch.setattr(Path, "is_dir", refused)
    found = find_images(tmp_path)
    assert [(path.name, why) for path, why in found.unreadable] == [
        (n, "Permission denied") for n in ("a.png", "b.png")
    ]


def test_the_sheets_that_generate_adds_are_left_out(tmp_path):
    for name in ("00000.png", "00001.png", "grid.png", "strip.png"):
        put(tmp_path / "drawn" / name)
    put(tmp_path / "drawn" / "x0.gif", "GIF")
    put(tmp_path / "photos" / "grid.png")
    assert names(tmp_path) == ["drawn/00000.png", "drawn/00001.png", "photos/grid.png"]
    assert "sheets of the images beside them (grid.png, strip.png, x0.gif)" in find_images(tmp_path).describe()
    earlier = [file.name for file in find_images(tmp_path, reading=3).files]
    assert earlier == ["00000.png", "00001.png", "grid.png", "strip.png", "x0.gif", "grid.png"], (
        "as older runs read them"
    )
