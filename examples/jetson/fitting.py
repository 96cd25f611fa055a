"""A pipeline from a plan that fits this machine: one that does not any more is built anew from its ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ddpmx
from ddpmx import engine, planfile
from ddpmx.device import gpus
from ddpmx.errors import BackendError

SMALL = engine.BuildOptions(batch=(1, 1, 4), workspace=512 << 20)  # few images at a time, on a board of 4 or 8 GB


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
    options, refusal = SMALL, None
    if path.exists():
        try:
            return ddpmx.load(path)
        except BackendError as error:
            if not gpus().devices:  # nothing that could be built would run
                raise
            refusal = error
        options = as_before(path)
    print(
        f"{refusal.fact if refusal else f'there is no {path}'}: building it from {onnx}; it may take minutes",
        flush=True,
    )
    if engine.build(onnx, path, options).reused and refusal:  # it is what would be built, so something else is wrong
        raise refusal
    return ddpmx.load(path)


def as_before(path: Path) -> engine.BuildOptions:
    """The options that a plan was built with."""
    record = planfile.read_plan(path).engine
    told: dict[str, Any] = dict(record.options)
    return dataclasses.replace(SMALL, batch=record.batch, **told)
