"""A run in parts: the union is the single run, what is whole is not drawn again, and two runs are not mixed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ddpmx.errors import Cancelled, InputError, OutputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling
from ddpmx.scale.ranges import Range, Shard
from ddpmx.scale.stores import open_store
from ddpmx.scale.work import RUN, claim, default_per_file, draw, part, pending
from oracles import conditioning
from oracles.toy_backend import ToyBackend

WHOLE = Range(8, 30)


@pytest.fixture(params=["png", "npz", "tar"])
def form(request):
    return request.param


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(toy, work, folder, images, **options):
    """What a process does; the units that it drew."""
    store = open_store(str(folder))
    units = pending(work, store, images, claim(work, store))
    draw(toy, work, store, units, **options)
    return units


def test_the_union_of_the_shards_is_the_single_run(make_work, toy, tmp_path, form):
    work = make_work(form=form)
    run(toy, work, tmp_path / "single", WHOLE)
    for index in reversed(range(3)):
        run(toy, work, tmp_path / "shards", part(work, WHOLE, Shard(index, 3)))
    assert content(tmp_path / "shards") == content(tmp_path / "single")
    images = toy.generate(
        30, seed=3, first=8, batch=4, labels=[(4, 0, 2)[index % 3] for index in range(8, 38)], steps=3
    )
    if form == "npz":
        files = sorted((tmp_path / "single").glob("*.npz"))
        np.testing.assert_array_equal(np.concatenate([np.load(file)["images"] for file in files]), images)
    elif form == "png":
        (tmp_path / "plain").mkdir()
        plain = work.files(WHOLE, images)
        assert {name: data for name, data in content(tmp_path / "single").items() if name != RUN} == plain


@pytest.mark.parametrize("sways", ["size", "place"])
def test_shards_run_the_batches_of_the_single_run(make_work, tmp_path, sways, form):
    """On a network whose bits depend on the batch: its calls are the same ones, and so are the images."""
    work, calls, contents = make_work(form=form), [], []
    for count in (1, 3):
        backend = ToyBackend(sways=sways)
        with Pipeline(work.spec, backend) as pipeline:
            pipeline.generate(4, labels=0, batch=4, steps=1)  # what is measured once
            pipeline.generate(2, labels=0, batch=4, steps=1)
            before = len(backend.calls)
            for index in range(count):
                run(pipeline, work, tmp_path / f"{count}", part(work, WHOLE, Shard(index, count)))
        calls.append(backend.calls[before:])
        contents.append(content(tmp_path / f"{count}"))
    assert calls[0] == calls[1]
    assert contents[0] == contents[1]


def test_work_that_was_broken_off_goes_on(make_work, toy, tmp_path, form):
    work, steps = make_work(form=form), []
    run(toy, work, tmp_path / "whole", WHOLE)
    with pytest.raises(Cancelled):
        run(toy, work, tmp_path / "parts", WHOLE, progress=lambda *at: steps.append(at), cancel=lambda: len(steps) > 14)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert 1 < len(before) < len(content(tmp_path / "whole"))
    again = run(toy, work, tmp_path / "parts", WHOLE)
    assert sum(unit.count for unit in again) < WHOLE.count
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in before} == before, "they were left alone"
    assert run(toy, work, tmp_path / "parts", WHOLE) == []
    assert steps[-1][1] == 3 * 8, "8 batches of 3 steps"


def test_a_damaged_file_is_drawn_again(make_work, toy, tmp_path, form):
    work = make_work(form=form)
    run(toy, work, tmp_path, WHOLE)
    whole = content(tmp_path)
    name = work.names(Range(16, 8))[0]
    (tmp_path / name).write_bytes(whole[name][: len(whole[name]) // 2])
    assert [unit.first for unit in run(toy, work, tmp_path, WHOLE)] == [16]
    assert content(tmp_path) == whole


def test_more_images_of_the_same_run_come_later(make_work, toy, tmp_path, form):
    work = make_work(form=form)
    run(toy, work, tmp_path / "at once", Range(0, 40))
    run(toy, work, tmp_path / "later", Range(0, 13))
    units = run(toy, work, tmp_path / "later", Range(0, 40))
    assert units[0].first == (12 if form == "png" else 8), "what is not full is drawn again"
    assert run(toy, work, tmp_path / "later", Range(0, 5)) == []
    assert content(tmp_path / "later") == content(tmp_path / "at once")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": "b" * 64}, "model a"),
        ({"seed": 4}, "seed 3, and now 4"),
        ({"sampling": Sampling(sampler="ddim", steps=3)}, "sampler ancestral, and now ddim"),
        ({"batch": 2}, "batch 4, and now 2"),
        ({"turns": (4, 0)}, r"labels \[4, 0, 2\], and now \[4, 0\]"),
        ({"guidance": 2.0}, "guidance not stated, and now 2"),
        ({"form": "npz"}, "format tar, and now npz"),
        ({"per_file": 16}, "per_file 8, and now 16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_two_runs_are_not_mixed(make_work, toy, tmp_path, change, difference):
    run(toy, make_work(), tmp_path, Range(0, 8))
    before = content(tmp_path)
    with pytest.raises(OutputError, match=f"(?s)refusing to mix.*run.json: .*{difference}"):
        claim(make_work(**change), open_store(str(tmp_path)))
    assert content(tmp_path) == before


def test_conditions_are_part_of_a_run(make_work, tmp_path):
    cond = np.zeros((2, 2, 8, 8), np.float32)
    values = {"spec": conditioning.spec_of("condition"), "turns": None, "cond": cond, "cond_names": ("a", "b")}
    work, store = make_work(**values), open_store(str(tmp_path))
    claim(work, store)
    assert work.conditions(Range(3, 3))[:, 0, 0, 0].tolist() == [0, 0, 0]
    assert [work.origin(Range(3, 2)).text(at)["condition"] for at in (0, 1)] == ["b", "a"]
    for change in ({"cond": cond + 1}, {"cond_names": ("a", "c")}):
        with pytest.raises(OutputError, match="conditions"):
            claim(make_work(**values | change), store)


def test_without_run_json_the_files_speak_for_themselves(make_work, toy, tmp_path, form):
    work, store = make_work(form=form), open_store(str(tmp_path))
    run(toy, work, tmp_path, Range(0, 8))
    names = store.names()
    for other in (make_work(form=form, model="b" * 64), make_work(form=form, seed=4)):
        with pytest.raises(OutputError, match="refusing to mix"):
            pending(other, store, Range(0, 8), names)
    (tmp_path / RUN).unlink()
    with pytest.raises(OutputError, match="refusing to mix"):
        claim(make_work(form=form, seed=4), store)
    assert not (tmp_path / RUN).exists()
    if form == "png":  # the images of a plain generate
        assert run(toy, work, tmp_path, Range(0, 8)) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"run": 3}'])
def test_a_run_json_of_somebody_else_is_left_alone(make_work, tmp_path, text):
    (tmp_path / RUN).write_text(text)
    with pytest.raises(OutputError, match=r"run\.json is not ddpmx's"):
        claim(make_work(), open_store(str(tmp_path)))
    assert (tmp_path / RUN).read_text() == text


def test_somebody_else_s_file_of_the_name_is_left_alone(make_work, toy, tmp_path):
    work, store = make_work(form="png"), open_store(str(tmp_path))
    strange = make_work(form="npz").files(Range(0, 1), np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "mine.npz").write_bytes(next(iter(strange.values())))
    claim(work, store)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "00003.png")
    with pytest.raises(OutputError, match=r"(?s)refusing to mix.*00003\.png: not ddpmx's"):
        pending(work, store, Range(0, 8), store.names())


def test_another_run_that_begins_meanwhile_is_noticed_before_a_file_is_written(make_work, toy, tmp_path):
    work, store = make_work(), open_store(str(tmp_path))
    claim(work, store)
    other = json.loads((tmp_path / RUN).read_text())
    other["run"]["seed"] = "77"
    (tmp_path / RUN).write_text(json.dumps(other))
    with pytest.raises(OutputError, match="seed 77, and now 3"):
        draw(toy, work, store, work.units(Range(0, 8)))
    assert set(content(tmp_path)) == {RUN}


def test_files_end_with_batches(make_work):
    with pytest.raises(InputError, match=r"(?s)--per-file 10 is no multiple.*--per-file 12, or 8"):
        make_work(per_file=10)
    with pytest.raises(InputError, match=r"(?s)--per-file 3 is no multiple.*--per-file 4;"):
        make_work(per_file=3)
    with pytest.raises(InputError, match=r"(?s)--first 12 is within a file.*--first 8 or 16"):
        part(make_work(), Range(12, 8), None)
    assert part(make_work(form="png"), Range(3, 8), None) == Range(3, 8)


@pytest.mark.parametrize(("side", "batch", "wanted"), [(32, 16, 1024), (32, 12, 1020), (1024, 4, 84), (4096, 8, 8)])
def test_files_of_large_images_have_fewer(side, batch, wanted):
    spec = dataclasses.replace(conditioning.spec_of("itself"), shape=(3, side, side))
    assert default_per_file(spec, batch) == wanted


def test_a_shard_without_images_has_nothing_to_do(make_work, toy, tmp_path):
    work = make_work()
    shares = [part(work, Range(0, 20), Shard(index, 5)) for index in range(5)]
    assert [share.count for share in shares] == [0, 8, 0, 8, 4]
    assert run(toy, work, tmp_path, shares[0]) == []
