"""Writes a model repository for NVIDIA Triton: ε alone, for those who have a chain of their own, and the chain.

    repository/
      garments/                 the chain, by Triton's Python backend and the ddpmx that is installed there
        config.pbtxt  labels.txt  1/model.py  1/model.onnx
      garments_eps/             the network alone, by Triton's ONNX Runtime or TensorRT
        config.pbtxt  1/model.onnx

Source of the fields: Triton's model_config.proto and its documentation of model configurations.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ddpmx
from ddpmx.backends.ort_common import NAMES
from ddpmx.errors import InputError, OutputError
from ddpmx.formats import model_file, onnx_file, plan_file, sidecar
from ddpmx.formats.atomic import atomic_folder, make_folder, write_synced
from ddpmx.formats.spec import ModelSpec, input_type
from ddpmx.images.gallery import check_drawable
from ddpmx.sampling.request import check_request, default_batch

MOST_IMAGES = 64
"""Of a request, by default."""

DELAY_MICROSECONDS = 2000
"""For so long Triton waits for further requests, which then share the network's batch. A chain takes far longer."""

ON_GPU = ("cuda", "tensorrt", "rtx")
"""ONNX Runtime's providers on an NVIDIA GPU."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_MODEL = '''"""The chain of {name}, by the ddpmx that is installed beside Triton. Written by ddpmx {version}."""

from ddpmx.scale.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Word(str):
    """A value without quotation marks: a number, true, or the name of a constant."""


Message = Mapping[str, Any]
"""Names of fields, with a text, a :class:`Word`, a message, or a sequence of words or messages."""


def write_repository(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    spec: str | os.PathLike[str] | None = None,
    provider: str = "cpu",
    batch: int | None = None,
    instances: int = 1,
    threads: int = 0,
    most_images: int = MOST_IMAGES,
) -> list[Path]:
    """Write both models into a repository, which may hold others.

    Args:
        model: an ONNX file, or a plan of TensorRT.
        out: the repository; made if it is not there.
        name: of the chain in the repository; the network is called ``NAME_eps``. By default the file's.
        spec: spec.json, for an ONNX file that does not describe itself.
        provider: ONNX Runtime's, for the chain of an ONNX file.
        batch: rows of the network's batch in the chain; by default 16, fewer for large images.
        instances: of the chain, for each GPU where it runs on one.
        threads: CPU threads of an instance; 0 for one per core.
        most_images: of a request.

    Returns:
        The files, sorted.

    Raises:
        FileFormatError, SpecError: no such model file, or a damaged one.
        InputError: a model that Triton cannot run, or a number or name out of its range.
        OutputError: there is a model of this name already, or the repository cannot be written.
    """
    path = Path(model)
    name = path.stem if name is None else name
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a model of Triton cannot be called {name[:80]!r}", hint="--name with letters, digits, _ - and ."
        )
    for what, number in (("--instances", instances), ("--most-images", most_images)):
        if number < 1:
            raise InputError(f"{what} must be at least 1, not {number}")
    if provider not in NAMES and provider not in NAMES.values():
        raise InputError(
            f"--provider {provider}: ONNX Runtime has no such provider",
            hint="cpu, cuda, tensorrt, rtx, openvino or webgpu",
        )
    found, largest = _described(path, None if spec is None else Path(spec))
    check_drawable(found)
    if found.condition is not None:
        raise InputError(f"{path}: a model that takes a condition image is not served", hint="generate --cond")
    rows = check_request(found, 1, batch=min(default_batch(found), largest) if batch is None else batch).batch
    if rows > largest:
        raise InputError(f"--batch {rows} is more than the plan takes", note=f"its largest batch is {largest}")
    is_plan = model_file.identify(path) == "plan"
    file = "model.plan" if is_plan else "model.onnx"
    beside = [(sidecar.sidecar_path(path), "model.plan.json")] if is_plan else []
    beside += [] if spec is None else [(Path(spec), "spec.json")]
    repository = make_folder(out)
    folders = (repository / f"{name}_eps", repository / name)
    for folder in folders:
        if os.path.lexists(folder):
            raise OutputError(f"{folder}: exists already", hint="another --name, or remove it first")
    chain = chain_config(
        found,
        name,
        file,
        rows=rows,
        on_gpu=is_plan or provider in ON_GPU,
        provider=provider,
        instances=instances,
        threads=threads,
        most_images=most_images,
    )
    with atomic_folder(folders[0]) as eps, atomic_folder(folders[1]) as part:
        write_synced(eps / "config.pbtxt", eps_config(found, f"{name}_eps", file, largest).encode())
        write_synced(part / "config.pbtxt", chain.encode())
        if found.classes is not None:
            names = found.class_names or [str(number) for number in range(found.classes)]
            write_synced(part / "labels.txt", "".join(f"{each}\n" for each in names).encode())
        for folder in (eps, part):
            (folder / "1").mkdir()
            shutil.copyfile(path, folder / "1" / file)
        write_synced(part / "1" / "model.py", _MODEL.format(name=name, version=ddpmx.__version__).encode())
        for source, target in beside:
            if source.is_file():
                shutil.copyfile(source, part / "1" / target)
    return sorted(each for folder in folders for each in folder.rglob("*") if each.is_file())


def eps_config(spec: ModelSpec, name: str, file: str, largest: int) -> str:
    """The configuration of the network alone, as protobuf text.

    A number for each image (t, the class) has no dimension beside the batch. Triton allows no input without one, so it has
    one for the client, which ``reshape`` takes away.

    Args:
        spec: the model.
        name: of the model in the repository.
        file: the model file's name.
        largest: the largest batch.
    """
    inputs: list[Message] = [
        {"name": each, "data_type": _type(input_type(each)), "dims": _dims(dims or (1,))}
        | ({} if dims else {"reshape": {"shape": []}})
        for each, dims in spec.inputs.items()
    ]
    outputs = [{"name": each, "data_type": Word("TYPE_FP32"), "dims": _dims(spec.shape)} for each in spec.outputs]
    plan = file.endswith(".plan")
    return pbtxt(
        {
            "name": name,
            "backend": "tensorrt" if plan else "onnxruntime",
            "default_model_filename": file,
            "max_batch_size": Word(largest),
            "input": inputs,
            "output": outputs,
            "dynamic_batching": {"max_queue_delay_microseconds": Word(DELAY_MICROSECONDS)},
        }
    )


def chain_config(
    spec: ModelSpec,
    name: str,
    file: str,
    *,
    rows: int,
    on_gpu: bool,
    provider: str,
    instances: int,
    threads: int,
    most_images: int,
) -> str:
    """The configuration of the chain, as protobuf text.

    Args:
        spec: the model.
        name: of the model in the repository.
        file: the model file's name.
        rows: of the network's batch.
        on_gpu: whether each GPU has instances of its own.
        provider, instances, threads, most_images: as for :func:`write_repository`.
    """
    one = {"dims": _dims((1,))}
    inputs: list[Message] = [{"name": "seed", "data_type": Word("TYPE_UINT64"), **one}]
    optional = {"n": "TYPE_INT32", "first": "TYPE_INT64", "steps": "TYPE_INT32", "sampler": "TYPE_STRING"}
    if spec.null_class:
        optional["guidance"] = "TYPE_FP64"
    inputs += [
        {"name": each, "data_type": Word(kind), **one, "optional": Word("true")} for each, kind in optional.items()
    ]
    if spec.classes is not None:
        labels = {"name": "labels", "data_type": Word("TYPE_INT32"), "dims": _dims((-1,))}
        inputs.append(labels | ({"optional": Word("true")} if spec.null_class else {}))
    channels, height, width = spec.shape
    parameters = {
        "file": file,
        "provider": provider,
        "batch": str(rows),
        "threads": str(threads),
        "most_images": str(most_images),
        **({} if spec.classes is None else {"labels_file": "labels.txt"}),
    }
    return pbtxt(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": Word(rows),
            "input": inputs,
            "output": [
                {"name": "images", "data_type": Word("TYPE_UINT8"), "dims": _dims((-1, height, width, channels))}
            ],
            "instance_group": [{"count": Word(instances), "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}],
            "dynamic_batching": {"max_queue_delay_microseconds": Word(DELAY_MICROSECONDS)},
            "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
        }
    )


def pbtxt(message: Message, indent: str = "") -> str:
    """A message as protobuf text: texts in quotation marks, :class:`Word` as it is, a sequence as a repeated field."""
    lines: list[str] = []
    for key, value in message.items():
        if isinstance(value, str):
            lines.append(f"{key}: {value if isinstance(value, Word) else json.dumps(value)}")
        elif isinstance(value, Mapping):
            lines += _nested(key, value, indent)
        elif all(isinstance(each, Word) for each in value):
            lines.append(f"{key}: [{', '.join(map(str, value))}]")
        else:
            for each in value:
                assert isinstance(each, Mapping)
                lines += _nested(key, each, indent)
    return "".join(f"{indent}{line}\n" for line in lines)


def _nested(key: str, value: Message, indent: str) -> Iterable[str]:
    inside = pbtxt(value, "  ").rstrip("\n").split("\n")
    return [f"{key} {{", *inside, "}"]


def _dims(dims: Sequence[int]) -> list[Word]:
    return [Word(each) for each in dims]


def _type(kind: type) -> Word:
    return Word("TYPE_INT32" if kind is np.int32 else "TYPE_FP32")


def _described(path: Path, spec: Path | None) -> tuple[ModelSpec, int]:
    """The model, and the largest batch that Triton may make of its requests."""
    kind = model_file.identify(path)
    if kind == "onnx":
        info = onnx_file.read_onnx(path)
        if info.external:
            raise InputError(
                f"{path}: its weights are in another file, which the repository does not take",
                note=", ".join(info.external[:3]),
                hint="ddpmx export writes one file for networks below 2 GiB",
            )
        found = onnx_file.onnx_spec(path, info, None if spec is None else model_file.read_spec(spec))
        return found, default_batch(found)
    if kind == "plan" and spec is None:
        plan = plan_file.read_plan(path)
        if plan.flavour != "TensorRT":
            raise InputError(
                f"{path}: a plan of {plan.flavour}, which Triton does not run",
                hint="the model.onnx that it was built from",
            )
        return plan.spec, plan.engine.batch[2]
    if kind == "plan":
        raise InputError(f"{path}: a plan describes itself", hint="leave --spec out")
    raise InputError(
        f"{path}: Triton runs ONNX files and plans of TensorRT",
        note="this is a run" if kind == "checkpoint" else f"this is a .{kind}",
        hint="ddpmx export writes an ONNX file",
    )
