"""`ddpmx adopt`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx_cli.console import busy, check_threads, say

EXAMPLES = """
Examples:\n
  ddpmx adopt model.int8.onnx --like model.onnx   # a quantiser dropped the description\n
  ddpmx adopt slim.onnx --like model.onnx -o model.slim.onnx
"""


def adopt(
    changed: Annotated[Path, Argument(help="The ONNX file that another tool made.", metavar="ONNX")],
    like: Annotated[
        str, Option(help="The exported file that it was made from, or a model that comes along.", metavar="ONNX")
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", help="The file to write.  \\[default: ONNX itself, replaced]")
    ] = None,
    tolerance: Annotated[float, Option(help="Largest difference of ε, as a share of its RMS.")] = 0.15,
    threads: Annotated[
        int, Option(help="CPU threads.  \\[default: ONNX Runtime's choice]", metavar="N", callback=check_threads)
    ] = 0,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Also replace the -o of another model, or one that ddpmx has not written.")
    ] = False,
) -> None:
    """Give a file that another tool made of an exported one its description back: spec, array of β, record.

    Inputs, outputs, weights and ε are compared with the original first. Nothing in the graph is changed.
    """
    from ddpmx.models import shipped
    from ddpmx.parity.adopt import adopt as adopt_file

    original = shipped.find(like)
    with busy(f"comparing {changed.name} with {original.name}"):
        adopted = adopt_file(changed, original, output, tolerance=tolerance, threads=threads, overwrite=overwrite)
    to = changed if output is None else output
    alike = "could not be compared" if adopted.alike is None else f"{adopted.alike:.0%} alike"
    say(f"{changed} → {to}: {adopted.spec.precision}; weights {alike}; ε differs by {adopted.error:.3g} of its RMS")
    if adopted.record is not None:
        say(f"{adopted.record}: the record of {like}")
        say(f"next: ddpmx parity {shlex.quote(str(to))}")
    elif adopted.left_out is not None:
        say(f"Note: the record beside {like} was left out: {adopted.left_out}")
        if to.with_suffix(".parity.npz").exists():
            say(f"Note: {to.with_suffix('.parity.npz')} is from before")
