"""A diffusion model that is known in closed form: every pixel of x_0 is N(μ, s²), so that

    E[ε | x_t] = √(1−ᾱ_t)·(x_t − √ᾱ_t·μ) / (ᾱ_t·s² + 1 − ᾱ_t)

is the output of a perfect network. `python tests/oracles/gaussian.py` writes it as tests/data/gaussian.onnx, so that
the runtime can be tested where there is neither torch nor onnx; a test compares the committed file with a new one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.schedule import Schedule
from ddpmx.formats.spec import ModelSpec

SHAPE = (3, 8, 8)
S = 0.1
# ±0.5 is five standard deviations from the clip at ±1: clipping never interferes
MU = np.linspace(-0.5, 0.5, 3 * 8 * 8).reshape(SHAPE)
SPEC = ModelSpec(SHAPE, ddpmx="0.1.0")


def optimal_eps(x: NDArray[np.float64], schedule: Schedule, t: int) -> NDArray[np.float64]:
    """E[ε | x_t], float64 [n, C, H, W]."""
    slope, offset = coefficients(schedule)
    return slope[t] * x - offset[t] * MU


def coefficients(schedule: Schedule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(slope, offset) with E[ε | x_t] = slope_t·x_t − offset_t·μ."""
    alpha_bar = schedule.alpha_bar
    slope = np.sqrt(1 - alpha_bar) / (alpha_bar * S**2 + 1 - alpha_bar)
    return slope, slope * np.sqrt(alpha_bar)


def onnx_bytes() -> bytes:
    """The model as an ONNX file that follows the graph contract."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from ddpmx.formats.onnx_file import METADATA_KEY

    slope, offset = coefficients(SPEC.make_schedule())
    column = ["batch", 1, 1, 1]
    constants = {
        "slope": slope.astype(np.float32).reshape(-1, 1, 1, 1),
        "offset": offset.astype(np.float32).reshape(-1, 1, 1, 1),
        "mu": MU.astype(np.float32)[None],
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["slope", "t"], ["slope_t"], axis=0),
            helper.make_node("Gather", ["offset", "t"], ["offset_t"], axis=0),
            helper.make_node("Mul", ["slope_t", "x"], ["scaled"]),
            helper.make_node("Mul", ["offset_t", "mu"], ["shift"]),
            helper.make_node("Sub", ["scaled", "shift"], ["eps"]),
        ],
        "gaussian",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE]),
            helper.make_tensor_value_info("t", TensorProto.INT32, ["batch"]),
        ],
        [helper.make_tensor_value_info("eps", TensorProto.FLOAT, ["batch", *SHAPE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, column) for n in ("slope_t", "offset_t")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8, producer_name="ddpmx")
    helper.set_model_props(model, {METADATA_KEY: SPEC.to_text()})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("data", "gaussian.onnx").write_bytes(onnx_bytes())
