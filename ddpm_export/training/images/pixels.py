"""Where the pixels of a data set are: in memory, or wherever else images can be taken from by their numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Digest = Callable[[bytes | memoryview], object]
"""Takes the next bytes of what is hashed."""

BLOCK = 256
"""Images that are hashed at once."""


class Pixels(ABC):
    """uint8 images of one shape, taken by their numbers.

    Attributes:
        identity: what tells these images from others if that is not their pixels.
    """

    identity: bytes | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""

    @abstractmethod
    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers, 0…N−1, in this order: uint8 [B, H, W, C], in memory of their own.

        Raises:
            DataError: one cannot be read any more.
        """

    def hash_into(self, update: Digest) -> None:
        """Pass on the identity or, without one, all pixels."""
        if self.identity is not None:
            update(self.identity)
            return
        n = self.shape[0]
        for start in range(0, n, BLOCK):
            update(np.ascontiguousarray(self.take(np.arange(start, min(n, start + BLOCK), dtype=np.int64))).data)


class InMemory(Pixels):
    """Images in an array.

    Args:
        array: uint8 [N, H, W, C].
        identity: in place of the pixels.
    """

    def __init__(self, array: NDArray[np.uint8], identity: bytes | None = None) -> None:
        self.array, self.identity = array, identity

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        n, height, width, channels = self.array.shape
        return n, height, width, channels

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers."""
        return self.array[indices]
