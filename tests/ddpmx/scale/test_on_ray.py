"""Ray's workers: on a fake Ray in this process, and on the real one where it is installed."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ddpmx import ModelSpec, Sampling, load
from ddpmx.errors import BackendError, FileFormatError, InputError
from ddpmx.images.origin import model_hash
from ddpmx.scale import on_ray
from ddpmx.scale.on_ray import draw_on_ray
from ddpmx.scale.ranges import Range, joined
from ddpmx.scale.stores import open_store
from ddpmx.scale.work import Work, claim, draw, pending
from oracles.fake_ray import FakeRay

WHOLE = Range(0, 46)


@pytest.fixture
def work(gaussian_onnx):
    with load(gaussian_onnx) as pipeline:
        spec = pipeline.spec
    return Work(model_hash(spec, gaussian_onnx), spec, 3, Sampling(steps=3), 3, 4, "tar", 8)


@pytest.fixture
def fake(monkeypatch):
    def make(**options):
        ray = FakeRay(**options)
        monkeypatch.setattr(on_ray, "_import_ray", lambda: ray)
        return ray

    return make


@pytest.fixture
def opener(gaussian_onnx):
    return functools.partial(load, gaussian_onnx, threads=1)


def single(work, opener, folder):
    store = open_store(str(folder))
    with opener() as pipeline:
        draw(pipeline, work, store, pending(work, store, WHOLE, claim(work, store)))
    return content(folder)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(work, opener, folder, **options):
    store = open_store(str(folder))
    units = pending(work, store, WHOLE, claim(work, store))
    return draw_on_ray(opener, work, str(folder), joined(units, work.per_file), **options)


# --- on a fake --------------------------------------------------------------------------------------------------------


def test_the_union_is_the_single_run_whoever_dies(fake, work, opener, tmp_path):
    ray, seen, notes = fake(deaths=[(0, 1), (2, 0), (3, 1), (4, 2)]), [], []
    done = run(work, opener, tmp_path / "ray", threads=1, progress=lambda *at: seen.append(at), note=notes.append)
    assert (done.drawn, done.workers, done.lost) == (46, 4, 4)
    assert "onnxruntime" in done.backend
    assert content(tmp_path / "ray") == single(work, opener, tmp_path / "single")
    assert seen[-1] == (46, 46)
    assert len(notes) == 4
    assert len(ray.actors) == 8, "each that died has a successor"
    assert ray.stopped == 1
    assert {actor.number for actor in ray.actors if actor.alive} == set(ray.killed), "none stays behind"


def test_what_is_there_is_not_drawn_again(fake, work, opener, tmp_path):
    fake()
    whole = single(work, opener, tmp_path)
    (tmp_path / work.names(Range(16, 8))[0]).unlink()
    assert run(work, opener, tmp_path, threads=1).drawn == 8
    assert content(tmp_path) == whole


def test_it_is_asked_not_to_report_its_use(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setitem(__import__("sys").modules, "ray", FakeRay())
    on_ray._import_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("machines", "options", "wanted"),
    [
        ({"cpus": (8, 8)}, {}, (2, 8, 0)),
        ({"cpus": (8, 9)}, {"threads": 3}, (5, 3, 0)),
        ({"cpus": (8, 8), "gpus": 2}, {"threads": 1, "gpus": 1}, (4, 1, 1)),
        ({"cpus": (8,)}, {"threads": 1, "workers": 3}, (3, 1, 0)),
        ({"cpus": (8,)}, {"threads": 1}, (6, 1, 0)),
    ],
    ids=str,
)
def test_there_are_as_many_workers_as_there_is_room_for_and_work(
    fake, work, opener, tmp_path, machines, options, wanted
):
    ray = fake(**machines)
    done = run(work, opener, tmp_path, **options)
    assert (done.workers, ray.options["num_cpus"], ray.options["num_gpus"]) == wanted


def test_what_a_worker_cannot_do_is_its_own_error(fake, work, tmp_path, gaussian_onnx):
    ray = fake()
    with pytest.raises(FileFormatError, match=r"nothing\.onnx") as error:
        run(work, functools.partial(load, tmp_path / "nothing.onnx"), tmp_path / "out", threads=1)
    assert error.value.hint
    assert ray.stopped == 1
    other = Work(work.model, work.spec.replace(clip=None), 3, Sampling(steps=3), 3, 4, "tar", 8)
    with pytest.raises(InputError, match="another model"):
        run(other, functools.partial(load, gaussian_onnx), tmp_path / "other", threads=1)


def test_a_worker_of_another_version_is_refused(work, opener, tmp_path):
    kind, fact, *_ = on_ray.Worker(opener, work, str(tmp_path), "0.0.1").open()
    assert (kind, "and 0.0.1 asks for images" in fact) == ("BackendError", True)


def test_a_fault_in_a_worker_has_its_last_line(fake, work, tmp_path):
    fake()
    with pytest.raises(BackendError, match=r"(?s)a worker failed.*ZeroDivisionError"):
        run(work, functools.partial(divmod, 1, 0), tmp_path, threads=1)


@pytest.mark.parametrize(
    ("machines", "options", "kind", "message"),
    [
        ({"always_die": True}, {"threads": 1}, BackendError, "have died in a row"),
        ({"no_cluster": True}, {"address": "auto"}, InputError, "--ray auto: there is no Ray cluster"),
        ({"no_cluster": True}, {"address": "local"}, BackendError, "Ray does not start"),
        ({"cpus": (2,)}, {"threads": 4}, InputError, "no machine of the cluster has 4 CPUs"),
        ({"cpus": (2,)}, {"gpus": 1}, InputError, "2 CPUs and a GPU"),
    ],
)
def test_a_cluster_that_cannot_do_it(fake, work, opener, tmp_path, machines, options, kind, message):
    fake(**machines)
    with pytest.raises(kind, match=message):
        run(work, opener, tmp_path, **options)
    assert set(content(tmp_path)) == {"run.json"}


def test_without_ray_the_extra_is_named(monkeypatch, work, opener, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BackendError, match="--ray needs Ray") as error:
        run(work, opener, tmp_path)
    assert error.value.hint == "pip install 'ddpmx[ray]'; or --shard"


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_ray():
    ray = pytest.importorskip("ray", reason="not verified here: real Ray workers (ray is not installed)")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def workers() -> set[int]:
    """Processes of workers that draw; Ray gives them their titles."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::Worker.draw"):
            found.add(int(path.parent.name))
    return found


@pytest.mark.long
@pytest.mark.usefixtures("real_ray")
def test_two_of_four_real_workers_are_killed(opener, gaussian_onnx, tmp_path):
    with load(gaussian_onnx) as pipeline:
        spec: ModelSpec = pipeline.spec
    work = Work(model_hash(spec, gaussian_onnx), spec, 3, Sampling(), 1000, 4, "tar", 4)
    killed: set[int] = set()

    def kill() -> None:
        while len(killed) < 2:
            time.sleep(0.1)
            for worker in workers() - killed:
                if len(killed) < 2:
                    os.kill(worker, signal.SIGKILL)
                    killed.add(worker)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    notes: list[str] = []
    done = run(work, opener, tmp_path / "ray", threads=1, workers=4, note=notes.append)
    killer.join()
    assert (done.drawn, done.workers, done.lost) == (46, 4, 2)
    assert "a worker has died" in notes[0]
    assert content(tmp_path / "ray") == single(work, opener, tmp_path / "single")


@pytest.mark.long
@pytest.mark.usefixtures("real_ray")
def test_a_real_worker_s_error_arrives_whole(work, tmp_path):
    with pytest.raises(FileFormatError, match=r"nothing\.onnx") as error:
        run(work, functools.partial(load, tmp_path / "nothing.onnx"), tmp_path / "out", threads=1, workers=1)
    assert error.value.fact.startswith(str(tmp_path))


@pytest.mark.long
def test_the_signals_stay_ours(opener, work, tmp_path):
    ray = pytest.importorskip("ray", reason="not verified here: real Ray workers (ray is not installed)")
    ray.shutdown()
    before = signal.getsignal(signal.SIGTERM)
    done = run(work, opener, tmp_path, threads=1, workers=2)
    assert (done.drawn, done.lost) == (46, 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not ray.is_initialized()
