"""Tars of images, labels and conditions, as WebDataset lays them out, are read by place and in their order."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpm_export.training.images import cache, shards
from ddpm_export.training.images.decoding import Decoding
from ddpm_export.training.images.on_disk import OnDisk
from ddpmx.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 8, 6, 3), np.uint8)
ORDER = np.array([7, 0, 7, 8, 3])


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(first: int, last: int, kind: str = "cls") -> dict[str, bytes]:
    out: dict[str, bytes] = {}
    for index in range(first, last):
        out[f"{index:03}.png"] = png(IMAGES[index])
        out[f"{index:03}.{kind}"] = (
            str(index % 3).encode() if kind == "cls" else ("dog", "cat", "owl")[index % 3].encode()
        )
        out[f"{index:03}.json"] = b"{}"
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    for number in range(3):
        write(path / f"s-{number:02}.tar", members(3 * number, 3 * number + 3))
    return path


def recorded(dataset: Dataset) -> Source:
    return Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")


@pytest.mark.parametrize("name", ["", "s-{00..02}.tar"])
@pytest.mark.parametrize("limit", [None, 0])
def test_images_in_the_order_of_shards_and_members(folder, name, limit):
    dataset = load_dataset(folder / name, classes=True, memory_limit=limit)
    assert np.array_equal(dataset.images, IMAGES)
    assert np.array_equal(dataset.take(ORDER), IMAGES[ORDER])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 2] * 3
    assert dataset.classes == ("0", "1", "2")
    assert "9 images; not read: 9 .json" in dataset.notes
    assert len(load_dataset(folder / "s-01.tar")) == 3
    assert load_dataset(folder / "s-01.tar").labels is None


def test_names_as_labels(tmp_path):
    write(tmp_path / "a.tar", members(0, 9, "txt"))
    dataset = load_dataset(tmp_path / "a.tar", classes=True)
    assert dataset.classes == ("cat", "dog", "owl")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0, 2] * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"001.cls": None, "002.cls": b" \n"}, "2 of 9 images have no label"),
        ({f"{i:03}.cls": f"a caption of {i}".encode() for i in range(9)}, "9 different texts"),
        ({"001.cls": b"\xff"}, "no label"),
        ({"001.cls": b"1" * 2000}, "no label"),
        ({"001.cls": b"99999999"}, "is no class"),
    ],
)
def test_labels_that_are_none(tmp_path, change, says):
    changed = {name: data for name, data in (members(0, 9) | change).items() if data is not None}
    write(tmp_path / "a.tar", changed)
    load_dataset(tmp_path / "a.tar")
    with pytest.raises(DataError, match=says) as caught:
        load_dataset(tmp_path / "a.tar", classes=True)
    assert caught.value.hint
    if "no label" in says and "2 of 9" in says:
        assert caught.value.items == ("a.tar: 001.png", "a.tar: 002.png")


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_is_resumed_and_only_with_its_own_images(folder, tmp_path, keep):
    run = tmp_path / "run"
    inside = load_dataset(folder)
    dataset = load_dataset(folder, memory_limit=0, keep=run if keep else None)
    assert isinstance(dataset.pixels, OnDisk if keep else Decoding)
    for source, known in ((recorded(dataset), dataset), (recorded(inside), inside)):
        for limit in (None, 0):
            again = load_source(source, cached=run / cache.NAME, memory_limit=limit)
            assert again.fingerprint() == known.fingerprint()
            assert np.array_equal(again.take(ORDER), IMAGES[ORDER])
    other = members(3, 6)
    other["004.png"] = png(IMAGES[0])
    write(folder / "s-01.tar", other)
    for limit in (None, 0):
        assert load_source(recorded(dataset), cached=run / cache.NAME, memory_limit=limit).fingerprint() != (
            dataset.fingerprint()
        )


def test_conditions_in_shards_of_their_own(folder, tmp_path):
    grey = {f"{index:03}.seg.png": png(IMAGES[index, ..., 0]) for index in reversed(range(9))}
    write(tmp_path / "cond.tar", grey)
    dataset = load_dataset(folder, condition=tmp_path / "cond.tar")
    assert dataset.conditions is not None
    assert np.array_equal(dataset.conditions.take(ORDER), IMAGES[ORDER][..., :1])
    assert load_source(recorded(dataset)).fingerprint() == dataset.fingerprint()
    del grey["004.seg.png"]
    write(tmp_path / "cond.tar", grey)
    with pytest.raises(DataError, match="not one to one") as caught:
        load_dataset(folder, condition=tmp_path / "cond.tar")
    assert caught.value.items == ("004: no condition image",)


def test_broken_members_are_named(folder):
    other = members(3, 6)
    other["004.png"] = other["004.png"][:60]
    write(folder / "s-01.tar", other)
    with pytest.raises(DataError) as caught:
        load_dataset(folder)
    assert caught.value.fact == f"{folder}: s-01.tar: 004.png: not an image that can be read"
    dataset = load_dataset(folder, skip_broken=True, classes=True)
    assert np.array_equal(dataset.images, np.delete(IMAGES, 4, axis=0))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2]


def test_names_are_never_paths(tmp_path):
    inside = {
        "../../up.png": png(IMAGES[0]),
        "/etc/passwd.png": png(IMAGES[1]),
        "x/" * 150 + "long.png": png(IMAGES[2]),
    }
    write(tmp_path / "a.tar", inside | {"._hidden.png": b"", "folder/.png": b""})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    dataset = load_dataset(tmp_path / "a.tar")
    assert np.array_equal(dataset.images, IMAGES[:3])
    assert sorted(tmp_path.rglob("*")) == before
    assert "2 hidden by a dot" in dataset.notes[0]
    assert "3 links or devices in a tar" in dataset.notes[0]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut in an image", "it ends in|unexpected end"),
        ("damaged header", "no header at"),
        ("compressed", "unpack it"),
        ("text", "not a tar"),
        ("two images", "several images have the key '000'"),
        ("no images", "no images in this tar"),
        ("missing", "1 of 3 shards are not there"),
        ("backwards", "no range of shards"),
        ("gone", "1 of 1 shards are not there"),
    ],
)
def test_what_is_no_shard(tmp_path, kind, says):
    path = tmp_path / "a.tar"
    data = write(path, members(0, 3)).read_bytes()
    if kind == "cut in an image":
        path.write_bytes(data[:700])
    elif kind == "damaged header":  # Python's tarfile takes it for the end
        at = data.index(b"002.png")
        path.write_bytes(data[:at] + b"X" + data[at + 1 :])
        with tarfile.open(path) as tar:
            assert "000.png" in tar.getnames()
            assert "002.png" not in tar.getnames()  # control
    elif kind == "compressed":
        write(path, members(0, 3), "w:gz")
    elif kind == "text":
        path.write_text("hello" * 300)
    elif kind == "two images":
        write(path, members(0, 3) | {"000.seg.png": png(IMAGES[0])})
    elif kind == "no images":
        write(path, {"a.json": b"{}"})
    elif kind == "missing":
        for number in (0, 2):
            write(tmp_path / f"s{number}.tar", members(0, 3))
        path = tmp_path / "s{0..2}.tar"
    elif kind == "backwards":
        path = tmp_path / "s{2..0}.tar"
    else:
        path = tmp_path / "gone.tar"
    with pytest.raises(DataError, match=says) as caught:
        load_dataset(path)
    assert str(path.parent) in caught.value.fact
    assert caught.value.hint
    assert kind != "missing" or caught.value.items == ("s1.tar",)


def test_a_member_too_large_to_be_an_image_is_named(folder, monkeypatch):
    monkeypatch.setattr(shards, "MAX_IMAGE", 50)
    with pytest.raises(DataError, match="9 of 9 files cannot be read"):
        load_dataset(folder)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_are_an_error_or_change_nothing_else(tmp_path, seed):
    """Headers decide where images are read: whatever they say, it is an image of the tar, or an error."""
    path = write(tmp_path / "a.tar", members(0, 9))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    at = [start + int(rng.integers(0, 512)) for start in range(0, len(data) - 10240, 512) if rng.random() < 0.05]
    for place in at:
        data[place] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(bytes(data))
    try:
        images = load_dataset(path, memory_limit=0, size=(8, 6), channels=3).images
    except DataError:
        return
    whole = {image.tobytes() for image in IMAGES}
    assert all(image.tobytes() in whole for image in images)
    assert len(images) == 9


def test_a_folder_of_images_with_a_tar_beside_them_is_a_folder(tmp_path):
    write(tmp_path / "a.tar", members(0, 3))
    Image.fromarray(IMAGES[8]).save(tmp_path / "a.png")
    dataset = load_dataset(tmp_path)
    assert len(dataset) == 1
    assert "1 .tar" in dataset.notes[0]
