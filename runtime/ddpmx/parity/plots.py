"""The plots of a parity report. Importing this module needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ddpmx.images import figures
from ddpmx.images.figures import BOUND, LINE, SOFT
from ddpmx.parity.ladder import ParityReport


def draw(report: ParityReport, folder: Path) -> dict[str, str]:
    """Write error.png, chain.png and, if there was a free chain, levels.png. {file name: caption}"""
    if "eps" not in report.curves:
        return {}
    made = {
        "error.png": "Error of the network's output over the timesteps, in units of the RMS of PyTorch's output. "
        "Each curve must stay below its red line.",
        "chain.png": "Along the chain, from noise (left) to image (right): the error of single steps from PyTorch's "
        "states, and the drift of a free-running chain from PyTorch's. Values below 6e-8 are drawn at 6e-8.",
    }
    with figures.own_style():
        _save(_error(report), folder / "error.png")
        _save(_chain(report), folder / "chain.png")
        if "levels_apart" in report.curves:
            _save(_levels(report), folder / "levels.png")
    if "levels_apart" in report.curves:
        made["levels.png"] = "The pixels of the free chain: share of uint8 values that differ by 0, 1, 2, … levels."
    return made


def _error(report: ParityReport) -> Figure:
    figure, (axes,) = figures.new()
    curves = report.curves
    axes.semilogy(curves["t"], _shown(curves["eps_pixel"]), color=SOFT, marker=".", label="largest of all pixels")
    axes.semilogy(curves["t"], _shown(curves["eps"]), color=LINE, marker=".", label="RMS over pixels")
    for name, style, label in (("eps_pixel_bound", ":", "its bound"), ("eps_bound", "-", "bound of the RMS")):
        least = float(np.min(curves[name]))
        axes.semilogy(
            curves["t"], _shown(curves[name]), color=BOUND, linewidth=1, linestyle=style, label=f"{label}, {least:.3g}"
        )
    axes.set_xlabel("timestep t   (0: almost an image; T−1: noise)")
    axes.set_ylabel("error of the output")
    axes.set_title(f"{report.spec.precision} against PyTorch float32")
    _legend(figure, axes)
    return figure


def _chain(report: ParityReport) -> Figure:
    figure, (axes,) = figures.new()
    curves = report.curves
    axes.semilogy(
        curves["chain_t"], _shown(curves["forced_step"]), color=SOFT, marker=".", label="one step from PyTorch's state"
    )
    if "free" in curves:
        axes.semilogy(
            curves["chain_t"], _shown(curves["free"]), color=LINE, marker=".", label="drift of the free chain"
        )
    axes.axhline(1 / 255, color=BOUND, linewidth=1, label="half a level of uint8")
    axes.invert_xaxis()
    axes.set_xlabel("timestep t   (the chain runs to the right)")
    axes.set_ylabel("RMS difference of x_t, of a range of 2")
    axes.set_title("teacher-forced and free-running chain")
    _legend(figure, axes)
    return figure


def _levels(report: ParityReport) -> Figure:
    figure, (axes,) = figures.new()
    counts = report.curves["levels_apart"].astype(np.float64)
    last = max(4, int(np.flatnonzero(counts).max(initial=0)) + 1)
    counts = np.pad(counts, (0, max(0, last + 1 - len(counts))))[: last + 1]
    share = counts / counts.sum()
    bars = axes.bar(np.arange(last + 1), share, color=LINE)
    axes.bar_label(bars, [f"{v:.2%}" if v else "none" for v in share], fontsize=8)
    axes.set_xticks(np.arange(0, last + 1, max(1, last // 12)))
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("levels apart, of 256")
    axes.set_ylabel("share of pixel values")
    axes.grid(visible=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("the images of the free chain")
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Add a legend below the plot, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _shown(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[float]:
    """``values`` for a logarithmic axis, which has no 0: at least 2⁻²⁴, the spacing of float32 just below 1."""
    return [max(float(v), 2.0**-24) for v in values]


def _save(figure: Figure, path: Path) -> None:
    path.write_bytes(figures.png(figure))
