"""A program of a user's under ``mypy --strict``: right calls pass, and each mistake is found where it stands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import ddpmx

api = pytest.importorskip(
    "mypy.api", reason="not verified here: what a type checker says of a user's program (no mypy)"
)

RIGHT = """
import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx import Conditioning, Sampling


def short(pipeline: ddpmx.Pipeline) -> NDArray[np.uint8]:
    return pipeline.generate(16, seed=0, steps=50, sampler="ddim")


def long(pipeline: ddpmx.Pipeline) -> NDArray[np.uint8]:
    sampling = Sampling(sampler="ddim", steps=50, eta=0.5)
    return pipeline.generate(16, sampling=sampling, conditioning=Conditioning([3] * 16, guidance=2), batch=4)


def arrays(pipeline: ddpmx.Pipeline, x: NDArray[np.float32], out: NDArray[np.uint8]) -> tuple[int, ...]:
    written: NDArray[np.uint8] = pipeline.generate(4, x=x, start=500, out=out)
    kept = pipeline.generate(4, on_device=True)
    for preview in pipeline.stream(2, labels=1, guidance=1.5, variance="fixed_small"):
        x = preview.x0
    return kept.shape + written.shape
"""

WRONG = {
    "an unknown sampler": 'pipeline.generate(16, sampler="ddmi")',
    "an option that does not exist": "pipeline.generate(16, step=50)",
    "a text for a number": 'pipeline.generate("16")',
    "what comes back is no list": "images: list[int] = pipeline.generate(16)",
    "no array": 'pipeline.generate(16, x="noise.npy")',
    "what stays on the GPU is no NumPy array": "array: np.ndarray = pipeline.generate(1, on_device=True)",
    "guidance is a number": 'pipeline.generate(16, labels=3, guidance="2")',
    "eta is a number": 'ddpmx.Sampling(eta="0.5")',
    "out and on_device exclude each other": "pipeline.generate(1, out=np.zeros(3, np.uint8), on_device=True)",
}


def check(tmp_path: Path, code: str) -> tuple[list[int], str]:
    """(lines with an error, everything that mypy printed)"""
    program = tmp_path / "program.py"
    program.write_text(code)
    cache = tmp_path.parent / "mypy-cache"
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nstrict = True\nmypy_path = {Path(ddpmx.__file__).parents[1]}\n")
    out, err, _ = api.run([f"--config-file={config}", f"--cache-dir={cache}", "--no-error-summary", str(program)])
    assert err == "", err
    return [int(line) for line in re.findall(r"^[^\n]*program\.py:(\d+): error", out, re.MULTILINE)], out


@pytest.mark.slow
def test_right_calls_pass(tmp_path):
    lines, out = check(tmp_path, RIGHT)
    assert lines == [], out


def test_every_mistake_is_found_where_it_stands(tmp_path):
    head = textwrap.dedent("""
        import numpy as np
        import ddpmx
        with ddpmx.load("model.onnx") as pipeline:
    """).strip("\n")
    first = head.count("\n") + 2
    body = "\n".join(f"    {call}" for call in WRONG.values())
    lines, out = check(tmp_path, f"{head}\n{body}\n")
    assert sorted(set(lines)) == list(range(first, first + len(WRONG))), out
