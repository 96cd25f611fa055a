"""The array of a schedule ``betas``, which has no formula, as text that is stored beside the spec.

    betas1 LENGTH CRC32 BASE64

of the float64, little-endian. A spec has no room for the array: an ONNX file holds this text as metadata "ddpmx.betas", a
plan's sidecar as "betas"; a ``spec.json`` holds the numbers themselves.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError, SpecError

MAX_BETAS = 1 << 14
"""Four times the steps of any published chain, and as many as fit into the JSON files that may hold them."""

_TEXT = re.compile(r"betas1 (\d{1,5}) ([0-9a-f]{8}) ([A-Za-z0-9+/]*={0,2})", re.ASCII)


def as_betas(values: Any) -> NDArray[np.float64]:
    """β_t as a read-only float64 array, a copy.

    Args:
        values: real numbers [T].

    Raises:
        InputError: not numbers, not one-dimensional, not 1…:data:`MAX_BETAS` of them, or outside (0, 1].
    """
    try:
        betas = np.array(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError("betas must be an array of numbers", note=str(error)[:200]) from error
    if betas.dtype.kind not in "fiu":
        raise InputError("betas must be an array of numbers", note=f"these are {betas.dtype}")
    if betas.ndim != 1 or not 1 <= len(betas) <= MAX_BETAS:
        raise InputError(f"betas must be 1…{MAX_BETAS} numbers, not an array of shape {list(betas.shape)}")
    betas = np.ascontiguousarray(betas, np.float64)
    Schedule.from_betas(betas)
    betas.flags.writeable = False
    return betas


def checksum(betas: NDArray[np.float64]) -> str:
    """CRC32 of the float64, little-endian, in hexadecimal."""
    return f"{zlib.crc32(betas.astype('<f8').tobytes()):08x}"


def to_text(betas: NDArray[np.float64]) -> str:
    """The array as one line of ASCII, ``betas1 LENGTH CRC32 BASE64``."""
    return f"betas1 {len(betas)} {checksum(betas)} {base64.b64encode(betas.astype('<f8').tobytes()).decode()}"


def from_text(text: object) -> NDArray[np.float64]:
    """The array in a text of :func:`to_text`.

    Raises:
        SpecError: not such a text, truncated or changed; or the numbers are not valid β.
    """
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise SpecError("the array of β is damaged", note=f"it begins with {ascii(text)[:24]}")
    try:
        raw = base64.b64decode(found[3], validate=True)
    except binascii.Error as error:
        raise SpecError("the array of β is damaged", note=str(error)) from error
    if len(raw) != 8 * int(found[1]) or f"{zlib.crc32(raw):08x}" != found[2]:
        raise SpecError(
            "the array of β is damaged",
            note=f"{len(raw)} bytes where it says {found[1]} numbers of 8, or another CRC",
            hint="export the model again",
        )
    try:
        return as_betas(np.frombuffer(raw, "<f8"))
    except InputError as error:
        raise SpecError(f"the array of β: {error.fact}", note=error.note) from error
