"""Damaged and hostile files, made from good ones: mutant N of a seed is the same file on every run.

A mutant that is only noise fails at the first magic number. So half of them are parsed by their format (protobuf fields,
the JSON in an envelope, npy headers, zip members, a safetensors header), changed at one place, and written again with
correct lengths and checksums: those reach the later checks.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.formats import compressed
from ddpmx.formats.envelope import wrap
from ddpmx.formats.plan_file import RECORD_PREFIX
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.reference import Reference
from oracles import mnn, plans, protobuf

Files = dict[str, bytes]
"""Name → content of the files of one mutant, all in one folder."""

GAUSSIAN = Path(__file__).parents[1] / "data" / "gaussian.onnx"
SPEC = ModelSpec((1, 8, 8), timesteps=20)
NETWORK = {"in_channels": 1, "out_channels": 1, "size": [8, 8], "channels": 4, "multipliers": [1], "blocks": 1}
NETWORK |= {"attention": [], "dropout": 0.0, "groups": 2}


@dataclass(frozen=True)
class Mutant:
    """One case.

    Attributes:
        kind: of :data:`KINDS`; it selects the readers.
        entry: the file or folder that is passed to the readers, below the mutant's own folder.
        files: the content of that folder.
    """

    kind: str
    entry: str
    files: Files


# --- good files ------------------------------------------------------------------------------------------------------


def onnx_files() -> list[bytes]:
    """The toy model, and one that refers to an external file, and has half precision, at every possible place."""
    tensor = protobuf.external_tensor("weights.bin")
    inner = protobuf.field(1, protobuf.node("If", [], [], protobuf.attribute(6, protobuf.field(5, tensor))))
    sparse = protobuf.field(1, tensor) + protobuf.field(2, tensor)
    graph = protobuf.field(5, tensor) + inner + protobuf.field(15, sparse)
    graph += protobuf.field(
        1, protobuf.node("Constant", [], ["c"], protobuf.attribute(23, sparse), protobuf.attribute(10, tensor))
    )
    graph += protobuf.field(5, protobuf.tensor("v", protobuf.FLOAT, [2, 2], bytes(16)))
    half = protobuf.tensor("h", protobuf.FLOAT16, [2], bytes(4))
    numbers = protobuf.field(1, b"\x02") + protobuf.field(2, 16) + protobuf.field(5, b"\x80\x7f\x01")
    to = protobuf.field(1, "to") + protobuf.field(3, protobuf.FLOAT16)
    graph += (
        protobuf.field(5, half) + protobuf.field(5, numbers) + protobuf.field(13, protobuf.value_info("h", 10, [2]))
    )
    graph += protobuf.field(1, protobuf.node("Cast", ["h"], ["i"], to, protobuf.attribute(5, half)))
    graph += protobuf.field(5, protobuf.field(1, b"\x02\x03") + protobuf.field(2, 1) + protobuf.field(8, "packed"))
    rest = protobuf.field(20, protobuf.field(1, inner)) + protobuf.field(
        25, protobuf.field(7, protobuf.node("Relu", ["x"], ["y"]))
    )
    inputs = {"x": (protobuf.FLOAT, ("batch", 1, 8, 8)), "t": (protobuf.INT32, ("batch",))}
    outputs = {"eps": (protobuf.FLOAT, ("batch", 1, 8, 8))}
    written = protobuf.model(inputs, outputs, metadata={"ddpmx": SPEC.to_text()}, graph=graph, rest=rest)
    return [GAUSSIAN.read_bytes(), written]


def plan_of(text: str) -> bytes:
    """A plan whose network has the name ``text``."""
    body = bytes(range(64)) + text.encode() + bytes(200)
    head = b"vtrt" + bytes(12) + (28 + len(body)).to_bytes(8, "little") + bytes([1, 7, 1, 116])
    return head + body


def plan_file() -> bytes:
    """A plan like those of ``ddpmx build``, as far as the format is known."""
    return plan_of(f"{SPEC.to_text()} {wrap(RECORD_PREFIX, plans.RECORD.to_json())}")


def sidecar_of(plan: bytes) -> bytes:
    """The sidecar that ``ddpmx build`` writes."""
    values = {"spec": SPEC.to_json(), "engine": plans.RECORD.to_json(), "bytes": len(plan)}
    return json.dumps(values | {"build": {"seconds": 1.5}}, indent=2).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip archive whose bytes do not depend on the time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as .npy."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@cache
def _images() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 8, 8, 1), np.uint8)
    return {"images.npy": npy(images), "labels.npy": npy(np.arange(3))}


@cache
def _parity() -> dict[str, bytes]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    record = Reference(
        spec=SPEC,
        made_with="torch 2.13.0, cpu",
        seed=7,
        real=True,
        loss=0.25,
        t=np.array([1, 9, 19], np.int32),
        x0=generator.integers(0, 256, (2, 1, 8, 8), np.uint8),
        out=normal(3, 2, 64),
        steps=20,
        at=np.array([0, 10, 19]),
        state=normal(3, 1, 8, 8),
        state_out=normal(3, 64),
        final=generator.integers(0, 256, (2, 1, 8, 8), np.uint8),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parity.npz"
        record.save(path)
        return members_of(path.read_bytes())


def members_of(archive: bytes) -> dict[str, bytes]:
    """The members of an archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """float32 tensors of these shapes."""
    generator = np.random.default_rng(0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes.items():
        raw = generator.standard_normal(shape).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header, separators=(",", ":")).encode(), data)


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


@cache
def _checkpoint(torch_too: bool) -> Files:
    """A checkpoint; with ``torch_too``, with the weights that its network needs."""
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (4, 3), "a.bias": (4,), "b": (), "c": (0, 2)}
    if torch_too:
        import torch

        from ddpm_export.networks.unet import UNet, UNetConfig

        with torch.device("meta"):
            shapes = {
                key: tuple(value.shape) for key, value in UNet(UNetConfig.from_json(NETWORK)).state_dict().items()
            }
    settings = {"train": {"batch": 4}, "data": {"path": "/images", "size": [8, 8], "channels": 1, "fingerprint": "0"}}
    spec = {"model": SPEC.to_json(), "network": {"type": "unet", **NETWORK}}
    return {
        "spec.json": json.dumps(spec, indent=2).encode(),
        "ema.safetensors": safetensors(shapes),
        "training.json": json.dumps({"step": 400, "settings": settings}).encode(),
        "training.safetensors": safetensors({"exp_avg.a": (4,), "exp_avg_sq.a": (4,)}),
    }


COMPRESSED_BY = "ab" * 32


class Silent:
    """A network that says 0."""

    description = "always 0"

    def bind(self, buffers: Any) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        self.buffers.out[...] = 0

    def close(self) -> None:
        pass


@cache
def compressed_file() -> bytes:
    """Compressed images, lossless."""
    from ddpmx.pipeline import Pipeline
    from ddpmx.tasks.codec import compress

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    with Pipeline(SPEC, Silent()) as pipeline:
        return compress(pipeline, images, stop=4, lossless=True, steps=5, book=8, seed=2**40, model=COMPRESSED_BY).data


# --- mutations of any bytes ------------------------------------------------------------------------------------------


def noise(rng: random.Random, data: bytes) -> bytes:
    """One to four changes that ignore the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _CHANGES[rng.randrange(len(_CHANGES))](rng, out)
    return bytes(out)


def _at(rng: random.Random, out: bytearray) -> int:
    """A place; half of the time near the beginning, where headers are."""
    end = len(out) if rng.random() < 0.5 else min(len(out), 64)
    return rng.randrange(end) if end else 0


def _range(rng: random.Random, out: bytearray) -> slice:
    start = _at(rng, out)
    return slice(start, start + rng.choice((1, 2, 4, 8, 16, 64, 300, 5000)))


def _flip(rng: random.Random, out: bytearray) -> None:
    if out:
        out[_at(rng, out)] ^= 1 << rng.randrange(8)


def _replace(rng: random.Random, out: bytearray) -> None:
    if out:
        out[_at(rng, out)] = rng.randrange(256)


def _truncate(rng: random.Random, out: bytearray) -> None:
    del out[_at(rng, out) :]


def _delete(rng: random.Random, out: bytearray) -> None:
    del out[_range(rng, out)]


def _duplicate(rng: random.Random, out: bytearray) -> None:
    part = out[_range(rng, out)]
    place = _at(rng, out)
    out[place:place] = part * rng.choice((1, 1, 2, 50))


def _insert(rng: random.Random, out: bytearray) -> None:
    place = _at(rng, out)
    out[place:place] = rng.randbytes(rng.choice((1, 2, 4, 8, 64, 1000)))


def _swap(rng: random.Random, out: bytearray) -> None:
    first, second = _range(rng, out), _range(rng, out)
    a, b = bytes(out[first]), bytes(out[second])
    out[first] = b
    out[second] = a


INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def _integer(rng: random.Random, out: bytearray) -> None:
    number = rng.choice(INTEGERS)
    raw = protobuf.varint(number)
    if rng.random() < 0.6:
        width = rng.choice((1, 2, 4, 8))
        raw = (number % (1 << 8 * width)).to_bytes(width, "little")
    place = _at(rng, out)
    out[place : place + len(raw)] = raw


def _splice(rng: random.Random, out: bytearray) -> None:
    other = rng.choice(_all_good())
    start = rng.randrange(len(other))
    part = other[start : start + rng.choice((4, 16, 256, 4096))]
    place = _at(rng, out)
    out[place : place + (len(part) if rng.random() < 0.5 else 0)] = part


_CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _replace, _truncate, _delete, _duplicate, _insert, _swap, _integer, _integer, _splice),
)


@cache
def _all_good() -> tuple[bytes, ...]:
    plan = plan_file()
    others = (plan, sidecar_of(plan), zipped(_images()), zipped(_parity()), *_checkpoint(False).values())
    return (*onnx_files(), *others)


# --- JSON ------------------------------------------------------------------------------------------------------------

_PLACE = "@PLACE@"


def _json_text(rng: random.Random) -> str:
    """An unexpected value, as JSON text."""
    which = rng.randrange(6)
    if which == 0:  # nested: less deep than Python recurses, about as deep, and deeper
        depth = rng.choice((2, 60, rng.randrange(300, 1000), rng.randrange(900, 1500), 4000, 100_000))
        begin, end = rng.choice((("[", "]"), ('{"a":', "}")))
        return begin * depth + ("1" if begin != "[" else "") + end * depth
    if which == 1:
        digits = rng.choice((20, 310, 4000, 4301, 9000))
        return rng.choice(("-", "", "")) + "9" * digits
    if which == 2:
        return json.dumps("x" * rng.choice((1, 63, 64, 300, 5000)))
    if which == 3:
        return "[" + ",".join([rng.choice(("1", "8", "1e999", "[]", '"8"'))] * rng.choice((1, 2, 3, 4, 900))) + "]"
    return rng.choice(_JSON_TEXTS)


_JSON_TEXTS = (
    *("null", "true", "false", "[]", "{}", '""', "0", "-0", "-1", "1", "2", "3", "1000000", "1000001", "0.5", "-0.0"),
    *("1e-320", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "2147483648", "9223372036854775808"),
    *('"NaN"', '"1"', r'"\ud800"', r'"\u0000"', '"é\u202e"', '"../../x"', "[null]", "[1,8,8]", '{"a":1}', "[0,0,0]"),
    *('"x0"', '"v"', '"cosine"', '"jsd"', '"sigmoid_beta"', '"fixed_small"', "[1,16384,16384]", "[16384,16384,1]"),
    *('"TensorRT"', '"8.0"', '"٨.٠"', "undefined", "", "1,", "'a'"),
)
_KEYS = ("", "x", "shape", "timesteps", "t", "out", "spec", "seed", "model", "network", "format", "a" * 3000, "\ud800")


def json_change(rng: random.Random, text: bytes, most: int | None = None) -> bytes:
    """Another value, key or member at one to three places of a JSON text. At most ``most`` bytes, if possible."""
    try:
        values = json.loads(text)
    except ValueError:
        return noise(rng, text)
    raws: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(values))
        if not places:
            break
        holder, key = places[rng.randrange(len(places))]
        action = rng.randrange(10)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(_KEYS)] = holder.pop(key) if rng.random() < 0.7 else holder[key]
        elif action == 2:
            other_holder, other = places[rng.randrange(len(places))]
            holder[key] = json.loads(json.dumps(other_holder[other]))
        else:
            holder[key] = f"{_PLACE}{len(raws)}"
            raws.append(_json_text(rng))
    changed = json.dumps(values, separators=(",", ":"))
    for index, raw in enumerate(raws):
        if most is None or len(changed) + len(raw) <= most:
            changed = changed.replace(f'"{_PLACE}{index}"', raw)
    if rng.random() < 0.03:
        changed = _json_text(rng)
    return changed.encode("utf-8", errors="surrogatepass")


def _places(values: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for key in range(len(values)) if isinstance(values, list) else list(values) if isinstance(values, dict) else ():
        found += [(values, key), *_places(values[key])]
    return found


def envelope_change(rng: random.Random, text: bytes) -> bytes:
    """Another object in an envelope, with the correct length and CRC."""
    match = re.match(rb"(\w+) (\d{1,4}) ([0-9a-f]{8}) ", text)
    if match is None:
        return noise(rng, text)
    body = json_change(rng, text[match.end() :], rng.choice((3800, 9999)))
    if rng.random() < 0.1:
        body = noise(rng, body)
    return b"%s %d %08x %s" % (match[1], len(body), zlib.crc32(body), body)


def spec_text_change(rng: random.Random, text: bytes) -> bytes:
    """An envelope with another object or another header."""
    if rng.random() < 0.75:
        return envelope_change(rng, text)
    return noise(rng, text)


# --- protobuf --------------------------------------------------------------------------------------------------------

Field = list[Any]
"""[number, wire type, value]: an int, bytes, or a list of fields where the bytes can be read as a message."""


def protobuf_change(rng: random.Random, data: bytes) -> bytes:
    """Another value, number, type or length at one to three fields of a message, with correct lengths around them."""
    message = _parse(data, 0)
    if message is None:
        return noise(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        nodes = list(_nodes(message))
        if not nodes:
            break
        holder, index = nodes[rng.randrange(len(nodes))]
        _change_field(rng, holder, index)
    return _encode(message)


def onnx_spec_change(rng: random.Random, data: bytes) -> bytes:
    """Another spec in the metadata of an ONNX file."""
    message = _parse(data, 0) or []
    for part in message:
        if part[0] == 14:
            raw = _payload(part[2])
            entries = _parse(raw, 9) or []
            for entry in entries:
                if entry[0] == 2:
                    entry[2] = spec_text_change(rng, _payload(entry[2]))
            part[2] = _encode(entries)
    return _encode(message)


def _change_field(rng: random.Random, holder: list[Field], index: int) -> None:
    field = holder[index]
    action = rng.randrange(8)
    if action == 0:
        del holder[index]
    elif action == 1:
        field[0] = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 14, 15, 20, 22, 25, 2**29, 2**60))
    elif action == 2:
        field[1] = rng.randrange(8)
    elif action == 3:
        holder[index:index] = [field] * rng.choice((1, 2, 30))
    elif action == 4:  # a wrong length
        field[2] = protobuf.varint(rng.choice(INTEGERS)) + _payload(field[2])
        field.append("as it is")
    elif action == 5 and field[1] == 2:  # the message within itself
        inner = _payload(field[2])
        for _ in range(rng.choice((1, 10, 40, 500))):
            inner = protobuf.field(field[0] % 30 or 1, inner)
        field[2] = inner
    elif field[1] == 2:
        texts = (b"", b"location", b"/etc/passwd", b"../x", b"x" * 5000, b"\xff\xfe", b"a\0b", b"weights.bin", b"ddpmx")
        field[2] = rng.choice((*texts, noise(rng, _payload(field[2])), rng.randbytes(rng.randrange(40))))
    else:
        field[1], field[2] = 0, rng.choice(INTEGERS)


def _nodes(message: list[Field]) -> list[tuple[list[Field], int]]:
    found: list[tuple[list[Field], int]] = []
    for index, field in enumerate(message):
        found.append((message, index))
        if isinstance(field[2], list):
            found += _nodes(field[2])
    return found


def _payload(value: Any) -> bytes:
    return _encode(value) if isinstance(value, list) else protobuf.varint(value) if isinstance(value, int) else value


def _encode(message: list[Field]) -> bytes:
    out = b""
    for number, kind, value, *as_it_is in message:
        out += protobuf.varint(number << 3 | kind)
        raw = _payload(value)
        out += protobuf.varint(len(raw)) + raw if kind == 2 and not as_it_is else raw
    return out


def _parse(data: bytes, depth: int) -> list[Field] | None:
    """The fields of a message; None if ``data`` is not one."""
    at, found = 0, []
    try:
        while at < len(data):
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            if not 1 <= number <= 40 or kind not in (0, 1, 2, 5):
                return None
            if kind == 0:
                value, at = _varint(data, at)
                found.append([number, kind, value])
                continue
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > len(data):
                return None
            raw = data[at : at + length]
            inner = _parse(raw, depth + 1) if kind == 2 and raw and length < 1 << 16 and depth < 12 else None
            found.append([number, kind, raw if inner is None or _encode(inner) != raw else inner])
            at += length
    except IndexError:
        return None
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_change(rng: random.Random, data: bytes) -> bytes:
    """Another object in one of a plan's envelopes, or noise; often with the correct length."""
    if rng.random() < 0.65:
        spec, record = SPEC.to_text().encode(), wrap(RECORD_PREFIX, plans.RECORD.to_json()).encode()
        if rng.random() < 0.35:
            spec = spec_text_change(rng, spec)
        else:
            record = spec_text_change(rng, record)
        name = spec + b" " + record
        if rng.random() < 0.15:
            name += bytes(20) + SPEC.replace(clip=rng.choice((1.0, 2.0))).to_text().encode() + b" " + record
        if rng.random() < 0.1:  # many texts that look like a description
            name += b"ddpmx1 9999 00000000 " * rng.choice((10, 3000))
        data = data.replace(SPEC.to_text().encode() + b" " + wrap(RECORD_PREFIX, plans.RECORD.to_json()).encode(), name)
    else:
        data = noise(rng, data)
    if rng.random() < 0.15:
        data = rng.choice((b"ftrt", b"vtrt")) + data[4:]
    if rng.random() < 0.7 and len(data) >= 24:
        data = data[:16] + len(data).to_bytes(8, "little") + data[24:]
    return data


# --- MNN models ------------------------------------------------------------------------------------------------------


def mnn_change(rng: random.Random, data: bytes) -> bytes:
    """Another object in an envelope of an MNN model, with the correct length around it; or noise."""
    if rng.random() < 0.35:
        return noise(rng, data)
    at, spec = data.rindex(SPEC.to_text().encode()), SPEC.to_text().encode()
    record, rest = data[at + len(spec) + 1 :].rstrip(b"\0"), b""
    action = rng.randrange(4)
    if action == 0:
        spec = spec_text_change(rng, spec)
    elif action == 1:
        record = spec_text_change(rng, record)
    elif action == 2:
        rest = b" " + rng.choice((b"betas1 2 00000000 AAAA", noise(rng, record), b"x" * rng.choice((1, 300_000))))
    text = spec + (b" " if rng.random() < 0.9 else b"") + record + rest
    length = len(text) if rng.random() < 0.8 else rng.choice((0, len(text) + 1, 2**31, 2**32 - 1))
    return data[: at - 4] + struct.pack("<I", length) + text + bytes(4 - len(text) % 4)


# --- npy and zip -----------------------------------------------------------------------------------------------------

_SHAPES = (
    *("()", "(0,)", "(1,)", "(2,)", "(3, 8, 8)", "(3, 8, 8, 3)", "(3, 64)", "(64, 3)", "(-1,)", "(-1, 8)", "(2.5,)"),
    *(
        "(10**12,)",
        "(1000000000000,)",
        "(9223372036854775807,)",
        "(4294967296, 4294967296)",
        "(0, 9223372036854775807)",
    ),
    *("(9223372036854775808,)", "None", "'ab'", "(True,)", "3", "[3]", "((3,),)", "(1000000000,)", "(3, 1000000, 0)"),
    *("(" + "1, " * 40 + ")", "(" + "1, " * 70 + ")", "(" + "1, " * 3000 + ")", "(" + "9" * 5000 + ",)"),
    *("(" * 80 + "1" + ")" * 80, "(" * 5000, "(-" * 1500 + "1" + ")" * 1500, "(9999999999, 0, 9999999999)"),
)
_DTYPES = (
    *("'|O'", "'<f4'", "'>f4'", "'>i4'", "'<i4'", "'|u1'", "'|b1'", "'<c16'", "'<f2'", "'<U5'", "'|S9'", "'|V8'"),
    *("'<M8[s]'", "'|S0'", "'<U1000000000'", "'|V2147483647'", "[('a', '<f4')]", "[('a', '|O')]", "None", "'zz'", "3"),
    *("[('a', '<f4', (1000000, 1000000))]", "('<f4', (3,))", "'f4,f4'", "''", "{}", "'<f16'", "'<f4' 'x'", "u'<f4'"),
)


def npy_change(rng: random.Random, data: bytes) -> bytes:
    """Another shape, type or order in the header of an .npy, with the correct length of the header."""
    if data[:6] != b"\x93NUMPY" or rng.random() < 0.15:
        return noise(rng, data)
    if rng.random() < 0.25:
        return _whole_change(rng, data)
    version, wide = data[6], data[6] > 1
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    header = data[start:end].decode("latin1").rstrip()
    action = rng.randrange(8)
    if action < 3:
        header = re.sub(r"'shape': \(.*?\)", lambda _: f"'shape': {rng.choice(_SHAPES)}", header)
    elif action < 5:
        header = re.sub(r"'descr': '.*?'", lambda _: f"'descr': {rng.choice(_DTYPES)}", header)
    elif action == 5:
        header = header.replace("False", rng.choice(("True", "None", "1", "'yes'")))
    elif action == 6:
        header = rng.choice(("", "{}", "[]", "{'descr': '|u1'}", header + "}", header[:-1] + "'more': 1}", "1" * 20000))
    else:
        version, wide = rng.choice((1, 2, 3, 0, 9)), rng.random() < 0.5
    raw = header.encode("latin1", errors="replace") + b"\n"
    width = 4 if wide else 2
    length = min(len(raw), 65535 if not wide else 2**32 - 1).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + raw + data[end:]


def _whole_change(rng: random.Random, data: bytes) -> bytes:
    """A whole .npy of another shape or type, or of other numbers."""
    array = np.load(io.BytesIO(data))
    flat = array.reshape(-1)
    longest = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.finfo(array.dtype).max
    changed: tuple[np.ndarray, ...] = (
        *(
            flat[0],
            flat,
            flat[None],
            flat[:0],
            array[None],
            array[..., None],
            array[:1],
            array[:0],
            array.T,
            array[::-1],
        ),
        *(
            array.astype(kind)
            for kind in ("f4", "f8", "i4", "i8", "u1", "c8", "?", ">i4", ">f4", "f2", "S4", "U4", "V4")
        ),
        *(np.full_like(array, fill) for fill in (0, 1, longest)),
        *(np.asfortranarray(array), np.zeros((1,) * 32, array.dtype), np.zeros((0, 5, 0), array.dtype)),
    )
    if array.dtype.kind == "f":
        changed = (*changed, *(np.full_like(array, fill) for fill in (np.nan, np.inf, 1e-40)))
    return npy(changed[rng.randrange(len(changed))])


def npz_change(rng: random.Random, members: dict[str, bytes]) -> bytes:
    """A member changed, renamed, removed, repeated or added, in a new archive; or the fields of the archive changed."""
    members = dict(members)
    if rng.random() < 0.3:
        return zip_fields_change(rng, zipped(members))
    name = rng.choice(sorted(members))
    action = rng.randrange(10)
    if action == 0:
        del members[name]
    elif action == 1:
        members[rng.choice(("spec.npy", "seed.npy", "x", "../x.npy", "", "a" * 3000, "about", "x/"))] = members.pop(
            name
        )
    elif action == 2:
        names = (*("spec.npy", "steps.npy", "extra.npy", "about.npy", "format.npy", "file.npy"), name)
        members[rng.choice(names)] = members[rng.choice(sorted(members))]
    elif action == 3:
        members |= {f"{index}.npy": npy(np.zeros(3)) for index in range(rng.choice((1, 300)))}
    elif action == 4 and rng.random() < 0.2:
        return _bomb()
    elif action == 5 and "about.npy" in members:
        text = json_change(rng, _text_of(members["about.npy"]))
        members["about.npy"] = npy(np.frombuffer(text, np.uint8))
    else:
        members[name] = npy_change(rng, members[name])
    return zipped(members)


def about_change(rng: random.Random, members: dict[str, bytes]) -> bytes:
    """Another object in a parity record's text."""
    text = json_change(rng, _text_of(members["about.npy"]))
    if rng.random() < 0.3:
        return _moved(rng, members)
    left_out = {rng.choice(sorted(members))} if rng.random() < 0.2 else set()
    kept = {name: data for name, data in members.items() if name not in left_out}
    return zipped({**kept, "about.npy": npy(np.frombuffer(text, np.uint8))})


def _moved(rng: random.Random, members: dict[str, bytes]) -> bytes:
    """A record with an array in the text, or a text value as an array, or in both places."""
    about = json.loads(_text_of(members["about.npy"]))
    members, both = dict(members), rng.random() < 0.5
    if rng.random() < 0.5:
        name = rng.choice(sorted(members))
        about[name.removesuffix(".npy")] = rng.choice((None, 1, "x", [1], [[1.0, 2.0]], {"a": 1}))
        if not both and name != "about.npy":
            del members[name]
    else:
        name = rng.choice(sorted(about))
        if not both:
            del about[name]
        members[f"{name}.npy"] = npy(rng.choice((np.zeros((1, 8, 8)), np.array(20), np.zeros(3), np.zeros((2, 2)))))
    return zipped({**members, "about.npy": npy(np.frombuffer(json.dumps(about).encode(), np.uint8))})


def _text_of(array: bytes) -> bytes:
    return np.load(io.BytesIO(array)).tobytes()


@cache
def _bomb() -> bytes:
    """A small archive that unpacks to 96 MiB."""
    return zipped({"images.npy": npy(np.zeros((96, 1024, 1024), np.uint8))})


def zip_fields_change(rng: random.Random, data: bytes) -> bytes:
    """Other sizes, offsets, methods or flags in a zip's headers."""
    out = bytearray(data)
    heads = {b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))}
    heads[b"PK\x01\x02"] = ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4))
    heads[b"PK\x05\x06"] = ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
    places = [(found.start(), part) for magic in heads for found in re.finditer(magic, data) for part in heads[magic]]
    for _ in range(rng.choice((1, 2, 4))):
        start, (offset, width) = places[rng.randrange(len(places))]
        at = start + offset
        number = rng.choice((*INTEGERS, int.from_bytes(out[at : at + width], "little") + rng.choice((-1, 1, 100))))
        out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out)


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors_change(rng: random.Random, data: bytes) -> bytes:
    """Another value in the header, with the correct length; or other data after it; or noise."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    action = rng.randrange(10)
    if action < 5:
        return with_header(json_change(rng, header), rest)
    if action == 5:  # NaN and infinities
        special = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff"))
        return with_header(header, special * (len(rest) // 4))
    if action == 6:
        dtype = rng.choice(
            (b"F64", b"F16", b"BF16", b"I64", b"BOOL", b"U16", b"C64", b"F8_E4M3", b"F8_E8M0", b"F4", b"X")
        )
        return with_header(header.replace(b'"F32"', b'"%s"' % dtype, rng.choice((1, -1))), rest)
    return noise(rng, data)


# --- kinds -----------------------------------------------------------------------------------------------------------


def _onnx(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    good = rng.choice(onnx_files())
    change = rng.choice((noise, protobuf_change, protobuf_change, onnx_spec_change))
    return "model.onnx", {"model.onnx": change(rng, good), "weights.bin": bytes(16)}


def _plan(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    return "model.plan", {"model.plan": plan_change(rng, plan_file())}


def _sidecar(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    plan = plan_file()
    sidecar = sidecar_of(plan)
    if rng.random() < 0.2:
        plan = plan_change(rng, plan)
        sidecar = sidecar_of(plan)
    sidecar = json_change(rng, sidecar) if rng.random() < 0.7 else noise(rng, sidecar)
    return "model.plan", {"model.plan": plan, "model.plan.json": sidecar}


def _spec(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    spec = SPEC.replace(
        schedule=rng.choice(("linear", "cosine", "quad", "warmup10", "sigmoid_beta")), schedule_params={}
    )
    if rng.random() < 0.5:
        return "spec.txt", {"spec.txt": spec_text_change(rng, spec.to_text().encode())}
    values = {key: value for key, value in spec.to_json().items() if key != "coefficients" or rng.random() < 0.3}
    text = json.dumps({"model": values} if rng.random() < 0.5 else values).encode()
    return "spec.json", {"spec.json": (json_change if rng.random() < 0.75 else noise)(rng, text)}


def _mnn(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    return "model.mnn", {"model.mnn": mnn_change(rng, mnn.mnn_file(SPEC))}


def _images_npz(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    members = _images()
    data = npz_change(rng, members) if rng.random() < 0.7 else noise(rng, zipped(members))
    return "images.npz", {"images.npz": data}


def _parity_npz(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    members = _parity()
    which = rng.random()
    if which < 0.4:
        data = about_change(rng, members)
    else:
        data = npz_change(rng, members) if which < 0.8 else noise(rng, zipped(members))
    return "parity.npz", {"parity.npz": data}


def _safetensors(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    good = _checkpoint(torch_too)
    name = rng.choice(("ema.safetensors", "ema.safetensors", "training.safetensors"))
    return ".", good | {name: safetensors_change(rng, good[name])}


def _checkpoint_json(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    good = _checkpoint(torch_too)
    name = rng.choice(("spec.json", "spec.json", "training.json"))
    return ".", good | {name: (json_change if rng.random() < 0.8 else noise)(rng, good[name])}


def _compressed(rng: random.Random, torch_too: bool) -> tuple[str, Files]:
    """A file whose bytes are damaged, or whose header or sections are others with the right CRC."""
    data = compressed_file()
    if rng.random() < 0.3:
        return "x.ddpm", {"x.ddpm": noise(rng, data)}
    end = 16 + int.from_bytes(data[8:12], "little")
    body, rest = bytearray(data[16:end]), data[end:]
    if rng.random() < 0.6:
        place = rng.randrange(20, len(body))
        body[place : place + rng.choice((0, 1, 1, 3))] = rng.choice(
            (
                bytes([rng.randrange(256)]),
                protobuf.varint(rng.choice(INTEGERS)),
                protobuf.varint(rng.randrange(40)),
                b"",
            )
        )
    else:
        sections = [
            compressed.Section(
                rng.choice((1, 1, 2, 0)),
                rng.choice((0, 1, 2, 3, 4, 5000)),
                noise(rng, bytes(rng.choice((0, 3, 4, 40, 3000)))),
            )
            for _ in range(rng.randrange(4))
        ]
        rest = b"".join(compressed.write_section(section) for section in sections)
    head = compressed.MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")
    return "x.ddpm", {"x.ddpm": head + bytes(body) + rest}


_MAKERS: dict[str, Callable[[random.Random, bool], tuple[str, Files]]] = {
    "onnx": _onnx,
    "plan": _plan,
    "plan+sidecar": _sidecar,
    "spec": _spec,
    "images": _images_npz,
    "parity": _parity_npz,
    "safetensors": _safetensors,
    "checkpoint": _checkpoint_json,
    "mnn": _mnn,
    "compressed": _compressed,
}
KINDS = tuple(_MAKERS)


def mutant(seed: int, number: int, *, torch_too: bool) -> Mutant:
    """Mutant ``number`` of ``seed``; its kind follows from the number."""
    kind = KINDS[number % len(KINDS)]
    entry, files = _MAKERS[kind](random.Random(f"{seed} {number}"), torch_too)
    return Mutant(kind, entry, files)


def good(*, torch_too: bool) -> list[Mutant]:
    """The files that the mutants are made from, unchanged: each must be readable."""
    plan = plan_file()
    texts = {"spec.txt": SPEC.to_text().encode(), "spec.json": json.dumps(SPEC.to_json()).encode()}
    return [
        *(Mutant("onnx", "model.onnx", {"model.onnx": data, "weights.bin": bytes(16)}) for data in onnx_files()),
        Mutant("plan", "model.plan", {"model.plan": plan}),
        Mutant("plan+sidecar", "model.plan", {"model.plan": plan, "model.plan.json": sidecar_of(plan)}),
        Mutant("mnn", "model.mnn", {"model.mnn": mnn.mnn_file(SPEC)}),
        *(Mutant("spec", name, {name: text}) for name, text in texts.items()),
        Mutant("images", "images.npz", {"images.npz": zipped(_images())}),
        Mutant("parity", "parity.npz", {"parity.npz": zipped(_parity())}),
        Mutant("checkpoint", ".", _checkpoint(torch_too)),
        Mutant("compressed", "x.ddpm", {"x.ddpm": compressed_file()}),
    ]
