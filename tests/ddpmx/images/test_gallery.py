"""The folder that `generate` writes: one run's images, all of them or none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddpmx.errors import OutputError
from ddpmx.images import writers
from ddpmx.images.gallery import check_free, check_one_run, earlier_images, other_runs, save_gallery
from ddpmx.images.origin import Origin
from ddpmx.sampling.request import Sampling

IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)
RUN = Origin("a" * 64, "fp32", 0, Sampling(), 50, labels=[1, 2, 3])


@pytest.fixture
def folder(tmp_path):
    save_gallery(tmp_path, IMAGES, grid=True, origin=RUN)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "1.png").write_text("a name that no run writes")
    return tmp_path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b" * 64},
        {"precision": "fp16"},
        {"seed": 1},
        {"seed": 1, "first": 50},
        {"steps": 49},
        {"sampling": Sampling(sampler="ddim")},
        {"sampling": Sampling(variance="fixed_small")},
        {"labels": [1, 2, 4]},
        {"labels": None},
    ],
)
def test_images_of_another_run_are_refused_and_replaced_as_a_whole(folder, change):
    other = dataclasses.replace(RUN, **change)
    with pytest.raises(OutputError, match="refusing to mix the images of two runs"):
        check_one_run(folder, other, 3)
    gone = [*earlier_images(folder), folder / "grid.png"]
    save_gallery(folder, IMAGES[:1] + 1, first=other.first, origin=other, instead_of=gone)
    mine = writers.image_path(folder, other.first).name
    assert set(content(folder)) == {mine, "1.png", "notes.txt"}
    check_one_run(folder, other, 3)


def test_what_is_no_run_of_generate_is_not_mixed_with(folder):
    paths = [writers.image_path(folder, number) for number in range(4)]
    check_free(paths, RUN, 3, folder=folder)
    paths[3].write_bytes(b"")  # a write that was broken off
    check_free(paths, RUN, 4, folder=folder)
    paths[3].write_text("somebody's own")
    with pytest.raises(OutputError, match=r"refusing to overwrite .*: ddpmx has not drawn it"):
        check_free(paths, RUN, 4, folder=folder)
    paths[3].unlink()
    writers.save_png(folder / "scan.png", IMAGES[0], text={"Software": "ddpmx 0.1.0", "task": "denoise"})
    with pytest.raises(OutputError, match="the pictures of a task"):
        check_free(paths, RUN, 3, folder=folder)
    (folder / "scan.png").unlink()
    (folder / "run.json").write_text('{"run": {"name": "somebody\'s experiment"}}')
    check_free(paths, RUN, 3, folder=folder)
    (folder / "run.json").write_text('{"ddpmx": "0.1.0", "run": {"seed": 0}}')
    with pytest.raises(OutputError, match="which is drawn in parts"):
        check_free(paths, RUN, 3, folder=folder)


def test_a_run_may_be_repeated_and_continued(folder):
    before = content(folder)
    check_one_run(folder, RUN, 3)
    assert other_runs(folder, RUN, 3) == []
    further = dataclasses.replace(RUN, first=2, labels=[3, 0])
    check_one_run(folder, further, 2)
    save_gallery(folder, IMAGES[1:], first=2, origin=further)
    assert set(content(folder)) == {*before, "00003.png"}


@pytest.mark.parametrize("function", ["writers.png", "write_synced", "exchange"])
def test_a_failure_leaves_the_earlier_run_as_it_was(folder, monkeypatch, function):
    before = content(folder)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ddpmx.images.gallery.{function}", fail)
    with pytest.raises(OutputError, match=f"{folder}: cannot be written"):
        save_gallery(folder, IMAGES[:1], instead_of=earlier_images(folder))
    assert content(folder) == before
