"""What kind of file this is, from its bytes alone: no onnx, no TensorRT, no GPU, nothing executed.

The metadata are read by ``onnx_file.py`` and ``plan_file.py``; a checkpoint's ``spec.json`` is read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ddpmx.errors import FileFormatError, InputError, SpecError
from ddpmx.formats.betas import as_betas
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.mnn_file import is_mnn
from ddpmx.formats.plan_file import MAGIC
from ddpmx.formats.spec import ModelSpec

SPEC_FILE = "spec.json"
MAX_SPEC_FILE = 1 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ckpt.index")

Kind = Literal["onnx", "plan", "mnn", "checkpoint"]


def identify(path: str | os.PathLike[str]) -> Kind:
    """Whether ``path`` is an ONNX file, a TensorRT plan, an MNN model or a ddpmx checkpoint.

    Raises:
        FileFormatError: missing, empty, or none of these.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if (path / SPEC_FILE).is_file() or (path / "checkpoints").is_dir():
                return "checkpoint"
            raise FileFormatError(
                f"{path}: a folder, but not a ddpmx checkpoint",
                note=f"there is no {SPEC_FILE} and no checkpoints folder in it",
                hint=_import_hint(path) if holds_weights(path) else None,
            )
        if os.path.exists(path) and not path.is_file():
            raise FileFormatError(f"{path}: cannot be read", note="not a file")
        with path.open("rb") as stream:
            head = stream.read(4)
        mnn = is_mnn(path)
    except FileNotFoundError as error:
        raise FileFormatError(
            f"{path}: cannot be read",
            note=error.strerror or str(error),
            hint="`ddpmx export RUN -o model.onnx` writes a model file from a checkpoint",
        ) from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    if not head:
        raise FileFormatError(f"{path}: the file is empty")
    if head in MAGIC:
        return "plan"
    if mnn:
        return "mnn"
    # A ModelProto begins with ir_version (field 1, a number): every writer puts the lowest field first.
    if head[0] == 0x08:
        return "onnx"
    if path.name.endswith(".parity.npz"):
        raise FileFormatError(
            f"{path}: a parity record, not a model file",
            hint=f"ddpmx parity model.onnx --against {shlex.quote(str(path))}",
        )
    if head.startswith((b"PK\x03\x04", b"\x80")) or path.name.endswith(".safetensors"):
        raise FileFormatError(
            f"{path}: weights or an archive, neither an ONNX file nor a TensorRT plan",
            note=f"it begins with {head!r}",
            hint=_import_hint(path),
        )
    raise FileFormatError(
        f"{path}: neither an ONNX file nor a TensorRT plan",
        note=f"it begins with {head!r}",
        hint="`ddpmx export` writes model.onnx from a checkpoint",
    )


def _import_hint(path: Path) -> str:
    return f"ddpmx import {shlex.quote(str(path))} -o runs/NAME, then ddpmx export runs/NAME, where torch is"


def holds_weights(folder: Path) -> bool:
    """Whether a folder looks like another project's checkpoint: it, or its ``unet``, has files of weights."""
    with contextlib.suppress(OSError):
        names = [entry.name for where in (folder, folder / "unet") if where.is_dir() for entry in where.iterdir()]
        return any(name == "model_index.json" or name.endswith(_WEIGHTS) for name in names)
    return False


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    with contextlib.suppress(OSError):
        found = [p for p in (run / "checkpoints").iterdir() if p.name.isdecimal() and (p / SPEC_FILE).is_file()]
        return sorted(found, key=lambda p: int(p.name))
    return []


def read_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """The :class:`ModelSpec` in a ``spec.json``: the object itself, or its "model" part as in a checkpoint.

    Raises:
        SpecError: missing, too large, not JSON, or not a valid spec.
    """
    return model_spec(path, read_spec_json(path))


def model_spec(path: str | os.PathLike[str], values: Mapping[str, object]) -> ModelSpec:
    """The :class:`ModelSpec` in ``values``, which :func:`read_spec_json` read from ``path``.

    The numbers of a schedule ``betas`` may be in the spec itself, or in "betas" beside it.

    Raises:
        SpecError: not a valid spec.
    """
    beside = values.get("betas")
    try:
        betas = None if beside is None else as_betas(beside)
        return ModelSpec.from_json(values["model"], betas=betas, where=f'"betas": [β, …] of {SPEC_FILE}')
    except (SpecError, InputError) as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error


def read_spec_json(path: str | os.PathLike[str]) -> dict[str, object]:
    """The content of a ``spec.json``; a bare ModelSpec is returned as ``{"model": …}``.

    Raises:
        SpecError: missing, too large or not a JSON object.
    """
    path = Path(path)
    try:
        if os.path.exists(path) and not path.is_file():
            raise SpecError("cannot be read", note="not a file")
        with path.open("rb") as stream:
            text = stream.read(MAX_SPEC_FILE + 1)
        if len(text) > MAX_SPEC_FILE:
            raise SpecError("too large for a spec", note=f"more than {MAX_SPEC_FILE} bytes")
        values = parse_json(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    except SpecError as error:
        raise SpecError(f"{path}: {error.fact}", note=error.note, hint=error.hint) from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: a spec must be a JSON object", note=f"this is {type(values).__name__}")
    return values if "model" in values else {"model": values}


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(files: Sequence[Path]) -> str:
    """The sha256 of an ONNX file, or of it and the files of its weights, whose names are part of it.

    Args:
        files: the ONNX file, then those beside it.
    """
    if len(files) == 1:
        return sha256(files[0])
    digests = [sha256(files[0]), *(f"{file.name} {sha256(file)}" for file in sorted(files[1:]))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
