"""TensorFlow's checkpoint format, written from its description, and the weights of the checkpoint of Ho's code."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from oracles.protobuf import field, varint

FIXTURES = Path(__file__).parents[1] / "data" / "tf_bundle"
MAGIC = 0xDB4775248B80FB57

Item = tuple[bytes, bytes]


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C, a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """The masked CRC of ``data``, as files hold it."""
    crc = crc32c(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# --- the index -------------------------------------------------------------------------------------------------------


def block(items: Sequence[Item], *, restart: int = 16) -> bytes:
    """A block's contents; keys are shortened by what they share with the one before, but for every ``restart``-th."""
    out, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(items):
        shared = 0
        if number % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + b"".join(at.to_bytes(4, "little") for at in restarts) + len(restarts).to_bytes(4, "little")


def table(blocks: Sequence[bytes], *, handles: Sequence[tuple[int, int]] | None = None, kind: int = 0) -> bytes:
    """A table of finished blocks. ``handles`` replaces where the index says that they are."""
    out, places = b"", []

    def add(contents: bytes, how: int = 0) -> tuple[int, int]:
        nonlocal out
        place = (len(out), len(contents))
        out += contents + bytes([how]) + masked(contents + bytes([how]))
        return place

    for contents in blocks:
        places.append(add(contents, kind))
    meta = add(block([]))
    pointers = places if handles is None else handles
    index = add(block([(b"%08d" % number, varint(a) + varint(n)) for number, (a, n) in enumerate(pointers)], restart=1))
    footer = b"".join(varint(number) for number in (*meta, *index))
    return out + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def header(shards: int = 1, *, big_endian: bool = False, min_consumer: int = 0) -> bytes:
    """BundleHeaderProto."""
    out = field(1, shards) + (field(2, 1) if big_endian else b"")
    return out + field(3, field(1, 1) + (field(2, min_consumer) if min_consumer else b""))


def entry(
    data: bytes, shape: Sequence[int], *, dtype: int = 1, offset: int = 0, size: int | None = None, shard: int = 0
) -> bytes:
    """BundleEntryProto of a tensor whose bytes are ``data``."""
    sides = b"".join(field(2, field(1, side)) for side in shape)
    out = field(1, dtype) + field(2, sides) + field(3, shard) + field(4, offset)
    return out + field(5, len(data) if size is None else size) + varint(6 << 3 | 5) + masked(data)


def write(folder: Path, items: Sequence[Item], data: bytes, *, name: str = "m.ckpt-1", per_block: int = 1000) -> Path:
    """A checkpoint of one data file."""
    blocks = [block(items[at : at + per_block]) for at in range(0, len(items), per_block)]
    (folder / f"{name}.index").write_bytes(table(blocks))
    (folder / f"{name}.data-00000-of-00001").write_bytes(data)
    return folder / name


# --- a checkpoint of Ho's code ---------------------------------------------------------------------------------------


def values(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 values that follow from a variable's name: PCG64's raw bits, of which each is exact on every machine."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count) >> np.uint64(40)
    unit = raw.astype(np.float64) / 2**23 - 1.0
    variable = name.removesuffix("/ExponentialMovingAverage").removesuffix("/Adam_1").removesuffix("/Adam")
    if variable.endswith("/W"):
        unit = unit * math.sqrt(3.0 / math.prod(shape[:-1]))
    else:
        unit = unit * 0.3 + (1.0 if variable.endswith("/gamma") else 0.0)
    return unit.astype(np.float32).reshape(shape)


def ho_value(name: str, shape: Sequence[int]) -> bytes:
    """The bytes of any variable in the checkpoint of Ho's code."""
    if name == "global_step":
        return np.int64(790000).tobytes()
    if name in ("beta1_power", "beta2_power"):
        return np.float32(0.5).tobytes()
    return values(name, shape).tobytes()


def ho_checkpoint(folder: Path, entries: Mapping[str, object], kwargs: Mapping[str, object] | None = None) -> Path:
    """Lay the checkpoint out in ``folder``: the committed index, and the data file made again.

    Args:
        folder: where to.
        entries: of the index, as the reader gives them: the name, and shape, offset and size of each.
        kwargs: what is to stand in kwargs.json; None for no such file.
    """
    data = bytearray(max(e.offset + e.size for e in entries.values()))  # type: ignore[attr-defined]
    for name, e in entries.items():
        data[e.offset : e.offset + e.size] = ho_value(name, e.shape)  # type: ignore[attr-defined]
    (folder / "model.ckpt-790000.index").write_bytes((FIXTURES / "ho.ckpt-790000.index").read_bytes())
    (folder / "model.ckpt-790000.data-00000-of-00001").write_bytes(data)
    if kwargs is not None:
        (folder / "kwargs.json").write_text(json.dumps(kwargs))
    return folder / "model.ckpt-790000"
