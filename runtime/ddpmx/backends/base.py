"""The interfaces of backends. A backend runs one file's network on one device; the chain around it is the same for all.

There are two kinds: a :class:`Backend` reads and writes arrays on the host, and waits; a :class:`DeviceBackend` gives
networks that read and write a GPU's memory, in a stream, and wait for nothing. :class:`CopyingBackend` adapts the second
kind to the first.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import BackendError
from ddpmx.formats.spec import ConditioningShapes, input_type

if TYPE_CHECKING:
    from ddpmx.device.driver import Driver, Handle


EXECUTORS: tuple[str, ...] = ("while", "graph", "plain")
"""How a chain is run, see :mod:`ddpmx.cuda.device_chain`, in the order in which ``auto`` tries them."""

VARIANCE = "var"
"""The graph's second output, where the network learns its variance."""

NO_CONDITIONING: Mapping[str, Any] = MappingProxyType({})
"""The conditioning, or its shapes, of a network that takes x and t alone."""


@dataclass(frozen=True)
class Buffers:
    """The arrays on the host that a network reads and writes. They stay the same from one step to the next.

    Attributes:
        x: float32 [B, C, H, W], C-contiguous, x_t.
        t: int32 [B].
        out: float32 [B, C, H, W], C-contiguous, the network's output.
        var: float32 [B, C, H, W], C-contiguous, its output ``var``, or None if it learns no variance.
        y: int32 [B], each image's class, or None if the network has no classes.
        x0_prev: float32 [B, C, H, W], C-contiguous, x̂_0 of the step before, or None.
        cond: float32 [B, K, H, W], C-contiguous, each image's condition, or None.
    """

    x: NDArray[np.float32]
    t: NDArray[np.int32]
    out: NDArray[np.float32]
    var: NDArray[np.float32] | None = None
    y: NDArray[np.int32] | None = None
    x0_prev: NDArray[np.float32] | None = None
    cond: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        batch: int,
        shape: tuple[int, int, int],
        *,
        var: bool = False,
        conditioning_shapes: ConditioningShapes = NO_CONDITIONING,
    ) -> Buffers:
        """New arrays for ``batch`` images of shape (C, H, W), all 0.

        Args:
            batch: the number of images.
            shape: (C, H, W) of one image.
            var: whether there is an output ``var``.
            conditioning_shapes: the conditioning inputs: :attr:`ModelSpec.conditioning_shapes`.
        """
        x, out = (np.zeros((batch, *shape), np.float32) for _ in range(2))
        conditioning: dict[str, Any] = {
            name: np.zeros((batch, *dims), input_type(name)) for name, dims in conditioning_shapes.items()
        }
        return cls(x, np.zeros(batch, np.int32), out, np.zeros_like(x) if var else None, **conditioning)

    def inputs(self) -> dict[str, NDArray[Any]]:
        """The arrays that the network reads, by the names of its graph's inputs."""
        every = {name: getattr(self, name) for name in ("x", "t", "y", "x0_prev", "cond")}
        return {name: array for name, array in every.items() if array is not None}

    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """The arrays that it writes: ``out``, and ``var`` if there is one."""
        return {"out": self.out, **({} if self.var is None else {"var": self.var})}

    def rows(self, part: slice) -> Buffers:
        """Views of the buffers of some images."""
        arrays: list[Any] = [getattr(self, f.name) for f in fields(self)]
        parts: list[Any] = [None if array is None else array[part] for array in arrays]
        return Buffers(*parts)


class Backend(Protocol):
    """Runs a network on arrays in host memory. Not thread-safe: one per thread."""

    @property
    def description(self) -> str:
        """What really computes: library, version and device."""

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers for all following calls of :meth:`enqueue`."""

    def enqueue(self) -> None:
        """Compute ``out``, and ``var`` if there is one, from the inputs.

        Raises:
            BackendError: the library refused.
        """

    def close(self) -> None:
        """Free everything. Safe to call again."""


@runtime_checkable
class SharedBackend(Backend, Protocol):
    """A backend that can be shared with other threads."""

    def share(self) -> Backend:
        """Another backend of the same network, with buffers of its own, for another thread.

        What they share is freed when the last of them is closed.
        """


@runtime_checkable
class PartBackend(Backend, Protocol):
    """A backend that cuts a batch into parts of equal size, and fills up the last one.

    The bits of an image's output depend on its place in its part and on the part's size, not on its neighbours.
    """

    @property
    def largest_part(self) -> int:
        """How many images may be in a part."""

    def use_part(self, part: int) -> None:
        """Cut all batches that are bound from now on into parts of this size."""


class Users:
    """A thread-safe count of the users of something shared. It begins with one."""

    def __init__(self) -> None:
        self._count, self._lock = 1, threading.Lock()

    def join(self) -> None:
        """Add a user."""
        with self._lock:
            self._count += 1

    def leave(self) -> bool:
        """Remove a user. Returns whether it was the last."""
        with self._lock:
            self._count -= 1
            return self._count == 0


class RowByRow:
    """A backend that passes each image of a batch to another backend on its own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._rows: list[Buffers] = []

    @property
    def description(self) -> str:
        """The other backend's description, and that images run one by one."""
        return f"{self._backend.description}, one image at a time"

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers."""
        self._rows = [buffers.rows(slice(index, index + 1)) for index in range(len(buffers.x))]

    def enqueue(self) -> None:
        """Compute each row."""
        for row in self._rows:
            self._backend.bind(row)
            self._backend.enqueue()

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()


class DeviceNetwork(Protocol):
    """A network bound to device memory for one batch size. Not thread-safe; for one captured graph."""

    def enqueue(self, stream: int) -> None:
        """Put one run into a stream, and wait for nothing.

        Raises:
            BackendError: the library refused.
        """

    def close(self) -> None:
        """Free its memory on the device. Wait for the stream first. Safe to call again."""


class DeviceBackend(Protocol):
    """A file's network on one GPU. Several threads may use it, each with a network of its own.

    Attributes:
        driver: the GPU.
        stream: the only stream in which its networks run, or 0 if they run in any.
        executors: those of :data:`EXECUTORS` by which ``auto`` may run its networks, best first.
    """

    driver: Driver
    stream: int
    executors: tuple[str, ...]

    @property
    def description(self) -> str:
        """Library, version and device."""

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """The smallest and the largest batch of each range that it takes."""

    def check_batch(self, batch: int) -> int:
        """The index of the range in :attr:`batches` that takes this batch.

        Raises:
            InputError: none does.
        """

    def network(
        self,
        batch: int,
        *,
        x: int,
        t: int,
        out: int,
        var: int = 0,
        conditioning: Mapping[str, int] = NO_CONDITIONING,
        stream: int,
    ) -> DeviceNetwork:
        """The network for ``batch`` images in device memory.

        Args:
            batch: the number of images.
            x, t, out, var: device addresses of float32 [batch, C, H, W], int32 [batch], float32 [batch, C, H, W] and,
                if the network learns its variance, float32 [batch, C, H, W].
            conditioning: the device addresses of its conditioning inputs, by name.
            stream: the stream in which it is prepared.

        Raises:
            BackendError: the library refuses, or its memory does not suffice.
            InputError: it does not take this batch.
        """

    def close(self) -> None:
        """Free everything. Close its networks first."""


class CopyingBackend:
    """A :class:`DeviceBackend` as a :class:`Backend`: each call copies the inputs to the device and the outputs back.

    For parity and everything else in NumPy; chains run on the device instead.

    Args:
        device: the network; closed with the last backend that shares it.
        users: the count of backends that share it; see :meth:`share`.

    Raises:
        BackendError: the driver refuses.
    """

    def __init__(self, device: DeviceBackend, *, users: Users | None = None) -> None:
        self.device = device
        self._users = users or Users()
        self._buffers: Buffers | None = None
        self._batch = 0
        self._memory: dict[str, Handle] = {}
        self._network: DeviceNetwork | None = None
        self._own: Handle | None = None
        self._closed = False
        if not device.stream:
            with device.driver.current():
                self._own = device.driver.stream()
        self._stream = self._own.value if self._own is not None else device.stream

    @property
    def description(self) -> str:
        """Library, version and device."""
        return self.device.description

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers. Memory on the device is allocated only for another batch size or other arrays.

        Raises:
            BackendError: it does not suffice.
            InputError: the network does not take this batch.
        """
        batch, arrays = len(buffers.x), buffers.inputs() | buffers.outputs()
        if batch != self._batch or self._network is None or arrays.keys() != self._memory.keys():
            self.release()
            driver = self.device.driver
            try:
                with driver.current():
                    for name, array in arrays.items():
                        self._memory[name] = driver.allocate(array.nbytes, _NAMES.get(name, name))
                    at = {name: memory.value for name, memory in self._memory.items()}
                    conditioning = {name: at.pop(name) for name in arrays if name not in ("x", "t", "out", "var")}
                    self._network = self.device.network(batch, **at, conditioning=conditioning, stream=self._stream)
            except BaseException:
                self.release()
                raise
            self._batch = batch
        self._buffers = buffers

    def enqueue(self) -> None:
        """Compute ``out``, and wait for it.

        Raises:
            BackendError: the library or the driver refuses.
        """
        if self._network is None or self._buffers is None:
            raise BackendError("no buffers are bound to the network")
        driver, stream = self.device.driver, self._stream
        with driver.current():
            try:
                for name, array in self._buffers.inputs().items():
                    driver.copy_in(self._memory[name].value, array, stream)
                self._network.enqueue(stream)
                for name, array in self._buffers.outputs().items():
                    driver.copy_out(array, self._memory[name].value, stream)
            finally:  # the buffers belong to the caller again
                driver.wait_for_stream(stream, "running the network")

    def release(self) -> None:
        """Free the memory of the bound batch. The next :meth:`bind` allocates it again."""
        if self._network is not None:
            self._network.close()
        self._network, self._buffers, self._batch = None, None, 0
        while self._memory:
            self._memory.popitem()[1].close()

    def share(self) -> CopyingBackend:
        """See :meth:`SharedBackend.share`.

        Raises:
            BackendError: the library runs in one stream of its own, and so in one thread; or the driver refuses.
        """
        if self.device.stream:
            raise BackendError(
                f"{self.description} runs in one stream, and so in one thread", hint="load the file again for another"
            )
        other = CopyingBackend(self.device, users=self._users)
        self._users.join()
        return other

    def close(self) -> None:
        """Free its own memory, and the network if nobody else shares it. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        self.release()
        if self._own is not None:
            self._own.close()
        if self._users.leave():
            self.device.close()


_NAMES = {"out": "the network's output", "var": "its variance"}
