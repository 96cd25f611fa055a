"""A network of a fixed size on images of any size: overlapping tiles, whose results are blended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline

Float32 = NDArray[np.float32]

AT_ONCE = 1 << 22
"""Elements of the tiles that are in memory at once, beside what the network needs."""


@dataclass(frozen=True)
class Tiling:
    """How an image of H'×W' is cut for a network of H×W.

    What is smaller than a tile is continued by its mirror image, and cut off again. Otherwise tiles lie at even distances,
    from edge to edge, and overlap by ``overlap`` pixels or more. Where they do, their results are averaged, with weights
    that fall linearly from each tile's middle to its edges, so no seam is seen.

    Attributes:
        size: (H', W') of the image.
        tile: (H, W) of the network.
        overlap: pixels, from 0 to one less than a tile's shorter side.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    overlap: int

    def __post_init__(self) -> None:
        """Check the overlap.

        Raises:
            InputError: it is out of its range.
        """
        most = min(self.tile) - 1
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, (int, np.integer)):
            raise InputError(f"overlap must be a whole number of pixels, not {self.overlap!r}")
        if not 0 <= self.overlap <= most:
            raise InputError(
                f"overlap must be from 0 to {most} pixels, not {self.overlap}",
                note=f"the network takes tiles of {self.tile[0]}×{self.tile[1]}",
            )

    @cached_property
    def canvas(self) -> tuple[int, int]:
        """(H', W') with the mirror image: at least a tile."""
        return max(self.size[0], self.tile[0]), max(self.size[1], self.tile[1])

    @cached_property
    def corners(self) -> list[tuple[int, int]]:
        """The upper left corner of each tile on the canvas."""
        rows, columns = (
            _positions(whole, side, self.overlap) for whole, side in zip(self.canvas, self.tile, strict=True)
        )
        return [(row, column) for row in rows for column in columns]

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.corners)

    def widened(self, image: Float32) -> Float32:
        """float32 [C, H', W'] on its canvas."""
        below, beside = self.canvas[0] - self.size[0], self.canvas[1] - self.size[1]
        widened: Float32 = np.pad(image, ((0, 0), (0, below), (0, beside)), mode="symmetric")
        return widened

    def cut(self, canvas: Float32, part: slice) -> Float32:
        """Some of the tiles of a canvas, float32 [n, C, H, W]."""
        height, width = self.tile
        return np.stack([canvas[:, y : y + height, x : x + width] for y, x in self.corners[part]])

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """float64 [H, W]: how much a tile counts at each of its pixels."""
        y, x = (np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)) / side for side in self.tile)
        return np.outer(y, x)

    def blended(self, tiles: Callable[[slice], Float32], channels: int, at_once: int) -> Float32:
        """The tiles' results as one canvas, float32 [C, H', W'].

        Args:
            tiles: the results of some of the tiles, float32 [n, C, H, W].
            channels: C.
            at_once: how many tiles to ask for at a time.
        """
        if len(self) == 1:
            alone: Float32 = tiles(slice(0, 1))[0]
            return alone
        height, width = self.tile
        total, weight = np.zeros((channels, *self.canvas)), np.zeros(self.canvas)
        for start in range(0, len(self), at_once):
            part = slice(start, start + at_once)
            for (y, x), result in zip(self.corners[part], tiles(part), strict=True):
                total[:, y : y + height, x : x + width] += self.weights * result
                weight[y : y + height, x : x + width] += self.weights
        canvas: Float32 = (total / weight).astype(np.float32)
        return canvas

    def cropped(self, canvas: Float32) -> Float32:
        """A canvas, float32 [C, H', W'], without the mirror image."""
        return canvas[:, : self.size[0], : self.size[1]]


def _positions(whole: int, side: int, overlap: int) -> list[int]:
    """Where tiles of ``side`` begin, evenly from one end of ``whole`` to the other."""
    count = 1 if whole == side else -(-(whole - overlap) // (side - overlap))
    return [int(at) for at in np.round(np.linspace(0, whole - side, count))]


@dataclass(frozen=True)
class TiledNetwork:
    """The network of a pipeline, for one image of any size at a time.

    Attributes:
        pipeline: the model.
        tiling: how the image is cut.
        batch: tiles at once, at most.
        guidance: as for :meth:`ddpmx.Pipeline.evaluate`.
        advance: called with the number of tiles that are done.
        cancel: as for :meth:`ddpmx.Pipeline.evaluate`.
    """

    pipeline: Pipeline
    tiling: Tiling
    batch: int | None = None
    guidance: float = 1.0
    advance: Callable[[int], None] | None = None
    cancel: Callable[[], bool] | None = None

    def evaluate(
        self, x: Float32, t: int, label: int | None = None, x0_prev: Float32 | None = None
    ) -> tuple[Float32, Float32 | None]:
        """x̂_0 of a canvas, and ``var`` of a network that learns its variance; float32 [C, H', W'] each.

        Args:
            x: float32 [C, H', W'], x_t.
            t: 0…T−1.
            label: the image's class.
            x0_prev: x̂_0 of the step before, for a network that conditions on itself.

        Raises:
            As :meth:`ddpmx.Pipeline.evaluate`.
        """
        spec = self.pipeline.spec
        C, H, W = spec.shape
        batch = self.pipeline.default_batch if self.batch is None else self.batch
        at_once = max(1, AT_ONCE // (C * H * W) // batch) * batch
        learns = spec.learns_variance

        def results(part: slice) -> Float32:
            more: dict[str, Any] = {}
            if x0_prev is not None and spec.self_condition:
                more["x0_prev"] = self.tiling.cut(x0_prev, part)
            found = self.pipeline.evaluate(
                self.tiling.cut(x, part),
                t,
                first=part.start,
                batch=batch,
                labels=label,
                guidance=self.guidance,
                cancel=self.cancel,
                **more,
            )
            if self.advance is not None:
                self.advance(len(found.x0))
            return found.x0 if found.var is None else np.concatenate([found.x0, found.var], axis=1)

        canvas = self.tiling.blended(results, 2 * C if learns else C, at_once)
        return canvas[:C], canvas[C:] if learns else None
