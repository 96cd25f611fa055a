"""The look of all plots. Importing this module needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context, rcdefaults
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ddpmx
from ddpmx.formats.output_file import PLOT

LINE, BOUND, SOFT = "#1f5fa8", "#c0392b", "#8fb3d9"
"""Colours: of what is shown, of its bound, and of what is behind it."""


@contextmanager
def own_style() -> Iterator[None]:
    """Draw as ddpmx does, whatever matplotlibrc there is in the current folder."""
    with rc_context():
        rcdefaults()
        yield


def new(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (7.2, 4.3)) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` in inches with a grid of axes, row by row."""
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    every: list[Axes] = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    for axes in every:
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": f"ddpmx {ddpmx.__version__}", "task": PLOT})
    return stream.getvalue()
