"""Opens a plan that fits this machine. A plan that no longer fits is rebuilt from its ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ddpmx
from ddpmx.errors import PlanMismatchError
from ddpmx.formats import plan_file
from ddpmx.trt import build as trt_build

SMALL = trt_build.BuildOptions(batch=(1, 1, 4), workspace=512 << 20)  # few images at a time, on a board of 4 or 8 GB


def open_pipeline(path: Path, onnx: Path) -> ddpmx.Pipeline:
    """Load a model.

    A missing plan is built, and a plan of another TensorRT or GPU is rebuilt with its previous options. The CPU runs only
    an ONNX file that was named; it never replaces a GPU.

    Args:
        path: a plan, or an ONNX file for the CPU.
        onnx: the source of the plan.

    Raises:
        DdpmxError: the plan is damaged, or does not run here and a rebuild would not help.
    """
    if path.suffix == ".onnx":
        return ddpmx.load(path)
    options, why = SMALL, f"there is no {path}"
    if path.exists():
        try:
            return ddpmx.load(path)
        except PlanMismatchError as error:
            options, why = as_before(path), error.fact
    print(f"{why}: building it from {onnx}, which may take minutes", flush=True)
    trt_build.build(onnx, path, options)  # it keeps a plan that would come out the same
    return ddpmx.load(path)  # any other error is raised here


def as_before(path: Path) -> trt_build.BuildOptions:
    """The options that a plan was built with."""
    record = plan_file.read_plan(path).engine
    options: dict[str, Any] = dict(record.options)
    return dataclasses.replace(SMALL, batch=record.batch, **options)
