"""Where the pixels of a data set are: in memory, or wherever else images can be taken from by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Digest = Callable[[bytes | memoryview], object]
"""Takes the next bytes of what is hashed."""


class Pixels(Protocol):
    """uint8 images of one shape, taken by their numbers."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers in this order, uint8 [B, H, W, C], in memory of their own.

        Raises:
            DataError: one cannot be read any more.
        """

    def hash_into(self, update: Digest) -> None:
        """Pass on what tells these images from others."""


class InMemory:
    """Images in an array; see :class:`Pixels`.

    Args:
        array: uint8 [N, H, W, C].
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        n, height, width, channels = self.array.shape
        return n, height, width, channels

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers."""
        return self.array[indices]

    def hash_into(self, update: Digest) -> None:
        """All pixels."""
        update(np.ascontiguousarray(self.array).data)
