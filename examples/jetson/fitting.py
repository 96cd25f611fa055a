"""A pipeline from a plan that fits this machine: one that does not any more is built anew from its ONNX file."""

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

    A plan that is missing is built, and so is one of another TensorRT or GPU, as it was built before. The CPU is for an
    ONNX file that somebody asked for; it never stands in for a GPU.

    Args:
        path: a plan, or an ONNX file for the CPU.
        onnx: what the plan is built from.

    Raises:
        DdpmxError: the plan does not run here, and would not if it were built again, or it is damaged.
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
    trt_build.build(onnx, path, options)  # it leaves a plan alone that would come out the same
    return ddpmx.load(path)  # so what else is wrong is said here


def as_before(path: Path) -> trt_build.BuildOptions:
    """The options that a plan was built with."""
    record = plan_file.read_plan(path).engine
    told: dict[str, Any] = dict(record.options)
    return dataclasses.replace(SMALL, batch=record.batch, **told)
