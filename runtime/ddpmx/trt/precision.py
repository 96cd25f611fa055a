"""Whether an engine still computes in the precision of the graph that it was built from: asserted, not believed.

Builders have widened half precision to float32 without a word before. A weight that is widened takes twice the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpmx.errors import BackendError, SpecError
from ddpmx.formats.onnx_file import BFLOAT16, FLOAT, FLOAT16, GraphInfo
from ddpmx.formats.spec import ModelSpec
from ddpmx.trt.library import Library

_SHARE, _SLACK = (0.9, 1.15), 1 << 16
"""How far a plan's weights may be from the graph's: constants are folded and tensors aligned, nothing more."""
_LEAST_WEIGHTS, _LEAST_HALVES = 1 << 18, 1 << 23


def check_weights(path: Path, spec: ModelSpec, info: GraphInfo) -> None:
    """A file that says fp16 and holds float32 is a mistake that would only show as a slow engine."""
    low = {"fp16": FLOAT16, "bf16": BFLOAT16}.get(spec.precision)
    halves, floats = info.weights.get(FLOAT16, 0) + info.weights.get(BFLOAT16, 0), info.weights.get(FLOAT, 0)
    if (low is None and halves > floats) or (low is not None and floats and info.weights.get(low, 0) == 0):
        raise SpecError(
            f"{path}: the file says {spec.precision}, and its weights say something else",
            note=f"{floats} bytes of float32, {halves} bytes of 16-bit floats",
            hint="export it again",
        )


def assert_precision(plan: Any, spec: ModelSpec, info: GraphInfo, library: Library, *, stripped: bool) -> str:
    """See that the plan's weights take as many bytes as the graph's: a builder that widens halves doubles them.

    TensorRT-RTX states in its header how long its section of weights is. TensorRT's format is not public; its plan as a
    whole must not be near the size that the widened weights would have.
    """
    weights = sum(info.weights.values())
    if stripped:
        return "not ascertained: the plan holds no weights"
    if library.is_rtx:
        stored = _rtx_weights(memoryview(plan))
        if stored is None:
            return "not ascertained: this version's header does not tell the size of the weights"
        if not _SHARE[0] * weights - _SLACK <= stored <= _SHARE[1] * weights + _SLACK:
            raise BackendError(
                f"{library} did not keep the precision of the graph",
                note=f"{spec.precision}: {weights} bytes of weights in the ONNX file, {stored} in the plan",
                hint="use the ONNX file, or another version of TensorRT, and report this",
            )
        if weights < _LEAST_WEIGHTS:
            return "not ascertained: too few weights to tell by their size"
        return f"{spec.precision}: {stored} bytes of weights in the plan, {weights} in the graph"
    size, halves = plan.nbytes, info.weights.get(FLOAT16, 0) + info.weights.get(BFLOAT16, 0)
    if halves < _LEAST_HALVES:
        return "not ascertained: too few 16-bit weights to tell by the plan's size"
    if size > weights + 0.75 * halves:
        raise BackendError(
            f"{library} seems to have widened the {spec.precision} weights to float32",
            note=f"{weights} bytes of weights in the ONNX file, and a plan of {size} bytes",
            hint="use another version of TensorRT, and report this",
        )
    return f"{spec.precision}: a plan of {size} bytes for {weights} bytes of weights"


def _rtx_weights(plan: memoryview) -> int | None:
    """The length of the section "WGHT" in a TensorRT-RTX plan: found in 1.7, in the table that follows the header."""
    at = bytes(plan[:256]).find(b"THGW")
    if at < 0:
        return None
    return int.from_bytes(plan[at + 16 : at + 24], "little")
