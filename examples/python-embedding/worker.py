"""Runs chains on a thread of its own, for a program with other work to do: a window, a robot, a server.

The thread loads the model, draws and closes it, since a pipeline is for one thread. Its arrays support DLPack and are
passed on without a copy. A slow consumer delays the next image at most: previews that were not taken in time are dropped,
and images lie in a few buffers that are returned after use.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import Cancelled


class Memory(Protocol):
    """Memory for images. ``stream`` is the CUDA stream in which the program uses them, or None on the host."""

    stream: Any

    def empty(self, shape: tuple[int, ...]) -> Any:
        """A new uint8 array."""


class HostMemory:
    """NumPy's memory on the host."""

    stream = None

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.empty(shape, np.uint8)


class TorchMemory:
    """PyTorch's memory on a GPU, with a stream. Use the images in that stream, or make another stream wait for it."""

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self._torch, self.device = torch, torch.device(device)
        self.stream = torch.cuda.Stream(self.device)

    def empty(self, shape: tuple[int, ...]) -> Any:
        return self._torch.empty(shape, dtype=self._torch.uint8, device=self.device)


class Job:
    """One request. All items that answer it name it."""

    def __init__(self, number: int, seed: int, every: int, sampling: dict[str, Any]) -> None:
        self.number, self.seed, self.every, self.sampling = number, seed, every, sampling
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End it, at the next step if it is running. It is still answered: by :class:`Ended`, or by its last images."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class Preview(NamedTuple):
    """x̂_0 of a job's images from ``first`` on at timestep ``t``: float32 [·, C, H, W] on the host, for the consumer."""

    job: Job
    t: int
    first: int
    x0: NDArray[np.float32]


class Frame:
    """A job's images, uint8 [n, H, W, C], in a buffer that :meth:`release` returns. A context manager.

    On a GPU the device, and not the host, waits for the work that the program has put into :attr:`Memory.stream` by then.
    """

    def __init__(self, job: Job, array: Any, free: queue.SimpleQueue[Any]) -> None:
        self.job, self.array = job, array
        self._free: queue.SimpleQueue[Any] | None = free

    def release(self) -> None:
        free, self._free = self._free, None
        if free is not None:
            free.put(self.array)

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Ended(NamedTuple):
    """A job without images: :class:`ddpmx.errors.Cancelled`, or another error."""

    job: Job
    error: Exception


class Outbox:
    """From the chain to the consumer. All answers are kept; of previews the newest ``room``, until their job is answered.

    One job runs after the other, so previews always belong to the running job, and are newer than every answer.
    """

    def __init__(self, room: int) -> None:
        self._answers, self._previews = deque[Frame | Ended](), deque[Preview](maxlen=room)
        self._changed, self._closed, self.dropped = threading.Condition(), False, 0

    def show(self, preview: Preview) -> None:
        with self._changed:
            self.dropped += len(self._previews) == self._previews.maxlen
            self._previews.append(preview)
            self._changed.notify()

    def answer(self, item: Frame | Ended) -> None:
        with self._changed:
            self.dropped += len(self._previews)
            self._previews.clear()
            self._answers.append(item)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Preview | Frame | Ended | None:
        """The next item; None if the outbox is closed and empty.

        Raises:
            TimeoutError: there was none for so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._answers or self._previews or self._closed, timeout):
                raise TimeoutError(f"nothing for {timeout} s")
            waiting = self._answers or self._previews
            return waiting.popleft() if waiting else None


class Worker:
    """Draws ``n`` images per job, one job after the other. A context manager; iterate over it for its items.

    Args:
        path: a model file.
        n: images of a job.
        memory: for the images. A plan's chain writes into a GPU's memory directly. Jobs with previews involve the host, and
            their images are always on the host.
        buffers: how many frames may be in use at once. The next chain waits for one to be released.
        room: how many previews may wait; beyond that the oldest is dropped.
        options: of :func:`ddpmx.load`.

    Raises:
        DdpmxError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n: int = 1,
        memory: Memory | None = None,
        buffers: int = 2,
        room: int = 4,
        **options: Any,
    ) -> None:
        self.n, self.memory, self.buffers, self.outbox = n, memory or HostMemory(), buffers, Outbox(room)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._numbers, self._stop, self._lock = itertools.count(), threading.Event(), threading.Lock()
        loaded: Future[ddpmx.ModelSpec] = Future()
        self._thread = threading.Thread(target=self._run, args=(path, options, loaded), name="ddpmx")
        self._thread.start()
        try:
            self.spec = loaded.result()
        except BaseException:  # Ctrl-C included: a forgotten thread would keep the process from ending
            self.close()
            raise

    def submit(self, seed: int, *, every: int = 0, **sampling: Any) -> Job:
        """Request the images of ``seed``. The job is answered by exactly one :class:`Frame` or :class:`Ended`.

        Args:
            seed: as in :meth:`ddpmx.Pipeline.generate`.
            every: a preview after every so many steps; 0 for none.
            **sampling: ``steps``, ``sampler``, ``labels`` and so on, as there.
        """
        with self._lock:  # so that no job comes after close()
            if self._stop.is_set():
                raise RuntimeError("the worker is closed")
            job = Job(next(self._numbers), seed, every, sampling)
            self._jobs.put(job)
        return job

    def __iter__(self) -> Iterator[Preview | Frame | Ended]:
        return iter(self.outbox.get, None)

    def close(self) -> None:
        """Cancel all jobs, and free the model. Finished items can still be taken. Safe to call again."""
        with self._lock:
            self._stop.set()
            self._jobs.put(None)
        self._thread.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _run(self, path: str | os.PathLike[str], options: dict[str, Any], loaded: Future[ddpmx.ModelSpec]) -> None:
        try:
            try:
                pipeline = ddpmx.load(path, **options)
            except BaseException as error:
                loaded.set_exception(error)
                return
            with pipeline:
                loaded.set_result(pipeline.spec)
                self._work(pipeline)
        finally:
            self.outbox.close()

    def _work(self, pipeline: ddpmx.Pipeline) -> None:
        channels, height, width = pipeline.spec.shape
        free: dict[bool, queue.SimpleQueue[Any]] = {}
        while (job := self._next()) is not None:
            watched = job.every > 0
            if watched not in free:
                memory = HostMemory() if watched else self.memory
                free[watched] = queue.SimpleQueue()
                for _ in range(self.buffers):
                    free[watched].put(memory.empty((self.n, height, width, channels)))
            try:
                self.outbox.answer(self._draw(pipeline, job, free[watched]))
            except Exception as error:  # for the consumer to handle
                self.outbox.answer(Ended(job, error))

    def _next(self) -> Job | None:
        """The next job; None once all jobs submitted before :meth:`close` are answered."""
        while (job := self._jobs.get()) is not None and self._stop.is_set():
            self.outbox.answer(Ended(job, Cancelled("the worker was closed")))
        return job

    def _draw(self, pipeline: ddpmx.Pipeline, job: Job, free: queue.SimpleQueue[Any]) -> Frame:
        out = self._buffer(job, free)
        steps = itertools.count(1)

        def show(first: int, step: ddpmx.Preview) -> None:
            if next(steps) % job.every == 0 and step.t > 0:
                self.outbox.show(Preview(job, step.t, first, step.x0))

        try:
            pipeline.generate(
                self.n,
                seed=job.seed,
                out=out,
                stream=None if job.every else self.memory.stream,
                cancel=lambda: job.cancelled or self._stop.is_set(),
                preview=show if job.every else None,
                **job.sampling,
            )
        except BaseException:
            free.put(out)
            raise
        return Frame(job, out, free)

    def _buffer(self, job: Job, free: queue.SimpleQueue[Any]) -> Any:
        while not (job.cancelled or self._stop.is_set()):
            try:
                return free.get(timeout=0.05)  # then check whether the job is still wanted
            except queue.Empty:
                continue
        raise Cancelled("cancelled before the chain began")
