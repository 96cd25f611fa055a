"""An ONNX model in half precision, widened: the same weights and nodes, and every number float32.

ONNX Runtime computes a half graph mostly in float32 on x86-64, and in half on aarch64. What has to be the same on both
(:mod:`ddpmx.tasks.codec`) runs the widened model instead. Its weights have the values that were rounded to half, since each
half and each bfloat16 is a float32; what is computed between them is rounded to half nowhere.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import FileFormatError
from ddpmx.formats import onnx_file
from ddpmx.formats.onnx_file import BFLOAT16, FLOAT, FLOAT16, WIDTH, GraphInfo
from ddpmx.formats.protobuf import (
    MalformedError,
    as_message,
    as_number,
    as_text,
    fields,
    packed,
    raw_fields,
    write_field,
    write_head,
)

MAX_MODEL = (1 << 31) - 1
"""Bytes of an ONNX model, its weights included: protobuf's limit."""

TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"}
)
"""Attributes of ONNX's operators that are an element type."""

_HALF = (FLOAT16, BFLOAT16)
_OURS = ("", "ai.onnx")
_BITS = "BitCast"  # reads a number's bits as another type's: of a wider one it would read others

Piece = bytes | memoryview
Field = int | memoryview
Editor = Callable[[Field], "int | list[Piece] | None"]


def read_widened(path: str | os.PathLike[str], info: GraphInfo) -> bytes | None:
    """The model in an ONNX file, widened, with the weights that lie beside it inside. None if there is no half in it.

    Args:
        path: the file.
        info: what :func:`ddpmx.formats.onnx_file.read_onnx` says of it.

    Raises:
        FileFormatError: unreadable or damaged; a weights file is missing, or outside the model's folder; something in it
            cannot be widened; or it would be larger than :data:`MAX_MODEL`.
    """
    path = Path(path)
    beside = dict(zip(dict.fromkeys(info.external), onnx_file.check_external(path, info), strict=True))
    with _problems_of(path):
        return widen(_mapped(path), beside)


def holds_half(path: str | os.PathLike[str]) -> bool:
    """Whether there is float16 or bfloat16 in an ONNX file: a tensor, a conversion, or a type. Weights are not read.

    Raises:
        FileFormatError: unreadable or damaged.
    """
    path = Path(path)
    with _problems_of(path):
        work = _Widening(None)
        work.model(_mapped(path))
        return work.found > 0


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return memoryview(b"")
        # not closed here: views of it are in use for as long as what is made of them
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def _problems_of(path: Path) -> Iterator[None]:
    """What is wrong with a file, as errors that name it."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    except (MalformedError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: not a valid ONNX file", note=str(error), hint="export or download it again"
        ) from error
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error


def widen(model: memoryview, beside: Mapping[str, Path]) -> bytes | None:
    """A ModelProto with float32 in place of float16 and bfloat16, and nothing in other files. None if there is neither.

    Args:
        model: its bytes.
        beside: the files with weights, by the name that they have in it.

    Raises:
        FileFormatError: something in it cannot be widened, or it would be larger than :data:`MAX_MODEL`.
        MalformedError: not such a message.
        OSError: a weights file cannot be read.
    """
    work = _Widening(beside)
    pieces = work.model(model)
    if not work.found:
        return None
    if work.unknown:
        raise FileFormatError(
            f"cannot be computed in float32: it has {work.unknown}",
            note="ddpmx does not know which numbers in it are half",
            hint="export the model with ddpmx, or use its fp32 file",
        )
    size = sum(map(len, pieces))
    if size > MAX_MODEL:
        raise FileFormatError(
            "cannot be computed in float32: it would be larger than 2 GiB",
            note=f"{size} bytes; ONNX's limit is {MAX_MODEL}",
        )
    return b"".join(pieces)


class _Widening:
    """Walks a model as onnx.proto describes it, and replaces what is half; numbers of fields are from there.

    Args:
        beside: the files with weights; None to look only, and replace no weights.

    Attributes:
        found: how many things were half.
        unknown: what is in it that cannot be widened, in words, or "".
    """

    def __init__(self, beside: Mapping[str, Path] | None) -> None:
        self.found, self.unknown = 0, ""
        self._beside, self._opened = beside, dict[str, memoryview]()
        self._functions: set[tuple[str, str]] = set()

    def model(self, view: memoryview) -> list[Piece]:
        for number, value in fields(view):
            if number == 25:  # functions: name, domain
                texts = {part: as_text(item) for part, item in fields(as_message(value)) if part in (1, 10)}
                self._functions.add((texts.get(10, ""), texts.get(1, "")))
        training = partial(self._edited, editors={1: self.graph, 2: self.graph})
        return self._edited(view, {7: self.graph, 20: training, 25: self.function}) or [view]

    def graph(self, value: Field) -> list[Piece] | None:
        info = self.value_info
        return self._edited(value, {1: self.node, 5: self.tensor, 11: info, 12: info, 13: info, 15: self.sparse})

    def function(self, value: Field) -> list[Piece] | None:
        default = partial(self.attribute, types=frozenset[str]())
        return self._edited(value, {7: self.node, 11: default, 12: self.value_info})

    def node(self, value: Field) -> list[Piece] | None:
        texts = {number: as_text(item) for number, item in fields(as_message(value)) if number in (4, 7)}
        operator, domain = texts.get(4, ""), texts.get(7, "")
        known = (domain, operator) in self._functions
        if not known and (domain not in _OURS or operator == _BITS):
            self.unknown = self.unknown or f"the operator {operator} of {domain or 'ai.onnx'}"
        types = TYPE_ATTRIBUTES if domain in _OURS and not known else frozenset[str]()
        return self._edited(value, {5: partial(self.attribute, types=types)})

    def attribute(self, value: Field, types: frozenset[str]) -> list[Piece] | None:
        inside = list(fields(as_message(value)))
        name = next((as_text(item) for number, item in inside if number == 1), "")
        if sum(number == 5 for number, _ in inside) > 1:
            raise MalformedError(f"the attribute {name!r} has several tensors in place of one")
        editors: dict[int, Editor] = {
            **dict.fromkeys((5, 10), self.tensor),
            **dict.fromkeys((6, 11), self.graph),
            **dict.fromkeys((14, 15), self.type_of),
            **dict.fromkeys((22, 23), self.sparse),
        }
        if name in types:
            editors[3] = self.element_type
            if any(number == 21 and as_text(item) for number, item in inside):  # ref_attr_name
                self.unknown = self.unknown or "a function with a type as its argument"
        return self._edited(value, editors)

    def value_info(self, value: Field) -> list[Piece] | None:
        return self._edited(value, {2: self.type_of})

    def type_of(self, value: Field) -> list[Piece] | None:
        tensor = partial(self._edited, editors={1: self.element_type})
        several, mapped = (partial(self._edited, editors={number: self.type_of}) for number in (1, 2))
        return self._edited(value, {1: tensor, 4: several, 5: mapped, 8: tensor, 9: several})

    def element_type(self, value: Field) -> int | None:
        if as_number(value) not in _HALF:
            return None
        self.found += 1
        return FLOAT

    def sparse(self, value: Field) -> list[Piece] | None:
        return self._edited(value, {1: self.tensor, 2: self.tensor})

    def tensor(self, value: Field) -> list[Piece] | None:
        data_type, elements, numbers, place = 0, 1, list[int](), dict[str, str]()
        raw: memoryview | None = None
        seen: list[int] = []
        for number, item in fields(as_message(value)):
            if number == 1:  # dims
                for dim in [item] if isinstance(item, int) else packed(item):
                    elements = min(elements * dim, MAX_MODEL)
            elif number == 2:
                data_type = as_number(item)
            elif number == 5:  # int32_data, which has the bits of a half in each number
                numbers += [item] if isinstance(item, int) else packed(item)
            elif number == 9:
                raw = as_message(item)
            elif number == 13:  # external_data
                entry = {part: as_text(text) for part, text in fields(as_message(item))}
                place[entry.get(1, "")] = entry.get(2, "")
            seen.append(number)
        if seen.count(2) > 1 or seen.count(9) > 1:
            raise MalformedError("a tensor with several types or contents")
        half = data_type in _HALF
        self.found += half
        if self._beside is None or not (half or "location" in place):
            return None
        if "location" in place:
            raw = self._outside(self._beside, place, elements * WIDTH[data_type] if data_type in WIDTH else None)
        rest = [field for number, _, field in raw_fields(as_message(value)) if number not in (2, 5, 9, 13, 14)]
        if not half:
            assert raw is not None
            return [*rest, write_field(2, data_type), write_head(9, len(raw)), raw]
        data = _floats(data_type, raw, numbers, elements)
        return [*rest, write_field(2, FLOAT), write_head(9, len(data)), data]

    def _outside(self, beside: Mapping[str, Path], place: Mapping[str, str], size: int | None) -> memoryview:
        """The bytes of a tensor in another file."""
        name = place["location"]
        if name not in beside:
            raise MalformedError(f"external data at {name!r}")
        if name not in self._opened:
            self._opened[name] = _mapped(beside[name])
        view = self._opened[name]
        try:
            offset = int(place.get("offset") or 0)
            length = int(place["length"]) if place.get("length") else len(view) - offset if size is None else size
        except ValueError as error:
            raise MalformedError(f"external data at {place!r}") from error
        if offset < 0 or length < 0 or offset + length > len(view):
            raise MalformedError(f"{name!r} has {len(view)} bytes, and {offset} to {offset + length} are needed")
        return view[offset : offset + length]

    def _edited(self, value: Field, editors: Mapping[int, Editor]) -> list[Piece] | None:
        """A message with the fields that these change; None if they change none."""
        pieces, changed = list[Piece](), False
        for number, item, field in raw_fields(as_message(value)):
            new = editors[number](item) if number in editors else None
            if new is None:
                pieces.append(field)
                continue
            changed = True
            pieces += (
                [write_field(number, new)] if isinstance(new, int) else [write_head(number, sum(map(len, new))), *new]
            )
        return pieces if changed else None


def _floats(data_type: int, raw: memoryview | None, numbers: list[int], elements: int) -> bytes:
    """The float32 numbers of a half tensor, little-endian."""
    bits: NDArray[np.uint16]
    if raw is not None:
        if len(raw) != 2 * elements:
            raise MalformedError(f"a tensor of {elements} numbers in half has {len(raw)} bytes")
        bits = np.frombuffer(raw, "<u2").astype(np.uint16)
    else:
        if len(numbers) != elements or (numbers and max(numbers) > 0xFFFF):
            raise MalformedError(f"a tensor of {elements} numbers in half has {len(numbers)}, or too large ones")
        bits = np.array(numbers, np.uint16)
    if data_type == FLOAT16:
        wide = bits.view(np.float16).astype("<f4")
    else:
        wide = (bits.astype("<u4") << 16).view("<f4")
    return wide.tobytes()
