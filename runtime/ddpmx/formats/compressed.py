"""Compressed images, x.ddpm: what the file says, checked, from its bytes alone. Nothing is decoded here.

    magic, 8 bytes | length of the header, uint32 | CRC-32 of the header, uint32 | header | sections

Those of the header are LEB128 (7 bits a byte, the lowest first), but for hashes and codes, which are bytes. All numbers are
little-endian. A section is

    kind, 1 byte | steps | length of its data | CRC-32 of all before and of the data, uint32 | data

with ``steps`` and the length as LEB128. A file that ends inside a section, or between two, is the beginning of a file, and
a coarser image.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from ddpmx.errors import FileFormatError
from ddpmx.formats.spec import PRECISIONS, Precision

FORMAT = 2
"""Format 1 did not say in which precision the network was computed; no release has written it."""
_BEGINS, _END = b"DDPMXC", b"\n"
MAGIC = _BEGINS + b"%d" % FORMAT + _END
MAX_FILE = 1 << 30
MAX_HEADER = 1 << 22
MAX_NUMBERS = 1 << 27
"""C·H·W times the images of a file."""
NUMBERS_BY_BYTE = 1 << 13
"""C·H·W times the images, at most, for each byte of a file: no file makes a reader allocate much more than it holds."""
MAX_STEPS = 1 << 12

STEPS, RESIDUAL = 1, 2
CHECK_BYTES = 4
CODES_PER_OCTAVE, CODE_OF_ONE = 16, 112
"""Root mean square errors are stored as 112 + 16·log₂(levels)."""
KNOTS = 20


@dataclass(frozen=True)
class Header:
    """What has to be known before anything is decoded.

    Attributes:
        weights: the first 32 digits of the sha256 of the model's weights.
        coefficients: CRC-32 of the chain's coefficients, 8 digits.
        precision: of the model's file, to which its weights were rounded.
        arithmetic: in which its network was computed: fp32, or that of the file.
        shape: (C, H, W).
        T: the model's timesteps.
        n: images.
        group: how many are coded together.
        seed: of the draws that coder and decoder have in common.
        book: bits of a book, the draws that a coder looks at.
        chunk: bits that a chunk is meant to need.
        times: the timesteps of the states that are sent, rising; the last is T − 1.
        errors: codes of the expected error of x̂_0 from x_t at the timesteps of :func:`knots`.
        lossless: whether what is left of the images comes last.
        labels: the class of each image, or empty.
    """

    weights: str
    coefficients: str
    precision: Precision
    arithmetic: Precision
    shape: tuple[int, int, int]
    T: int
    n: int
    group: int
    seed: int
    book: int
    chunk: int
    times: tuple[int, ...]
    errors: tuple[int, ...]
    lossless: bool = False
    labels: tuple[int, ...] = ()

    @property
    def numbers(self) -> int:
        """C·H·W."""
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Section:
    """A section of a file.

    Attributes:
        kind: :data:`STEPS` or :data:`RESIDUAL`.
        steps: how many states it sends.
        data: its numbers, coded; of steps, with :data:`CHECK_BYTES` before them.
    """

    kind: int
    steps: int
    data: bytes


@dataclass(frozen=True)
class CompressedFile:
    """A file.

    Attributes:
        header: its header.
        sections: those that are there in full.
        complete: whether these are all.
        name: of the file, for messages.
    """

    header: Header
    sections: tuple[Section, ...] = field(repr=False)
    complete: bool
    name: str = "the file"

    @property
    def steps(self) -> int:
        """States that can be decoded."""
        return sum(section.steps for section in self.sections)


def knots(T: int) -> tuple[int, ...]:
    """The timesteps at which a header has errors, rising, 0 and T − 1 among them; closer where t is small."""
    last = KNOTS - 1
    return tuple(sorted({(T - 1) * k * k // (last * last) for k in range(KNOTS)}))


def error_code(levels: float) -> int:
    """The code of an error in levels, 0…255."""
    return min(255, max(0, round(CODE_OF_ONE + CODES_PER_OCTAVE * math.log2(max(levels, 1e-9)))))


def write_header(header: Header) -> bytes:
    """Magic and header as bytes."""
    values = [*header.shape, header.T, header.n, header.group, header.seed, header.book, header.chunk]
    values += [
        len(header.times),
        header.times[0],
        *(b - a for a, b in zip(header.times, header.times[1:], strict=False)),
    ]
    body = bytes.fromhex(header.weights) + bytes.fromhex(header.coefficients)
    body += bytes(PRECISIONS.index(precision) for precision in (header.precision, header.arithmetic))
    body += b"".join(map(_leb128, values)) + bytes(header.errors) + bytes([header.lossless, bool(header.labels)])
    body += b"".join(map(_leb128, header.labels))
    return MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


def write_section(section: Section) -> bytes:
    """A section as bytes."""
    head = bytes([section.kind]) + _leb128(section.steps) + _leb128(len(section.data))
    return head + zlib.crc32(section.data, zlib.crc32(head)).to_bytes(4, "little") + section.data


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as compressed images do, of any format. False if it cannot be read."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as stream:
            return _format(stream.read(len(MAGIC))) is not None
    except OSError:
        return False


def read_compressed(path: str | os.PathLike[str]) -> CompressedFile:
    """The file at ``path``.

    Raises:
        FileFormatError: unreadable, none of these files, too large, or damaged.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise FileFormatError(f"{path}: cannot be read", note="not a file")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    return parse(data, str(path))


def parse(data: bytes, name: str = "the file") -> CompressedFile:
    """A file from its bytes, or from the first of them.

    Raises:
        FileFormatError: too large, of another format, damaged, or cut short within its header.
    """
    if len(data) > MAX_FILE:
        raise FileFormatError(f"{name}: too large for compressed images", note=f"the limit is {MAX_FILE >> 20} MiB")
    if (found := _format(data)) is None:
        raise FileFormatError(f"{name}: not compressed images of ddpmx", note=f"it begins with {data[:8]!r}")
    if found != FORMAT:
        raise FileFormatError(
            f"{name}: compressed images of format {found}, and this ddpmx reads format {FORMAT}",
            hint="compress the images again: no release has written such files" if found < FORMAT else "a newer ddpmx",
        )
    try:
        header, at = _header(data)
        if header.n * header.numbers > NUMBERS_BY_BYTE * len(data):
            raise ValueError(f"{len(data)} bytes are too few for {header.n} images")
        sections, complete = _sections(data, at, header)
    except ValueError as error:
        raise FileFormatError(f"{name}: damaged", note=str(error), hint="copy it again from where it came") from error
    return CompressedFile(header, sections, complete, name)


def _format(data: bytes) -> int | None:
    """The number of the format that these are the first bytes of, or None."""
    digit = data[len(_BEGINS) : len(MAGIC) - 1]
    return int(digit) if data[: len(MAGIC)] == _BEGINS + digit + _END and digit.isdigit() else None


def _header(data: bytes) -> tuple[Header, int]:
    begin = len(MAGIC) + 8
    if len(data) < begin:
        raise ValueError("it ends within its header")
    length = int.from_bytes(data[8:12], "little")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    body = data[begin : begin + length]
    if len(body) < length:
        raise ValueError("it ends within its header")
    if zlib.crc32(body) != int.from_bytes(data[12:16], "little"):
        raise ValueError("its header has the wrong CRC")
    stream = _Bytes(body)
    weights, coefficients = stream.take(16).hex(), stream.take(4).hex()
    precision, arithmetic = (PRECISIONS[stream.number("precision", 0, len(PRECISIONS) - 1)] for _ in range(2))
    if arithmetic not in ("fp32", precision):
        raise ValueError(f"a file in {precision} that was computed in {arithmetic}")
    c, height, width = (stream.number("side", 1, 1 << 20) for _ in range(3))
    T = stream.number("T", 1, 1_000_000)
    n = stream.number("images", 1, max(0, MAX_NUMBERS // (c * height * width)))
    group = stream.number("images of a group", 1, n)
    seed = stream.number("seed", 0, (1 << 64) - 1)
    book = stream.number("bits of a book", 8, 22)
    chunk = stream.number("bits of a chunk", 1, 1 << 10)
    count = stream.number("steps", 1, min(T, MAX_STEPS))
    times = [stream.number("timestep", 0, T - 1)]
    for _ in range(count - 1):
        times.append(times[-1] + stream.number("timestep", 1, T - 1 - times[-1]))
    if times[-1] != T - 1:
        raise ValueError(f"its chain begins at t = {times[-1]}, and T is {T}")
    errors = tuple(stream.take(len(knots(T))))
    lossless, labelled = (stream.number("flag", 0, 1) for _ in range(2))
    labels = tuple(stream.number("label", 0, 1 << 31) for _ in range(n)) if labelled else ()
    if stream.left:
        raise ValueError(f"{stream.left} bytes too many in its header")
    shape = (c, height, width)
    return (
        Header(
            weights,
            coefficients,
            precision,
            arithmetic,
            shape,
            T,
            n,
            group,
            seed,
            book,
            chunk,
            tuple(times),
            errors,
            bool(lossless),
            labels,
        ),
        begin + length,
    )


def _sections(data: bytes, at: int, header: Header) -> tuple[tuple[Section, ...], bool]:
    sections: list[Section] = []
    steps = 0
    while at < len(data):
        stream = _Bytes(data, at)
        try:
            kind = stream.take(1)[0]
            count, length = stream.number("steps of a section", 0, MAX_STEPS), stream.number("section", 0, MAX_FILE)
            head = data[at : stream.at]
            crc = int.from_bytes(stream.take(4), "little")
            body = stream.take(length)
        except _EndError:
            return tuple(sections), False
        if zlib.crc32(body, zlib.crc32(head)) != crc:
            raise ValueError(f"section {len(sections) + 1} has the wrong CRC")
        steps += count
        residual = bool(sections) and steps == len(header.times) and count == 0 and header.lossless and kind == RESIDUAL
        ours = kind == STEPS and count >= 1 and steps <= len(header.times) and length >= CHECK_BYTES
        if not (residual or ours) or (sections and sections[-1].kind == RESIDUAL):
            raise ValueError(f"section {len(sections) + 1} does not belong there")
        sections.append(Section(kind, count, body))
        at = stream.at
    last = RESIDUAL if header.lossless else STEPS
    return tuple(sections), bool(sections) and steps == len(header.times) and sections[-1].kind == last


class _Bytes:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.at = data, at

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def take(self, count: int) -> bytes:
        """So many bytes. Raises ValueError if there are less."""
        if self.left < count:
            raise _EndError("it ends within its header")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, what: str, least: int, most: int) -> int:
        """A LEB128 number in these limits. Raises ValueError."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise ValueError(f"{what}: a number of more than ten bytes")
        if not least <= value <= most:
            raise ValueError(f"{what}: {value}, and not from {least} to {most}")
        return value


class _EndError(ValueError):
    """The bytes are at their end."""


def _leb128(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
