"""The curves of a run, from its ``log.csv``, as a picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

import ddpmx
from ddpm_export.training.log import LOG, Row, read_log
from ddpmx.errors import BackendError, FileFormatError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.output_file import PLOT


def plot_run(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Draw losses, losses by t, gradient norm, speed, and bits/dim where images were held out, as a PNG.

    Args:
        run: a run's folder.
        out: the PNG.

    Raises:
        FileFormatError: the run has no log.
        BackendError: matplotlib is not installed.
        OutputError: the PNG cannot be written.
    """
    rows = read_log(Path(run) / LOG)
    if not rows:
        raise FileFormatError(
            f"{Path(run) / LOG}: the log has no rows yet", hint="there is one every --log-every steps"
        )
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise BackendError("drawing curves needs matplotlib", hint="pip install matplotlib") from error
    buckets = [name for name in rows[0] if name.startswith("t") and "-" in name]
    panels = ["loss", "by t", "grad_norm", "images_per_second"]
    if any(not math.isnan(row.get("bits_per_dim", math.nan)) for row in rows):
        panels.append("bits_per_dim")
    titles = {
        "loss": "loss",
        "by t": "L_simple by t",
        "grad_norm": "norm of the gradient",
        "images_per_second": "images per second",
        "bits_per_dim": "bits/dim of images held out",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        axis.set_title(titles[panel], fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if panel == "by t":
            colours = plt.get_cmap("viridis")
            for number, name in enumerate(buckets):
                axis.plot(*_curve(rows, name), color=colours(number / max(1, len(buckets) - 1)), label=name, lw=1)
            axis.legend(fontsize=6, ncols=2, title="t", title_fontsize=6)
        else:
            marker = "o" if panel == "bits_per_dim" or len(rows) < 3 else ""
            axis.plot(*_curve(rows, panel), color="#1f5f8b", lw=1, marker=marker, ms=3)
        if panel == "images_per_second":
            axis.set_ylim(bottom=0)
        if panel in ("loss", "by t", "grad_norm") and all(value > 0 for value in _curve(rows, "loss")[1]):
            axis.set_yscale("log")
    path = Path(out)
    try:
        with atomic_write(path) as stream:
            about = {"Software": f"ddpmx {ddpmx.__version__}", "task": PLOT}
            figure.savefig(stream, format="png", dpi=110, metadata=about)
    finally:
        plt.close(figure)
    return path


def _curve(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column, where it has any."""
    points = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]
