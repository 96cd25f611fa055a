"""The images of each step: their order, flips and crops. A function of (seed, step), so nothing has to be saved.

An epoch is a permutation of the images by (seed, epoch); the batch of step s are the positions s·B … (s+1)·B − 1 in the
sequence of all epochs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_export.training.data import Dataset
from ddpm_export.training.distributed import ALONE, Processes
from ddpm_export.training.images.pixels import InMemory
from ddpm_export.training.prefetch import Prefetch
from ddpm_export.training.settings import TrainSettings
from ddpmx.errors import InputError
from ddpmx.sampling.pixels import from_uint8


@dataclass(frozen=True)
class Batch:
    """A process's share of the images of a step.

    Attributes:
        x0: float32 [B, C, H, W] in [−1, 1].
        y: int64 [B], their classes, or None.
        cond: float32 [B, K, H, W] in [−1, 1], their conditions, or None.
    """

    x0: Tensor
    y: Tensor | None = None
    cond: Tensor | None = None


class Batches:
    """The batches of a run.

    Args:
        dataset: the images.
        settings: of the training.
        processes: of the training.

    Attributes:
        shape: (C, H, W) of the images as they are trained on: cropped.
        trained: int64, the indices of the images that are trained on.
        held_out: int64 [holdout], those that are not.

    Raises:
        InputError: the images are smaller than the crop, none is left to train on, or a process's share of the batch cannot
            be accumulated in so many parts.
    """

    def __init__(self, dataset: Dataset, settings: TrainSettings, processes: Processes = ALONE) -> None:
        channels, height, width = dataset.shape
        crop = settings.crop
        check_crop(dataset.shape, crop)
        if settings.holdout >= len(dataset):
            raise InputError(
                f"holdout must leave images to train on, and there are {len(dataset)}",
                note=f"holdout {settings.holdout}",
            )
        self.dataset, self.settings, self.processes = dataset, settings, processes
        self.shape = (channels, *(crop or (height, width)))
        order = np.arange(len(dataset))
        if settings.holdout:
            order = np.random.default_rng([settings.seed, 1 << 32]).permutation(len(dataset))
        self.held_out = np.sort(order[: settings.holdout])
        self.trained = np.sort(order[settings.holdout :])
        self._share = processes.share(settings.batch)
        each = settings.batch // processes.size
        if each % settings.accumulate:
            raise InputError(
                f"accumulate must be a divisor of each process's share of the batch, which is {each}",
                note=f"a batch of {settings.batch} among {processes.size} processes, in {settings.accumulate} parts",
            )
        self._ahead: Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] | None = None
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def indices(self, step: int) -> NDArray[np.int64]:
        """The indices of the whole batch of a step, int64 [B]."""
        batch, n = self.settings.batch, len(self.trained)
        where = np.arange(step * batch, (step + 1) * batch)
        places = [
            self._order(epoch)[position]
            for epoch, position in zip((where // n).tolist(), (where % n).tolist(), strict=True)
        ]
        chosen: NDArray[np.int64] = self.trained[np.array(places)]
        return chosen

    def draw(self, step: int) -> Batch:
        """This process's share of the batch, flipped and cropped by torch's generator on the CPU."""
        settings, dataset = self.settings, self.dataset
        indices = self.indices(step)
        corners, mirrored = None, None
        if settings.crop is not None:
            room = [have - want + 1 for have, want in zip(dataset.shape[1:], settings.crop, strict=True)]
            corners = torch.stack([torch.randint(most, (len(indices),)) for most in room], 1)[self._share]
        if settings.hflip:
            mirrored = (torch.rand(len(indices)) < 0.5)[self._share]
        mine = indices[self._share]
        if self._ahead is None:
            pixels, conditions = self._take(mine)
        else:
            pixels, conditions = next(self._ahead)
        x0 = self._augmented(pixels, corners, mirrored)
        cond = None if conditions is None else self._augmented(conditions, corners, mirrored)
        y = None if dataset.labels is None else torch.from_numpy(dataset.labels[mine].astype(np.int64))
        return Batch(x0, y, cond)

    @contextlib.contextmanager
    def ahead(self, step: int) -> Iterator[None]:
        """Within the block images are read ahead, in a thread; :meth:`draw` is then called for ``step``, ``step`` + 1, …

        Images that are in memory need no reading, and none is done.
        """
        kept = (
            [self.dataset.pixels]
            if self.dataset.conditions is None
            else [self.dataset.pixels, self.dataset.conditions.pixels]
        )
        if all(isinstance(pixels, InMemory) for pixels in kept):
            yield
            return
        order = (self.indices(later)[self._share] for later in itertools.count(step))
        with Prefetch(self._take, order) as self._ahead:
            try:
                yield
            finally:
                self._ahead = None

    def _take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        conditions = self.dataset.conditions
        return self.dataset.take(indices), None if conditions is None else conditions.take(indices)

    def whole(self, indices: NDArray[np.int64]) -> Batch:
        """These images without any chance: the middle of each, not mirrored."""
        dataset, crop = self.dataset, self.settings.crop
        corners = None
        if crop is not None:
            middle = [(have - want) // 2 for have, want in zip(dataset.shape[1:], crop, strict=True)]
            corners = torch.tensor(middle).repeat(len(indices), 1)
        x0 = self._augmented(dataset.take(indices), corners, None)
        cond = None if dataset.conditions is None else self._augmented(dataset.conditions.take(indices), corners, None)
        y = None if dataset.labels is None else torch.from_numpy(dataset.labels[indices].astype(np.int64))
        return Batch(x0, y, cond)

    def _augmented(self, pixels: NDArray[np.uint8], corners: Tensor | None, mirrored: Tensor | None) -> Tensor:
        if corners is not None and self.settings.crop is not None:
            height, width = self.settings.crop
            cut = [image[i : i + height, j : j + width] for image, (i, j) in zip(pixels, corners.tolist(), strict=True)]
            pixels = np.stack(cut)
        images = torch.from_numpy(from_uint8(pixels)).permute(0, 3, 1, 2)
        if mirrored is not None:
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images.contiguous()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the images in one epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.settings.seed, epoch])
            self._epoch = epoch, generator.permutation(len(self.trained))
        return self._epoch[1]


def check_crop(shape: tuple[int, int, int], crop: tuple[int, int] | None) -> None:
    """Check that a crop (H, W) fits into images of ``shape`` (C, H, W).

    Raises:
        InputError: it does not.
    """
    _, height, width = shape
    if crop is not None and (crop[0] > height or crop[1] > width):
        raise InputError(f"crop {crop[0]}×{crop[1]} is larger than the images", note=f"they are {height}×{width}")
