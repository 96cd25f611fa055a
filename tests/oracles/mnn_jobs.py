"""A program for another processor: what MNN's backend does there. It needs NumPy, MNN and ddpmx's runtime.

    python mnn_jobs.py '[["ladder", "model.mnn", "model.parity.npz"], …]'

prints the results of its jobs, functions of this file, as a JSON list.
"""

from __future__ import annotations

import json
import platform
import sys
from typing import Any

import numpy as np

import ddpmx
from ddpmx.backends import mnn
from ddpmx.backends.base import Buffers
from ddpmx.backends.open import open_model


def ladder(model: str, record: str) -> dict[str, Any]:
    """The checks of the ladder in one thread, and the largest error of ε."""
    from ddpmx.parity.ladder import run_ladder
    from ddpmx.parity.reference import Reference

    spec, backend = open_model(model, threads=1)
    report = run_ladder(backend, spec, Reference.load(record), batch=8)
    checks = [(c.name, c.value, c.bound, c.at_least) for c in report.checks if c.skipped is None]
    eps = float(report.curves["eps"].max())
    return {"machine": platform.machine(), "backend": backend.description, "eps": eps, "checks": checks}


def images(model: str, output: str) -> dict[str, bool]:
    """Six images of a short chain, and whether threads and parts make no difference to them."""

    def generate(threads: int, n: int = 6, first: int = 0) -> Any:
        with ddpmx.load(model, threads=threads) as pipeline:
            return pipeline.generate(n, seed=5, first=first, sampler="ddim", steps=4, batch=4)

    one = generate(1)
    np.save(output, one)
    return {"threads": np.array_equal(generate(2), one), "parts": np.array_equal(generate(2, 3, 3), one[3:])}


def outputs(model: str, inputs: str, output: str, level: int | None = None) -> str:
    """The network's outputs, with another limit on Winograd's tiles in half if ``level`` says so; the description."""
    spec, backend = open_model(model, threads=1) if level is None else _with_tiles(model, level)
    arrays = np.load(inputs)
    buffers = Buffers.of(len(arrays["x"]), spec.shape)
    buffers.x[...], buffers.t[...] = arrays["x"], arrays["t"]
    backend.bind(buffers)
    backend.enqueue()
    np.save(output, buffers.out)
    return backend.description


def _with_tiles(model: str, level: int) -> Any:
    kept, mnn._WINOGRAD_IN_HALF = mnn._WINOGRAD_IN_HALF, level
    try:
        return open_model(model, threads=1)
    finally:
        mnn._WINOGRAD_IN_HALF = kept


if __name__ == "__main__":
    json.dump([globals()[name](*words) for name, *words in json.loads(sys.argv[1])], sys.stdout)
