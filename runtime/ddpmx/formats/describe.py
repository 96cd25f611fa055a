"""The metadata of a checkpoint, a model file or an image, as plain JSON values. Nothing is loaded or run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats import compressed, mnn_file, model_file, noise_file, onnx_file, output_file, plan_file, png_text
from ddpmx.formats.envelope import parse_json
from ddpmx.models import shipped

_NUMBERS = {1, 3, 10, 11, 16, 17}  # of ONNX: floats, and what 8-bit weights are stored as
_MAX_HEADER = 16 << 20
_TRAINING: dict[str, type] = {
    "step": int,
    "loss": float,
    "batch": int,
    "mirrored": bool,
    "begun_from": str,
    "data": str,
    "images": int,
    "from": str,
}
"""What :func:`describe` says of a training, and its types."""


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a model file, a checkpoint folder, a PNG that ``ddpmx generate`` has written, compressed images, or
    the noise of images.

    Returns:
        ``path``, ``kind`` (checkpoint, onnx, plan, mnn, png, compressed or noise), ``bytes``, ``spec`` (as
        :meth:`ModelSpec.to_json` makes it, or None if the file has no spec), ``note`` (what is missing, or None), and the
        values that only this kind has.

    Raises:
        FileFormatError, SpecError: none of these kinds, truncated, damaged, or contradicts itself.
    """
    path = shipped.find(path)
    if png_text.is_png(path):
        return {"path": os.fspath(path), "kind": "png", **_png(path)}
    if compressed.is_compressed(path):
        return {"path": os.fspath(path), "kind": "compressed", **_compressed(path)}
    if output_file.is_npz_of(path, noise_file.FORMAT):
        return {"path": os.fspath(path), "kind": "noise", **_noise(path)}
    kind = model_file.identify(path)
    values = {"checkpoint": _checkpoint, "onnx": _onnx, "plan": _plan, "mnn": _mnn}[kind](path)
    return {"path": os.fspath(path), "kind": kind, **values}


def _noise(path: Path) -> dict[str, Any]:
    noise = noise_file.Noise.load(path)
    n, channels, *size = noise.x.shape
    values = {name: getattr(noise, name) for name in ("model", "by", "steps", "spacing", "label")}
    about = {"bytes": path.stat().st_size, "spec": None, "note": None, "images": n, "channels": channels, "size": size}
    return {**about, **values, "names": list(noise.names)}


def _compressed(path: Path) -> dict[str, Any]:
    file = compressed.read_compressed(path)
    header = file.header
    c, height, width = header.shape
    note = None
    if not file.complete:
        what = "it decodes to coarser images" if file.steps else "nothing of it decodes"
        note = f"this is the beginning of a file: {what}"
    return {
        "bytes": path.stat().st_size,
        "spec": None,
        "note": note,
        "images": header.n,
        "size": [height, width],
        "channels": c,
        "model": header.weights,
        "precision": header.precision,
        "arithmetic": header.arithmetic,
        "lossless": header.lossless,
        "steps": len(header.times),
        "steps_here": file.steps,
        "stop": header.times[len(header.times) - file.steps] if file.steps else None,
        "seed": header.seed,
        "group": header.group,
        "sections": [{"steps": section.steps, "bytes": len(section.data)} for section in file.sections],
    }


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
            "step": step,
            "loss": settings.get("loss"),
            "batch": train.get("batch"),
            "mirrored": train.get("hflip"),
            "begun_from": (settings.get("from") or {}).get("path"),
            "data": data.get("path"),
            "images": data.get("images"),
            "from": imported.get("from"),
        }
    except (OSError, SpecError, LookupError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if type(value) is _TRAINING[name]}


def training_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an ONNX file may say of the checkpoint that it was made of, for people.

    Args:
        path: a checkpoint, or a run (its newest one).

    Returns:
        ``network``, ``parameters`` (the number of weights) and ``training``, with the names of files but not their folders:
        a model file travels.

    Raises:
        FileFormatError, SpecError: it cannot be read.
    """
    values = _checkpoint(Path(path))
    training = dict(values["training"])
    for name in ("data", "from", "begun_from"):
        if name in training:
            training[name] = Path(training[name]).name
    files = values["parameters"]  # an imported average is alone
    weights = files.get("weights.safetensors", files.get("ema.safetensors"))
    return {"network": values["network"], "parameters": weights, "training": training}


def _said(info: onnx_file.GraphInfo) -> dict[str, Any]:
    """What a file says under :data:`~ddpmx.formats.onnx_file.TRAINING_KEY`: only what is of the right type."""
    try:
        values = parse_json(info.metadata.get(onnx_file.TRAINING_KEY, "{}"))
    except SpecError:
        return {}
    if not isinstance(values, dict):
        return {}
    found = {"network": dict, "parameters": int, "training": dict}
    said = {name: values[name] for name, kind in found.items() if type(values.get(name)) is kind}
    if "training" in said:
        said["training"] = {
            name: value
            for name, value in said["training"].items()
            if name in _TRAINING and type(value) is _TRAINING[name]
        }
    return said


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
            name: f"{_type_name(tensor.element_type)} {list(tensor.dims or ())}" for name, tensor in tensors.items()
        }

    return {
        "bytes": real.stat().st_size + sum(file.stat().st_size for file in beside),
        "spec": spec,
        "note": note,
        "opset": info.opset,
        "inputs": shown(info.inputs),
        "outputs": shown(info.outputs),
        "weights": {_type_name(key): size for key, size in sorted(info.weights.items())},
        "rounded": [
            {"from": _type_name(stored), "to": _type_name(to), "bytes": size}
            for (stored, to), size in sorted(info.rounded.items())
        ],
        "parameters": sum(
            size // onnx_file.WIDTH.get(kind, 4) for kind, size in info.weights.items() if kind in _NUMBERS
        ),
        "external": [file.name for file in beside],
        "made_of": _said(info) or None,
    }


def _type_name(element_type: int) -> str:
    return onnx_file.TYPE_NAMES.get(element_type, f"type {element_type}")


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


def _mnn(path: Path) -> dict[str, Any]:
    try:
        info = mnn_file.read_mnn(path, brief=True)
    except SpecError as error:
        if "does not say" not in error.fact:
            raise
        return {"bytes": path.stat().st_size, "spec": None, "note": error.fact.removeprefix(f"{path}: ")}
    return {"bytes": info.size, "spec": info.spec.to_json(), "note": None, "record": info.record.to_json()}


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
