"""TensorFlow's checkpoints (``model.ckpt-N.index`` and ``model.ckpt-N.data-00000-of-0000K``), read without TensorFlow.

The index is a table as in LevelDB: blocks of sorted keys, each key stored as its difference from the one before; a block
that says where the others are; and a footer that says where that one is. Every block has a CRC. The empty key holds a
header; every other key is a tensor's name, and holds where its bytes are and their CRC. The data files are bytes and
nothing else.

A file of unknown origin is trusted only as far as it has been checked: nothing is allocated that the files do not really
hold, and every number is compared with the file's size before it is used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ddpm_export.importers.reading.crc32c import crc32c, unmask
from ddpmx.errors import FileFormatError
from ddpmx.formats.protobuf import MalformedError, as_message, as_number, fields, varint

MAGIC = bytes.fromhex("57fb808b247547db")
"""The last eight bytes of an index."""

MAX_INDEX = 1 << 24
"""Bytes of an index; Ho et al.'s have 120 per variable."""
MAX_TENSOR = 1 << 32
"""Bytes of one tensor; the largest of Ho et al.'s is 19 MB. A file with holes in it can be longer than any disk."""
MAX_TENSORS = 1 << 17
MAX_ENTRY = 1 << 16
MAX_NAME = 4096
MAX_NAMES = 1 << 26
"""Bytes of one name, and of all. A key that repeats most of the one before takes four bytes, whatever its length."""

_FOOTER = 48
_SUFFIXES = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_STEP = re.compile(r"-(\d{1,18})$")

# DataType in tensorflow/core/framework/types.proto
_FLOAT32, _STRING, _BFLOAT16 = 1, 7, 14
_DTYPES: Mapping[int, str] = {
    _FLOAT32: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 9: "i8", 10: "u1", 17: "u2", 19: "f2", 22: "u4", 23: "u8"
}  # fmt: skip
_BOOL = 10
_NAMES = {_STRING: "text", 8: "complex64", 18: "complex128", 20: "resource", 21: "variant"}


@dataclass(frozen=True)
class Entry:
    """The index entry of a tensor.

    Attributes:
        dtype: TensorFlow's number of the element type.
        shape: of the tensor.
        shard: the number of the data file with its bytes.
        offset: where they begin in that file.
        size: how many bytes.
        crc: CRC-32C of the bytes.
        sliced: whether it was saved in parts, which are elsewhere under names of their own.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class TensorBundle:
    """A TensorFlow checkpoint. Opening reads the index; a tensor's bytes are read by :meth:`read`.

    Attributes:
        prefix: the path without ``.index``.
        entries: every tensor, by name, sorted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open what :func:`find_bundle` finds at ``path``.

        Raises:
            FileFormatError: there is no checkpoint, or its index is damaged, compressed, or of an unknown version.
        """
        self.prefix = find_bundle(path)
        self._index = self.prefix.with_name(self.prefix.name + ".index")
        self._order = "<"
        self._shards = 0
        try:
            self.entries: Mapping[str, Entry] = self._read_index(_contents(self._index))
        except MalformedError as error:
            _refuse(f"{self._index}: not a whole index of a TensorFlow checkpoint", str(error))

    @property
    def step(self) -> int | None:
        """N if the name is ``model.ckpt-N``, else None."""
        match = _STEP.search(self.prefix.name)
        return int(match[1]) if match else None

    def read(self, name: str) -> NDArray[Any]:
        """A tensor of its own shape and type, bfloat16 as float32; its CRC has been checked.

        Raises:
            FileFormatError: no such tensor, one saved in parts, one not of numbers, or its bytes are missing or changed.
        """
        entry = self.entries.get(name)
        if entry is None:
            _refuse(f"{self._index}: no tensor {name[:200]!r}", f"it holds {len(self.entries)} others")
        if entry.sliced:
            _refuse(
                f"{self._index}: {name[:200]!r} was saved in parts, and ddpmx reads whole tensors only",
                "a partitioned variable",
                "restore it in TensorFlow, and save it without a partitioner",
            )
        if entry.dtype != _BFLOAT16 and entry.dtype not in _DTYPES:
            kind = _NAMES.get(entry.dtype, f"of TensorFlow's type {entry.dtype}")
            _refuse(f"{self._index}: {name[:200]!r} is {kind}, not a tensor of numbers")
        width = 2 if entry.dtype == _BFLOAT16 else np.dtype(_DTYPES[entry.dtype]).itemsize
        if entry.size > MAX_TENSOR:
            _refuse(f"{self._index}: {name[:200]!r} is too large", f"{entry.size} bytes, at most {MAX_TENSOR}")
        if math.prod(entry.shape) * width != entry.size:
            _refuse(
                f"{self._index}: {name[:200]!r} contradicts itself",
                f"{entry.size} bytes for the shape {list(entry.shape)} of {width} bytes each",
            )
        raw = self._bytes(name, entry)
        if crc32c(raw) != entry.crc:
            _refuse(f"{self.shard(entry.shard)}: the bytes of {name[:200]!r} were changed", "their CRC does not match")
        array: NDArray[Any]
        if entry.dtype == _BFLOAT16:  # the upper half of a float32
            array = (np.frombuffer(raw, f"{self._order}u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            array = np.frombuffer(raw, self._order + _DTYPES[entry.dtype])
            array = array != 0 if entry.dtype == _BOOL else array.astype(array.dtype.newbyteorder("="), copy=False)
        return array.reshape(entry.shape)

    def shard(self, number: int) -> Path:
        """The path of a data file."""
        return self.prefix.with_name(f"{self.prefix.name}.data-{number:05d}-of-{self._shards:05d}")

    # --- the data files ----------------------------------------------------------------------------------------------

    def _bytes(self, name: str, entry: Entry) -> bytearray:
        path = self.shard(entry.shard)
        try:
            if path.exists() and not path.is_file():
                _refuse(f"{path}: cannot be read", "not a file")
            with path.open("rb") as stream:  # not memory-mapped: a file that shrinks meanwhile would kill the process
                size = os.fstat(stream.fileno()).st_size
                if entry.offset + entry.size > size:
                    _refuse(
                        f"{path}: cut off",
                        f"{name[:200]!r} ends at byte {entry.offset + entry.size} of {size}",
                        "copy it again",
                    )
                stream.seek(entry.offset)
                raw = bytearray(entry.size)
                if stream.readinto(raw) != entry.size:
                    _refuse(f"{path}: cut off", "it became shorter while being read")
        except OSError as error:
            _refuse(
                f"{path}: cannot be read",
                error.strerror or str(error),
                f"a checkpoint needs its {self._shards} data files beside the index",
            )
        return raw

    # --- the index ---------------------------------------------------------------------------------------------------

    def _read_index(self, view: memoryview) -> dict[str, Entry]:
        table = _table(view)
        key, header = next(table, (None, memoryview(b"")))
        if key != b"":
            _refuse(f"{self._index}: a table, but not of a TensorFlow checkpoint", "no header under the empty key")
        self._read_header(header)
        entries: dict[str, Entry] = {}
        for key, value in table:
            if key[:1] == b"\0":  # a part of a tensor; the tensor's own entry is marked as sliced
                continue
            name = key.decode("utf-8", errors="surrogateescape")
            try:
                entries[name] = _entry(value)
            except MalformedError as error:
                raise MalformedError(f"{name[:200]!r}: {error}") from error
            if not 0 <= entries[name].shard < self._shards:
                raise MalformedError(f"{name[:200]!r} is in data file {entries[name].shard} of {self._shards}")
        self._check_overlap(entries)
        return entries

    def _read_header(self, header: memoryview) -> None:
        oldest_reader = 0
        for number, value in fields(header):
            if number == 1:
                if not isinstance(value, int):  # version 1 has a list of all tensors in this field
                    _refuse(
                        f"{self._index}: a TensorFlow checkpoint of version 1, which ddpmx does not read",
                        hint="restore it in TensorFlow, and save it with tf.train.Saver(write_version=2)",
                    )
                self._shards = value
            elif number == 2:
                self._order = ">" if as_number(value) else "<"
            elif number == 3:
                for part, version in fields(as_message(value)):
                    oldest_reader = as_number(version) if part == 2 else oldest_reader
        if oldest_reader > 1:
            _refuse(
                f"{self._index}: of a version that this ddpmx does not know",
                f"it needs a reader of version {oldest_reader}, and this is one of version 1",
            )
        if not 1 <= self._shards <= 99999:
            raise MalformedError(f"{self._shards} data files")

    def _check_overlap(self, entries: Mapping[str, Entry]) -> None:
        """Refuse tensors that share bytes: a small file could otherwise unpack to as much as its author likes."""
        places = sorted((entry.shard, entry.offset, entry.size, name) for name, entry in entries.items() if entry.size)
        for (shard, offset, size, first), (next_shard, next_offset, _, second) in pairwise(places):
            if shard == next_shard and next_offset < offset + size:
                raise MalformedError(f"{first[:150]!r} and {second[:150]!r} are in the same place")


def find_bundle(path: str | os.PathLike[str]) -> Path:
    """The prefix of the checkpoint at ``path``.

    ``path`` is the prefix itself, one of the checkpoint's files, or a folder: then the checkpoint that the folder's file
    ``checkpoint`` names, or the one with the most steps.

    Raises:
        FileFormatError: there is no checkpoint, or it is one of version 1.
    """
    path = Path(path)
    if path.is_dir():
        return _newest(path)
    prefix = path.with_name(_SUFFIXES.sub("", path.name) or path.name) if path.name else path
    if prefix.name and prefix.with_name(f"{prefix.name}.index").is_file():
        return prefix
    if _is_version_1(prefix):
        raise FileFormatError(
            f"{prefix}: a TensorFlow checkpoint of version 1, which ddpmx does not read",
            note="a single file, as TensorFlow wrote them before version 1.0",
            hint="restore it in TensorFlow, and save it with tf.train.Saver(write_version=2)",
        )
    raise FileFormatError(
        f"{path}: no TensorFlow checkpoint there",
        note=f"there is no file {prefix.name}.index",
        hint="a checkpoint is model.ckpt-N.index and its model.ckpt-N.data-… files; name model.ckpt-N",
    )


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether there is a TensorFlow checkpoint at ``path``, including one of version 1 or without its index.

    :class:`TensorBundle` opens it, or says why it cannot.
    """
    path = Path(path)
    if path.is_dir():
        return any(path.glob("*.index"))
    return (
        bool(_SUFFIXES.search(path.name))
        or path.with_name(f"{path.name or 'x'}.index").is_file()
        or _is_version_1(path)
    )


def _is_version_1(path: Path) -> bool:
    """Whether it is a single file in the format of a table."""
    return path.is_file() and _contents(path, _FOOTER)[-8:] == MAGIC


def _newest(folder: Path) -> Path:
    """The checkpoint that the file ``checkpoint`` names (TensorFlow writes the last one's path), or the highest N."""
    state = folder / "checkpoint"
    if state.is_file():
        text = _contents(state, 1 << 16).tobytes().decode("utf-8", errors="replace")
        match = re.search(r'^model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
        # a path on the machine where it was written: only the name matters
        name = re.split(r"[/\\]", match[1])[-1] if match else ""
        if name and (folder / f"{name}.index").is_file():
            return folder / name
    prefixes = [file.with_name(file.name.removesuffix(".index")) for file in folder.glob("*.index")]
    if not prefixes:
        raise FileFormatError(
            f"{folder}: no TensorFlow checkpoint there",
            note="no file ends in .index",
            hint="a checkpoint is model.ckpt-N.index and its model.ckpt-N.data-… files",
        )
    return max(prefixes, key=lambda prefix: (int(m[1]) if (m := _STEP.search(prefix.name)) else -1, prefix.name))


def _refuse(fact: str, note: str | None = None, hint: str | None = None) -> NoReturn:
    raise FileFormatError(fact, note=note, hint=hint)


def _contents(path: Path, last: int | None = None) -> memoryview:
    """The bytes of a file, or its ``last`` ones.

    Raises:
        FileFormatError: it cannot be read, or is too large for an index.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe could block, reading a device never end
            raise FileFormatError(f"{path}: cannot be read", note="not a file")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if last is not None:
                stream.seek(max(0, size - last))
            elif size > MAX_INDEX:
                raise FileFormatError(f"{path}: too large for an index", note=f"{size} bytes, at most {MAX_INDEX}")
            return memoryview(stream.read(size if last is None else last))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error


def _entry(value: memoryview) -> Entry:
    """BundleEntryProto, in tensorflow/core/protobuf/tensor_bundle.proto."""
    if len(value) > MAX_ENTRY:
        raise MalformedError(f"{len(value)} bytes to describe one tensor")
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}
    shape: list[int] = []
    crc, sliced = 0, False
    for number, item in fields(value):
        if number in numbers:
            numbers[number] = as_number(item)
            if numbers[number] >= 1 << 62:
                raise MalformedError("a negative place or size")
        elif number == 2:  # TensorShapeProto
            for part, dim in fields(as_message(item)):
                if part == 2:
                    shape.append(next((as_number(side) for which, side in fields(as_message(dim)) if which == 1), 0))
        elif number == 6:
            crc = unmask(int.from_bytes(as_message(item), "little"))
        elif number == 7:
            sliced = True
    if len(shape) > 32 or any(side >= 1 << 40 for side in shape):
        raise MalformedError("a shape that no tensor has")
    return Entry(numbers[1], tuple(shape), numbers[3], numbers[4], numbers[5], crc, sliced)


# --- the table -------------------------------------------------------------------------------------------------------


def _table(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Every key and its value, in order.

    Raises:
        MalformedError: damaged, or not in order.
    """
    if len(view) < _FOOTER or view[-8:] != MAGIC:
        raise MalformedError("it does not end with the magic number" if len(view) else "it is empty")
    footer = view[-_FOOTER:]
    position = 0
    handle = []
    for _ in range(4):  # offset and size of the block of statistics, then of the block of blocks
        number, position = varint(footer, position)
        handle.append(number)
    end, count, names, last = 0, 0, 0, None
    for _, place in _block(view, handle[2], handle[3]):
        offset, at = varint(place, 0)
        size, _ = varint(place, at)
        if offset < end:  # blocks that are listed many times would be read many times
            raise MalformedError("its blocks are not in order")
        end = offset + size
        for key, value in _block(view, offset, size):
            if last is not None and key <= last:
                raise MalformedError("its names are not in order")
            last = key
            count += 1
            names += len(key)
            if count > MAX_TENSORS or names > MAX_NAMES:
                raise MalformedError(f"more than {MAX_TENSORS} tensors, or {MAX_NAMES} bytes of names")
            yield key, value


def _block(view: memoryview, offset: int, size: int) -> Iterator[tuple[bytes, memoryview]]:
    """The entries of a block, each stored as: bytes shared with the key before, the rest of the key, and a value.

    The block ends with the positions at which nothing is shared, and their number; then follow compression and CRC.
    """
    if offset + size + 5 > len(view) - _FOOTER:
        raise MalformedError(f"a block of {size} bytes at {offset} lies beyond its end")
    block, rest = view[offset : offset + size], view[offset + size : offset + size + 5]
    if unmask(int.from_bytes(rest[1:], "little")) != crc32c(view[offset : offset + size + 1]):
        raise MalformedError("a block was changed: its CRC does not match")
    if rest[0] != 0:
        raise MalformedError("it is compressed, which TensorFlow's never are")
    restarts = int.from_bytes(block[-4:], "little")
    if size < 4 or 4 * restarts > size - 4:
        raise MalformedError("a block without an end")
    entries = block[: size - 4 - 4 * restarts]
    position, key = 0, b""
    while position < len(entries):
        shared, position = varint(entries, position)
        own, position = varint(entries, position)
        length, position = varint(entries, position)
        if shared > len(key) or shared + own > MAX_NAME or position + own + length > len(entries):
            raise MalformedError("an entry that does not fit into its block")
        key = key[:shared] + entries[position : position + own].tobytes()
        position += own
        yield key, entries[position : position + length]
        position += length
