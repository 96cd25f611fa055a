"""How a plan was built: what its network's name and its sidecar say about that, and the command that does it again."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpmx.errors import SpecError

MAGIC = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
FLAVOURS = tuple(MAGIC.values())
RECORD_PREFIX = "engine1"
MAX_BATCH = 1 << 16

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,6}){1,3}", re.ASCII)
_TARGET = re.compile(r"\d{1,2}\.\d\+?", re.ASCII)


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


def release(version: str) -> list[str]:
    """Major, minor and patch of a version. Build numbers are not compared."""
    return version.split(".")[:3]
