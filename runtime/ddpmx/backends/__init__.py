"""How ε is computed. A backend is one file's network on one device; the chain around it is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Buffers:
    """The arrays that a network reads and writes, on the host. They stay the same from one step to the next.

    Attributes:
        x: float32 [B, C, H, W], C-contiguous, x_t.
        t: int32 [B].
        out: float32 [B, C, H, W], C-contiguous, the network's answer.
    """

    x: NDArray[np.float32]
    t: NDArray[np.int32]
    out: NDArray[np.float32]

    @classmethod
    def of(cls, batch: int, shape: tuple[int, int, int]) -> Buffers:
        """New ones for ``batch`` images of shape (C, H, W)."""
        return cls(
            np.zeros((batch, *shape), np.float32), np.zeros(batch, np.int32), np.zeros((batch, *shape), np.float32)
        )


class Backend(Protocol):
    """ε(x, t) in place. Not thread-safe: one per thread."""

    @property
    def description(self) -> str:
        """What really computes, for people: library, version and device."""

    def bind(self, buffers: Buffers) -> None:
        """Take these buffers for all following calls of :meth:`enqueue`."""

    def enqueue(self) -> None:
        """Compute ``out`` from ``x`` and ``t``.

        Raises:
            BackendError: the library refused.
        """

    def close(self) -> None:
        """Free everything."""


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
        rows = range(len(buffers.x))
        self._rows = [Buffers(buffers.x[i : i + 1], buffers.t[i : i + 1], buffers.out[i : i + 1]) for i in rows]

    def enqueue(self) -> None:
        """Compute each row."""
        for row in self._rows:
            self._backend.bind(row)
            self._backend.enqueue()

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()
