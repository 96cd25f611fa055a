"""Protobuf's wire format: read field by field, nothing copied and every length checked before it is used; and written."""

from __future__ import annotations

from collections.abc import Iterator


class MalformedError(Exception):
    """Not a protobuf message."""


def fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Each field of a message: (number, an int for varints and the bytes for everything else).

    Raises:
        MalformedError: truncated, or not a protobuf message.
    """
    for number, value, _ in raw_fields(view):
        yield number, value


def raw_fields(view: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """As :func:`fields`, and with each the bytes of the whole field, key included.

    Raises:
        MalformedError: truncated, or not a protobuf message.
    """
    position, end = 0, len(view)
    while position < end:
        begin = position
        key, position = varint(view, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise MalformedError("a field numbered 0")
        if number >= 1 << 29:  # other readers take a key modulo 2³², and would see a different field
            raise MalformedError("a field numbered beyond 2^29 - 1")
        if wire_type == 0:
            value, position = varint(view, position)
            yield number, value, view[begin:position]
            continue
        if wire_type == 2:
            length, position = varint(view, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise MalformedError(f"a field of wire type {wire_type}")
        if position + length > end:
            raise MalformedError(f"{position + length - end} bytes are missing at the end")
        position += length
        yield number, view[position - length : position], view[begin:position]


def varint(view: memoryview, position: int) -> tuple[int, int]:
    """The number at ``position``, and the position after it.

    Raises:
        MalformedError: truncated, or longer than ten bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise MalformedError("the end is inside a number")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise MalformedError("a number of more than ten bytes")


def packed(view: memoryview) -> Iterator[int]:
    """The numbers of a packed repeated field.

    Raises:
        MalformedError: truncated.
    """
    position = 0
    while position < len(view):
        value, position = varint(view, position)
        yield value


def as_message(value: int | memoryview) -> memoryview:
    """The bytes of a field that should hold a message."""
    if isinstance(value, int):
        raise MalformedError("a number in place of a message")
    return value


def as_text(value: int | memoryview) -> str:
    """The text of a field; bytes that are not UTF-8 become surrogates."""
    return bytes(as_message(value)).decode("utf-8", errors="surrogateescape")


def as_number(value: int | memoryview) -> int:
    """The value of a field that should hold a number."""
    if not isinstance(value, int):
        raise MalformedError("a message in place of a number")
    return value


def write_field(number: int, value: int | bytes | str) -> bytes:
    """A field: a number, 0 or more, as a varint; bytes, or a text as :func:`as_text` reads it, with their length."""
    if isinstance(value, int):
        return _write_varint(number << 3) + _write_varint(value)
    data = value.encode("utf-8", errors="surrogateescape") if isinstance(value, str) else value
    return write_head(number, len(data)) + data


def write_head(number: int, length: int) -> bytes:
    """What stands before the ``length`` bytes of a field that is a message, text or bytes."""
    return _write_varint(number << 3 | 2) + _write_varint(length)


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
