"""``log.csv`` of a run: losses, by t as well, gradient norms, rates, one row every so many steps. Needs no torch."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import FileFormatError
from ddpmx.formats.atomic import atomic_write, write_error

LOG = "log.csv"
BUCKETS = 10
"""Parts of 0…T−1 whose losses are shown apart."""

Row = dict[str, float]


def bucket_edges(timesteps: int) -> list[tuple[int, int]]:
    """First and last t of each bucket; there are fewer than :data:`BUCKETS` if T is smaller."""
    count = min(BUCKETS, timesteps)
    edges = [timesteps * i // count for i in range(count + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(edges)]


def bucket_names(timesteps: int) -> list[str]:
    """The columns of the buckets' losses: ``t0-99``, …"""
    return [f"t{low}-{high}" for low, high in bucket_edges(timesteps)]


def columns(timesteps: int) -> list[str]:
    """The columns of ``log.csv``: losses and norms are means since the row before."""
    figures = ["step", "seconds", "loss", "grad_norm", "lr", "images_per_second", "memory_mb", "bits_per_dim"]
    return figures + bucket_names(timesteps)


class Tracker(Protocol):
    """Takes a run's figures and pictures."""

    def row(self, row: Row) -> None:
        """Figures; "step" among them."""

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """A picture, uint8 [H, W, C]."""

    def close(self) -> None:
        """There is nothing more to come."""


class CsvLog:
    """``log.csv`` of a run: one row every so many steps.

    A resumed run drops the rows after the step at which it goes on, so that there is one row for every step.

    Args:
        run: the run's folder.
        timesteps: T.
        step: the step at which the run goes on, 0 for a new one.

    Raises:
        FileFormatError: there is a log of something else.
        OutputError: it cannot be written.
    """

    def __init__(self, run: Path, timesteps: int, step: int) -> None:
        self.path, self._columns = run / LOG, columns(timesteps)
        kept = [row for row in read_log(self.path) if row.get("step", math.inf) <= step] if self.path.exists() else []
        text = self._text([self._columns, *(self._cells(row) for row in kept)])
        if not (self.path.exists() and self.path.read_bytes() == text):
            with atomic_write(self.path) as stream:
                stream.write(text)

    def row(self, row: Row) -> None:
        """Figures; "step" among them."""
        before = None
        try:
            with self.path.open("ab") as stream:
                before = stream.tell()
                stream.write(self._text([self._cells(row)]))
        except OSError as error:
            if before is not None:  # a row that is tried again must not stand behind a part of itself
                with contextlib.suppress(OSError):
                    os.truncate(self.path, before)
            raise write_error(self.path, error) from error

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Do nothing: pictures are files of their own."""

    def close(self) -> None:
        """Do nothing: every row is on disk already."""

    def _cells(self, row: Row) -> list[str]:
        return ["" if math.isnan(value := row.get(name, math.nan)) else f"{value:.6g}" for name in self._columns]

    @staticmethod
    def _text(rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def read_log(path: Path) -> list[Row]:
    """The rows of a ``log.csv``; a last one that was cut off is left out.

    Raises:
        FileFormatError: it is missing, or not such a file.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: no log of a training", note=str(error)) from error
    rows = list(csv.reader(line for line in lines if line.endswith("\n")))
    if not rows or rows[0][:3] != ["step", "seconds", "loss"]:
        raise FileFormatError(f"{path}: not the log of a training", hint="ddpmx train writes log.csv into its run")
    found = []
    for row in rows[1:]:
        with contextlib.suppress(ValueError):
            if len(row) == len(rows[0]):
                cells = zip(rows[0], row, strict=True)
                found.append({name: float(cell) if cell else math.nan for name, cell in cells})
    return found
