"""The metadata of a checkpoint, an ONNX file, a plan or an image, as plain JSON values. Nothing is loaded or run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats import model_file, onnx_file, plan_file, png_text
from ddpmx.formats.envelope import parse_json
from ddpmx.models import shipped

_ELEMENT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
_FLOATS = {1, 10, 11, 16}
_MAX_HEADER = 16 << 20


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a model file, a checkpoint folder, or a PNG that ``ddpmx generate`` has written.

    Returns:
        ``path``, ``kind`` (checkpoint, onnx, plan or png), ``bytes``, ``spec`` (as :meth:`ModelSpec.to_json` makes it, or
        None if the file has no spec), ``note`` (what is missing, or None), and the values that only this kind has.

    Raises:
        FileFormatError, SpecError: none of these kinds, truncated, damaged, or contradicts itself.
    """
    path = shipped.find(path)
    if png_text.is_png(path):
        return {"path": os.fspath(path), "kind": "png", **_png(path)}
    kind = model_file.identify(path)
    values = {"checkpoint": _checkpoint, "onnx": _onnx, "plan": _plan}[kind](path)
    return {"path": os.fspath(path), "kind": kind, **values}


def _checkpoint(path: Path) -> dict[str, Any]:
    folder = path if (path / model_file.SPEC_FILE).is_file() else next(reversed(model_file.checkpoints(path)), None)
    if folder is None:
        raise FileFormatError(f"{path}: this run has no checkpoint yet")
    values = model_file.read_spec_json(folder / model_file.SPEC_FILE)
    spec = model_file.model_spec(folder / model_file.SPEC_FILE, values)
    files = sorted(folder.glob("*.safetensors"))
    parameters = {file.name: safetensors_elements(file) for file in files}
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "spec": spec.to_json(),
        "note": None,
        "checkpoint": folder.name,
        "network": values.get("network"),
        "parameters": parameters,
        "training": _training(folder / "training.json"),
    }


def _training(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its training, as far as it is there: ``step``, ``loss``, ``data``, ``images``, ``from``,
    ``mirrored``, ``begun_from``.

    Nothing here is needed to run the network, so nothing is an error.
    """
    try:
        with path.open("rb") as stream:
            values = parse_json(stream.read(_MAX_HEADER))
        step, settings = values["step"], values["settings"]  # type: ignore[index]
        data, imported = settings.get("data") or {}, settings.get("imported") or {}
        train = settings.get("train") or {}
        found = {
            "step": (step, int),
            "loss": (settings.get("loss"), float),
            "batch": (train.get("batch"), int),
            "mirrored": (train.get("hflip"), bool),
            "begun_from": ((settings.get("from") or {}).get("path"), str),
            "data": (data.get("path"), str),
            "images": (data.get("images"), int),
            "from": (imported.get("from"), str),
        }
    except (OSError, SpecError, LookupError, TypeError, AttributeError):
        return {}
    return {name: value for name, (value, kind) in found.items() if type(value) is kind}


def _onnx(path: Path) -> dict[str, Any]:
    real = path.resolve()
    info = onnx_file.read_onnx(real)
    beside = onnx_file.check_external(real, info)
    spec, note = None, None
    try:
        spec = onnx_file.onnx_spec(path, info).to_json()
    except SpecError as error:
        if onnx_file.METADATA_KEY in info.metadata:
            raise
        note = error.fact.removeprefix(f"{path}: ")
        if {"x", "t"} <= info.inputs.keys():
            note += "; if a tool made it of an exported one: ddpmx adopt FILE --like ORIGINAL.onnx"

    def shown(tensors: dict[str, onnx_file.TensorInfo]) -> dict[str, str]:
        return {
            name: f"{_ELEMENT_TYPES.get(tensor.element_type, f'type {tensor.element_type}')} {list(tensor.dims or ())}"
            for name, tensor in tensors.items()
        }

    return {
        "bytes": real.stat().st_size + sum(file.stat().st_size for file in beside),
        "spec": spec,
        "note": note,
        "opset": info.opset,
        "inputs": shown(info.inputs),
        "outputs": shown(info.outputs),
        "weights": {_ELEMENT_TYPES.get(key, f"type {key}"): size for key, size in sorted(info.weights.items())},
        "parameters": sum(
            size // onnx_file.WIDTH.get(kind, 4) for kind, size in info.weights.items() if kind in _FLOATS
        ),
        "external": [file.name for file in beside],
    }


def _plan(path: Path) -> dict[str, Any]:
    flavour, version = plan_file.plan_flavour(path)
    header: dict[str, Any] = {"bytes": path.stat().st_size, "flavour": flavour, "version": version}
    try:
        info = plan_file.read_plan(path, trust_host_code=True, brief=True)
    except SpecError as error:
        if "does not say" not in error.fact:
            raise
        return header | {"spec": None, "note": error.fact.removeprefix(f"{path}: ")}
    sidecar = info.sidecar or {}
    return header | {
        "spec": info.spec.to_json(),
        "note": None,
        "engine": info.engine.to_json(),
        "build": sidecar.get("build"),
    }


def _png(path: Path) -> dict[str, Any]:
    (height, width), texts = png_text.read_png_text(path)
    drawn = texts.get("Software", "").startswith("ddpmx ")
    return {
        "bytes": path.stat().st_size,
        "spec": None,
        "note": None if drawn else "it does not say that ddpmx has drawn it",
        "size": [height, width],
        "text": texts if drawn else {},
    }


def safetensors_elements(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header.

    Raises:
        FileFormatError: truncated, or not a safetensors file.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = stream.read(length) if 2 <= length <= min(_MAX_HEADER, size - 8) else b""
        header = json.loads(head)
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        if tensors and 8 + length + max(tensor["data_offsets"][1] for tensor in tensors) != size:
            raise ValueError(f"{size} bytes, and its header declares another size")
        total = 0
        for tensor in tensors:
            elements = 1
            for dim in tensor["shape"]:
                if type(dim) is not int or dim < 0:
                    raise ValueError(f"invalid dimension {str(dim)[:40]}")
                elements = min(elements * dim, 1 << 62)
            total += elements
    except (OSError, ArithmeticError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: not a valid safetensors file",
            note=str(error)[:200],
            hint="use an earlier checkpoint of the run, or copy it again",
        ) from error
    return total
