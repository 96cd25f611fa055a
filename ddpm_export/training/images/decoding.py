"""Images that are decoded each time they are taken, since their pixels do not fit into memory and are not kept on disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images import decode, threads
from ddpm_export.training.images.decode import Unreadable
from ddpm_export.training.images.items import Item, name_of
from ddpm_export.training.images.pixels import BLOCK, Digest, Pixels
from ddpm_export.training.images.source import Source
from ddpmx.device.cores import usable_cores
from ddpmx.errors import DataError


class Decoding(Pixels):
    """Images of files, or inside files, decoded by as many threads as there are cores, up to eight.

    Args:
        items: the images.
        size: (H, W).
        channels: C.
        source: how they are decoded.
        bicubic: whether smaller ones are enlarged as conditions are.
        identity: in place of the pixels, for which all of them would be decoded.
        progress: called with (images hashed, images in all) if they are.
    """

    def __init__(
        self,
        items: Sequence[Item],
        size: tuple[int, int],
        channels: int,
        source: Source,
        bicubic: bool,
        identity: bytes | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._items, self._size, self._channels, self._source = items, size, channels, source
        self._bicubic = bicubic
        self.identity, self._progress = identity, progress
        self._pool = ThreadPoolExecutor(min(threads.MOST, usable_cores()), "decode")
        weakref.finalize(self, self._pool.shutdown, wait=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return len(self._items), *self._size, self._channels

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers.

        Raises:
            DataError: one of them cannot be decoded.
        """
        images = np.empty((len(indices), *self._size, self._channels), np.uint8)
        with decode.own_limit():
            list(self._pool.map(self._decode, np.asarray(indices).tolist(), images))
        return images

    def hash_into(self, update: Digest) -> None:
        """The identity or, without one, all pixels."""
        done = 0

        def counted(data: bytes | memoryview) -> None:
            nonlocal done
            update(data)
            done = min(len(self._items), done + BLOCK)
            if self._progress is not None and self.identity is None:
                self._progress(done, len(self._items))

        super().hash_into(counted)

    def _decode(self, index: int, into: NDArray[np.uint8]) -> None:
        item = self._items[index]
        try:
            into[...] = decode.read_image(item, self._size, self._channels, self._source, bicubic=self._bicubic)
        except Unreadable as error:
            where = item if isinstance(item, Path) else f"{self._source.path}: {name_of(item, self._source.path)}"
            raise DataError(
                f"{where}: not an image that can be read",
                note=str(error),
                hint="put it right and --resume; pixels that are kept in the run are decoded before training begins",
            ) from error
