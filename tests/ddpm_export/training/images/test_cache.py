"""The pixels kept in a run are those of the files, or the files are read again."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, load_dataset, load_source
from ddpm_export.training.images import cache, folder
from ddpm_export.training.images.source import READING, Source
from ddpmx.errors import FileFormatError

RNG = np.random.default_rng(0)


@pytest.fixture
def images(tmp_path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(5):
        Image.fromarray(RNG.integers(0, 4096, (8, 8)).astype(np.uint16)).save(data / f"{index}.png")
    return data


@pytest.fixture
def kept(tmp_path, images) -> tuple[Dataset, Path]:
    dataset = load_dataset(images)
    cache.store(tmp_path, dataset.cache_key, dataset.images, dataset.notes)
    return dataset, tmp_path / cache.NAME


def read_again(monkeypatch, source: Source, cached: Path) -> bool:
    """Whether files are decoded in spite of the cache; what is read has to be right either way."""
    decoded = []
    read = folder.read_image
    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_image", lambda *how, **more: decoded.append(how[0]) or read(*how, **more))
        again = load_source(source, cached=cached)
    assert np.array_equal(again.images, load_source(source).images)
    return bool(decoded)


def test_nothing_is_decoded_as_long_as_nothing_has_changed(monkeypatch, kept):
    dataset, cached = kept
    monkeypatch.setattr(folder, "read_image", lambda *_, **__: pytest.fail("decoded"))
    again = load_source(dataset.source, cached=cached)
    assert np.array_equal(again.images, dataset.images)
    assert again.notes == dataset.notes != ()
    assert again.fingerprint() == dataset.fingerprint()
    assert again.cache_key == dataset.cache_key


@pytest.mark.parametrize("change", ["touched", "replaced", "renamed", "added", "removed"])
def test_a_changed_file_is_read_again(monkeypatch, kept, images, change):
    dataset, cached = kept
    file = images / "1.png"
    if change == "touched":
        os.utime(file)
    elif change == "replaced":  # by one of the same size with the same time
        status = file.stat()
        data = bytearray(file.read_bytes())
        time.sleep(0.01)
        file.write_bytes(bytes(data))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "renamed":
        file.rename(images / "9.png")
    elif change == "added":
        (images / "5.png").write_bytes(file.read_bytes())
    else:
        file.unlink()
    assert read_again(monkeypatch, dataset.source, cached)


@pytest.mark.parametrize("change", [{"size": (4, 4)}, {"channels": 3}, {"white": 1000}])
def test_other_settings_are_another_reading(monkeypatch, kept, change):
    dataset, cached = kept
    assert not read_again(monkeypatch, dataset.source, cached)
    assert read_again(monkeypatch, dataclasses.replace(dataset.source, **change), cached)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "gone"])
def test_a_damaged_cache_is_passed_over(monkeypatch, kept, damage):
    dataset, cached = kept
    data = bytearray(cached.read_bytes())
    if damage == "gone":
        cached.unlink()
    else:
        data[-400] ^= 0xFF  # a pixel: the archive's checksum finds it
        cached.write_bytes({"empty": b"", "cut": data[:-50], "text": b"hello", "flipped": bytes(data)}[damage])
    assert read_again(monkeypatch, dataset.source, cached)
    cache.store(cached.parent, dataset.cache_key, dataset.images, ())
    assert cache.load(cached, dataset.cache_key) is not None, "and written anew"


def test_too_many_pixels_and_a_full_disk_are_no_error(monkeypatch, tmp_path, images):
    dataset = load_dataset(images)
    monkeypatch.setattr(cache, "MAX_BYTES", dataset.images.nbytes - 1)
    cache.store(tmp_path, dataset.cache_key, dataset.images, ())
    assert not (tmp_path / cache.NAME).exists()
    monkeypatch.undo()
    cache.store(tmp_path / "missing", dataset.cache_key, dataset.images, ())


def test_runs_from_before_are_read_as_they_were(tmp_path):
    """Their sources have no background, no white and no reading: then hidden colours are kept, and links not followed."""
    data = tmp_path / "data"
    data.mkdir()
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 77
    Image.fromarray(rgba).save(data / "a.png")
    Image.fromarray(rgba).save(data / "b", "PNG")
    old = Source.from_json({"path": str(data), "size": None, "channels": 3}, "run")
    assert load_source(old).images.tolist() == rgba[None, ..., :3].tolist()
    assert len(load_dataset(data)) == 2
    new = load_dataset(data, channels=3, background=(1, 2, 3)).source
    assert Source.from_json(new.to_json(), "run") == new
    for junk in ({"reading": READING + 1}, {"reading": 0}, {"background": [1, 2]}, {"white": "x"}, {"max_pixels": 0}):
        with pytest.raises(FileFormatError):
            Source.from_json(new.to_json() | junk, "run")
