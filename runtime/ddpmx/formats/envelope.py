"""An envelope: a short JSON object inside a file of another format, as a prefix, its length, its CRC and the object.

    ddpmx1 LENGTH CRC32 {"shape":[3,32,32],…}

It is ASCII, so it survives as a value of ONNX metadata and as the name of a TensorRT network, and it can be found
in the bytes of a file whose format is not public. The CRC finds damage; nothing protects against tampering.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ddpmx.errors import SpecError

MAX_BYTES = 9999
MAX_DEPTH = 64


def wrap(prefix: str, values: Mapping[str, Any]) -> str:
    """The envelope of ``values``, one line of ASCII.

    Raises:
        SpecError: the JSON is longer than :data:`MAX_BYTES`.
    """
    body = json.dumps(values, separators=(",", ":"), sort_keys=True).encode()
    if len(body) > MAX_BYTES:
        raise SpecError(f"the metadata takes {len(body)} bytes, and the most is {MAX_BYTES}")
    return f"{prefix} {len(body)} {zlib.crc32(body):08x} {body.decode()}"


def unwrap(prefix: str, text: str) -> object:
    """The object in an envelope.

    Raises:
        SpecError: not an envelope, truncated or changed.
    """
    raw = text.encode(errors="replace")  # text with surrogates cannot have the right CRC
    header = _header(prefix).match(raw)
    if header is None:
        raise SpecError("the text is not a ddpmx spec", note=f"it begins with {text[:24]!r}")
    body = raw[header.end() :]
    if len(body) != int(header[1]) or zlib.crc32(body) != int(header[2], 16):
        raise SpecError(
            "the ddpmx spec in the file is damaged",
            note=f"{len(body)} bytes where it says {int(header[1])}, or another CRC",
            hint="export the model again",
        )
    return parse_json(body)


def search(prefix: str, data: Any) -> Iterator[tuple[str, int]]:
    """Every intact envelope in ``data`` (bytes, or a mapped file) and where it ends. Damaged ones are skipped."""
    for header in _header(prefix).finditer(data):
        end = header.end() + int(header[1])
        body = bytes(data[header.end() : end])
        if len(body) == int(header[1]) and zlib.crc32(body) == int(header[2], 16):
            yield (header[0] + body).decode(errors="replace"), end


def parse_json(text: bytes | str) -> object:
    """JSON to Python values; NaN and infinities are refused.

    Raises:
        SpecError: not JSON, or nested deeper than :data:`MAX_DEPTH`.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:40])

    try:
        values = json.loads(text, parse_constant=refuse, parse_float=finite)
        _refuse_depth(values)
        return values
    except (ValueError, RecursionError) as error:
        raise SpecError("not valid JSON", note=str(error)[:200]) from error


def _refuse_depth(values: object) -> None:
    """json cannot always write what it reads, nor can repr() show it: each has its own limit, by the version of Python."""
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _header(prefix: str) -> re.Pattern[bytes]:
    return re.compile(re.escape(prefix.encode()) + rb" (\d{1,4}) ([0-9a-f]{8}) ")
