"""Writes the page: what is in ``web/``, the model, its chains as tables, and ONNX Runtime for browsers.

The page computes noise and update as NumPy does, bit for bit, and takes its coefficients from the tables that are written
here: nothing of a schedule or a sampler is written again in JavaScript.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats import model_file, onnx_file
from ddpmx.formats.atomic import atomic_folder, write_synced
from ddpmx.formats.spec import ModelSpec
from ddpmx.images.origin import model_hash
from ddpmx.sampling.request import Sampling

VERSION = 1
"""Of ``model.json``."""

STEPS = (8, 20, 50, 100, 250)
"""The chains that the page offers, and that of all T steps."""

DEFAULT_STEPS = 20

ORT_VERSION = "1.30.0"
ORT_ADDRESS = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ORT_VERSION}/dist/"
"""Where the page finds ONNX Runtime if it does not come with it."""

WASM_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU_FILES = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")

_LARGEST_MODEL = 1 << 30
"""A browser's memory for WebAssembly ends at 4 GiB, and holds the weights more than once while they are loaded."""


def write_site(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    name: str | None = None,
    steps: Sequence[int] = STEPS,
    ort: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write a folder that any web server can serve, and no other host is asked for anything if ONNX Runtime is in it.

    Args:
        model: an ONNX file, that takes no condition image.
        out: the folder; new, or empty.
        spec: for a file that does not describe itself.
        name: of the model, for the page; by default the file's.
        steps: the numbers of steps that the page offers; those below T, and T, are taken.
        ort: the ``dist`` folder of the npm package onnxruntime-web, whose files are copied; by default the page loads
            them from a public server (:data:`ORT_ADDRESS`).

    Returns:
        The files, sorted.

    Raises:
        FileFormatError, SpecError: no such model file, or a damaged one.
        InputError: a model that a browser cannot run, or a folder without the files of onnxruntime-web.
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    path = Path(model)
    kind = model_file.identify(path)
    if kind != "onnx":
        raise InputError(
            f"{path}: browsers run ONNX files, and this is {'a run' if kind == 'checkpoint' else f'.{kind}'}",
            hint="ddpmx export writes an ONNX file",
        )
    info = onnx_file.read_onnx(path)
    found = onnx_file.onnx_spec(path, info, spec)
    _check_runs(path, found, info.external)
    sources = _ort_files(Path(ort)) if ort is not None else []
    data = path.read_bytes()
    web = {each.name: each.read_bytes() for each in resources.files(__package__).joinpath("web").iterdir()}
    described = describe(found, name or path.stem, model_hash(found, path), len(data), steps=steps)
    described |= {"ort": ORT_ADDRESS, "webgpu": True}
    if ort is not None:
        described |= {"ort": "ort/", "webgpu": WEBGPU_FILES[0] in {source.name for source in sources}}
    with atomic_folder(out) as part:
        write_synced(part / "model.onnx", data)
        write_synced(part / "model.json", json.dumps(described, separators=(",", ":")).encode())
        for file, text in web.items():
            write_synced(part / file, text)
        if sources:
            (part / "ort").mkdir()
        for source in sources:
            shutil.copyfile(source, part / "ort" / source.name)
        write_synced(part / "sw.js", _service_worker(part, described["ort"]))
    return sorted(file for file in Path(out).rglob("*") if file.is_file())


def _service_worker(site: Path, ort: str) -> bytes:
    """sw.js with the files that it keeps (ONNX Runtime for WebGPU only once it was used) and a version of all of them."""
    files = sorted(file.name for file in site.iterdir() if file.is_file() and file.name != "sw.js")
    digest = hashlib.sha256("".join(hashlib.sha256((site / file).read_bytes()).hexdigest() for file in files).encode())
    text = (site / "sw.js").read_text(encoding="utf-8")
    text = text.replace('"VERSION"', json.dumps(digest.hexdigest()[:16]))
    return text.replace("[/* FILES */]", json.dumps([*files, *(ort + file for file in WASM_FILES)])).encode()


def _check_runs(path: Path, spec: ModelSpec, external: tuple[str, ...]) -> None:
    """That a browser can run the model."""
    if spec.condition is not None:
        raise InputError(f"{path}: the page has no condition image to give the model", hint="a model without one")
    if external:
        raise InputError(
            f"{path}: its weights are in another file, which the page does not take",
            note=", ".join(external[:3]),
            hint="ddpmx export writes one file for networks below 2 GiB",
        )
    if (size := path.stat().st_size) > _LARGEST_MODEL:
        raise InputError(
            f"{path}: {size / 2**30:.1f} GiB are too much for a browser", hint="a smaller network, or --fp16"
        )


def _ort_files(folder: Path) -> list[Path]:
    """The files of onnxruntime-web: those for CPUs, and those for WebGPU where they are there as well."""
    if not folder.is_dir():
        raise FileFormatError(f"{folder}: there is no such folder", hint="npm pack onnxruntime-web; its folder dist")
    missing = [name for name in WASM_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: not the files of onnxruntime-web: {', '.join(missing)} missing",
            hint=f"npm install onnxruntime-web@{ORT_VERSION}; then --ort node_modules/onnxruntime-web/dist",
        )
    gpu = WEBGPU_FILES if all((folder / name).is_file() for name in WEBGPU_FILES) else ()
    return [folder / name for name in (*WASM_FILES, *gpu)]


def describe(
    spec: ModelSpec, name: str, sha256: str, size: int, *, steps: Sequence[int] = STEPS, tables: bool = True
) -> dict[str, Any]:
    """What the page knows of its model, as plain JSON.

    Args:
        spec: the model.
        name: of the model.
        sha256: by which it is known, see :func:`ddpmx.images.origin.model_hash`.
        size: of its file, bytes.
        steps: the numbers of steps that are offered; those below T, and T, are taken.
        tables: with the coefficients of the chains, for a page that runs them itself.
    """
    T = spec.timesteps
    offered = sorted({count for count in steps if 0 < count < T} | {T})
    return {
        "page": VERSION,
        "ddpmx": ddpmx.__version__,
        "name": name,
        "sha256": sha256,
        "bytes": size,
        "webgpu": False,
        "spec": {
            "shape": list(spec.shape),
            "prediction": spec.prediction,
            "timesteps": T,
            "clip": spec.clip,
            "classes": spec.classes,
            "class_names": list(spec.class_names or ()),
            "null_class": spec.null_class,
            "condition": spec.condition,
            "self_condition": spec.self_condition,
            "precision": spec.precision,
        },
        "steps": DEFAULT_STEPS if DEFAULT_STEPS in offered else offered[0],
        "chains": {str(count): _chain(spec, None if count == T else count, tables) for count in offered},
    }


def _chain(spec: ModelSpec, steps: int | None, tables: bool) -> dict[str, str]:
    """A sampler as ``ddpmx generate`` chooses it, and its table in float32 as every chain has it."""
    sampling = Sampling.chosen(spec.timesteps, steps=steps)
    chain: dict[str, str] = {"sampler": sampling.sampler}
    if tables:
        table = sampling.table(spec)
        columns = {"rows": table.rows, "learned": table.learned, "memory": table.memory}
        chain["timesteps"] = _packed(table.timesteps.astype("<i4"))
        chain |= {name: _packed(values.astype("<f4")) for name, values in columns.items() if values is not None}
    return chain


def _packed(array: NDArray[np.generic]) -> str:
    return base64.b64encode(array.tobytes()).decode()
