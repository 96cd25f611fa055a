"""CRC-32C (Castagnoli), which TensorFlow's files carry, in NumPy: half a gigabyte in about a second.

A CRC is linear over GF(2): the remainder of a long message is the sum of the remainders of its parts, each moved by the
bytes that follow it. So the message is laid out as rows of many 32-bit words, all worked on at once:

    s ← Z(s) ⊕ row        Z: "a row of zero bytes follows", a linear map of 32 bits, the same for every word

Z is looked up in two tables of 65,536 words, one for each half of s. In the end the words of s are added up by folding
it in half, with the Z of what is then left, until there is one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78
"""Without x³², and with the lowest power in the highest bit."""

_MIN_ROW, _MAX_ROW = 1 << 6, 1 << 15
"""Bytes of a row, powers of two. A row and its tables should fit into the cache."""

Words = NDArray[np.uint32]


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C of contiguous bytes."""
    message = np.frombuffer(data, np.uint8)
    if len(message) < _MIN_ROW:
        return _one_by_one(message.tobytes())
    width = _MIN_ROW
    while width < _MAX_ROW and 16 * width <= len(message):
        width *= 2
    # Zero bytes in front change nothing while the register is 0, so the first rows are filled up with them. The register
    # begins as all ones instead: that goes into the message's first four bytes.
    start = width + len(message) % width
    first = np.zeros(2 * width, np.uint8)
    first[-start:] = message[:start]
    first[-start:][:4] ^= 0xFF
    state = _rows(np.zeros(width // 4, np.uint32), first)
    state = _rows(state, message[start:])
    while len(state) > 1:
        half = len(state) // 2
        state = _apply(_zeros(4 * half), state[:half]) ^ state[half:]
    return int(_apply(_zeros(4), state)[0]) ^ 0xFFFFFFFF


def unmask(stored: int) -> int:
    """The CRC from its stored form, which is rotated and shifted so that data with CRCs in it still has a useful CRC."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def mask(crc: int) -> int:
    """The inverse of :func:`unmask`."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _rows(state: Words, message: NDArray[np.uint8]) -> Words:
    """s ← Z(s) ⊕ row over all rows of ``message``, which is a whole number of them."""
    low, high = _zeros(4 * len(state))
    index = np.empty(len(state), np.intp)
    other = np.empty_like(state)
    for row in message.reshape(-1, 4 * len(state)):
        # "wrap" because NumPy checks every index otherwise; 16 bits cannot leave the table
        np.copyto(index, state & np.uint32(0xFFFF), casting="unsafe")
        np.take(low, index, out=other, mode="wrap")
        np.copyto(index, state >> np.uint32(16), casting="unsafe")
        np.take(high, index, out=state, mode="wrap")
        state ^= other
        state ^= row.view("<u4")
    return state


def _apply(tables: tuple[Words, Words], words: Words) -> Words:
    low, high = tables
    moved: Words = low[words & np.uint32(0xFFFF)] ^ high[words >> np.uint32(16)]
    return moved


@cache
def _zeros(count: int) -> tuple[Words, Words]:
    """Tables of what ``count`` (a power of two) zero bytes do to a register: of its lower half, and of its upper."""
    if count > 1:
        half = _zeros(count // 2)
        return _apply(half, half[0]), _apply(half, half[1])
    registers = np.arange(1 << 16, dtype=np.uint32)
    return _zero_byte(registers), _zero_byte(registers << np.uint32(16))


def _zero_byte(words: Words) -> Words:
    one = np.uint32(1)
    for _ in range(8):
        words = (words >> one) ^ (words & one) * np.uint32(POLYNOMIAL)
    return words


def _one_by_one(message: bytes) -> int:
    low = _zeros(1)[0]
    crc = 0xFFFFFFFF
    for byte in message:
        crc = int(low[crc & 0xFF ^ byte]) ^ crc >> 8
    return crc ^ 0xFFFFFFFF
