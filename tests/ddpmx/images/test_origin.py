"""The text in an image's file: it is enough to draw the image again, and tells whose it is."""

from __future__ import annotations

import dataclasses
import os
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpmx import ModelSpec
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import FileFormatError, OutputError
from ddpmx.formats.png_text import read_png_text
from ddpmx.images.gallery import Animation, check_pictures_replaceable, save_gallery
from ddpmx.images.origin import Origin, difference
from ddpmx.sampling.request import Sampling

PICTURES = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6, 1)
ORIGIN = Origin("a" * 64, "fp16", 2**64 - 1, Sampling("ddim", 20, "trailing", 0.5), 20, first=7, labels=[0, 4, 4])


def test_each_image_says_its_own_index_and_label(tmp_path):
    written = save_gallery(tmp_path, PICTURES, first=7, grid=True, origin=ORIGIN)
    first, _, last, sheet = (Image.open(path).text for path in written)  # Pillow is the other reader
    assert first["Software"].startswith("ddpmx ")
    assert {k: v for k, v in first.items() if k != "Software"} == {
        **{"model": "a" * 64, "precision": "fp16", "seed": str(2**64 - 1), "index": "7", "label": "0"},
        **{"steps": "20", "sampler": "ddim", "spacing": "trailing", "eta": "0.5"},
    }
    assert (last["index"], last["label"]) == ("9", "4")
    assert (sheet["index"], sheet["label"]) == ("7-9", "0,4,4")
    for path in written:
        with Image.open(path) as picture:
            assert read_png_text(path) == (picture.size[::-1], dict(picture.text))


def test_guidance_is_stated_where_there_is_some(tmp_path):
    guided = dataclasses.replace(ORIGIN, guidance=2.5)
    assert (guided.text(0)["guidance"], guided.text(0)["label"]) == ("2.5", "0")
    assert "guidance" not in ORIGIN.text(0)
    path, *_ = save_gallery(tmp_path, PICTURES, first=7, origin=guided)
    assert read_png_text(path)[1]["guidance"] == "2.5"
    assert difference(path, guided, 3) is None
    assert difference(path, ORIGIN, 3) == "guidance 2.5, and now not stated"


def test_a_condition_s_name_may_be_any_file_name(tmp_path):
    names = [os.fsdecode(b"\xe4.png"), "a\nmodel: b.png", "ä.png"]
    origin = dataclasses.replace(ORIGIN, labels=None, conditions=names)
    spec = ModelSpec((1, 4, 6), timesteps=20)
    animation = Animation(spec, make_table(spec.make_schedule(), spec.prediction, spec.variance), 3)
    for path in save_gallery(tmp_path, PICTURES, first=7, animation=animation, origin=origin):
        assert difference(path, origin, 3) is None
    assert read_png_text(tmp_path / "00007.png")[1]["condition"] == "?.png"
    assert read_png_text(tmp_path / "00008.png")[1]["condition"] == "a?model: b.png"
    assert read_png_text(tmp_path / "00009.png")[1]["condition"] == "ä.png"


def test_text_of_other_programs_is_read(tmp_path):
    chunks = PngInfo()
    chunks.add_text("Author", "Zoë")
    chunks.add_itxt("Title", "ᾱ", lang="el")
    chunks.add_text("Comment", "long " * 1000, zip=True)  # compressed: left out
    Image.new("L", (5, 3)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_png_text(tmp_path / "a.png") == ((3, 5), {"Author": "Zoë", "Title": "ᾱ"})


def test_damaged_pngs_are_refused(tmp_path):
    (path,) = save_gallery(tmp_path, PICTURES[:1], origin=ORIGIN)
    whole = path.read_bytes()
    read_png_text(path)
    for damaged in (b"", whole[:20], whole[:60], whole.replace(b"fp16", b"fp32"), b"GIF89a" + whole):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            read_png_text(path)
    for length in range(8, len(whole) - 4):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="not a valid PNG\nNote: it is cut short"):
            read_png_text(path)
    huge = b"\x7f\xff\xff\xfftEXt"  # a declared length of 2 GiB is not read
    path.write_bytes(whole[:33] + huge)
    with pytest.raises(FileFormatError):
        read_png_text(path)
    assert zlib.crc32(b"IEND") == 0xAE426082  # PNG specification: the last chunk of every file
    assert whole.endswith(b"IEND\xae\x42\x60\x82")


def test_pictures_of_others_are_not_overwritten(tmp_path):
    written = save_gallery(tmp_path, PICTURES, grid=True, origin=ORIGIN)
    check_pictures_replaceable([*written, tmp_path / "new.png"], "a" * 64)
    for path in written:
        with pytest.raises(OutputError, match="another model, aaaaaaaaaaaa"):
            check_pictures_replaceable([path], "b" * 64)
    Image.new("RGB", (3, 3)).save(written[0])
    Image.new("RGB", (3, 3)).save(tmp_path / "x0.gif")
    for path in (written[0], tmp_path / "x0.gif"):
        with pytest.raises(OutputError, match="ddpmx has not drawn it"):
            check_pictures_replaceable([path], "a" * 64)
    for rest in (b"", written[1].read_bytes()[:20]):  # cut off
        written[0].write_bytes(rest)
        check_pictures_replaceable([written[0]], "a" * 64)
    written[0].write_bytes(b"something else")
    with pytest.raises(OutputError, match="ddpmx has not drawn it"):
        check_pictures_replaceable([written[0]], "a" * 64)
