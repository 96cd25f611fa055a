"""Images that make their steps together, in a batch where others are at other steps: what each.cu has to know of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddpmx.cuda.layout import EACH, Each
from ddpmx.diffusion.samplers import Table


def steps_of(table: Table) -> NDArray[np.void]:
    """A table's steps as the kernels read them, :data:`ddpmx.cuda.layout.EACH` [S]. What is an image's own is 0."""
    steps = np.zeros(len(table), EACH)
    rows = table.rows.astype(np.float32)
    for name, column in zip(("p", "q", "a", "b", "sigma"), rows.T, strict=True):
        steps[name] = column
    steps["t"] = table.timesteps
    for columns, flag in ((table.learned, Each.LEARNS), (table.memory, Each.REMEMBERS)):
        if columns is not None:
            steps["c"], steps["d"] = columns.astype(np.float32).T
            steps["flags"] |= np.uint32(flag)
    steps["flags"][-1:] |= np.uint32(Each.LAST)
    return steps


@dataclass(eq=False)
class Group:
    """Images that make the same steps together.

    Attributes:
        table: their sampler.
        seed: of their noise.
        images: int64 [n], their indices.
        rows: int64 [n], their rows in the batch; of a guided chain [2·n], first those with the class.
        guidance: w of a guided chain.
        labels: int32 [n], their classes, where the network takes them.
        own_x: whether x is what :meth:`DeviceBatch.put` wrote, and not x_T ~ N(0, I).
        done: how many steps were launched.
    """

    table: Table
    seed: int
    images: NDArray[np.int64]
    rows: NDArray[np.int64]
    guidance: float = 0.0
    labels: NDArray[np.int32] | None = None
    own_x: bool = False
    done: int = 0
    steps: NDArray[np.void] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """The table as the kernels read it."""
        self.steps = steps_of(self.table)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.steps)

    @property
    def first(self) -> NDArray[np.int64]:
        """The rows with the images' classes."""
        return self.rows[: len(self.images)]

    def write(self, entries: NDArray[np.void], *, keeps_x0: bool = False) -> None:
        """What the next step needs, into :data:`ddpmx.cuda.layout.EACH` [n]; x̂_0 is written only if it ``keeps_x0``."""
        n = len(self.images)
        entries[...] = self.steps[self.done]
        if keeps_x0:
            entries["flags"] |= np.uint32(Each.KEEPS_X0)
        if self.done == 0:
            entries["flags"] |= np.uint32(Each.BEGINS | (Each.OWN_X if self.own_x else 0))
        entries["at"] = self.rows[:n]
        entries["without"] = self.rows[n:] if len(self.rows) > n else -1
        entries["image"], entries["guidance"] = self.images, self.guidance
        entries["seed_low"], entries["seed_high"] = self.seed & 0xFFFFFFFF, self.seed >> 32
