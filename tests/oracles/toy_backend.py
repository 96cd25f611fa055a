"""The closed-form network of ``gaussian.py`` as a Backend in NumPy, with faults to order."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ddpmx.backends.base import Buffers
from oracles import conditioning, gaussian


class ToyBackend:
    """Its output is E[ε | x_t].

    Args:
        poison: (t, value): at that t one element of each image's output is ``value``.
        sways: the output depends on the "size" of the batch, as on a GPU but by more, or on an image's "place" in it.
        v: the output ``var``, if there is one.
        poisoned, swaying: which output.
    """

    description = "toy"

    def __init__(
        self,
        *,
        poison: tuple[int, float] | None = None,
        sways: Literal["size", "place"] | None = None,
        v: float = 0.0,
        poisoned: Literal["out", "var"] = "out",
        swaying: Literal["out", "var"] = "out",
    ) -> None:
        self.poison, self.sways, self.v = poison, sways, v
        self.poisoned, self.swaying = poisoned, swaying
        self.calls: list[tuple[int, int]] = []
        """(t of the first image, executed batch) of each call."""
        self.closed = 0
        self._slope, self._offset = gaussian.coefficients(gaussian.SPEC.make_schedule())

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        x, t, out = self.buffers.x, self.buffers.t, self.buffers.out
        self.calls.append((int(t[0]), len(x)))
        slope, offset = (c[t][:, None, None, None] for c in (self._slope, self._offset))
        out[...] = slope * x - offset * gaussian.MU
        out += conditioning.effect(self.buffers.inputs())
        if self.buffers.var is not None:
            self.buffers.var[...] = self.v
        swaying, poisoned = (getattr(self.buffers, name) for name in (self.swaying, self.poisoned))
        if swaying is not None and self.sways == "size":
            swaying += np.float32(0.01 * len(x))
        elif swaying is not None and self.sways == "place":
            swaying += np.float32(0.01) * np.arange(len(x), dtype=np.float32)[:, None, None, None]
        if poisoned is not None and self.poison is not None:
            poisoned[t == self.poison[0], -1, -1, -1] = self.poison[1]

    def close(self) -> None:
        self.closed += 1
