"""The description of an MNN model, model.mnn, read and written without MNN; nothing of the network is looked at.

An .mnn file is a FlatBuffer (schema ``MNN.fbs``, table ``Net``), whose first field, ``bizCode``, is free text. ``ddpmx
build --for mnn`` appends that text to the end of the file and points the field to it:

    the network, as MNN's converter wrote it | length | ddpmx1 … mnn1 … [betas1 …] | zeros

the envelopes of the :class:`ModelSpec` and of an :class:`MnnRecord`, and the array of β where the schedule is one. The
record holds the sha256 of the network. MNN's reader is C++ and trusts its file, so length and hash are checked before it
opens one: a file that was damaged on its way never gets there. Against a file that was made to harm, they are no help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.envelope import search, unwrap, wrap
from ddpmx.formats.plan_record import is_plain_name
from ddpmx.formats.spec import PREFIX, ModelSpec

RECORD_PREFIX = "mnn1"
MAX_PART = 64
MEMORY = ("normal", "low")

_TEXT = 1 << 18  # bytes; an array of β is the longest part, with up to 175 kB
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_VERSION = re.compile(r"\d{1,4}(\.\d{1,6}){1,3}", re.ASCII)


@dataclass(frozen=True)
class MnnRecord:
    """How an .mnn file was made.

    Attributes:
        version: of the MNN that converted it.
        onnx: sha256 of the ONNX file and the weights beside it.
        source: the ONNX file's name, without its folder.
        network: sha256 of the network's bytes in this file.
        part: how many images run in one call, at most.
        memory: how much memory transformed weights may take: "normal", about 2.6 times what the weights take, or "low",
            0.7 times. Like ``part`` it decides how fast the network is, and the last bits of an image.
    """

    version: str
    onnx: str
    source: str
    network: str
    part: int
    memory: str = "normal"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: object) -> MnnRecord:
        """The record that :meth:`to_json` made.

        Raises:
            SpecError: not such an object.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        good = (
            isinstance(values, dict)
            and values.keys() == names
            and all(isinstance(values[name], str) for name in names - {"part"})
            and values["memory"] in MEMORY
            and _VERSION.fullmatch(values["version"])
            and _SHA256.fullmatch(values["onnx"])
            and _SHA256.fullmatch(values["network"])
            and is_plain_name(values["source"])
            and type(values["part"]) is int
            and 1 <= values["part"] <= MAX_PART
        )
        if not good:
            raise SpecError("the record of this MNN file is damaged", note=ascii(values)[:200])
        assert isinstance(values, dict)
        return cls(**values)


@dataclass(frozen=True)
class MnnInfo:
    """What an .mnn file says of itself.

    Attributes:
        size: bytes.
        spec: the model.
        record: how the file was made.
    """

    size: int
    spec: ModelSpec
    record: MnnRecord


def is_mnn(path: Path) -> bool:
    """Whether this is an MNN model: one of ddpmx's by its description, others by their name.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        found = _text_at(stream, os.fstat(stream.fileno()).st_size)
        if found is not None:
            stream.seek(found[0] + 4)
            if stream.read(len(PREFIX) + 1) == f"{PREFIX} ".encode():
                return True
    return path.suffix.lower() == ".mnn"


def has_network(path: Path) -> bool:
    """Whether this is an MNN model by its structure, with a description or without.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return _text_at(stream, os.fstat(stream.fileno()).st_size) is not None


def read_mnn(path: str | os.PathLike[str], *, brief: bool = False) -> MnnInfo:
    """The description of an .mnn file.

    Args:
        path: the file.
        brief: do not compare the network's hash, which reads the whole file: for showing a file, and not for running it.

    Raises:
        FileFormatError: not an MNN model, or truncated or changed.
        SpecError: it has no description, or a damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            found = _text_at(stream, size)
            if found is None:
                raise FileFormatError(
                    f"{path}: not a valid MNN model",
                    note=f"{size} bytes; it has no table of a network, or was cut short",
                    hint="build or copy it again",
                )
            at, length = found
            stream.seek(at + 4)
            raw = stream.read(min(length, _TEXT))
            spec, record = _parse(path, raw)
            end = at + 4 + length
            stream.seek(end)
            if size != end + _padding(length) or any(stream.read(size - end)):
                raise FileFormatError(
                    f"{path}: not a valid MNN model",
                    note=f"{size} bytes, and its description ends at {end}",
                    hint=rebuild_command(path, record),
                )
            if not brief and _sha256(stream, at) != record.network:
                raise FileFormatError(
                    f"{path}: the network in this file is damaged",
                    note="its sha256 is not the one in the file's description",
                    hint=f"copy it again, or {rebuild_command(path, record)}",
                )
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    return MnnInfo(size, spec, record)


def describe_network(network: bytes, spec: ModelSpec, record: MnnRecord) -> bytes:
    """An .mnn file: a network with its description.

    Args:
        network: what MNN's converter wrote, with any ``bizCode``.
        spec: the model.
        record: how the file was made; its ``network`` is filled in here.

    Raises:
        SpecError: the description is too long, or ``network`` has no ``bizCode``.
    """
    field = _field(network)
    if field is None:
        raise SpecError("MNN's converter wrote a file without a place for the description")
    body = bytearray(network + b"\0" * (-len(network) % 4))
    struct.pack_into("<I", body, field, len(body) - field)  # an offset counts from where it stands
    record = dataclasses.replace(record, network=hashlib.sha256(body).hexdigest())
    parts = [spec.to_text(), wrap(RECORD_PREFIX, record.to_json())]
    if spec.betas is not None:
        parts.append(free_betas.to_text(spec.betas))
    text = " ".join(parts).encode()
    return bytes(body) + struct.pack("<I", len(text)) + text + b"\0" * _padding(len(text))


def rebuild_command(path: str | os.PathLike[str], record: MnnRecord) -> str:
    """The command that makes this file again."""
    options = ["--part", str(record.part), *["--low-memory"] * (record.memory == "low")]
    return shlex.join(["ddpmx", "build", record.source, "--for", "mnn", *options, "-o", os.fspath(path)])


def _padding(length: int) -> int:
    """Zeros after a string of this length: one that ends it, and those up to a multiple of four bytes."""
    return 4 - length % 4


def _parse(path: Path, raw: bytes) -> tuple[ModelSpec, MnnRecord]:
    try:
        text = raw.decode("ascii", errors="replace")
        if not text.startswith(f"{PREFIX} "):
            raise SpecError(
                "the file does not say which diffusion model it is",
                note="MNN's own converter wrote it, or the description was lost",
                hint="ddpmx build model.onnx --for mnn",
            )
        spec_text, end = next(search(PREFIX, raw), ("", 0))
        record_text, after = next(search(RECORD_PREFIX, raw[end:]), ("", 0))
        rest = text[end + after :]
        if not raw.startswith(spec_text.encode() or b"-") or text[end : end + after] != f" {record_text}":
            raise SpecError("the description in this MNN file is damaged", hint="build or copy it again")
        betas = free_betas.from_text(rest[1:]) if rest else None
        record = MnnRecord.from_json(unwrap(RECORD_PREFIX, record_text))
        where = f'the file\'s description, behind "{RECORD_PREFIX}"'
        return ModelSpec.from_json(unwrap(PREFIX, spec_text), betas=betas, where=where), record
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error


def _sha256(stream: BinaryIO, size: int) -> str:
    stream.seek(0)
    digest = hashlib.sha256()
    while size and (chunk := stream.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _text_at(stream: BinaryIO, size: int) -> tuple[int, int] | None:
    """Where ``bizCode`` is, and how many bytes it has; None if this is not a FlatBuffer with such a field."""

    def read(at: int, count: int) -> bytes:
        if not 0 <= at <= size - count:
            raise ValueError
        stream.seek(at)
        return stream.read(count)

    try:
        field = _field_at(read)
        at = field + int.from_bytes(read(field, 4), "little")
        length = int.from_bytes(read(at, 4), "little")
        read(at + 4, length + 1 if length < _TEXT else 1)
        return (at, length) if at + 4 + length <= size else None
    except ValueError:
        return None


def _field(data: bytes) -> int | None:
    def read(at: int, count: int) -> bytes:
        if not 0 <= at <= len(data) - count:
            raise ValueError
        return data[at : at + count]

    try:
        return _field_at(read)
    except ValueError:
        return None


def _field_at(read: Any) -> int:
    """Where the offset of the root table's first field stands.

    The root's offset is at 0. A table begins with the distance back to its vtable: the vtable's size, the table's, and the
    place of each field within the table, 0 for those that are not there (flatbuffers.dev, "Internals").

    Raises:
        ValueError: there is no such table or field.
    """
    root = int.from_bytes(read(0, 4), "little")
    vtable = root - int.from_bytes(read(root, 4), "little", signed=True)
    size, table, place = struct.unpack("<3H", read(vtable, 6))
    if size < 6 or size % 2 or not 4 <= place <= table - 4:
        raise ValueError
    return int(root + place)
