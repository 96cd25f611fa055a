"""Continuous batching across timesteps: chains at different steps share the calls of one network.

The network takes t for each image, and noise is a function of (seed, image, t), so nothing binds the images of a call to
one timestep. A request joins at the next call, where there is room, instead of waiting for a chain to end; its images are
those that ``generate`` draws with the same ``batch``.

Where the network is on a GPU, so are the chains (:mod:`ddpmx.cuda.device_batch`); elsewhere NumPy makes the steps.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.backends.base import Backend, Buffers, CopyingBackend, PartBackend, RowByRow
from ddpmx.cuda.device_batch import DeviceBatch
from ddpmx.cuda.group import Group
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, Cancelled, InputError, QueueFull
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Preview, Walk
from ddpmx.sampling.conditioning import check_conditioning, class_labels
from ddpmx.sampling.guidance import Guidance, combine, guided
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.request import Request, Sampling, check_request, default_batch
from ddpmx.sampling.runner import fitting_batch

Float32 = NDArray[np.float32]


class Ticket:
    """A request on its way. For any thread.

    Attributes:
        request: what was asked for, checked.
    """

    def __init__(self, request: Request, pixels: NDArray[np.uint8]) -> None:
        self.request = request
        self._pixels, self._left = pixels, request.n
        self._error: Exception | None = None
        self._finished, self._cancelled = threading.Event(), False
        self._lock = threading.Lock()
        self._calls: list[Callable[[], object]] = []

    def cancel(self) -> None:
        """Draw no more of it: it ends with the next call of the network."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Whether there is a result, or an error."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None) -> NDArray[np.uint8]:
        """The images, uint8 [n, H, W, C]; waits for them.

        Raises:
            TimeoutError: they are not there after ``timeout`` seconds.
            Cancelled: it was cancelled, or the batcher was closed.
            NumericError, BackendError: the network's output was not finite, or it could not be run.
            Exception: what ``watch`` raised.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"no images after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._pixels

    def then(self, call: Callable[[], object]) -> None:
        """Call this when it has ended, in the batcher's thread; at once if it has already. It must not raise."""
        with self._lock:
            self._calls.append(call)
        if self.finished:
            self._tell()

    def _end(self, error: Exception | None) -> None:
        if not self._finished.is_set():
            self._error = error
            self._finished.set()
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        for call in calls:
            call()


@dataclass(eq=False)
class _Waiting:
    """Images of a request that have no place yet."""

    ticket: Ticket
    at: int
    """Of the first of them in the result."""
    guidance: Guidance | None
    watch: Callable[[int, Preview], None] | None
    x: Float32 | None
    cond: Float32 | None

    @property
    def left(self) -> int:
        """How many."""
        return self.ticket.request.n - self.at


@dataclass(eq=False)
class _Part:
    """Images of a request that go down the chain together."""

    ticket: Ticket
    at: int
    images: NDArray[np.int64]
    walk: Walk | Group
    """Its steps: on the host, or on a GPU."""
    x: Float32
    """On the host x_t, on a GPU nothing."""
    labels: NDArray[np.int32] | None
    cond: Float32 | None
    guidance: Guidance | None
    watch: Callable[[int, Preview], None] | None
    rows: NDArray[np.int64]
    """In the batch of this call; of a guided chain first those with the class, then those without."""


class Batcher:
    """Runs requests on a network, in a thread of its own. A context manager, which waits for what was asked for.

    Args:
        spec: the model.
        backend: the network; closed with the batcher.
        batch: rows of the network's batch, at most. A guided image takes two.
        waiting: how many images may wait for a place; more are refused.
        executor: of a network on a GPU ``auto``, ``graph`` or ``plain``; ``host`` makes the steps in NumPy, and copies.

    Raises:
        InputError: a number is out of its range, or the network does not support that executor.
        BackendError: the network cannot be run.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        *,
        batch: int | None = None,
        waiting: int = 4096,
        executor: str = "auto",
    ) -> None:
        self.spec, self._backend, self._schedule = spec, backend, spec.make_schedule()
        self._ranges = backend.device.batches if isinstance(backend, CopyingBackend) else ((1, 1 << 32),)
        wanted = check_request(spec, 1, batch=default_batch(spec) if batch is None else batch).batch
        self.batch = fitting_batch(self._ranges, wanted)
        self._most_waiting = waiting
        self._part_size = chain.choose_part(backend, spec, self.batch) if isinstance(backend, PartBackend) else 0
        # a guided image is at the same place of two parts, and so needs two, even of a batch that is one
        self._most_rows = max(self.batch, 2 * self._part_size if spec.null_class else 0)
        self._network = backend
        alone = not self._part_size and chain.executed_batch(backend, spec, self.batch, self.batch) < self.batch
        if alone and self._takes(1):
            self._network = RowByRow(backend)
        self._buffers = Buffers.of(
            self._most_rows, spec.shape, var=spec.learns_variance, conditioning_shapes=spec.conditioning_shapes
        )
        self._bound, self._sizes = 0, {self.batch: self.batch}
        self._on_device: DeviceBatch | None = None
        # a GPU whose images have to run one by one is fed from the host
        if isinstance(backend, CopyingBackend) and not alone and executor != "host":
            backend.release()
            self._on_device = DeviceBatch(backend.device, spec, self.batch, executor=executor)
        elif executor not in ("auto", "host"):
            raise InputError(f"{backend.description} does not support executor {executor!r} here", hint="auto")
        self._flying: deque[list[_Part]] = deque()
        self._queue: deque[_Waiting] = deque()
        self._active: list[_Part] = []
        self._wake = threading.Condition()
        self._closing = False
        self._failed: BackendError | None = None
        self.calls = 0
        """Of the network so far."""
        self._thread = threading.Thread(target=self._work, name="ddpmx batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        """The batcher."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it: at once after an error, else when everything is drawn."""
        self.close(drain=kind is None)

    def submit(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        labels: Labels | None = None,
        guidance: float = 1.0,
        sampling: Sampling | None = None,
        x: NDArray[np.float32] | None = None,
        cond: NDArray[np.float32] | None = None,
        watch: Callable[[int, Preview], None] | None = None,
    ) -> Ticket:
        """Ask for images.

        Args:
            n, seed, first, labels, guidance, sampling: as for :meth:`ddpmx.Pipeline.generate`.
            x: float32 [n, C, H, W], where the chains begin, on the host; by default the seed's x_T.
            cond: float32 [n, K, H, W], the condition of each image, on the host.
            watch: called after each step with the position in the result of the first image, and the state, in arrays of
                the caller's own; in the batcher's thread, which waits meanwhile.

        Raises:
            InputError: a number out of its range.
            QueueFull: too many wait already.
            BackendError: the batcher is closed, or its network failed.
        """
        request = check_request(
            self.spec,
            n,
            seed=seed,
            first=first,
            batch=self.batch,
            sampling=Sampling() if sampling is None else sampling,
            labels=labels,
            guidance=guidance,
            schedule=self._schedule,
        )
        if request.sampling.start is not None and x is None:
            raise InputError(f"missing x: x_t at t = {request.sampling.start}, where the chain begins")
        shapes = {name: dims for name, dims in self.spec.conditioning_shapes.items() if name == "cond"}
        check_conditioning(shapes, {} if cond is None else {"cond": cond}, n)
        if x is not None and (x.dtype != np.float32 or x.shape != (n, *self.spec.shape)):
            raise InputError(f"x must be float32 {[n, *self.spec.shape]}", note=f"it is {x.dtype} {[*x.shape]}")
        for name, array in (("x", x), ("cond", cond)):
            if array is not None and not np.isfinite(array).all():
                raise InputError(f"{name} holds NaN or infinities")
        twice = guided(self.spec, request.guidance)
        if twice is not None and self.batch < 2:
            raise InputError("a guided image takes two rows, and the batch has one", hint="a larger batch")
        channels, height, width = self.spec.shape
        ticket = Ticket(request, np.empty((n, height, width, channels), np.uint8))
        with self._wake:
            if self._closing:
                raise BackendError("the batcher is closed") if self._failed is None else self._failed
            if n + self._waiting() > self._most_waiting:
                raise QueueFull(f"{self._most_waiting} images are waiting already", hint="later, or fewer")
            self._queue.append(_Waiting(ticket, 0, twice, watch, x, cond))
            self._wake.notify()
        return ticket

    def table(self, sampling: Sampling | None = None) -> Table:
        """The sampler as a table of coefficients, as :meth:`ddpmx.Pipeline.table`."""
        return (Sampling() if sampling is None else sampling).table(self.spec, self._schedule)

    @property
    def description(self) -> str:
        """What really computes: library and device, and on a GPU the executor."""
        if self._on_device is not None:
            return self._on_device.description
        on_gpu = isinstance(self._backend, CopyingBackend)
        return f"{self._network.description}, steps on the host" if on_gpu else self._network.description

    @property
    def active(self) -> int:
        """Rows of the network's batch that are used."""
        return sum(len(part.rows) for part in self._active)

    @property
    def waiting(self) -> int:
        """Images that have no place yet."""
        with self._wake:
            return self._waiting()

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and end.

        Args:
            drain: draw what was asked for before; otherwise it ends with :class:`Cancelled`.
        """
        with self._wake:
            self._closing = True
            if not drain:
                for each in self._everyone():
                    each.ticket.cancel()
            self._wake.notify()
        self._thread.join()

    # --- the batcher's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._admitted():
                self._call()
        except BaseException as error:  # whoever waits has to hear of it
            self._fail(error)
        finally:
            with contextlib.ExitStack() as stack:
                stack.callback(self._backend.close)
                if self._on_device is not None:
                    self._on_device.close()

    def _admitted(self) -> bool:
        """Wait for work, and let in what there is room for. False: there will be no more."""
        with self._wake:
            while True:
                for each in self._everyone():
                    if each.ticket.cancelled:
                        each.ticket._end(Cancelled("cancelled before the chain finished"))
                self._active = [part for part in self._active if not part.ticket.finished]
                self._queue = deque(each for each in self._queue if not each.ticket.finished)
                # first come, first served: a small request does not overtake a large one for ever
                while self._queue and (count := self._room(self._queue[0])):
                    self._active.append(self._begun(self._queue[0], count))
                    self._queue[0].at += count
                    if not self._queue[0].left:
                        self._queue.popleft()
                if self._active or self._flying:
                    return True
                if self._closing:
                    return False
                self._wake.wait()

    def _everyone(self) -> list[_Part | _Waiting]:
        return [*self._active, *self._queue]

    def _under_way(self) -> list[_Part]:
        """Those whose steps were launched and not looked at; some have left the batch."""
        return [part for parts in self._flying for part in parts]

    def _waiting(self) -> int:
        return sum(each.left for each in self._queue if not each.ticket.cancelled)

    def _room(self, waiting: _Waiting) -> int:
        """How many of these images have room."""
        first, rows = waiting.ticket.request.first + waiting.at, 1 if waiting.guidance is None else 2
        taken = [(part.images, len(part.rows) // len(part.images)) for part in self._active]
        most = min(waiting.left, (self.batch - sum(len(images) * each for images, each in taken)) // rows)
        for count in range(most, 0, -1):
            if self._places([*taken, (np.arange(first, first + count), rows)])[0] <= self._most_rows:
                return count
        return 0

    def _begun(self, waiting: _Waiting, n: int) -> _Part:
        """The chain of the first n of these images, at its first timestep."""
        request, at = waiting.ticket.request, waiting.at
        images = np.arange(request.first + at, request.first + at + n)
        labels = None
        if self.spec.classes is not None:
            given = request.labels if request.guidance != 0 else None
            labels = class_labels(self.spec, n, None if given is None else given[at : at + n])
        cond = None if waiting.cond is None else waiting.cond[at : at + n]
        own = None if waiting.x is None else waiting.x[at : at + n]
        rows = np.zeros(n if waiting.guidance is None else 2 * n, np.int64)
        walk: Walk | Group
        if self._on_device is None:
            walk = Walk(request.table, (n, *self.spec.shape), seed=request.seed, images=images, clip=self.spec.clip)
            x = chain.initial(request.seed, images, self.spec.shape) if own is None else own.copy()
        else:
            rows, x = self._free(len(rows)), np.empty(0, np.float32)
            scale = 0.0 if waiting.guidance is None else waiting.guidance.scale
            walk = Group(request.table, request.seed, images, rows, scale, labels, own_x=own is not None)
            for name, array in (("x", own), ("cond", cond)):
                for half in (rows[:n], rows[n:]) if array is not None else ():
                    if array is not None and len(half):
                        self._on_device.put(name, half, array)
        return _Part(waiting.ticket, at, images, walk, x, labels, cond, waiting.guidance, waiting.watch, rows)

    def _places(self, parts: Sequence[tuple[NDArray[np.int64], int]]) -> tuple[int, list[NDArray[np.int64]]]:
        """The rows of images, each of which takes one or two; and how many the batch has then.

        Where an image's bits depend on its place in a part of the batch, it has place i mod part, as in ``generate``.
        """
        found, used, free = [], 0, [0] * self._part_size  # for each place, the first part of the batch where it is free
        for images, each in parts:
            if not self._part_size:
                found.append(np.arange(used, used + each * len(images)))
                used += each * len(images)
                continue
            rows = []
            for place in (images % self._part_size).tolist() * each:
                rows.append(free[place] * self._part_size + place)
                free[place] += 1
            found.append(np.array(rows))
        return (max(free) * self._part_size if free else used), found

    def _call(self) -> None:
        """One call of the network for all that are on their way, and a step of each."""
        if self._active:
            if self._on_device is None:
                self._call_from_host()
            else:
                self._call_on_device(self._on_device)
            self.calls += 1
        self._active = [part for part in self._active if part.walk.done < len(part.walk)]
        if self._on_device is not None:
            self._land(self._on_device, leave=1 if self._active else 0)

    def _call_from_host(self) -> None:
        used, rows = self._places([(part.images, len(part.rows) // len(part.images)) for part in self._active])
        for part, its in zip(self._active, rows, strict=True):
            part.rows = its
        buffers = self._bound_to(used)
        for part in self._active:
            assert isinstance(part.walk, Walk)
            n, row = len(part.images), part.rows
            buffers.t[row] = part.walk.t
            for half in (row[:n], row[n:]):
                if len(half):
                    buffers.x[half] = part.x
                    if buffers.x0_prev is not None:
                        buffers.x0_prev[half] = part.walk.x0
                    if buffers.cond is not None:
                        buffers.cond[half] = part.cond
            if buffers.y is not None:
                assert part.labels is not None
                buffers.y[row[:n]] = part.labels
                buffers.y[row[n:]] = self.spec.classes or 0
        self._network.enqueue()
        for part in self._active:
            self._step(part, buffers)

    def _call_on_device(self, device: DeviceBatch) -> None:
        size, parts = self._size_of(sum(len(part.rows) for part in self._active)), self._active
        for part in parts:  # those that smaller batches do not reach take places of others that have left
            assert isinstance(part.walk, Group)
            beyond = part.rows >= size
            if beyond.any():
                rows = part.rows.copy()
                rows[beyond] = self._free(int(beyond.sum()))
                device.move(part.walk, rows)
                part.rows = rows
        device.call(
            size,
            [part.walk for part in parts if isinstance(part.walk, Group)],
            watched=[part.watch is not None for part in parts],
        )
        self._flying.append([*parts])

    def _free(self, count: int) -> NDArray[np.int64]:
        """The first rows that nobody has."""
        taken = [part.rows for part in self._active]
        return np.setdiff1d(np.arange(self.batch), np.concatenate(taken) if taken else [])[:count]

    def _land(self, device: DeviceBatch, *, leave: int) -> None:
        """Look at the oldest calls until so many are left under way."""
        for arrived in device.landed(leave=leave):
            for part, each in zip(self._flying[0], arrived, strict=True):
                if part.ticket.finished:
                    continue
                table = part.ticket.request.table
                if each.bad:
                    t = int(table.timesteps[each.index])
                    part.ticket._end(chain.not_finite(t, each.index, len(table), device.description))
                    continue
                if part.watch is not None and each.x is not None and each.x0 is not None:
                    try:
                        part.watch(part.at, Preview(int(table.timesteps[each.index]), each.x, each.x0))
                    except Exception as error:  # of this request alone, and the others go on
                        part.ticket._end(error)
                        continue
                if each.pixels is not None:
                    self._drawn(part, each.pixels)
            self._flying.popleft()

    def _size_of(self, used: int) -> int:
        """The batch that holds so many rows: as small a one as gives the bits of a whole one.

        A few sizes are tried, not each, since trying takes calls of the network.
        """
        rows = 1 << (used - 1).bit_length()
        rows = rows if rows < self.batch and self._takes(rows) else self.batch
        if rows not in self._sizes:
            if self._on_device is not None:
                self._on_device.release()  # a small device has no room for both
            self._sizes[rows] = chain.executed_batch(self._backend, self.spec, rows, self.batch)
            self._bound = 0
            if self._on_device is not None and isinstance(self._backend, CopyingBackend):
                self._backend.release()
        return self._sizes[rows]

    def _bound_to(self, used: int) -> Buffers:
        """The arrays of a batch that holds so many rows."""
        rows = used if self._part_size or self._network is not self._backend else self._size_of(used)
        buffers = self._buffers.rows(slice(0, rows))
        if rows != self._bound:
            self._network.bind(buffers)
            self._bound = rows
        return buffers

    def _takes(self, rows: int) -> bool:
        return any(low <= rows <= high for low, high in self._ranges)

    def _fail(self, error: BaseException) -> None:
        """The network cannot be run: everybody hears of it, and nobody else is let in."""
        failed = error if isinstance(error, BackendError) else BackendError(f"the batcher stopped: {error}")
        with self._wake:
            self._closing, self._failed = True, failed
            for each in (*self._everyone(), *self._under_way()):
                each.ticket._end(failed)
            self._active, self._queue, self._flying = [], deque(), deque()

    def _step(self, part: _Part, buffers: Buffers) -> None:
        assert isinstance(part.walk, Walk)
        n, row = len(part.images), part.rows
        out, learns = buffers.out[row[:n]], part.ticket.request.table.learned is not None
        var = buffers.var[row[:n]] if learns and buffers.var is not None else None
        if part.guidance is not None:
            both = np.empty_like(out)
            combine(np.float32(part.guidance.scale), out, buffers.out[row[n:]], both)
            out = both
        try:
            step = part.walk.step(part.x, out, var, self._backend.description)
            if part.watch is not None:
                part.watch(part.at, Preview(step.t, part.x.copy(), step.x0.copy()))
        except Exception as error:  # of this request alone, and the others go on
            part.ticket._end(error)
            return
        part.x[...] = step.x_next
        if part.walk.done == len(part.walk):
            self._drawn(part, to_nhwc(step.x0))

    def _drawn(self, part: _Part, pixels: NDArray[np.uint8]) -> None:
        n = len(part.images)
        part.ticket._pixels[part.at : part.at + n] = pixels
        part.ticket._left -= n
        if not part.ticket._left:
            part.ticket._end(None)
