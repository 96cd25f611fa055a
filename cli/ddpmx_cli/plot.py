"""`ddpmx plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx_cli.console import say

EXAMPLES = """
Examples:\n
  ddpmx plot runs/photos\n
  ddpmx plot runs/photos -o curves.png
"""


def plot(
    run: Annotated[Path, Argument(help="Folder of a run.")],
    out: Annotated[Path | None, Option("--out", "-o", help="The PNG.  \\[default: RUN/curves.png]")] = None,
) -> None:
    """Draw the curves of a training: loss, loss by t, gradient, speed, and bits/dim where images were held out."""
    from ddpm_export.training.plot import plot_run
    from ddpmx.formats.output_file import check_output, is_plot

    if out is not None:
        check_output(out, [], what="a plot of ddpmx", suffix=".png", is_ours=is_plot)
    say(f"wrote {plot_run(run, run / 'curves.png' if out is None else out)}")
