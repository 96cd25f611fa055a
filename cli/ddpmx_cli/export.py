"""`ddpmx export`."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx.errors import BackendError, InputError
from ddpmx_cli.console import busy, megabytes, say

EXAMPLES = """
Examples:\n
  ddpmx export\n
  ddpmx export runs/photos --fp16 -o photos-fp16.onnx
"""


def export(
    run: Annotated[
        Path | None, Argument(help="A run, or one of its checkpoints.  \\[default: the newest run under runs/]")
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="The file to write.")] = Path("model.onnx"),
    fp16: Annotated[
        bool, Option("--fp16", help="Half precision inside; norms, softmax and the time path stay float32.")
    ] = False,
    weights: Annotated[str, Option(help="ema (averaged) or raw.", metavar="NAME")] = "ema",
    time_table: Annotated[
        bool, Option("--time-table", help="Store what depends on t alone as a table instead of computing it.")
    ] = False,
) -> None:
    """Export a checkpoint to ONNX: one file that says everything about itself.

    It runs in onnxruntime, and TensorRT builds an engine from it. Inputs and outputs are float32 and int32 in every
    precision, so files of different precision are interchangeable.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights!r}: there are ema and raw")
    try:
        with busy("loading torch"):
            from ddpm_export import checkpoint, onnx_export
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError(
            "export needs torch and onnx", note=str(error), hint="pip install torch safetensors onnx onnxscript"
        ) from error
    source = checkpoint.resolve(run if run is not None else checkpoint.newest_run(Path("runs")))
    begun, replaced = time.monotonic(), os.path.exists(output)
    with busy(f"exporting {source}"):
        spec = onnx_export.export(
            source,
            output,
            precision="fp16" if fp16 else "fp32",
            weights="raw" if weights == "raw" else "ema",
            time_table=time_table,
        )
    c, height, width = spec.shape
    say(f"{source} → {output}{' (replaced)' if replaced else ''}")
    say(
        f"{spec.precision}, {height}×{width}×{c}, T = {spec.timesteps}, {spec.schedule}, predicts {spec.prediction}; "
        f"{megabytes(output)} in {time.monotonic() - begun:.1f} s"
    )
    say(f"next: ddpmx generate --engine {shlex.quote(str(output))} -n 16 --out samples/ --grid")
