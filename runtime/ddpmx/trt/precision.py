"""Checks that an engine computes in the precision of its graph, by the size of its weights.

Builders have widened half precision to float32 silently before. A widened weight takes twice the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpmx.errors import BackendError, SpecError
from ddpmx.formats.onnx_file import BFLOAT16, FLOAT, FLOAT8E4M3FN, FLOAT16, INT8, GraphInfo
from ddpmx.formats.spec import EIGHT_BITS, ModelSpec
from ddpmx.trt.library import Library

_SHARE, _SLACK = (0.9, 1.15), 1 << 16
"""How much the size of a plan's weights may differ from the graph's, by folded constants and alignment."""
_LEAST_WEIGHTS, _LEAST_HALVES = 1 << 18, 1 << 23


LOW = {"fp16": FLOAT16, "bf16": BFLOAT16, "int8": INT8, "fp8": FLOAT8E4M3FN}
"""The ONNX type of most weights in each precision but fp32."""


def check_weights(path: Path, spec: ModelSpec, info: GraphInfo) -> None:
    """Check that the weights have the precision that the file declares; a wrong one would only show as a slow engine.

    Raises:
        SpecError: they have another one.
    """
    low = LOW.get(spec.precision)
    halves, floats = info.computed.get(FLOAT16, 0) + info.computed.get(BFLOAT16, 0), info.computed.get(FLOAT, 0)
    if (low is None and halves > floats) or (low is not None and floats and info.computed.get(low, 0) == 0):
        raise SpecError(
            f"{path}: the file declares {spec.precision}, but its weights have another precision",
            note=f"{floats} bytes of float32, {halves} bytes of 16-bit floats",
            hint="export it again",
        )


def assert_precision(plan: Any, spec: ModelSpec, info: GraphInfo, library: Library, *, stripped: bool) -> str:
    """Check that the plan's weights take as many bytes as the graph's: a builder that widens 16-bit weights doubles them.

    The header of a TensorRT-RTX plan states the size of its weights. TensorRT's format is not public, so there the whole
    plan must be smaller than widened weights would be.

    Returns:
        How the precision was checked, as text for the reader.

    Raises:
        BackendError: the weights have another size.
    """
    weights = sum(info.computed.values())
    if stripped:
        return "not verified: the plan holds no weights"
    if library.is_rtx:
        stored = _rtx_weights(memoryview(plan))
        if stored is None:
            return "not verified: the header of this version does not state the size of the weights"
        most = _SHARE[1] * weights + _SLACK
        if spec.precision in EIGHT_BITS:  # the time path's weights are halves there, which the builder widens
            most = weights + info.computed.get(FLOAT16, 0) + _SLACK
        if not _SHARE[0] * weights - _SLACK <= stored <= most:
            raise BackendError(
                f"{library} did not keep the precision of the graph",
                note=f"{spec.precision}: {weights} bytes of weights in the ONNX file, {stored} in the plan",
                hint="use the ONNX file, or another version of TensorRT, and report this",
            )
        if weights < _LEAST_WEIGHTS:
            return "not verified: too few weights to judge by their size"
        return f"{spec.precision}: {stored} bytes of weights in the plan, {weights} in the graph"
    size, halves = plan.nbytes, info.computed.get(FLOAT16, 0) + info.computed.get(BFLOAT16, 0)
    bits = 16
    if spec.precision in EIGHT_BITS:
        bits, halves = 8, info.computed.get(LOW[spec.precision], 0)
    if halves < _LEAST_HALVES:
        return f"not verified: too few {bits}-bit weights to judge by the size of the plan"
    if size > weights + 0.75 * halves:
        raise BackendError(
            f"{library} seems to have widened the {spec.precision} weights",
            note=f"{weights} bytes of weights in the ONNX file, and a plan of {size} bytes",
            hint="use another version of TensorRT, and report this",
        )
    return f"{spec.precision}: a plan of {size} bytes for {weights} bytes of weights"


def _rtx_weights(plan: memoryview) -> int | None:
    """The size of the section "WGHT" of a TensorRT-RTX plan, from the table after the header; seen in 1.7."""
    at = bytes(plan[:256]).find(b"THGW")
    if at < 0:
        return None
    return int.from_bytes(plan[at + 16 : at + 24], "little")
