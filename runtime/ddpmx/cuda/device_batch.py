"""A batch on the device whose images are at steps of their own: what :mod:`ddpmx.serve.batcher` runs on a GPU.

The state, x̂_0 and what samplers remember stay in the GPU's memory. For each call of the network the host writes which image
makes which step into pinned memory, and one small copy takes it to the device; then follow the network and
``ddpmx_step_each``, launched one by one (``plain``) or as one captured graph (``graph``). The host does not wait for a call
before it launches the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import DeviceBackend, DeviceNetwork
from ddpmx.cuda import layout
from ddpmx.cuda.device_chain import BLOCKS_PER_MULTIPROCESSOR, Choice
from ddpmx.cuda.group import Group
from ddpmx.cuda.kernels import Kernels
from ddpmx.cuda.layout import EACH, Call
from ddpmx.device.driver import Handle, Pinned
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ModelSpec

Float32 = NDArray[np.float32]

EXECUTORS = ("graph", "plain")
"""Those that a batch may run by: after each call the host says what the next one is, so there is no ``while``."""

_AT_ONCE = 2  # calls on their way: the device has the next one while the host looks at the last
_ALIGNED = 256


@dataclass
class Arrived:
    """What became of a group's step.

    Attributes:
        index: the step, from 0.
        bad: whether the network's output was not finite. The rest means nothing then.
        x, x0: float32 [n, C, H, W], the state before the step and x̂_0, if they were wanted.
        pixels: uint8 [n, H, W, C] after the last step.
    """

    index: int
    bad: bool = False
    x: Float32 | None = None
    x0: Float32 | None = None
    pixels: NDArray[np.uint8] | None = None


class _Slot:
    """Pinned memory of one call that is on its way."""

    def __init__(self, batch: DeviceBatch, rows: int, shape: tuple[int, int, int], classes: bool) -> None:
        channels, height, width = shape
        sizes = {
            "t": 4 * rows,
            "y": 4 * rows if classes else 0,
            "call": ctypes.sizeof(Call),
            "each": EACH.itemsize * rows,
            "bad": 4 * rows,
            "pixels": rows * math.prod(shape),
        }
        self.at, size = {}, 0
        for name, part in sizes.items():
            self.at[name] = size
            size += -(-part // _ALIGNED) * _ALIGNED
        self.pinned: Pinned = batch.keep_pinned(size, "what each image does")
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pinned.value))
        whole[...] = 0

        def view(name: str, kind: Any) -> NDArray[Any]:
            return whole[self.at[name] : self.at[name] + sizes[name]].view(kind)

        self.copied = whole[: self.at["bad"]]
        """What goes to the device: t, y, the call, and its images' steps."""
        self.t, self.y = view("t", np.int32), view("y", np.int32)
        self.call = Call.from_address(self.pinned.value + self.at["call"])
        self.each, self.bad = view("each", EACH), view("bad", np.int32)
        self.pixels = view("pixels", np.uint8).reshape(rows, height, width, channels)
        self.done = batch.keep_event()


@dataclass
class _Landing:
    """What to look at when a group's step is made: its rows, whether it was the last, and what is answered."""

    rows: NDArray[np.int64]
    last: bool
    arrived: Arrived


class DeviceBatch:
    """The memory of a batch on the device, and the calls of its network. A context manager; for one thread.

    Args:
        device: the network. It stays open.
        spec: the model.
        rows: of the batch, at most.
        executor: ``auto``, or one of :data:`EXECUTORS`.

    Attributes:
        choice: the executor, and why not another.

    Raises:
        BackendError: the memory does not suffice, or the driver refuses. Nothing stays allocated then.
        InputError: the network does not support that executor, or the elements exceed 32 bits.
    """

    def __init__(self, device: DeviceBackend, spec: ModelSpec, rows: int, *, executor: str = "auto") -> None:
        among = tuple(name for name in EXECUTORS if name in device.executors)
        if executor not in ("auto", *among):
            raise InputError(
                f"{device.description} does not support executor {executor!r} where images are at different steps",
                hint=f"auto, {', '.join(among)}",
            )
        channels, height, width = spec.shape
        self._elements = math.prod(spec.shape)
        if not 0 < rows * -(-self._elements // 4) < 1 << 31:
            raise InputError(f"{rows} images of {spec.shape} cannot run together on a GPU")
        self._device, self._driver, self._spec, self._rows = device, device.driver, spec, rows
        self._null = spec.classes or 0
        self._own: list[Handle] = []
        self._networks: dict[int, DeviceNetwork] = {}
        self._graphs: dict[int, Handle] = {}
        self._flights: deque[tuple[_Slot, list[_Landing]]] = deque()
        self._launched = self._stream = 0
        self._auto = executor == "auto"
        self.choice = Choice(among[0] if executor == "auto" else executor)
        try:
            with self._driver.current():
                self._begin, self._step = Kernels.of(self._driver).each()
                self._stream = device.stream or self._keep(self._driver.stream()).value
                names = ["x", "out", "x0", "one_ago", "two_ago", *(["var"] if spec.learns_variance else [])]
                self._at = {name: self._memory(4 * rows * self._elements, name) for name in names}
                shapes = spec.conditioning_shapes
                self._size = {name: math.prod(shapes[name]) for name in ("cond",) if name in shapes}
                self._at |= {name: self._memory(4 * rows * size, name) for name, size in self._size.items()}
                self._size |= dict.fromkeys(names, self._elements)
                self._slots = [_Slot(self, rows, spec.shape, spec.classes is not None) for _ in range(_AT_ONCE)]
                slot = self._slots[0]
                self._block = self._memory(slot.copied.nbytes, "what each image does")
                self._pixels = self._memory(rows * self._elements, "the images")
                for each in self._slots:
                    call = each.call
                    for name in names:
                        setattr(call, name, self._at[name])
                    call.image_bytes, call.bad = self._pixels, each.pinned.device + each.at["bad"]
                    call.each, call.channels, call.pixels = self._block + each.at["each"], channels, height * width
                    call.limit = math.inf if spec.clip is None else spec.clip
                self._driver.wait_for_stream(self._stream, "preparing the batch's memory")
            self.prepare(rows)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """Library, device and executor."""
        return f"{self._device.description}, executor {self.choice}"

    # --- memory ------------------------------------------------------------------------------------------------------

    def _keep(self, handle: Handle) -> Handle:
        self._own.append(handle)
        return handle

    def keep_pinned(self, size: int, what: str) -> Pinned:
        """Pinned memory that is freed with the batch."""
        pinned = self._driver.allocate_pinned(size, what)
        self._own.append(pinned)
        return pinned

    def keep_event(self) -> Handle:
        """An event that is freed with the batch."""
        return self._keep(self._driver.event())

    def _memory(self, size: int, what: str) -> int:
        """Device memory, all 0: a class or t is an index into the network's tables, so it has to be a legal one."""
        size = -(-size // 4) * 4
        address = self._keep(self._driver.allocate(size, what)).value
        self._driver.zero(address, size, self._stream)
        return address

    def __enter__(self) -> DeviceBatch:
        """The batch itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything, once the device is done with it. Safe to call again."""
        if not self._own:
            return
        with self._driver.current():
            if self._stream:
                with contextlib.suppress(BackendError):
                    self._driver.wait_for_stream(self._stream)
            self._drop()
            self._flights.clear()
            while self._own:
                self._own.pop().close()

    def put(self, name: str, rows: NDArray[np.int64], array: Float32) -> None:
        """Write images' ``x`` or ``cond``, float32 [len(rows), …], after the calls that are on their way."""
        size, kept = 4 * self._size[name], np.ascontiguousarray(array, np.float32)
        with self._driver.current():
            for run in _runs(rows):
                self._driver.copy_in(self._at[name] + int(rows[run.start]) * size, kept[run], self._stream)
            # a copy from pageable memory may read it later
            self._driver.wait_for_stream(self._stream, f"copying {name}")

    def move(self, group: Group, rows: NDArray[np.int64]) -> None:
        """Give a group other rows, which nobody else has."""
        names = ["x", "x0", *(name for name in ("cond",) if name in self._at)]
        if group.table.memory is not None:
            names += ["one_ago", "two_ago"]
        with self._driver.current():
            for old, new in zip(group.rows.tolist(), rows.tolist(), strict=True):
                for name in names if old != new else ():
                    at, size = self._at[name], 4 * self._size[name]
                    self._driver.copy(at + new * size, at + old * size, size, self._stream)
        group.rows = rows

    # --- the network -------------------------------------------------------------------------------------------------

    def prepare(self, size: int) -> None:
        """Prepare calls with a batch of ``size``, which are kept: a network may need memory of its own for each size. Where
        that does not suffice for all, those of the other sizes are given up.

        Args:
            size: rows of the network's batch.

        Raises:
            BackendError: the network refuses, its memory does not suffice, or the executor does not work.
        """
        if size in self._networks:
            return
        try:
            self._prepare(size)
        except BackendError:
            if not self._networks.keys() - {size}:
                raise
            self.release()
            self._prepare(size)

    def release(self) -> None:
        """Give up the prepared networks, once the device is done with them: a small one has no room for others.

        Raises:
            BackendError: the device failed.
        """
        with self._driver.current():
            self._driver.wait_for_stream(self._stream, "waiting for the calls before")
            self._drop()

    def _drop(self) -> None:
        """Close the networks, and what was captured of them. The device is done with them."""
        for graph in self._graphs.values():
            graph.close()
        for network in self._networks.values():
            network.close()
        self._graphs, self._networks = {}, {}

    def _prepare(self, size: int) -> None:
        conditioning = {name: self._at[name] for name in ("cond",) if name in self._at}
        if self._spec.classes is not None:
            conditioning["y"] = self._block + self._slots[0].at["y"]
        if self._spec.self_condition:
            conditioning["x0_prev"] = self._at["x0"]
        with self._driver.current():
            self._networks[size] = self._device.network(
                size,
                x=self._at["x"],
                t=self._block,
                out=self._at["out"],
                var=self._at.get("var", 0),
                conditioning=conditioning,
                stream=self._stream,
            )
            if self.choice.executor == "graph":
                try:
                    self._capture(size)
                except BackendError as error:
                    if not self._auto:
                        raise
                    why = ": ".join(filter(None, (error.fact, error.note)))
                    self.choice = Choice("plain", (*self.choice.rejected, ("graph", why)))

    def _capture(self, size: int) -> None:
        """The network and the step as one graph, which is compared with the two launched one by one.

        What the images on their way need of x and x̂_0 is kept meanwhile. The network runs once before: what it does only at
        its first run must not be captured.
        """
        driver, stream, network = self._driver, self._stream, self._networks[size]
        driver.wait_for_stream(stream, "waiting for the calls before")
        kept = {name: np.empty((size, self._elements), np.float32) for name in ("x", "x0")}
        for name, array in kept.items():
            driver.copy_out(array, self._at[name], stream)
        slot = self._free_slot()
        try:
            self._fill(slot, [])
            driver.copy_in(self._block, slot.copied, stream)
            network.enqueue(stream)
            driver.wait_for_stream(stream, "running the network for the first time")
            with driver.capture(stream) as graphs:
                network.enqueue(stream)
                self._launch_step(size)
            if not graphs:
                raise BackendError("the capture gave no graph")
            try:
                self._graphs[size] = driver.instantiate(graphs[0], "the graph of a call")
            finally:
                graphs[0].close()
            # a library may do part of its work while it enqueues, and a graph replays old outputs then
            wanted, got = self._once(slot, size, "plain"), self._once(slot, size, "graph")
            if got != wanted and self._once(slot, size, "plain") == wanted:
                raise BackendError(
                    "the captured call gives another output than the plain one", note=self._device.description
                )
        except BackendError:
            if size in self._graphs:
                self._graphs.pop(size).close()
            raise
        finally:
            for name, array in kept.items():
                driver.copy_in(self._at[name], array, stream)
            driver.wait_for_stream(stream, "trying a captured call")

    def _once(self, slot: _Slot, size: int, executor: str) -> bytes:
        """What the network answers to noise, and the state after a step, as bytes."""
        driver, rows = self._driver, np.arange(size)
        table = Table(np.array([self._spec.timesteps - 1]), np.array([[1.0, -0.5, 0.5, 0.5, 0.1]]))
        self._fill(slot, [Group(table, 1, rows, rows)])
        names = [name for name in ("out", "var", "x") if name in self._at]
        arrays = [np.full((size, self._elements), np.nan, np.float32) for _ in names]
        driver.copy_in(self._block, slot.copied, self._stream)
        driver.copy_in(self._at["out"], arrays[0], self._stream)  # NaN shows an output that is not written
        driver.wait_for_stream(self._stream, "beginning a call")
        self._launch(self._begin, size, "ddpmx_begin_each")
        self._launch_call(size, executor)
        for name, array in zip(names, arrays, strict=True):
            driver.copy_out(array, self._at[name], self._stream)
        driver.wait_for_stream(self._stream, "trying a call")
        return b"".join(array.tobytes() for array in arrays)

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(self, size: int, groups: Sequence[Group], *, watched: Sequence[bool] = ()) -> None:
        """Launch a call of the network with a batch of ``size``, and a step of each group; wait for nothing.

        At most one call may be on its way before, see :meth:`landed`.

        Args:
            size: rows of the batch; those of all groups are below it.
            groups: who makes a step, which counts as done afterwards.
            watched: of each group, whether its states are wanted; by default of none.

        Raises:
            BackendError: the network or the driver refuses.
        """
        self.prepare(size)
        slot, driver, stream = self._free_slot(), self._driver, self._stream
        landing = [_Landing(group.first, group.done + 1 == len(group), Arrived(group.done)) for group in groups]
        seen = list(zip(landing, watched, strict=True)) if watched else []
        with driver.current():
            self._fill(slot, groups, watched)
            driver.copy_in(self._block, slot.copied, stream)
            if any(group.done == 0 for group in groups):
                self._launch(self._begin, size, "ddpmx_begin_each")
            for each, watch in seen:
                if watch:
                    each.arrived.x = self._fetched("x", each.rows)
            self._launch_call(size, self.choice.executor)
            for each, watch in seen:
                if watch:
                    each.arrived.x0 = self._fetched("x0", each.rows)
            for each in landing:
                for run in _runs(each.rows) if each.last else ():
                    first, end = (int(each.rows[at]) for at in (run.start, run.stop - 1))
                    address = self._pixels + first * self._elements
                    driver.copy_out(slot.pixels[first : end + 1], address, stream)
            driver.record(slot.done, stream)
        for group in groups:
            group.done += 1
        self._launched += 1
        self._flights.append((slot, landing))

    def landed(self, *, leave: int = 0) -> Iterator[list[Arrived]]:
        """Wait for the oldest calls until so many are left on their way. Yields what became of each group of a call.

        Raises:
            BackendError: the device failed.
        """
        while len(self._flights) > leave:
            slot, landing = self._flights[0]
            with self._driver.current():
                self._driver.wait_for(slot.done, f"running a call by {self.choice.executor}")
            self._flights.popleft()
            at = 0
            for each in landing:
                each.arrived.bad = bool(slot.bad[at : at + len(each.rows)].any())
                each.arrived.pixels = slot.pixels[each.rows] if each.last else None
                at += len(each.rows)
            yield [each.arrived for each in landing]

    def _free_slot(self) -> _Slot:
        if len(self._flights) >= _AT_ONCE:
            raise BackendError("too many calls are on their way", hint="landed(leave=1) waits for the oldest")
        return self._slots[self._launched % _AT_ONCE]

    def _fill(self, slot: _Slot, groups: Sequence[Group], watched: Sequence[bool] = ()) -> None:
        """Write what each image does."""
        watched = watched or [False] * len(groups)
        slot.t[:], slot.bad[:], count = 0, 0, 0
        if self._spec.classes is not None:
            slot.y[:] = 0
        for group, watch in zip(groups, watched, strict=True):
            n = len(group.images)
            group.write(slot.each[count : count + n], keeps_x0=watch or self._spec.self_condition)
            slot.t[group.rows] = group.steps["t"][group.done]
            if self._spec.classes is not None:
                slot.y[group.first] = 0 if group.labels is None else group.labels
                slot.y[group.rows[n:]] = self._null
            count += n
        slot.call.count = count

    def _launch(self, kernel: int, size: int, name: str) -> None:
        fours = size * -(-self._elements // 4)
        grid = min(-(-fours // layout.THREADS), BLOCKS_PER_MULTIPROCESSOR * max(1, self._driver.multiprocessors))
        address = self._block + self._slots[0].at["call"]
        self._driver.launch(kernel, grid, layout.THREADS, self._stream, (address,), name)

    def _launch_step(self, size: int) -> None:
        self._launch(self._step, size, "ddpmx_step_each")

    def _launch_call(self, size: int, executor: str) -> None:
        if executor == "graph" and size in self._graphs:
            self._driver.launch_graph(self._graphs[size], self._stream, "the graph of a call")
        else:
            self._networks[size].enqueue(self._stream)
            self._launch_step(size)

    def _fetched(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Images' states, float32 [n, C, H, W], complete when the call has landed."""
        array = np.empty((len(rows), *self._spec.shape), np.float32)
        for run in _runs(rows):
            address = self._at[name] + 4 * self._elements * int(rows[run.start])
            self._driver.copy_out(array[run], address, self._stream)
        return array


def _runs(rows: NDArray[np.int64]) -> list[slice]:
    """The parts of an array of rows that follow each other, each to be copied as one."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if end > begin]
