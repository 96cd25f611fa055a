"""Progressive generation (Ho et al. 2020, Figures 6 and 10): x̂_0 as the chain goes, and how far it is from the image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.pixels import to_nhwc

FRAMES = 11


class Frames(NamedTuple):
    """x̂_0 at some timesteps of a chain.

    Attributes:
        t: int64 [k], falling to that of the chain's end.
        pixels: uint8 [k, n, H, W, C], x̂_0 as pixels; the last are the images.
        rmse: float64 [k], the root mean square difference of ``pixels`` to the images, over all n, on the scale of 0…255.
    """

    t: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    rmse: NDArray[np.float64]


class Progress:
    """Collects x̂_0 through the chain. Pass it to ``generate`` as ``preview``, and then take :attr:`frames`.

    Args:
        spec: the model.
        table: the chain's table, from ``Pipeline.table``.
        n: how many images are generated.
        count: at how many timesteps, spread evenly over the chain with both of its ends; fewer if it has fewer.

    Raises:
        InputError: ``count`` is less than 2.
    """

    def __init__(self, spec: ModelSpec, table: Table, n: int, count: int = FRAMES) -> None:
        if count < 2:
            raise InputError(f"a chain is shown at 2 timesteps or more, not {count}")
        picked = np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int))
        self._t = table.timesteps[picked]
        self._slots = {int(t): slot for slot, t in enumerate(self._t)}
        channels, height, width = spec.shape
        self._pixels = np.zeros((len(picked), n, height, width, channels), np.uint8)

    def __call__(self, start: int, step: Preview) -> None:
        """Keep the step if it is one of the frames."""
        slot = self._slots.get(step.t)
        if slot is not None:
            self._pixels[slot, start : start + len(step.x0)] = to_nhwc(step.x0)

    @property
    def frames(self) -> Frames:
        """What was collected, once the chain has ended."""
        pixels = self._pixels.astype(np.float64)
        rmse = np.sqrt(((pixels - pixels[-1]) ** 2).mean(axis=(1, 2, 3, 4)))
        return Frames(self._t, self._pixels, rmse)
