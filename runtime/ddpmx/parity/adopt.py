"""Gives a file that another tool made of an exported one its description back.

Optimisers and quantisers write a new graph, and some drop the metadata that says which diffusion model it is. Whether the
new file is that model is checked by its inputs and outputs, by its weights, and by its output ε.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.open import open_model
from ddpmx.errors import DdpmxError, InputError, NumericError, OutputError, SpecError
from ddpmx.formats import model_file, onnx_file, same_model
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.protobuf import as_message, as_number, as_text, fields, packed, raw_fields, write_field
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.evaluator import Evaluator
from ddpmx.parity.ladder import check_record_of
from ddpmx.parity.reference import Reference
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example

TOLERANCE = 0.15
"""Largest relative RMS of ε against the original: what a careless 8-bit quantisation may cost, and no other model has."""

ROWS = 8
_LEAST = 64  # numbers of a tensor that counts as weights
_ALIKE = 0.9  # correlation of a tensor with its original; 4 bits have 0.99, other weights about 0
_KIN = 0.5
_SHORT = 8  # a row of fewer numbers says little of its own

_TYPES = {1: "<f4", 2: "u1", 3: "i1", 10: "<f2"}


@dataclass(frozen=True)
class Adopted:
    """What was found.

    Attributes:
        spec: what the file says now.
        error: relative RMS of ε against the original, the largest over t.
        alike: the share of the weights that could be compared and are the original's, rounded or not; None if none could.
        record: the copy of the original's record, None if it has none that is its own.
        left_out: why the record that lies beside the original was not copied, None if it was or there is none.
    """

    spec: ModelSpec
    error: float
    alike: float | None
    record: Path | None
    left_out: str | None = None


def adopt(
    changed: str | os.PathLike[str],
    like: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tolerance: float = TOLERANCE,
    threads: int = 0,
    overwrite: bool = False,
) -> Adopted:
    """Write the spec, the array of β and the record of an exported file to a file that was made from it.

    Args:
        changed: the ONNX file that another tool made.
        like: the ONNX file that it was made from.
        output: the file to write; by default ``changed`` itself, which is replaced when everything was checked.
        tolerance: the largest relative RMS of ε.
        threads: of ONNX Runtime.
        overwrite: whether an ``output`` of another model may be replaced, or one that ddpmx has not written; and a record.

    Raises:
        InputError: ``changed`` describes itself as another model already, or the weights or ε are another model's.
        SpecError: the original has no spec, or inputs and outputs are others.
        FileFormatError, BackendError: a file cannot be read or run.
        OutputError: the file cannot be written, or something else is there.
    """
    changed, like = Path(changed), Path(like)
    output = changed if output is None else Path(output)
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance is between 0 and 1, not {tolerance:g}")
    same_model.check_output(output)
    if output.exists() and output.samefile(like):
        raise InputError(f"refusing to overwrite {output}: it is the original", hint="choose another -o")
    _check_onnx(like, "the file that ddpmx export wrote")
    _check_onnx(changed, "the ONNX file that the other tool made; a plan is built from it afterwards")
    original = onnx_file.read_onnx(like)
    info = onnx_file.read_onnx(changed)
    if onnx_file.METADATA_KEY not in original.metadata:
        raise SpecError(
            f"{like}: has no description to give",
            note=f"there is no metadata {onnx_file.METADATA_KEY!r} in it",
            hint="--like is the file that ddpmx export wrote",
        )
    beside = onnx_file.check_external(changed, info)
    if beside and output.resolve().parent != changed.resolve().parent:
        raise InputError(f"{output}: must be in the folder of {changed}", note="its weights lie beside it")
    spec = onnx_file.onnx_spec(like, original)
    if not overwrite and not (output.exists() and output.samefile(changed)):
        same_model.check_same_model(output, spec)
    source, record = like.with_suffix(".parity.npz"), output.with_suffix(".parity.npz")
    left_out = _why_not(source, spec) if source.exists() else None
    copies = source.exists() and left_out is None and not (record.exists() and record.samefile(source))
    if copies:
        same_model.check_record(record)
        if record.exists() and not overwrite and (why := _why_not(record, spec)):
            raise OutputError(f"refusing to overwrite {record}: {why}", hint="another -o, or --overwrite")
    had = onnx_file.METADATA_KEY in info.metadata
    said = onnx_file.onnx_spec(changed, info) if had else spec
    origin: dict[str, Any] = {"precision": "fp32", "ddpmx": ""}  # in which a file may differ from what it was made of
    if said.replace(**origin) != spec.replace(**origin):
        raise InputError(
            f"{changed}: describes itself already, as another model", hint=f"ddpmx info {shlex.quote(str(changed))}"
        )
    spec = said.replace(precision=_precision(info, said))
    if not had:
        onnx_file.onnx_spec(changed, info, spec)  # inputs and outputs
    alike = kinship(changed, like)
    if alike is not None and alike < _KIN:
        raise InputError(
            f"{changed}: its weights are not those of {like}",
            note=f"{alike:.0%} of the weights that can be compared are alike",
            hint="--like is the file that it was made from",
        )
    error = _difference(changed, like, None if had else spec, threads)
    if not error <= tolerance:
        raise InputError(
            f"{changed}: its ε is not that of {like}",
            note=f"relative RMS of the difference: {error:.3g}, at most {tolerance:g} allowed",
            hint="if that much is expected, as with few bits, pass a larger --tolerance",
        )
    entries = {} if had and said == spec else onnx_file.metadata(spec)
    if onnx_file.TRAINING_KEY in original.metadata.keys() - info.metadata.keys():
        entries[onnx_file.TRAINING_KEY] = original.metadata[onnx_file.TRAINING_KEY]
    _write(changed, output, entries)
    if copies:
        with source.open("rb") as stream, atomic_write(record) as copy:
            shutil.copyfileobj(stream, copy)
    return Adopted(spec, error, alike, record if source.exists() and left_out is None else None, left_out)


def _check_onnx(path: Path, wanted: str) -> None:
    """Refuse a plan or a checkpoint by name."""
    if (kind := model_file.identify(path)) != "onnx":
        what = {"plan": "a TensorRT plan", "mnn": "an MNN model"}.get(kind, "a checkpoint")
        raise InputError(f"{path}: {what}, and not an ONNX file", hint=f"pass {wanted}")


def _why_not(record: Path, spec: ModelSpec) -> str | None:
    """Why a file is no record of this model's outputs, in words; None if it is one."""
    try:
        check_record_of(spec, Reference.load(record))
    except DdpmxError as error:
        return f"{error.fact} ({error.note})" if error.note else error.fact
    return None


def kinship(changed: Path, like: Path) -> float | None:
    """The share of the original's weights that the other file has too, rounded or not; None if none can be compared.

    Tensors of one size are compared row by row, since a quantiser scales rows on their own, and by correlation, since the
    scale is another one.
    """
    theirs: dict[int, list[NDArray[np.float64]]] = {}
    for tensor in _tensors(changed):
        theirs.setdefault(tensor.size, []).append(tensor)
    compared = found = 0
    for tensor in _tensors(like):
        if (others := theirs.get(tensor.size)) is None:
            continue
        compared += tensor.size
        rows = tensor.reshape(len(tensor), -1)
        if rows.shape[1] < _SHORT:
            rows = tensor.reshape(1, -1)
        if any(_alike(rows, other) for other in others):
            found += tensor.size
    return found / compared if compared else None


def _alike(rows: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    turned = other.reshape(rows.shape[::-1]).T  # a matrix that was stored transposed
    return max(_correlation(rows, other.reshape(rows.shape)), _correlation(rows, turned)) > _ALIKE


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = (m - m.mean(axis=1, keepdims=True) for m in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    rows = lengths > 0
    return float(((a * b).sum(axis=1)[rows] / lengths[rows]).mean()) if rows.any() else 0.0


def _tensors(path: Path) -> Iterator[NDArray[np.float64]]:
    """The constants of a file that may be weights, as float64. Those in other files are left out."""
    for number, value in fields(memoryview(path.read_bytes())):
        if number != 7:
            continue
        for part, item in fields(as_message(value)):
            if part == 5 and (tensor := _tensor(as_message(item))) is not None:
                yield tensor


def _tensor(view: memoryview) -> NDArray[np.float64] | None:
    dims: list[int] = []
    kind, raw = 0, memoryview(b"")
    for number, value in fields(view):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(packed(value))
        elif number == 2:
            kind = as_number(value)
        elif number in (4, 9) and not isinstance(value, int):  # float_data, packed; raw_data
            raw = value
    count = int(np.prod(dims, dtype=object)) if dims else 0
    if kind not in _TYPES or len(dims) < 2 or count < _LEAST or len(raw) != count * np.dtype(_TYPES[kind]).itemsize:
        return None
    return np.frombuffer(raw, _TYPES[kind]).reshape(dims).astype(np.float64)


def _precision(info: onnx_file.GraphInfo, spec: ModelSpec) -> Any:
    """8 bits where a tenth of the weights has them, since those make the error; else what most of the weights are."""
    numbers = {kind: size // onnx_file.WIDTH.get(kind, 1) for kind, size in info.computed.items()}
    eight = {
        "int8": numbers.get(onnx_file.INT8, 0) + numbers.get(onnx_file.UINT8, 0),
        "fp8": numbers.get(onnx_file.FLOAT8E4M3FN, 0),
    }
    wide = {
        "fp32": numbers.get(onnx_file.FLOAT, 0),
        "fp16": numbers.get(onnx_file.FLOAT16, 0),
        "bf16": numbers.get(onnx_file.BFLOAT16, 0),
    }
    if any(eight.values()) and sum(eight.values()) * 10 >= sum(wide.values()):
        return max(eight, key=lambda name: eight[name])
    if (stored := wide.get(spec.precision)) and stored * 2 >= max(wide.values()):
        return spec.precision
    return max(wide, key=lambda name: wide[name])


def _difference(changed: Path, like: Path, spec: ModelSpec | None, threads: int) -> float:
    """The largest relative RMS of ε over t, for noise."""
    outputs = []
    timesteps: NDArray[np.int32] = np.empty(0, np.int32)
    for path, given in ((like, None), (changed, spec)):
        found, backend = open_model(path, spec=given, threads=threads)
        try:
            timesteps = np.linspace(0, found.timesteps - 1, ROWS).round().astype(np.int32)
            rows = np.arange(ROWS)
            x = chain.initial(0, rows, found.shape)
            conditioning = dict(example(found, rows, seed=0))
            if found.self_condition:
                conditioning["x0_prev"] = np.clip(x, -1, 1)
            evaluate = Evaluator(backend, found, 1, None, ROWS)
            outputs.append(evaluate(x, timesteps, conditioning)[0].astype(np.float64))
        finally:
            backend.close()
    first, second = outputs
    if not np.isfinite(second).all():
        raise NumericError(f"{changed}: its output is not finite")
    axes = (1, 2, 3)
    return float(np.sqrt(((second - first) ** 2).mean(axes) / (first**2).mean(axes)).max())


def _write(changed: Path, output: Path, metadata: dict[str, str]) -> None:
    """A repeated field of a protobuf message may be continued at its end, so that nothing of the graph is touched.

    Entries of the same keys go: what readers make of two is not the same.
    """
    data = memoryview(changed.read_bytes())
    with atomic_write(output) as stream:
        for part in _without(data, metadata.keys()):
            stream.write(part)
        for key, value in metadata.items():
            stream.write(write_field(14, write_field(1, key) + write_field(2, value)))


def _without(data: memoryview, keys: Set[str]) -> Iterator[memoryview]:
    """The parts of a model file, which has been read, that are no metadata of these keys."""
    for number, value, raw in raw_fields(data):
        if number != 14 or as_text(dict(fields(as_message(value))).get(1, memoryview(b""))) not in keys:
            yield raw
