"""The metadata of a TensorRT plan, read from its bytes: no TensorRT, no GPU, nothing deserialised.

The format is not public. Known are: bytes 0–3, the flavour ("ftrt", "vtrt"); bytes 16–23, the length of the file; bytes
24–27, the version; and that the file contains the network's name verbatim. ``ddpmx build`` makes that name of two
envelopes, the ModelSpec and a :class:`PlanRecord`. A sidecar ``model.plan.json`` repeats both and adds what only the
builder knew; it may be missing, but must not contradict the plan. If the schedule is an array of β, the sidecar holds the
array and is required.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ddpmx.errors import DdpmxError, FileFormatError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.envelope import search, unwrap
from ddpmx.formats.plan_record import (
    FLAVOURS,
    MAGIC,
    MAX_BATCH,
    RECORD_PREFIX,
    PlanRecord,
    is_plain_name,
    rebuild_command,
    release,
)
from ddpmx.formats.sidecar import (
    MAX_SIDECAR,
    check_sidecar,
    plan_stamp,
    read_sidecar,
    sidecar_json,
    sidecar_path,
    write_plan,
)
from ddpmx.formats.spec import PREFIX, ModelSpec

__all__ = [
    "FLAVOURS",
    "MAGIC",
    "MAX_BATCH",
    "MAX_SIDECAR",
    "RECORD_PREFIX",
    "PlanInfo",
    "PlanRecord",
    "is_plain_name",
    "plan_flavour",
    "read_plan",
    "rebuild_command",
    "release",
    "sidecar_json",
    "sidecar_path",
    "write_plan",
]

_SIZE_AT, _VERSION_AT, _HEADER = 16, 24, 28
_CUDA_MACHINE = 190  # e_machine of a GPU's own code
_MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_ELF_MACHINE_AT = 18
_LIBRARY = re.compile(rb"\x7fELF[\x01\x02]\x01\x01|PE\x00\x00(?:\x64\x86|\x64\xaa|\x4c\x01)")

_WINDOW = (
    4 << 20
)  # a plan is read in pieces: mapped, 5 GB of it would stay in memory, and Ctrl-C would wait for the disk
_OVERLAP = 1 << 14  # more than the first envelope and the bytes behind it in which the second has to be
_RECORD_WITHIN = 4096
_RETRIES = 20


@dataclass(frozen=True)
class PlanInfo:
    """The metadata of a plan.

    Attributes:
        flavour: ``TensorRT`` or ``TensorRT-RTX``, from the first bytes.
        version: of the library, from the header.
        size: bytes.
        spec: the model.
        engine: how the plan was built.
        sidecar: the content of ``model.plan.json``, or None without one.
    """

    flavour: str
    version: str
    size: int
    spec: ModelSpec
    engine: PlanRecord
    sidecar: Mapping[str, Any] | None


def plan_flavour(path: str | os.PathLike[str]) -> tuple[str, str]:
    """What a plan was built with: ("TensorRT" or "TensorRT-RTX", version).

    Raises:
        FileFormatError: not a plan, or truncated.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    if len(head) < _HEADER or head[:4] not in MAGIC:
        raise FileFormatError(f"{path}: not a valid TensorRT plan", note=f"{len(head)} bytes of header")
    declared = int.from_bytes(head[_SIZE_AT:_VERSION_AT], "little")
    # Observed in TensorRT-RTX. TensorRT does not document its field at this place: it is checked only if it can be a length
    if size < declared < 1 << 40 or (head[:4] == b"vtrt" and declared != size):
        raise FileFormatError(
            f"{path}: not a valid TensorRT plan",
            note=f"{size} bytes, and its header declares {declared}",
            hint="build or copy it again",
        )
    return MAGIC[head[:4]], ".".join(map(str, head[_VERSION_AT:_HEADER]))


def read_plan(path: str | os.PathLike[str], *, trust_host_code: bool = False, brief: bool = False) -> PlanInfo:
    """All metadata of a plan, its parts checked against each other.

    Args:
        path: the plan.
        trust_host_code: accept a plan that contains code for the CPU. Such a file is a program: loading runs it.
        brief: read no further than to the description, which is looked for at the ends of the file first: for showing a
            plan, and not for running it. Neither code for the CPU nor a second description is then found.

    Raises:
        FileFormatError: truncated, with host code, or its parts contradict each other.
        SpecError: the plan has no spec or a damaged one, or the sidecar contradicts it.
    """
    path = Path(path)
    for _ in range(_RETRIES):
        before = _identity(path)
        try:
            return _read_plan(path, trust_host_code, brief)
        except DdpmxError:  # a build that ends just now replaces the plan and the sidecar one after the other
            if before == _identity(path):
                raise
    return _read_plan(path, trust_host_code, brief)


def _read_plan(path: Path, trust_host_code: bool, brief: bool) -> PlanInfo:
    flavour, version = plan_flavour(path)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        texts, machine = _scan(path, stream, size, f"{flavour} {version}", brief)
        if machine and not trust_host_code:
            raise FileFormatError(
                f"{path}: the plan contains code for the CPU, which loading it would run",
                note=f"a library for {machine}; version-compatible plans contain one",
                hint="build your own plan from the ONNX file, or accept this one with --trust-host-code",
            )
        stamp = plan_stamp(stream, size)
    try:
        engine = PlanRecord.from_json(unwrap(RECORD_PREFIX, texts[1]))
        values = unwrap(PREFIX, texts[0])
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error
    if (engine.flavour, release(engine.version)) != (flavour, release(version)):
        raise FileFormatError(
            f"{path}: the plan's header and its record contradict each other",
            note=f"{flavour} {version} and {engine.flavour} {engine.version}",
            hint=rebuild_command(path, engine),
        )
    file = sidecar_path(os.path.realpath(path))
    sidecar = read_sidecar(path, file, engine, size, stamp)
    try:
        beside = sidecar.get("betas") if sidecar is not None else None
        betas = None if beside is None else free_betas.from_text(beside)
        spec = ModelSpec.from_json(values, betas=betas, where=f'the plan\'s sidecar, {file.name}, as "betas"')
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error
    if sidecar is not None:
        check_sidecar(path, file, sidecar, size, stamp, spec, engine)
    return PlanInfo(flavour, version, size, spec, engine, sidecar)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def _scan(path: Path, stream: BinaryIO, size: int, built: str, brief: bool) -> tuple[tuple[str, str], str | None]:
    """The two envelopes of a plan's name, and the processor that the plan has code for, if it is a CPU."""
    found: set[tuple[str, str]] = set()
    damaged, machine = False, None
    for data in _windows(stream, size, brief):
        if f"{PREFIX} ".encode() in data:
            damaged = True  # unless an intact one is found
            for text, end in search(PREFIX, data):
                for record, _ in search(RECORD_PREFIX, data[end : end + _RECORD_WITHIN]):
                    found.add((text, record))
                    break
                if len(found) > 1:
                    raise FileFormatError(f"{path}: two descriptions in the plan contradict each other")
        if brief and found:
            break
        if machine is None and not brief:
            machine = _host_code(data)
    if not found:
        if damaged:
            raise SpecError(
                f"{path}: the description in this plan of {built} is damaged",
                hint="build or copy it again",
            )
        raise SpecError(
            f"{path}: the plan does not say which diffusion model it is",
            note=f"a plan of {built}; `ddpmx build` writes a description into the network's name: another program built "
            "this plan, or the name was lost",
            hint="ddpmx build model.onnx -o model.plan",
        )
    return found.pop(), machine


def _windows(stream: BinaryIO, size: int, brief: bool) -> Iterator[bytes]:
    """The file in overlapping pieces; if brief, the two ends first."""
    starts = list(range(0, size, _WINDOW))
    if brief:
        starts = [*starts[:1], *reversed(starts[1:])]
    for start in starts:
        stream.seek(start)
        yield stream.read(_WINDOW + _OVERLAP)


def _host_code(data: bytes) -> str | None:
    """The processor of the first library in ``data`` that is for a CPU; GPU code is in the same containers."""
    if b"\x7fELF" not in data and not _has_pe(data):  # ten times as fast as the expression
        return None
    for match in _LIBRARY.finditer(data):
        if match[0].startswith(b"PE"):
            return "Windows"
        at = match.start() + _ELF_MACHINE_AT
        machine = int.from_bytes(data[at : at + 2], "little")
        if machine not in (0, _CUDA_MACHINE):
            return _MACHINES.get(machine, f"machine {machine}")
    return None


def _has_pe(data: bytes) -> bool:
    """Whether "PE", 0, 0 is in ``data``. With zeros in what is searched for, all of a file's padding would slow it down."""
    at = data.find(b"PE")
    while at >= 0:
        if data[at + 2 : at + 4] == b"\x00\x00":
            return True
        at = data.find(b"PE", at + 1)
    return False
