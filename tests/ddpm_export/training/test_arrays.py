"""Arrays beyond memory stay in their file, and give the same batches as in memory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training import arrays
from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpm_export.training.images.on_disk import OnDisk
from ddpm_export.training.images.pixels import InMemory
from ddpmx.errors import DataError

NHWC = np.random.default_rng(0).integers(0, 256, (7, 8, 6, 3), np.uint8)
ORDER = np.array([5, 0, 5, 6])


def recorded(dataset: Dataset) -> Source:
    return Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")


def written(path: Path, array: np.ndarray, **others: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, images=array, **others)
    return path


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "images"),
    [(NHWC, NHWC), (NHWC[..., 0], NHWC[..., :1]), (NHWC.transpose(0, 3, 1, 2).copy(), NHWC)],
    ids=["N,H,W,C", "N,H,W", "N,C,H,W"],
)
def test_layouts(tmp_path, suffix, limit, array, images):
    dataset = load_dataset(written(tmp_path / f"a.{suffix}", array), memory_limit=limit)
    assert isinstance(dataset.pixels, InMemory if limit is None else OnDisk)
    assert len(dataset) == 7
    assert dataset.shape == (images.shape[3], 8, 6)
    assert np.array_equal(dataset.take(ORDER), images[ORDER])
    assert dataset.take(ORDER).flags.c_contiguous
    assert np.array_equal(dataset.images, images)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("begun", [None, 0], ids=["in memory", "on disk"])
def test_a_run_may_go_on_with_more_or_less_memory(tmp_path, suffix, begun):
    path = written(tmp_path / f"a.{suffix}", NHWC)
    dataset = load_dataset(path, memory_limit=begun)
    assert dataset.source.identity == ("pixels" if begun is None else "files")
    source = recorded(dataset)
    for limit in (None, 0):
        assert load_source(source, memory_limit=limit).fingerprint() == dataset.fingerprint()
    other = NHWC.copy()
    other[3, 2, 1] ^= 1
    written(path, other)
    for limit in (None, 0):
        assert load_source(source, memory_limit=limit).fingerprint() != dataset.fingerprint()


def test_labels_and_conditions_beside_images_on_disk(tmp_path):
    grey = NHWC[..., :1].copy()
    path = written(tmp_path / "a.npz", NHWC, cond=grey, y=np.arange(7) % 2)
    dataset = load_dataset(path, classes=True, condition=path, memory_limit=0)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert dataset.conditions is not None
    assert isinstance(dataset.conditions.pixels, OnDisk)
    assert np.array_equal(dataset.conditions.take(ORDER), grey[ORDER])
    assert load_source(recorded(dataset)).fingerprint() == dataset.fingerprint()
    written(path, NHWC, cond=grey[::-1], y=np.arange(7) % 2)
    assert load_source(recorded(dataset), memory_limit=0).fingerprint() != dataset.fingerprint()


def test_what_cannot_be_read_in_parts_is_in_memory_and_said(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=NHWC)
    np.save(tmp_path / "b.npy", np.asfortranarray(NHWC))
    np.save(tmp_path / "c.npy", NHWC / np.float32(255))
    for name, how in (("a.npz", {}), ("b.npy", {}), ("c.npy", {"white": 1})):
        dataset = load_dataset(tmp_path / name, memory_limit=0, **how)
        assert isinstance(dataset.pixels, InMemory)
        assert np.array_equal(dataset.images, NHWC)
        assert "GiB of memory" in dataset.notes[-1]
        assert not load_dataset(tmp_path / name, **how).notes[1:]


@pytest.mark.parametrize("name", ["b.npy", "c.npy"])
def test_what_is_too_large_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    np.save(tmp_path / "b.npy", np.asfortranarray(NHWC))
    np.save(tmp_path / "c.npy", NHWC / np.float32(255))
    monkeypatch.setattr(arrays, "MAX_BYTES", NHWC.nbytes - 1)
    monkeypatch.setattr(np, "fromfile", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DataError, match="unpacks to") as caught:
        load_dataset(tmp_path / name, white=1 if name == "c.npy" else None)
    assert "savez" in (caught.value.hint or "")


def damaged(kind: str) -> bytes:
    stream = io.BytesIO()
    np.save(stream, NHWC)
    whole = stream.getvalue()
    if kind == "objects":
        stream = io.BytesIO()
        np.save(stream, np.array([{}]), allow_pickle=True)
        return stream.getvalue()
    return {
        "empty": b"",
        "text": b"hello",
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "header": whole[:40],
        "negative": whole.replace(b"(7, 8, 6, 3)", b"(-7, 8, 6,3)"),
        "huge": whole.replace(b"(7, 8, 6, 3), }", b"(7, 8, 6, 3000000000), }")[: len(whole)],
    }[kind]


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "longer", "header", "negative", "huge", "objects"])
def test_damaged_npy(tmp_path, kind, limit):
    (tmp_path / "a.npy").write_bytes(damaged(kind))
    with pytest.raises(DataError, match=r"a\.npy: not a valid \.npy file"):
        load_dataset(tmp_path / "a.npy", memory_limit=limit)


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_flipped_bits_in_an_npz_that_stays_on_disk_are_an_error_or_change_nothing(tmp_path, at):
    """Headers decide where pixels are read: whatever they say, reading stays in the file and never crashes."""
    path = written(tmp_path / "a.npz", NHWC)
    data = bytearray(path.read_bytes())
    place = at if at < 200 else len(data) - (at - 199)
    data[place] ^= 0x41
    path.write_bytes(bytes(data))
    try:
        dataset = load_dataset(path, memory_limit=0)
    except DataError:
        return
    assert dataset.images.shape == NHWC.shape
    assert np.count_nonzero(dataset.images != NHWC) <= 1, "the flipped byte itself, whose checksum is not computed here"


def test_an_npy_that_is_cut_off_meanwhile_is_an_error_and_no_crash(tmp_path):
    path = written(tmp_path / "a.npy", NHWC)
    dataset = load_dataset(path, memory_limit=0)
    with path.open("r+b") as stream:
        stream.truncate(500)
    with pytest.raises(DataError, match="can no longer be read"):
        dataset.take(np.array([6]))
