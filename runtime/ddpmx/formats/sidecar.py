"""``model.plan.json``, a plan's sidecar: what it says of the plan, and how the two are replaced as one.

No rename replaces two files at once. So a build first puts a sidecar in place that describes the new plan and, as
"before", the old one; then the plan; and then the sidecar without "before". Whenever it is stopped, the sidecar fits the
plan that is there. What ties them is a stamp over the plan's ends, since two builds of one network differ in little else.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ddpmx.errors import DdpmxError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.atomic import locked, staging, write_error, write_synced
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.plan_record import PlanRecord, rebuild_command
from ddpmx.formats.spec import ModelSpec

MAX_SIDECAR = 1 << 20

_STAMPED = 1 << 20  # bytes at each end of the plan


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """The path of a plan's sidecar: ``model.plan.json`` for ``model.plan``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def sidecar_json(
    size: int, spec: ModelSpec, engine: PlanRecord, build: Mapping[str, Any], *, stamp: str | None = None
) -> dict[str, Any]:
    """The content of a plan's sidecar, as plain JSON values.

    Args:
        size: bytes of the plan.
        spec: the model.
        engine: how the plan was built.
        build: what only the builder knows.
        stamp: of the plan, see :func:`plan_stamp`; earlier versions wrote none.
    """
    beside = {} if spec.betas is None else {"betas": free_betas.to_text(spec.betas)}
    tie = {} if stamp is None else {"stamp": stamp}
    return {"spec": spec.to_json(), "engine": engine.to_json(), "bytes": size, "build": build, **tie, **beside}


def plan_stamp(stream: BinaryIO, size: int) -> str:
    """CRC32 of a plan's first and last MiB, in hexadecimal: it tells builds apart without reading all of a large file."""
    stream.seek(0)
    crc = zlib.crc32(stream.read(min(size, 2 * _STAMPED) if size <= 2 * _STAMPED else _STAMPED))
    if size > 2 * _STAMPED:
        stream.seek(size - _STAMPED)
        crc = zlib.crc32(stream.read(_STAMPED), crc)
    return f"{crc:08x}"


def read_sidecar(path: Path, file: Path, engine: PlanRecord, size: int, stamp: str) -> Mapping[str, Any] | None:
    """What the sidecar ``file`` says of the plan ``path``; None without one, {} if it is not an object.

    Args:
        path: the plan, for messages.
        file: its sidecar.
        engine, size, stamp: what the plan itself says.

    Raises:
        SpecError: it cannot be read.
    """
    if not os.path.lexists(file):
        return None
    again = f"remove it, or build again: {rebuild_command(path, engine)}"
    try:
        values = _read(file)
    except (OSError, SpecError) as error:
        note = error.strerror if isinstance(error, OSError) else f"{error}"
        raise SpecError(f"{file}: the plan's sidecar cannot be read", note=note, hint=again) from error
    if "before" not in values or _is_of(values, engine.to_json(), size, stamp):
        return values
    before = values["before"]  # a build was stopped before it put the new plan in place
    if before is None:
        return None
    return before if isinstance(before, dict) and _is_of(before, engine.to_json(), size, stamp) else values


def check_sidecar(
    path: Path, file: Path, sidecar: Mapping[str, Any], size: int, stamp: str, spec: ModelSpec, engine: PlanRecord
) -> None:
    """Refuse a sidecar that contradicts its plan.

    Raises:
        SpecError: it is of another plan, or of another build of this one.
    """
    mine: dict[str, object] = {"spec": spec.to_json(), "engine": engine.to_json(), "bytes": size}
    if "stamp" in sidecar:
        mine["stamp"] = stamp
    for name, value in mine.items():
        if sidecar.get(name) != value:
            raise SpecError(
                f"{file}: the sidecar contradicts its plan",
                note=_difference(name, sidecar.get(name), value, path.name),
                # a plan whose β are in its sidecar is useless without it
                hint=("" if spec.schedule == "betas" else "remove it, or build again: ")
                + rebuild_command(path, engine),
            )


def write_plan(output: Path, plan: memoryview, spec: ModelSpec, engine: PlanRecord, build: Mapping[str, Any]) -> None:
    """Write a plan and its sidecar, as one: whenever this is stopped, ``output`` is the old plan or the new one, whole.

    Raises:
        OutputError: they could not be written. Those that were there are unchanged.
    """
    file = sidecar_path(output)
    with staging(output.parent, output) as part:
        write_synced(part / "plan", plan)
        with (part / "plan").open("rb") as stream:
            stamp = plan_stamp(stream, plan.nbytes)
        values = sidecar_json(plan.nbytes, spec, engine, build, stamp=stamp)
        write_synced(part / "new", _text(values))
        with locked(output):
            old = _bytes(file)
            write_synced(part / "both", _text(values | _before(output, file)))
            write_synced(part / "old", old or b"")
            try:
                os.replace(part / "both", file)
                os.replace(part / "plan", output)
            except BaseException:
                if (part / "plan").exists():  # the old plan is still in place
                    with contextlib.suppress(OSError):
                        file.unlink() if old is None else os.replace(part / "old", file)
                raise
            with contextlib.suppress(OSError):  # "both" is right, too
                os.replace(part / "new", file)


def _before(output: Path, file: Path) -> dict[str, Any]:
    """What the sidecar has to say about the plan that is about to be replaced: {"before": …}, or {} if nothing."""
    if not output.is_file():
        return {}
    if not file.exists():
        return {"before": None}
    try:
        old = _read(file)
        size = output.stat().st_size
        with output.open("rb") as stream:
            stamp = plan_stamp(stream, size)
    except (OSError, DdpmxError):
        return {}
    if "before" in old and not _is_of(old, old.get("engine"), size, stamp):
        return {"before": old["before"]}  # the last build was stopped half-way
    return {"before": {name: value for name, value in old.items() if name != "before"}}


def _is_of(values: Mapping[str, Any], engine: object, size: int, stamp: str) -> bool:
    """Whether a sidecar is of the plan with this record, size and stamp."""
    return values.get("engine") == engine and values.get("bytes") == size and values.get("stamp", stamp) == stamp


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SpecError("not a file")
    with file.open("rb") as stream:
        text = stream.read(MAX_SIDECAR + 1)
    if len(text) > MAX_SIDECAR:
        raise SpecError("too large")
    values = parse_json(text)
    return values if isinstance(values, dict) else {}


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise write_error(file, error) from error


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _difference(name: str, theirs: object, mine: object, plan: str) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        nothing = object()
        key = next(key for key in {**mine, **theirs} if theirs.get(key, nothing) != mine.get(key, nothing))
        name, theirs, mine = f"{name}: {key}", theirs.get(key, "nothing"), mine.get(key, "nothing")
    return f"{name}: {ascii(theirs)[:120]} there, {ascii(mine)[:120]} in {plan}"
