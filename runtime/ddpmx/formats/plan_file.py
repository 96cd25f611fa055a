"""The metadata of a TensorRT plan, read from its bytes: no TensorRT, no GPU, nothing deserialised.

The format is not public. Known are: bytes 0–3, the flavour ("ftrt", "vtrt"); bytes 16–23, the length of the file; bytes
24–27, the version; and that the file contains the network's name verbatim. ``ddpmx build`` makes that name of two
envelopes, the ModelSpec and a :class:`PlanRecord`. A sidecar ``model.plan.json`` repeats both and adds what only the
builder knew; it may be missing, but must not contradict the plan. If the schedule is an array of β, the sidecar holds the
array and is required.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.envelope import parse_json, search, unwrap
from ddpmx.formats.spec import PREFIX, ModelSpec

MAGIC = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
FLAVOURS = tuple(MAGIC.values())
RECORD_PREFIX = "engine1"

MAX_SIDECAR = 1 << 20
MAX_BATCH = 1 << 16

_SIZE_AT, _VERSION_AT, _HEADER = 16, 24, 28
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,6}){1,3}", re.ASCII)
_TARGET = re.compile(r"\d{1,2}\.\d\+?", re.ASCII)
_CUDA_MACHINE = 190  # e_machine of a GPU's own code
_MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_ELF_MACHINE_AT = 18


@dataclass(frozen=True)
class PlanRecord:
    """How a plan was built; the JSON key "engine" of a sidecar.

    Attributes:
        flavour: ``TensorRT`` or ``TensorRT-RTX``.
        version: of the library that built it.
        targets: compute capabilities that it was built for; "8.0+" means 8.0 and later.
        platform: operating system and machine, "linux x86_64".
        batch: the optimization profile: smallest, optimal and largest batch.
        onnx: sha256 of the ONNX file and the weights beside it.
        source: the ONNX file's name, without its folder.
        options: every other setting of the builder.
        key: sha256 of all of the above but ``source``: plans with the same key are equivalent.
    """

    flavour: str
    version: str
    targets: tuple[str, ...]
    platform: str
    batch: tuple[int, int, int]
    onnx: str
    source: str
    options: Mapping[str, bool | int | None]
    key: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"targets": list(self.targets), "batch": list(self.batch)}

    @classmethod
    def from_json(cls, values: object) -> PlanRecord:
        """The record that :meth:`to_json` made.

        Raises:
            SpecError: not such an object.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise SpecError("the plan's record has missing or unknown fields", note=ascii(values)[:200])
        options, batch, targets = values["options"], values["batch"], values["targets"]
        good = (
            values["flavour"] in FLAVOURS
            and all(isinstance(values[name], str) for name in ("version", "platform", "onnx", "source", "key"))
            and _VERSION.fullmatch(values["version"])
            and values["platform"].isprintable()
            and is_plain_name(values["source"])
            and _SHA256.fullmatch(values["onnx"])
            and _SHA256.fullmatch(values["key"])
            and isinstance(batch, list)
            and len(batch) == 3
            and all(type(n) is int for n in batch)
            and 1 <= batch[0] <= batch[1] <= batch[2] <= MAX_BATCH
            and isinstance(targets, list)
            and len(targets) > 0
            and all(isinstance(target, str) and _TARGET.fullmatch(target) for target in targets)
            and isinstance(options, dict)
            and all(name.isidentifier() for name in options)
            and all(value is None or type(value) in (bool, int) for value in options.values())
        )
        if not good:
            raise SpecError("the plan's record is damaged", note=ascii(values)[:200])
        return cls(**values | {"batch": tuple(batch), "targets": tuple(targets)})


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


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """The path of a plan's sidecar: ``model.plan.json`` for ``model.plan``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


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


def read_plan(path: str | os.PathLike[str], *, trust_host_code: bool = False) -> PlanInfo:
    """All metadata of a plan, its parts checked against each other.

    Args:
        path: the plan.
        trust_host_code: accept a plan that contains code for the CPU. Such a file is a program: loading runs it.

    Raises:
        FileFormatError: truncated, with host code, or its parts contradict each other.
        SpecError: the plan has no spec or a damaged one, or the sidecar contradicts it.
    """
    path = Path(path)
    flavour, version = plan_flavour(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        texts = _texts(path, data, f"{flavour} {version}")
        if not trust_host_code and (machine := _host_code(data)):
            raise FileFormatError(
                f"{path}: the plan contains code for the CPU, which loading it would run",
                note=f"a library for {machine}; version-compatible plans contain one",
                hint="build your own plan from the ONNX file, or accept this one with --trust-host-code",
            )
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
    sidecar = _sidecar(path, file, engine)
    try:
        beside = sidecar.get("betas") if sidecar is not None else None
        betas = None if beside is None else free_betas.from_text(beside)
        spec = ModelSpec.from_json(values, betas=betas, where=f'the plan\'s sidecar, {file.name}, as "betas"')
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error
    _check_sidecar(path, file, sidecar, size, spec, engine)
    return PlanInfo(flavour, version, size, spec, engine, sidecar)


def sidecar_json(size: int, spec: ModelSpec, engine: PlanRecord, build: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a plan's sidecar, as plain JSON values.

    Args:
        size: bytes of the plan.
        spec: the model.
        engine: how the plan was built.
        build: what only the builder knows.
    """
    beside = {} if spec.betas is None else {"betas": free_betas.to_text(spec.betas)}
    return {"spec": spec.to_json(), "engine": engine.to_json(), "bytes": size, "build": build, **beside}


def rebuild_command(path: str | os.PathLike[str], engine: PlanRecord) -> str:
    """The command that rebuilds this plan on this machine, for its GPU and library."""
    options = dict(engine.options)
    if options.get("workspace"):
        options["workspace"] = int(options["workspace"] or 0) >> 20
    words = ["ddpmx", "build", engine.source, "-o", str(path), "--batch", ",".join(map(str, engine.batch))]
    for name, value in sorted(options.items()):
        if value is True:
            words.append(f"--{name}")
        elif type(value) is int:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def is_plain_name(name: str) -> bool:
    """Whether a file's name is safe to show and to put into a command: printable, without slashes, no leading hyphen."""
    return name.isprintable() and name != "" and not name.startswith("-") and not set(name) & set("/\\")


def _texts(path: Path, data: mmap.mmap, built: str) -> tuple[str, str]:
    """The two envelopes of a plan's name."""
    found: set[tuple[str, str]] = set()
    for text, end in search(PREFIX, data):
        for record, _ in search(RECORD_PREFIX, data[end : end + 4096]):
            found.add((text, record))
            break
        if len(found) > 1:
            raise FileFormatError(f"{path}: two descriptions in the plan contradict each other")
    if not found:
        if data.find(f"{PREFIX} ".encode()) >= 0:
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
    return found.pop()


def _sidecar(path: Path, file: Path, engine: PlanRecord) -> Mapping[str, Any] | None:
    """The content of the sidecar; None without one, {} if it is not an object."""
    if not os.path.lexists(file):
        return None
    again = f"remove it, or build again: {rebuild_command(path, engine)}"
    try:
        if not file.is_file():
            raise SpecError("not a file")
        with file.open("rb") as stream:
            text = stream.read(MAX_SIDECAR + 1)
        if len(text) > MAX_SIDECAR:
            raise SpecError("too large")
        values = parse_json(text)
    except (OSError, SpecError) as error:
        note = error.strerror if isinstance(error, OSError) else f"{error}"
        raise SpecError(f"{file}: the plan's sidecar cannot be read", note=note, hint=again) from error
    return values if isinstance(values, dict) else {}


def _check_sidecar(
    path: Path, file: Path, sidecar: Mapping[str, Any] | None, size: int, spec: ModelSpec, engine: PlanRecord
) -> None:
    """Refuse a sidecar that contradicts its plan."""
    for name, mine in (("spec", spec.to_json()), ("engine", engine.to_json()), ("bytes", size)):
        if sidecar is not None and sidecar.get(name) != mine:
            raise SpecError(
                f"{file}: the sidecar contradicts its plan",
                note=_difference(name, sidecar.get(name), mine, path.name),
                # a plan whose β are in its sidecar is useless without it
                hint=("" if spec.schedule == "betas" else "remove it, or build again: ")
                + rebuild_command(path, engine),
            )


def _difference(name: str, theirs: object, mine: object, plan: str) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        nothing = object()
        key = next(key for key in {**mine, **theirs} if theirs.get(key, nothing) != mine.get(key, nothing))
        name, theirs, mine = f"{name}: {key}", theirs.get(key, "nothing"), mine.get(key, "nothing")
    return f"{name}: {ascii(theirs)[:120]} there, {ascii(mine)[:120]} in {plan}"


def _host_code(data: mmap.mmap) -> str | None:
    """The processor of the first library in ``data`` that is for a CPU; GPU code is in the same containers."""
    for match in re.finditer(rb"\x7fELF[\x01\x02]\x01\x01|PE\x00\x00(?:\x64\x86|\x64\xaa|\x4c\x01)", data):
        if match[0].startswith(b"PE"):
            return "Windows"
        at = match.start() + _ELF_MACHINE_AT
        machine = int.from_bytes(data[at : at + 2], "little")
        if machine not in (0, _CUDA_MACHINE):
            return _MACHINES.get(machine, f"machine {machine}")
    return None


def release(version: str) -> list[str]:
    """Major, minor and patch of a version. Build numbers are not compared."""
    return version.split(".")[:3]
