"""The figures of a training: summed on its device, and passed on to TensorBoard and Weights & Biases if asked for.

They are read now and then, so that watching costs a GPU no waiting. ``log.csv`` is in :mod:`ddpm_export.training.log`.
"""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_export.training.distributed import ALONE, Processes
from ddpm_export.training.log import BUCKETS, Row
from ddpmx.errors import BackendError, OutputError


@dataclass(frozen=True)
class Figures:
    """Means since they were read before.

    Attributes:
        steps: how many steps.
        loss: what was minimised.
        grad_norm: of the gradient, before it was clipped.
        buckets: the mean of L_simple in each bucket of t, NaN where there was no such t.
    """

    steps: int
    loss: float
    grad_norm: float
    buckets: tuple[float, ...]


class Sums:
    """Losses and gradient norms, summed on the device of a training."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self._count = min(BUCKETS, timesteps)
        self._timesteps = timesteps
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._values = torch.zeros(3 + 2 * self._count, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, t: Tensor, simple: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Count a step: t int64 [B], L_simple and the loss of its images float32 [B], the gradient's norm."""
        values, k = self._values, self._count
        values[0] += 1
        values[1] += loss.mean()
        values[2] += norm
        # the bucket b of t has T·b // k ≤ t, so b = ((t + 1)·k − 1) // T
        bucket = torch.div((t + 1) * k - 1, self._timesteps, rounding_mode="floor")
        values[3 : 3 + k].index_add_(0, bucket, simple.to(values.dtype))
        values[3 + k :].index_add_(0, bucket, torch.ones_like(simple, dtype=values.dtype))

    def read(self, processes: Processes = ALONE) -> NDArray[np.float64]:
        """The sums over all processes since the last call, for :func:`figures`; they can be added up."""
        sums = self._values.clone()
        self._values.zero_()
        return processes.sum(sums).cpu().numpy().astype(np.float64)


def figures(sums: NDArray[np.float64], processes: int = 1) -> Figures:
    """The means of what :meth:`Sums.read` gave."""
    count, loss, norm = sums[:3]
    totals, counts = np.split(sums[3:], 2)
    buckets = tuple(float(total / n) if n else math.nan for total, n in zip(totals, counts, strict=True))
    return Figures(round(count / processes), float(loss / max(count, 1)), float(norm / max(count, 1)), buckets)


class TensorBoard:
    """Event files in ``RUN/tensorboard``.

    Raises:
        BackendError: the package is not installed.
    """

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendError("tensorboard is not installed", hint="pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def row(self, row: Row) -> None:
        """Figures; "step" among them."""
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(f"loss/{name}" if name.startswith("t") else name, value, int(row["step"]))

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """A picture, uint8 [H, W, C]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """There is nothing more to come."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the project "ddpmx"; where it is logged in or set to be offline.

    Raises:
        BackendError: the package is not installed, or cannot begin.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise BackendError("wandb is not installed", hint="pip install wandb") from error
        try:
            self._wandb: Any = wandb
            self._run: Any = wandb.init(project="ddpmx", name=run.name, dir=str(run), config=dict(config))
        except Exception as error:  # of its own kinds, by version
            raise BackendError(
                "Weights & Biases does not begin",
                note=str(error).splitlines()[0][:200] if str(error) else None,
                hint="wandb login, or WANDB_MODE=offline",
            ) from error

    def row(self, row: Row) -> None:
        """Figures; "step" among them."""
        figures = {name: value for name, value in row.items() if name != "step" and not math.isnan(value)}
        self._run.log(figures, step=int(row["step"]))

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """A picture, uint8 [H, W, C]."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """There is nothing more to come."""
        self._run.finish()


def memory_mb(device: torch.device) -> float:
    """The most memory that was in use so far, in MB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def is_full(error: OutputError) -> bool:
    """Whether a file could not be written because there is no space left, which may change."""
    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return True
    return any(os.strerror(code) in f"{error.fact} {error.note}" for code in (errno.ENOSPC, errno.EDQUOT))
