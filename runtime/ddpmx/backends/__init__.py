"""How ε is computed. A backend is one file's network on one device; the chain around it is the same for all.

Two faces: a :class:`Backend` reads and writes arrays on the host, and waits; a :class:`DeviceBackend` gives networks that
read and write a GPU's memory, in a stream, and wait for nothing. :class:`CopyingBackend` makes the first of the second.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import BackendError

if TYPE_CHECKING:
    from ddpmx.cuda.driver import Driver, Handle


@dataclass(frozen=True)
class Buffers:
    """The arrays that a network reads and writes, on the host. They stay the same from one step to the next.

    Attributes:
        x: float32 [B, C, H, W], C-contiguous, x_t.
        t: int32 [B].
        out: float32 [B, C, H, W], C-contiguous, the network's answer.
        var: float32 [B, C, H, W], C-contiguous, its second answer, or None if it learns no variance.
    """

    x: NDArray[np.float32]
    t: NDArray[np.int32]
    out: NDArray[np.float32]
    var: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, batch: int, shape: tuple[int, int, int], *, var: bool = False) -> Buffers:
        """New ones for ``batch`` images of shape (C, H, W)."""
        x, out = (np.zeros((batch, *shape), np.float32) for _ in range(2))
        return cls(x, np.zeros(batch, np.int32), out, np.zeros_like(x) if var else None)

    def row(self, index: int) -> Buffers:
        """The buffers of one image alone, as views."""
        part = slice(index, index + 1)
        return Buffers(self.x[part], self.t[part], self.out[part], None if self.var is None else self.var[part])


class Backend(Protocol):
    """ε(x, t) in place. Not thread-safe: one per thread."""

    @property
    def description(self) -> str:
        """What really computes, for people: library, version and device."""

    def bind(self, buffers: Buffers) -> None:
        """Take these buffers for all following calls of :meth:`enqueue`."""

    def enqueue(self) -> None:
        """Compute ``out``, and ``var`` if there is one, from ``x`` and ``t``.

        Raises:
            BackendError: the library refused.
        """

    def close(self) -> None:
        """Free everything. Again is harmless."""


@runtime_checkable
class SharedBackend(Backend, Protocol):
    """A backend that other threads may have as well."""

    def share(self) -> Backend:
        """Another backend of the same network, with buffers of its own, for another thread.

        What they share is freed when the last of them is closed.
        """


class Users:
    """How many share something, in whatever threads they are. It begins with one."""

    def __init__(self) -> None:
        self._count, self._lock = 1, threading.Lock()

    def join(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def leave(self) -> bool:
        """One less; whether it was the last."""
        with self._lock:
            self._count -= 1
            return self._count == 0


class RowByRow:
    """A backend that gives every image of a batch to another backend alone."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._rows: list[Buffers] = []

    @property
    def description(self) -> str:
        """The other backend's."""
        return f"{self._backend.description}, one image at a time"

    def bind(self, buffers: Buffers) -> None:
        """Take these buffers."""
        self._rows = [buffers.row(index) for index in range(len(buffers.x))]

    def enqueue(self) -> None:
        """Compute each row."""
        for row in self._rows:
            self._backend.bind(row)
            self._backend.enqueue()

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()


class DeviceNetwork(Protocol):
    """A network bound to device memory for one batch size. For one thread at a time, and for one captured graph."""

    def enqueue(self, stream: int) -> None:
        """Put one run into a stream, and wait for nothing.

        Raises:
            BackendError: the library refused.
        """

    def close(self) -> None:
        """Free what it has on the device. Wait for the stream before. Again is harmless."""


class DeviceBackend(Protocol):
    """A file's network on one GPU. Several threads may use it, each with a network of its own.

    Attributes:
        driver: the GPU.
        stream: the stream, in which alone its networks run, or 0 if any will do.
        executors: by which of :data:`ddpmx.cuda.executors.EXECUTORS` ``auto`` may run its networks, best first.
    """

    driver: Driver
    stream: int
    executors: tuple[str, ...]

    @property
    def description(self) -> str:
        """Library, version and device, for people."""

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """The smallest and the largest batch of each range that it takes."""

    def check_batch(self, batch: int) -> int:
        """Which of :attr:`batches` takes this one.

        Raises:
            InputError: none does.
        """

    def network(self, batch: int, *, x: int, t: int, out: int, var: int = 0, stream: int) -> DeviceNetwork:
        """The network for ``batch`` images in device memory.

        Args:
            batch: images.
            x, t, out, var: device addresses of float32 [batch, C, H, W], int32 [batch], float32 [batch, C, H, W] and,
                if the network learns its variance, float32 [batch, C, H, W].
            stream: where it is prepared.

        Raises:
            BackendError: the library refuses, or its memory does not suffice.
            InputError: it does not take this batch.
        """

    def close(self) -> None:
        """Free everything. Close its networks first."""


class CopyingBackend:
    """A :class:`DeviceBackend` as a :class:`Backend`: x and t are copied to the device, and the answer back, every time.

    What parity and everything else in NumPy wants; chains run on the device instead.

    Args:
        device: the network; closed with the last backend that shares it.
        users: how many there are; for :meth:`share`.

    Raises:
        BackendError: the driver refuses.
    """

    def __init__(self, device: DeviceBackend, *, users: Users | None = None) -> None:
        self.device = device
        self._users = users or Users()
        self._buffers: Buffers | None = None
        self._batch = 0
        self._memory: list[Handle] = []
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
        """Take these buffers. Memory on the device is taken anew only for another batch.

        Raises:
            BackendError: it does not suffice.
            InputError: the network does not take this batch.
        """
        batch = len(buffers.x)
        if batch != self._batch or self._network is None or len(self._memory) != len(_told(buffers)):
            self.release()
            driver = self.device.driver
            try:
                with driver.current():
                    for array, what in _told(buffers):
                        self._memory.append(driver.allocate(array.nbytes, what))
                    x, t, *answers = (memory.value for memory in self._memory)
                    at = dict(zip(("out", "var"), answers, strict=False))
                    self._network = self.device.network(batch, x=x, t=t, **at, stream=self._stream)
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
            raise BackendError("nothing is bound to the network")
        driver, stream = self.device.driver, self._stream
        arrays = [array for array, _ in _told(self._buffers)]
        with driver.current():
            try:
                for array, memory in zip(arrays[:2], self._memory[:2], strict=True):
                    driver.copy_in(memory.value, array, stream)
                self._network.enqueue(stream)
                for array, memory in zip(arrays[2:], self._memory[2:], strict=True):
                    driver.copy_out(array, memory.value, stream)
            finally:  # the buffers are the caller's again
                driver.wait_for_stream(stream, "running the network")

    def release(self) -> None:
        """Free the memory of the batch that was bound. The next :meth:`bind` takes it again."""
        if self._network is not None:
            self._network.close()
        self._network, self._buffers, self._batch = None, None, 0
        while self._memory:
            self._memory.pop().close()

    def share(self) -> CopyingBackend:
        """See :meth:`SharedBackend.share`. What runs on a stream of the library's own is for one thread.

        Raises:
            BackendError: it is such a library, or the driver refuses.
        """
        if self.device.stream:
            raise BackendError(
                f"{self.description} runs in one stream, and so in one thread", hint="load the file again for another"
            )
        other = CopyingBackend(self.device, users=self._users)
        self._users.join()
        return other

    def close(self) -> None:
        """Free what is this one's, and the network if nobody else shares it. Again is harmless."""
        if self._closed:
            return
        self._closed = True
        self.release()
        if self._own is not None:
            self._own.close()
        if self._users.leave():
            self.device.close()


def _told(buffers: Buffers) -> list[tuple[NDArray[np.generic], str]]:
    """Each array and what it is: x and t, then the answers."""
    named = [(buffers.x, "x"), (buffers.t, "t"), (buffers.out, "the network's answer"), (buffers.var, "its variance")]
    return [(array, what) for array, what in named if array is not None]
