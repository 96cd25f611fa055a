"""A graph with explicit Q/DQ: ONNX Runtime's quantizer inserts it, and here it gets what TensorRT wants.

8-bit weights are constants behind a DequantizeLinear, symmetric, with a scale for every output channel. Inputs of
convolutions go through QuantizeLinear and DequantizeLinear with one scale and no zero point. Outputs and biases stay as
they are: an int32 bias is refused by TensorRT-RTX, and rounding outputs as well would double the error.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ddpm_export.quantize.convolutions import Convolution
from ddpmx.errors import BackendError
from ddpmx.formats.spec import Precision

E4M3_MAX = 448.0
"""The largest number of E4M3; that of int8 is 127."""

SHORT = {
    "_QuantizeLinear_Output": "/Q",
    "_QuantizeLinear": "/Q",
    "_DequantizeLinear_Output": "/DQ",
    "_DequantizeLinear": "/DQ",
    "_scale": "/scale",
    "_zero_point": "/zero",
    "_quantized": "/8bit",
}
"""What ONNX Runtime's quantizer appends to names, and what stands there afterwards: a third of the bytes of a small graph
are its names."""


def insert(
    model: onnx.ModelProto,
    chosen: Mapping[str, Convolution],
    largest: Mapping[str, float],
    precision: Precision,
) -> onnx.ModelProto:
    """A copy of the graph in which some convolutions compute in 8 bits.

    Args:
        model: without metadata in its nodes.
        chosen: the convolutions, by their nodes' names.
        largest: of each of their inputs, the largest absolute value, by the tensor's name.
        precision: ``int8`` or ``fp8``.

    Raises:
        BackendError: ONNX Runtime or its quantizer is missing, or fails.
    """
    if not chosen:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        return copied
    try:
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorData, TensorsData
    except ImportError as error:
        raise BackendError(
            "8 bits need ONNX Runtime's quantizer", note=str(error), hint="pip install onnxruntime"
        ) from error
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.input)
    types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in values}
    ranges = {}
    for one in chosen.values():
        limit = np.array(largest[one.input], types[one.input])
        ranges[one.input] = TensorData(lowest=-limit, highest=limit)
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": False,
        "OpTypesToExcludeOutputQuantization": ["Conv"],
    }
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing that changes names and opset
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizer = QDQQuantizer(
                inferred,
                True,
                False,
                QuantType.QInt8,
                QuantType.QInt8,
                TensorsData(CalibrationMethod.MinMax, ranges),
                list(chosen),
                [],
                ["Conv"],
                options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            result: onnx.ModelProto = quantizer.model.model
    except Exception as error:  # it raises anything
        raise BackendError(
            "ONNX Runtime's quantizer failed", note=str(error).strip()[:300], hint="another version of onnxruntime"
        ) from error
    finally:
        root.setLevel(before)
    del result.graph.value_info[:]
    del result.metadata_props[:]
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    _leave_others(result, chosen)
    _own_biases(result, model, chosen)
    _shorten(result, model)
    _check_inserted(result, chosen)
    if precision == "fp8":
        _as_e4m3(result, model, chosen)
    return result


def _leave_others(result: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Let all but the chosen convolutions read a tensor itself: the quantizer gives every reader the rounded one.

    Norms, residual sums and the U-Net's long connections read the same tensors as some convolutions.
    """
    producers = {name: node for node in result.graph.node for name in node.output}
    for node in result.graph.node:
        if node.name in chosen:
            continue
        for place, name in enumerate(node.input):
            if name in producers and producers[name].op_type == "DequantizeLinear":
                rounded = producers.get(producers[name].input[0])
                if rounded is not None:  # not a weight's
                    node.input[place] = rounded.input[0]


def _own_biases(result: onnx.ModelProto, model: onnx.ModelProto, chosen: Mapping[str, Convolution]) -> None:
    """Undo the quantizer's copies of biases that several convolutions share: it names them by appending a number."""
    graph = result.graph
    for node in graph.node:
        if node.name in chosen and chosen[node.name].bias:
            node.input[2] = chosen[node.name].bias
    there = {tensor.name for tensor in graph.initializer}
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(one for one in model.graph.initializer if one.name in used - there)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _check_inserted(result: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Check that every chosen convolution has 8-bit operands: the quantizer leaves out what it does not know, silently."""
    dequantised = {name for node in result.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in result.graph.node:
        if node.name in chosen and not dequantised.issuperset(node.input[:2]):
            raise BackendError(
                "ONNX Runtime's quantizer left out a convolution",
                note=node.name,
                hint="another version of onnxruntime",
            )


def _shorten(result: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Give what was inserted short names, none of which ends in a digit."""
    known = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
    known |= {tensor.name for tensor in model.graph.initializer}
    new: dict[str, str] = {}

    def short(name: str) -> str:
        if name in known or name in new:
            return new.get(name, name)
        end = next((end for end in SHORT if name.endswith(end)), "")
        base = name[: len(name) - len(end)] if end else name
        if end:
            # the scale of a weight is named after its 8-bit form
            wanted = f"{base.removesuffix('_quantized')}{SHORT[end]}"
            name_now = wanted if wanted not in known and wanted not in new.values() else name
            new[name] = name_now
        return new.get(name, name)

    for node in result.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.output[:] = [short(name) for name in node.output]
            node.name = node.output[0]
    for tensor in result.graph.initializer:
        if tensor.name not in known:
            tensor.name = short(tensor.name)
    for node in result.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]


def _as_e4m3(result: onnx.ModelProto, model: onnx.ModelProto, chosen: Mapping[str, Convolution]) -> None:
    """Replace int8 by E4M3 in a graph with Q/DQ: the same scales, by the other type's largest number.

    The quantizer's own way to E4M3 sets scales by the standard deviation, which clips a few values of every layer.
    """
    import ml_dtypes

    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    wide = {tensor.name: tensor for tensor in model.graph.initializer}
    weight_of = {}
    for node in result.graph.node:
        if node.name in chosen:
            weight_of[node.input[1]] = chosen[node.name].weight
    done: set[str] = set()
    for node in result.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        _, scale, zero = node.input
        if scale not in done:
            done.add(scale)
            values = numpy_helper.to_array(constants[scale])
            _replace(constants[scale], (values.astype(np.float64) * (127 / E4M3_MAX)).astype(values.dtype))
        if zero not in done:
            done.add(zero)
            _replace(constants[zero], np.zeros(tuple(constants[zero].dims), ml_dtypes.float8_e4m3fn))
        if node.op_type == "DequantizeLinear" and node.output[0] in weight_of:
            values = numpy_helper.to_array(wide[weight_of[node.output[0]]]).astype(np.float32)
            steps = numpy_helper.to_array(constants[scale]).astype(np.float32).reshape(-1, 1, 1, 1)
            scaled = np.clip(values / np.maximum(steps, np.finfo(np.float32).tiny), -E4M3_MAX, E4M3_MAX)
            _replace(constants[node.input[0]], scaled.astype(ml_dtypes.float8_e4m3fn))


def _replace(tensor: TensorProto, values: NDArray[Any]) -> None:
    name = tensor.name
    if str(values.dtype) == "float8_e4m3fn":
        made = TensorProto(data_type=TensorProto.FLOAT8E4M3FN, dims=values.shape, raw_data=values.tobytes())
    else:
        made = numpy_helper.from_array(values)
    tensor.CopyFrom(made)
    tensor.name = name


def store_in_half(model: onnx.ModelProto) -> None:
    """Store the float32 matrices that are left, the weights of the time path, in half, and widen them as they are read.

    What computes stays float32. Rounding a weight to half changes it by 2⁻¹² of itself, as ``--fp16`` does with most.
    """
    graph = model.graph
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or int(np.prod(tensor.dims)) < 256:
            continue
        name, half = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            continue
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}/half"))
        graph.node.insert(0, helper.make_node("Cast", [f"{name}/half"], [name], f"{name}/Cast", to=TensorProto.FLOAT))


def weight_and_scale(model: onnx.ModelProto, node: str) -> tuple[NDArray[np.float32], float]:
    """What a convolution of such a graph multiplies with: its weights behind the DequantizeLinear, and its input's scale.

    Args:
        model: from :func:`insert`.
        node: the name of a convolution in 8 bits.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: one for one in model.graph.node for name in one.output}
    convolution = next(one for one in model.graph.node if one.name == node)
    activation, weight = (producers[name] for name in convolution.input[:2])
    stored = numpy_helper.to_array(constants[weight.input[0]]).astype(np.float32)
    scale = numpy_helper.to_array(constants[weight.input[1]]).astype(np.float32)
    step = float(numpy_helper.to_array(constants[activation.input[1]]))
    return stored * scale.reshape(-1, 1, 1, 1), step


def rounded(x: NDArray[np.floating], step: float, precision: Precision) -> NDArray[np.float32]:
    """What QuantizeLinear and DequantizeLinear make of values."""
    scaled = x.astype(np.float32) / np.float32(step)
    if precision == "int8":
        out: NDArray[np.float32] = np.clip(np.round(scaled), -128, 127) * np.float32(step)
        return out
    import ml_dtypes

    saturated = np.clip(scaled, -E4M3_MAX, E4M3_MAX)
    narrow: NDArray[np.float32] = saturated.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(step)
    return narrow


def set_bias(model: onnx.ModelProto, node: str, values: NDArray[np.floating]) -> None:
    """Give a convolution a bias of its own: constants that are equal may be one tensor of the graph.

    Args:
        model: changed in place.
        node: the convolution's name.
        values: [channels].
    """
    convolution = next(one for one in model.graph.node if one.name == node)
    weight = next(one for one in model.graph.node if convolution.input[1] in one.output)
    scale = next(one for one in model.graph.initializer if one.name == weight.input[1])
    name = f"{node}/b"
    dtype = helper.tensor_dtype_to_np_dtype(scale.data_type)
    if dtype == np.float32 and len(convolution.input) > 2:
        before = next(one for one in model.graph.initializer if one.name == convolution.input[2])
        dtype = helper.tensor_dtype_to_np_dtype(before.data_type)
    old = convolution.input[2] if len(convolution.input) > 2 else ""
    del convolution.input[2:]
    convolution.input.append(name)
    model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
    if old and not any(old in one.input for one in model.graph.node):
        left = [one for one in model.graph.initializer if one.name != old]
        del model.graph.initializer[:]
        model.graph.initializer.extend(left)
