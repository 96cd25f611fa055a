"""A run on Ray: workers that hold a pipeline each, and draw one range after the other into the same folder.

Only ranges and errors go through Ray; images go from a worker to the folder. Ray is imported when it is asked for. It is
not to report its use to anybody: ``RAY_USAGE_STATS_ENABLED=0`` is set before it starts. A cluster that runs already decides
for itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ddpmx
from ddpmx import errors
from ddpmx.device.cores import usable_cores
from ddpmx.errors import BackendError, DdpmxError, InputError
from ddpmx.pipeline import Pipeline
from ddpmx.scale.ranges import Range
from ddpmx.scale.stores import open_store
from ddpmx.scale.tasks import Tasks
from ddpmx.scale.work import Work, draw

WAIT_SECONDS = 0.5
"""Between two looks at whether the caller wants to stop."""

PATIENCE_SECONDS = 60.0
"""After so long without a worker it is said that there is none."""


@dataclass(frozen=True)
class Outcome:
    """What has happened.

    Attributes:
        drawn: images.
        workers: how many there were at once.
        lost: how many of them died.
        backend: what computed.
    """

    drawn: int
    workers: int
    lost: int
    backend: str


class Worker:
    """Draws ranges, in a process of its own.

    What goes wrong is returned and not raised, since Ray makes another exception of it, with a traceback as its text.
    """

    def __init__(self, opener: Callable[[], Pipeline], work: Work, target: str, version: str) -> None:
        self._opener, self._work, self._target, self._version = opener, work, target, version
        self._pipeline: Pipeline | None = None

    def open(self) -> tuple[str, ...]:
        """Open the model: ("", what computes), or an error."""
        return _caught(self._open)

    def draw(self, first: int, count: int) -> tuple[str, ...]:
        """Draw a range: ("",), or an error."""
        return _caught(lambda: self._draw(Range(first, count)))

    def _open(self) -> str:
        if ddpmx.__version__ != self._version:
            raise BackendError(
                f"a worker has ddpmx {ddpmx.__version__}, and {self._version} asks for images",
                hint="the same version on every machine",
            )
        pipeline = self._pipeline = self._opener()
        if pipeline.spec != self._work.spec:
            raise InputError("a worker has another model under the same path", hint="the same file on every machine")
        return pipeline.backend

    def _draw(self, images: Range) -> str:
        assert self._pipeline is not None
        store = open_store(self._target)
        draw(self._pipeline, self._work, store, self._work.units(images))
        return ""


def draw_on_ray(
    opener: Callable[[], Pipeline],
    work: Work,
    target: str,
    ranges: Iterable[Range],
    *,
    address: str = "local",
    workers: int | None = None,
    threads: int = 0,
    gpus: int = 0,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Outcome:
    """Draw ranges by Ray's workers. A range whose worker dies is drawn by another one.

    Args:
        opener: opens the model in a worker; pickled, so a ``functools.partial`` of a function of a module.
        work: the run.
        target: a folder that every machine sees under this absolute path, or an address.
        ranges: what is to be drawn, each of whole units.
        address: ``local`` for workers of this machine alone; ``auto`` for the cluster that this machine is part of; or the
            address of one, ``HOST:6379`` or ``ray://HOST:10001``.
        workers: how many; by default as many as the cluster has room for, and never more than there are ranges.
        threads: CPU threads of a worker; 0 for a whole machine.
        gpus: GPUs of a worker, 0 or 1. Ray may hide the GPUs from a worker that asks for none.
        progress: called with (images drawn, images in all), twice a second at least.
        note: called with a line of text for people.

    Raises:
        BackendError: Ray is not installed or does not start, or workers die again and again.
        InputError: no cluster, or no worker fits on any of its machines; or a worker has another model.
        DdpmxError: what a worker could not do.
    """
    tasks = Tasks(ranges)
    ray = _import_ray()
    with _connected(ray, address, workers, threads):
        room, cpus = _room(ray, threads, gpus)
        count = min(room if workers is None else workers, tasks.waiting)
        kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
        shared = ray.put(work)
        crew = _Crew(ray, tasks, lambda: kind.remote(opener, shared, target, ddpmx.__version__))
        try:
            for _ in range(count):
                crew.hire()
            _run(crew, tasks, progress, note)
        finally:
            crew.dismiss()
        return Outcome(tasks.drawn, count, tasks.lost, crew.backend)


class _Crew:
    """The workers, and what each is at: a reference to its answer."""

    def __init__(self, ray: Any, tasks: Tasks, make: Callable[[], Any]) -> None:
        self._ray, self._tasks, self._make = ray, tasks, make
        self._at: dict[Any, Any] = {}
        self.backend = ""

    def hire(self) -> None:
        """Start a worker."""
        worker = self._make()
        self._at[worker.open.remote()] = worker

    def wait(self) -> None:
        """Wait for answers for a moment, and give who has answered the next range.

        Raises:
            DdpmxError: a worker's own, or too many have died.
        """
        ready, _ = self._ray.wait(list(self._at), num_returns=1, timeout=WAIT_SECONDS)
        for answer in ready:
            worker = self._at.pop(answer)
            try:
                kind, *words = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:  # a fault of ours in the worker
                raise BackendError("a worker failed", note=str(error).strip().splitlines()[-1]) from error
            except self._ray.exceptions.RayError as error:
                self._tasks.lose(worker, str(error).strip().splitlines()[0])
                self.hire()
                continue
            if kind:
                raise _raised(kind, *words)
            if words[0]:
                self.backend = words[0]
            else:
                self._tasks.done(worker)
            images = self._tasks.take(worker)
            if images is not None:
                self._at[worker.draw.remote(images.first, images.count)] = worker
            else:
                self._ray.kill(worker)

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self._at.values():
            self._ray.kill(worker)


def _run(
    crew: _Crew, tasks: Tasks, progress: Callable[[int, int], None] | None, note: Callable[[str], None] | None
) -> None:
    total, begun, lost, said = tasks.images, time.monotonic(), 0, False
    while not tasks.finished:
        crew.wait()
        if progress is not None:
            progress(tasks.drawn, total)
        if note is not None and tasks.lost > lost:
            note(f"a worker has died; what it was at is drawn again ({tasks.lost} so far)")
        lost = tasks.lost
        if note is not None and not said and not crew.backend and time.monotonic() - begun > PATIENCE_SECONDS:
            note("no worker has begun yet: the cluster has no room, or opening the model takes long")
            said = True


def _caught(call: Callable[[], str]) -> tuple[str, ...]:
    try:
        return "", call()
    except DdpmxError as error:
        return type(error).__name__, error.fact, error.note or "", error.hint or ""


def _raised(kind: str, fact: str, note: str, hint: str) -> DdpmxError:
    """A worker's error, here."""
    found = getattr(errors, kind, DdpmxError)
    error: DdpmxError = found(fact, note=note or None, hint=hint or None)
    return error


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise BackendError("--ray needs Ray", note=str(error), hint="pip install 'ddpmx[ray]'; or --shard") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str, workers: int | None, threads: int) -> Iterator[None]:
    """Connected to a cluster, as long as this takes; a caller's own connection is left as it is."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        cores = usable_cores()
        options |= {"include_dashboard": False, "num_cpus": max(cores, (workers or 1) * (threads or cores))}
    try:
        with _handlers_kept():
            ray.init(address=address, **options)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, …
        if address == "local":
            raise BackendError("Ray does not start", note=_first_line(error), hint="--shard needs no Ray") from error
        raise InputError(
            f"--ray {address}: there is no Ray cluster",
            note=_first_line(error),
            hint="--ray local; or start one with ray start --head",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray installs a handler of SIGTERM that ends the process; ours lets it end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _room(ray: Any, threads: int, gpus: int) -> tuple[int, int]:
    """How many workers the cluster has room for, and the CPUs of each: without ``threads`` those of a whole machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    whole = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    cpus = threads or min(whole, default=1)
    room = sum(min(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0)) if gpus else 1 << 30) for node in nodes)
    if room < 1:
        what = f"{cpus} CPUs" + " and a GPU" * bool(gpus)
        raise InputError(f"no machine of the cluster has {what}, which a worker takes", hint="fewer --threads")
    return room, cpus


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
