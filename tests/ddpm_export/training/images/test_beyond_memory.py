"""Images that do not fit into memory give the same batches, wherever they lie."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpm_export.training.images import cache, folder, memory
from ddpm_export.training.images.decoding import Decoding
from ddpm_export.training.images.on_disk import OnDisk
from ddpm_export.training.images.pixels import InMemory
from ddpmx.errors import DataError, OutputError

RNG = np.random.default_rng(0)
ORDER = np.array([3, 0, 3, 8, 1])


@pytest.fixture
def photos(tmp_path) -> Path:
    data = tmp_path / "photos"
    data.mkdir()
    for index in range(9):
        Image.fromarray(RNG.integers(0, 256, (8, 6, 3), np.uint8)).save(data / f"{index}.png")
    return data


def recorded(dataset: Dataset) -> Source:
    return Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")


def test_the_places_of_pixels_give_the_same_images(photos, tmp_path):
    inside = load_dataset(photos)
    kept = load_dataset(photos, memory_limit=8 * 6 * 3 * 9 - 1, keep=tmp_path / "run")
    decoded = load_dataset(photos, memory_limit=0)
    assert [type(d.pixels) for d in (inside, kept, decoded)] == [InMemory, OnDisk, Decoding]
    for dataset in (kept, decoded):
        assert dataset.shape == inside.shape
        assert len(dataset) == 9
        assert np.array_equal(dataset.take(ORDER), inside.take(ORDER))
        assert np.array_equal(dataset.images, inside.images)
        assert dataset.cache_key is None, "the trainer must not store it again"
    assert load_dataset(photos, memory_limit=8 * 6 * 3 * 9).cache_key == inside.cache_key != None  # noqa: E711
    with pytest.raises(IndexError):
        kept.take(np.array([9]))
    with pytest.raises(IndexError):
        kept.take(np.array([-1]))


@pytest.mark.parametrize("begun", ["in memory", "on disk", "decoding"])
def test_a_run_may_go_on_with_more_or_less_memory(photos, tmp_path, begun):
    """What images are known by is settled when a run begins: not by the memory that there is when it goes on."""
    run = tmp_path / "run"
    how = {"in memory": {}, "on disk": {"memory_limit": 0, "keep": run}, "decoding": {"memory_limit": 0}}[begun]
    dataset = load_dataset(photos, **how)
    source = recorded(dataset)
    assert source == dataset.source
    assert source.identity == ("pixels" if begun == "in memory" else "files")
    kinds = set()
    for limit in (None, 0):
        for keep in (None, tmp_path / "again"):
            again = load_source(source, cached=run / cache.NAME, keep=keep, memory_limit=limit)
            kinds.add(type(again.pixels))
            assert again.fingerprint() == dataset.fingerprint()
            assert np.array_equal(again.take(ORDER), dataset.take(ORDER))
    assert kinds >= {InMemory, OnDisk}
    Image.fromarray(RNG.integers(0, 256, (8, 6, 3), np.uint8)).save(photos / "4.png")  # another image of that name
    for limit in (None, 0):
        assert load_source(source, memory_limit=limit).fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("change", [{"size": (4, 3)}, {"channels": 1}])
def test_the_identity_of_files_is_of_the_settings_too(photos, change):
    one = load_dataset(photos, memory_limit=0)
    assert load_dataset(photos, memory_limit=0, **change).fingerprint() != one.fingerprint()


def test_a_copy_of_the_files_is_the_same_data_set(photos, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in photos.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert load_dataset(copy, memory_limit=0).fingerprint() == load_dataset(photos, memory_limit=0).fingerprint()
    (copy / "8.png").rename(copy / "9.png")
    assert load_dataset(copy, memory_limit=0).fingerprint() != load_dataset(photos, memory_limit=0).fingerprint()


def test_what_was_decoded_once_is_not_decoded_again(photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    seen: list[tuple[int, int]] = []
    dataset = load_dataset(photos, memory_limit=0, keep=run, progress=lambda *counts: seen.append(counts))
    assert seen == [(i + 1, 9) for i in range(9)]
    monkeypatch.setattr(folder, "read_image", lambda *_, **__: pytest.fail("decoded"))
    for again in (
        load_source(recorded(dataset), cached=run / cache.NAME, keep=run, memory_limit=0),
        load_dataset(photos, memory_limit=0, keep=run),  # a run that failed before its first checkpoint begins anew
    ):
        assert isinstance(again.pixels, OnDisk)
        assert again.source == dataset.source
        assert again.fingerprint() == dataset.fingerprint()
    monkeypatch.undo()
    (run / cache.NAME).write_bytes((run / cache.NAME).read_bytes()[:-300])
    again = load_source(recorded(dataset), cached=run / cache.NAME, keep=run, memory_limit=0)
    assert np.array_equal(again.images, load_dataset(photos).images), "damaged: decoded again"


def test_the_pixels_of_a_run_are_an_npz_that_numpy_reads(photos, tmp_path):
    load_dataset(photos, memory_limit=0, keep=tmp_path / "run")
    with np.load(tmp_path / "run" / cache.NAME) as kept:
        assert np.array_equal(kept["images"], load_dataset(photos).images)


def test_broken_files_are_named_at_once_and_nothing_is_left(photos, tmp_path):
    for index in (2, 5):
        file = photos / f"{index}.png"
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError) as caught:
        load_dataset(photos, memory_limit=0, keep=tmp_path / "run", size=(8, 6))
    assert [item.split(":")[0] for item in caught.value.items] == ["2.png", "5.png"]
    assert list((tmp_path / "run").iterdir()) == []


def test_too_little_room_is_said_before_anything_is_decoded(photos, tmp_path, monkeypatch):
    usage = cache.shutil.disk_usage(tmp_path)._replace(free=9 * 8 * 6 * 3 - 1)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(folder, "read_image", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(OutputError, match="no room for") as caught:
        load_dataset(photos, memory_limit=0, keep=tmp_path / "run")
    assert "--no-cache" in (caught.value.hint or "")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_line_says_where_pixels_are(photos, tmp_path):
    (line,) = load_dataset(photos, memory_limit=0, keep=tmp_path / "run").notes
    assert f"read out of {tmp_path / 'run' / cache.NAME}" in line
    (again,) = load_dataset(photos, memory_limit=0, keep=tmp_path / "run").notes
    assert again == line
    (line,) = load_dataset(photos, memory_limit=0).notes
    assert line.endswith("decoded whenever they are taken")
    assert load_dataset(photos).notes == ()


def test_a_place_that_cannot_be_written_is_an_error(photos, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError):
        load_dataset(photos, memory_limit=0, keep=tmp_path / "run")


def test_a_file_that_breaks_meanwhile_is_named_where_it_is_taken(photos):
    dataset = load_dataset(photos, memory_limit=0)
    (photos / "3.png").write_text("no image")
    dataset.take(np.array([0, 1]))
    with pytest.raises(DataError, match=r"3\.png: not an image"):
        dataset.take(ORDER)


def test_a_kept_file_that_is_cut_off_meanwhile_is_an_error_and_no_crash(photos, tmp_path):
    dataset = load_dataset(photos, memory_limit=0, keep=tmp_path / "run")
    with (tmp_path / "run" / cache.NAME).open("r+b") as stream:
        stream.truncate(600)
    with pytest.raises(DataError, match="can no longer be read"):
        dataset.take(np.array([8]))


@pytest.mark.parametrize("keep", [True, False])
def test_conditions_beyond_memory(photos, tmp_path, keep):
    small = tmp_path / "small"
    small.mkdir()
    for index in range(9):
        Image.open(photos / f"{index}.png").resize((3, 4)).save(small / f"{index}.png")
    run = tmp_path / "run" if keep else None
    inside = load_dataset(photos, condition=small)
    outside = load_dataset(photos, condition=small, memory_limit=0, keep=run)
    assert inside.conditions is not None
    assert outside.conditions is not None
    assert isinstance(outside.conditions.pixels, OnDisk if keep else Decoding)
    assert np.array_equal(outside.conditions.take(ORDER), inside.conditions.take(ORDER))
    for limit in (None, 0):
        again = load_source(recorded(outside), cached=tmp_path / "run" / cache.NAME, memory_limit=limit)
        assert again.fingerprint() == outside.fingerprint()
        again = load_source(recorded(inside), cached=tmp_path / "run" / cache.NAME, memory_limit=limit)
        assert again.fingerprint() == inside.fingerprint()
    Image.new("RGB", (3, 4)).save(small / "5.png")
    assert load_source(recorded(outside), memory_limit=0).fingerprint() != outside.fingerprint()


def test_memory_is_what_the_system_and_the_control_group_leave(tmp_path, monkeypatch):
    assert memory.default_limit() > 0
    group = tmp_path / "group"
    group.mkdir()
    for name, text in (
        ("memory.max", "max"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 100\n"),
    ):
        (group / name).write_text(text)
    assert memory._of_group(group, tmp_path / "no list") is None, "no limit"
    (group / "memory.max").write_text("1000\n")
    assert memory._of_group(group, tmp_path / "no list") == 400
    monkeypatch.setattr(memory, "_of_group", lambda: 400)
    assert memory.default_limit() == 200
    monkeypatch.setattr(memory, "_of_group", lambda: None)
    monkeypatch.setattr(memory, "_of_system", lambda: None)
    assert memory.default_limit() == memory.UNKNOWN


def test_a_source_of_an_unknown_identity_is_refused(photos):
    source = dataclasses.replace(Source(photos), identity="names")
    with pytest.raises(Exception, match="run: the images"):
        Source.from_json(source.to_json(), "run")


@pytest.mark.parametrize("version", [1, 2])
def test_the_control_group_of_a_job_lies_deeper_than_a_container_s(tmp_path, version):
    """The least of a group and of those around it holds; those beside it do not count."""
    limit, used, freeable = memory._VERSION_1 if version == 1 else memory._VERSION_2
    root = tmp_path / "memory" if version == 1 else tmp_path
    for path, most in ((".", None), ("slurm", 5000), ("slurm/job_1", 900), ("slurm/job_1/step_0", 2000), ("other", 1)):
        group = root / path
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(("9223372036854771712" if version == 1 else "max") if most is None else str(most))
        (group / used).write_text("300")
        (group / "memory.stat").write_text(f"{freeable} 50\n")
    listed = tmp_path / "list"
    lines = {1: "11:cpu,cpuacct:/other\n4:memory:/slurm/job_1/step_0\n", 2: "0::/slurm/job_1/step_0\n"}
    listed.write_text(lines[version])
    assert memory._of_group(tmp_path, listed) == 900 - 300 + 50
    listed.write_text(lines[version].replace("/slurm/job_1/step_0", "/slurm"))
    assert memory._of_group(tmp_path, listed) == 5000 - 300 + 50
