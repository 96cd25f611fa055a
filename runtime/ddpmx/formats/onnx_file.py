"""The metadata, inputs and outputs of an ONNX file, read without the onnx package, and whether ddpmx can run it.

An ONNX file is a protobuf message. Only the few fields that matter here are read (names and numbers as in onnx.proto):
metadata, inputs and outputs, how many bytes of weights of which type, and every reference to another file.
"""

from __future__ import annotations

import json
import mmap
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.protobuf import MalformedError, as_message, as_number, as_text, fields, packed
from ddpmx.formats.spec import ModelSpec, input_type

METADATA_KEY = "ddpmx"
"""The key of ``metadata_props`` under which an ONNX file carries its spec."""

BETAS_KEY = "ddpmx.betas"
"""The key of the array of a schedule ``betas``, see :mod:`ddpmx.formats.betas`."""

TRAINING_KEY = "ddpmx.training"
"""The metadata key of what people want to know of a checkpoint's file and nothing computes with: a JSON object with
``network``, ``parameters`` and ``training``, as :func:`~ddpmx.formats.describe.describe` gives them of the checkpoint."""

FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16, FLOAT8E4M3FN = 1, 2, 3, 6, 10, 16, 17
"""ONNX element types."""
WIDTH = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    14: 8,
    15: 16,
    16: 2,
    17: 1,
    18: 1,
    19: 1,
    20: 1,
}
"""Bytes of an element of each type."""
_NAMES = "float32 uint8 int8 uint16 int16 int32 int64 string bool float16 float64 uint32 uint64 complex64 complex128"
_SMALL = "bfloat16 float8e4m3fn float8e4m3fnuz float8e5m2 float8e5m2fnuz uint4 int4 float4e2m1"
TYPE_NAMES = dict(enumerate(f"{_NAMES} {_SMALL}".split(), 1))
"""Their names."""
_MAX_DEPTH = 32  # subgraphs within subgraphs; real models have a handful


@dataclass(frozen=True)
class GraphInfo:
    """What is read from an ONNX file.

    Attributes:
        inputs: the graph inputs that are not weights, by name.
        outputs: the graph outputs, by name.
        metadata: ``metadata_props``.
        opset: of the default operator domain, 0 if the file declares none.
        external: every other file that the model refers to, as written there.
        weights: how many bytes its constants take, by ONNX element type.
        rounded: how many of those bytes a QuantizeLinear rounds once the file is loaded, by the type they are stored in and
            the type they get. Some quantisers leave the weights as they were, and write how to round them.
    """

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    metadata: dict[str, str]
    opset: int
    external: tuple[str, ...]
    weights: Mapping[int, int]
    rounded: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def computed(self) -> Mapping[int, int]:
        """``weights`` once they are rounded: what a runtime computes with."""
        found = Counter(self.weights)
        for (stored, to), size in self.rounded.items():
            found[stored] -= size
            found[to] += size // WIDTH.get(stored, 1) * WIDTH.get(to, 1)
        return {kind: size for kind, size in found.items() if size > 0}


@dataclass(frozen=True)
class TensorInfo:
    """The type of a graph input or output.

    Attributes:
        element_type: of ONNX: 1 = float32, 6 = int32, 7 = int64, 10 = float16.
        dims: each a number, a name where it is dynamic, or None where it has neither; None if the file declares no shape.
    """

    element_type: int
    dims: tuple[int | str | None, ...] | None


def read_onnx(path: str | os.PathLike[str]) -> GraphInfo:
    """Read :class:`GraphInfo` from an ONNX file. Tensors are skipped, not loaded.

    Raises:
        FileFormatError: unreadable, truncated or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            # not closed here: while an exception propagates, its traceback still holds views of the map
            return _read_model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    except (MalformedError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: not a valid ONNX file",
            note=f"{path.stat().st_size} bytes; {error}",
            hint="export or download it again",
        ) from error


def check_external(path: str | os.PathLike[str], info: GraphInfo) -> list[Path]:
    """The files beside ``path`` that hold its weights.

    Raises:
        FileFormatError: one is missing, or outside the model's own folder. A model that can name any file on the
            machine could read what its user did not mean to disclose.
    """
    folder = Path(path).resolve().parent
    found = []
    for location in dict.fromkeys(info.external):
        try:
            target = (folder / location).resolve()
            present = target.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, a loop of links
            raise FileFormatError(f"{path}: invalid path of a weights file", note=str(error)[:200]) from error
        # to ONNX Runtime "*/_ORT_MEM_ADDR_/*" is an address in memory
        if not location or os.path.isabs(location) or set(location) & {"\\", "*"} or not target.is_relative_to(folder):
            raise FileFormatError(
                f"{path}: weights file outside its own folder",
                note=f"external data at {location!r}",
                hint="do not run this file unless you know who made it; re-export it otherwise",
            )
        if not present:
            raise FileFormatError(
                f"{path}: missing weights file",
                note=f"{location!r} should be beside it",
            )
        found.append(target)
    return found


def metadata(spec: ModelSpec, training: dict[str, Any] | None = None) -> dict[str, str]:
    """The ``metadata_props`` of an ONNX file of this model.

    Args:
        spec: of the model.
        training: what :data:`TRAINING_KEY` holds; None for nothing.

    Raises:
        SpecError: the spec is too long.
    """
    beside = {} if spec.betas is None else {BETAS_KEY: free_betas.to_text(spec.betas)}
    about = {} if training is None else {TRAINING_KEY: json.dumps(training, separators=(",", ":"))}
    return {METADATA_KEY: spec.to_text(), **beside, **about}


def onnx_spec(path: str | os.PathLike[str], info: GraphInfo, override: ModelSpec | None = None) -> ModelSpec:
    """The spec of an ONNX file: its own, or ``override`` for a file that has none.

    Raises:
        SpecError: the file has none and there is no override, it is damaged, the two contradict each other, or the
            graph's inputs and outputs do not match it.
    """
    text = info.metadata.get(METADATA_KEY)
    if text is None and override is None:
        raise SpecError(
            f"{path}: the file does not say which diffusion model it is",
            note=f"an ONNX file, but without the metadata {METADATA_KEY!r} that `ddpmx export` writes",
            hint=f"if a tool made it of an exported one: ddpmx adopt {shlex.quote(os.fspath(path))} --like ORIGINAL.onnx; "
            "if you know its schedule and prediction: --spec spec.json, or spec= from Python",
        )
    try:
        beside = info.metadata.get(BETAS_KEY) if text is not None else None
        betas = None if beside is None else free_betas.from_text(beside)
        where = f"the file's metadata {BETAS_KEY!r}"
        spec = override if text is None else ModelSpec.from_text(text, betas=betas, where=where)
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error
    assert spec is not None
    origin: dict[str, Any] = {"ddpmx": "", "weights": None}  # where a file comes from, not what it computes
    if override is not None and override.replace(**origin) != spec.replace(**origin):
        raise SpecError(
            f"{path}: the given spec contradicts the one in the file",
            note="a spec in the file takes precedence",
            hint="leave out --spec (spec= from Python)",
        )
    _check_contract(path, info, spec)
    return spec


def _check_contract(path: str | os.PathLike[str], info: GraphInfo, spec: ModelSpec) -> None:
    """x: float32 [batch, C, H, W], t: int32 [batch] → one output, named by what it predicts, float32 [batch, C, H, W].

    With a learned variance there is one more of that shape, ``var``. The spec declares the conditioning inputs:
    y: int32 [batch], x0_prev: float32 [batch, C, H, W], cond: float32 [batch, K, H, W].
    """
    types = {name: INT32 if input_type(name) is np.int32 else FLOAT for name in spec.inputs}
    wanted = (
        *(("input", name, info.inputs, types[name], dims) for name, dims in spec.inputs.items()),
        *(("output", name, info.outputs, FLOAT, spec.shape) for name in spec.outputs),
    )
    faults = [f"unexpected input {name!r}" for name in info.inputs if name not in spec.inputs]
    faults += [f"unexpected output {name!r}" for name in info.outputs if name not in spec.outputs]
    for kind, name, tensors, element_type, dims in wanted:
        tensor = tensors.get(name)
        if tensor is None:
            faults.append(f"missing {kind} {name!r}")
            continue
        if tensor.element_type != element_type:
            has = TYPE_NAMES.get(tensor.element_type, f"of ONNX's type {tensor.element_type}")
            faults.append(f"{name!r} is {has}, not {TYPE_NAMES[element_type]}")
        if tensor.dims is not None and (
            (tensor.dims and isinstance(tensor.dims[0], int))
            or len(tensor.dims) != 1 + len(dims)
            or any(isinstance(has, int) and has != want for has, want in zip(tensor.dims[1:], dims, strict=True))
        ):
            faults.append(f"{name!r} has the shape {list(tensor.dims)}, not {['batch', *dims]}")
    if faults:
        raise SpecError(
            f"{path}: the graph does not match the spec",
            note="; ".join(faults)[:400],
            hint=f"export it so that it takes {_listed(spec)}, and returns " + " and ".join(map(repr, spec.outputs)),
        )


def _listed(spec: ModelSpec) -> str:
    """The inputs of a spec, as in "x float32 [batch, C, H, W] and t int32 [batch]"."""
    dims = {"t": "", "y": "", "cond": ", K, H, W"}
    *most, last = [f"{name} {input_type(name).__name__} [batch{dims.get(name, ', C, H, W')}]" for name in spec.inputs]
    return f"{', '.join(most)} and {last}"


# --- the parts of onnx.proto that are needed --------------------------------------------------------------------------


@dataclass
class _Found:
    external: list[str] = field(default_factory=list)
    weights: Counter[int] = field(default_factory=Counter)
    rounded: Counter[tuple[int, int]] = field(default_factory=Counter)
    rounds: int = 0  # nodes that round


def _read_model(view: memoryview) -> GraphInfo:
    metadata: dict[str, str] = {}
    inputs: dict[str, TensorInfo] = {}
    outputs: dict[str, TensorInfo] = {}
    initializers: set[str] = set()
    opset, graphs, found = 0, 0, _Found()
    for number, value in fields(view):
        if number == 7:  # graph
            graphs += 1
            for part, item in fields(as_message(value)):
                if part == 11:  # input
                    inputs.update([_value_info(as_message(item))])
                elif part == 12:  # output
                    outputs.update([_value_info(as_message(item))])
                elif part == 5:  # initializer
                    initializers.add(_tensor_name(as_message(item)))
            _walk_graph(as_message(value), found, 0)
        elif number == 8:  # opset_import
            entry = dict(fields(as_message(value)))
            if as_text(entry.get(1, memoryview(b""))) in ("", "ai.onnx"):
                opset = as_number(entry.get(2, 0))
        elif number == 14:  # metadata_props
            entry = dict(fields(as_message(value)))
            metadata[as_text(entry.get(1, memoryview(b"")))] = as_text(entry.get(2, memoryview(b"")))
        elif number == 20:  # training_info: two graphs
            for part, graph in fields(as_message(value)):
                if part in (1, 2):
                    _walk_graph(as_message(graph), found, 1)
        elif number == 25:  # functions
            for part, node in fields(as_message(value)):
                if part == 7:
                    _walk_node(as_message(node), found, 1)
                elif part == 11:  # an attribute's default
                    _walk_attribute(as_message(node), found, 1)
    if graphs != 1:
        raise MalformedError(f"{graphs} graphs in the file")
    inputs = {name: tensor for name, tensor in inputs.items() if name not in initializers}
    return GraphInfo(inputs, outputs, metadata, opset, tuple(found.external), dict(found.weights), dict(found.rounded))


def _walk_graph(view: memoryview, found: _Found, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise MalformedError(f"graphs nested deeper than {_MAX_DEPTH}")
    rounds = found.rounds
    for number, value in fields(view):
        if number == 1:  # node
            _walk_node(as_message(value), found, depth)
        elif number == 5:  # initializer
            _walk_tensor(as_message(value), found)
            element_type, size = _tensor_bytes(as_message(value))
            found.weights[element_type] += size
        elif number == 15:  # sparse_initializer
            _walk_sparse(as_message(value), found)
    if found.rounds > rounds:
        _count_rounded(view, found)


def _count_rounded(graph: memoryview, found: _Found) -> None:
    """Count the constants of a graph that its QuantizeLinear round."""
    constants: dict[bytes, tuple[int, int]] = {}
    rounding: dict[bytes, tuple[bytes, int]] = {}
    for number, value in fields(graph):
        if number == 1:
            rounding.update(_rounding(as_message(value)))
        elif number == 5:
            constants[_bytes(dict(fields(as_message(value))).get(8))] = _tensor_bytes(as_message(value))
    for name, (zero, to) in rounding.items():
        if name in constants:
            element_type, size = constants[name]
            found.rounded[element_type, to or constants.get(zero, (UINT8, 0))[0]] += size


def _rounding(node: memoryview) -> Iterator[tuple[bytes, tuple[bytes, int]]]:
    """Of a QuantizeLinear: the name of what it rounds, that of its zero point, and the type that it states, or 0."""
    parts = list(fields(node))
    if not any(number == 4 and _bytes(value) == b"QuantizeLinear" for number, value in parts):
        return
    inputs = [_bytes(value) for number, value in parts if number == 1]
    to = 0
    for number, value in parts:
        if number == 5:  # attribute: name, and i
            entry = dict(fields(as_message(value)))
            if _bytes(entry.get(1)) == b"output_dtype" and isinstance(kind := entry.get(3), int):
                to = kind
    if inputs:
        yield inputs[0], (inputs[2] if len(inputs) > 2 else b"", to)


def _bytes(value: int | memoryview | None) -> bytes:
    """A field's bytes; none of a number, which is no fault here: nothing depends on it."""
    return b"" if value is None or isinstance(value, int) else bytes(value)


def _walk_sparse(view: memoryview, found: _Found) -> None:
    for number, value in fields(view):
        if number in (1, 2):  # values, indices
            _walk_tensor(as_message(value), found)


def _walk_node(view: memoryview, found: _Found, depth: int) -> None:
    for number, value in fields(view):
        if number == 5:  # attribute
            _walk_attribute(as_message(value), found, depth)
        elif number == 4 and _bytes(value) == b"QuantizeLinear":  # op_type
            found.rounds += 1


def _walk_attribute(view: memoryview, found: _Found, depth: int) -> None:
    for number, value in fields(view):
        if number in (5, 10):  # t, tensors
            _walk_tensor(as_message(value), found)
            element_type, size = _tensor_bytes(as_message(value))
            found.weights[element_type] += size
        elif number in (6, 11):  # g, graphs
            _walk_graph(as_message(value), found, depth + 1)
        elif number in (22, 23):  # sparse_tensor, sparse_tensors
            _walk_sparse(as_message(value), found)


def _walk_tensor(view: memoryview, found: _Found) -> None:
    for number, value in fields(view):
        if number == 13:  # external_data: key, value
            entry = dict(fields(as_message(value)))
            if as_text(entry.get(1, memoryview(b""))) == "location":
                found.external.append(as_text(entry.get(2, memoryview(b""))))


def _tensor_bytes(view: memoryview) -> tuple[int, int]:
    """(element type, bytes by its dimensions); types of less than a byte count as one."""
    element_type, elements = 0, 1
    for number, value in fields(view):
        if number == 1:  # dims, packed or one by one
            for dim in [value] if isinstance(value, int) else packed(value):
                elements = min(elements * dim, 1 << 62)
        elif number == 2:
            element_type = as_number(value)
    return element_type, elements * WIDTH.get(element_type, 1)


def _tensor_name(view: memoryview) -> str:
    return next((as_text(value) for number, value in fields(view) if number == 8), "")


def _value_info(view: memoryview) -> tuple[str, TensorInfo]:
    name, element_type = "", 0
    dims: tuple[int | str | None, ...] | None = None
    for number, value in fields(view):
        if number == 1:
            name = as_text(value)
        elif number == 2:  # type
            for kind, tensor in fields(as_message(value)):
                if kind != 1:  # tensor_type
                    continue
                for part, item in fields(as_message(tensor)):
                    if part == 1:
                        element_type = as_number(item)
                    elif part == 2:  # shape
                        dims = tuple(_dim(as_message(dim)) for which, dim in fields(as_message(item)) if which == 1)
    return name, TensorInfo(element_type, dims)


def _dim(view: memoryview) -> int | str | None:
    for number, value in fields(view):
        if number == 1:
            return as_number(value)
        if number == 2:
            return as_text(value)
    return None
