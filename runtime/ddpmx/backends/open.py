"""Opens a model file: its spec, and the backend that runs it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ddpmx.backends.base import Backend, CopyingBackend
from ddpmx.errors import BackendError, FileFormatError, InputError
from ddpmx.formats import mnn_file, model_file, onnx_file
from ddpmx.formats.spec import ModelSpec
from ddpmx.formats.widen import holds_half, read_widened
from ddpmx.models import shipped


class OpenOptions(TypedDict, total=False):
    """The keywords of :func:`open_model`."""

    spec: ModelSpec | None
    providers: Sequence[str]
    fallback: bool
    threads: int
    trust_host_code: bool
    cache: str | os.PathLike[str] | None
    widen: bool


def open_model(
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    providers: Sequence[str] = ("cpu",),
    fallback: bool = False,
    threads: int = 0,
    trust_host_code: bool = False,
    cache: str | os.PathLike[str] | None = None,
    widen: bool = False,
) -> tuple[ModelSpec, Backend]:
    """A file's spec and its backend: :func:`ddpmx.load` without the chain around it. Close the backend after use."""
    path = shipped.find(path)
    kind = model_file.identify(path)
    if kind == "checkpoint":
        raise FileFormatError(
            f"{path}: a checkpoint, which needs torch to run",
            hint=f"ddpmx export {shlex.quote(os.fspath(path))} -o model.onnx, and use that; "
            "ddpm_export.load runs it in torch",
        )
    if kind == "plan":
        if widen:
            raise InputError(
                f"{path}: a plan computes in the precision that it was built in",
                hint="widen is for ONNX files and MNN models",
            )
        return _open_plan(path, spec, providers, trust_host_code, None if cache is None else Path(cache))
    if kind == "mnn":
        return _open_mnn(path, spec, providers, threads, widen)
    # A link is followed here, once: the weights lie beside the file that it leads to, and those are checked.
    path = path.resolve()
    info = onnx_file.read_onnx(path)
    onnx_file.check_external(path, info)
    spec = onnx_file.onnx_spec(path, info, spec)
    from ddpmx.backends import ort
    from ddpmx.backends.ort_common import import_onnxruntime, rounds_halves

    # by an older ONNX Runtime an 8-bit graph is right in float32 alone, whatever provider runs it
    in_float32 = widen or (spec.precision == "int8" and not rounds_halves(import_onnxruntime()))
    wide = read_widened(path, info) if in_float32 else None
    eight_bits = None
    if spec.precision == "int8" and not widen and ort.computes_on_cpu(providers):
        eight_bits = _in_memory(path, info)
    try:
        return spec, ort.open_onnx(
            path, spec, providers=providers, fallback=fallback, threads=threads, widened=wide, eight_bits=eight_bits
        )
    except FileFormatError as error:
        if spec.precision != "bf16" or widen:
            raise
        raise BackendError(
            f"{path}: ONNX Runtime cannot run this bfloat16 file here",
            note=error.note,
            hint=f"it is made for TensorRT 10.13 and later: ddpmx build {shlex.quote(path.name)}; "
            "fp16 and fp32 files run here",
        ) from error


def _in_memory(path: Path, info: onnx_file.GraphInfo) -> bytes | None:
    """An ONNX model in float32 with all that belongs to it; None if it has weights beside it and nothing in half."""
    wide = read_widened(path, info)
    if wide is not None or info.external:
        return wide
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error


def _open_plan(
    path: Path, spec: ModelSpec | None, providers: Sequence[str], trust_host_code: bool, cache: Path | None
) -> tuple[ModelSpec, Backend]:
    if spec is not None:
        raise InputError(f"{path}: a plan carries its own spec", hint="spec is for ONNX files that carry none")
    if tuple(providers) != ("cpu",):
        raise InputError(f"{path}: a plan runs on TensorRT alone", hint="providers are for ONNX files")
    from ddpmx.backends.trt import TrtEngine

    engine = TrtEngine(path, trust_host_code=trust_host_code, cache=cache)
    try:
        return engine.spec, CopyingBackend(engine)
    except BaseException:
        engine.close()
        raise


def is_half(path: str | os.PathLike[str]) -> bool:
    """Whether ``widen`` makes a difference to a model file: it has half precision in it, and is no plan.

    Raises:
        FileFormatError, SpecError: no model file, or a damaged one.
    """
    path = shipped.find(path)
    kind = model_file.identify(path)
    if kind == "mnn":
        return mnn_file.read_mnn(path, brief=True).spec.precision != "fp32"
    if kind != "onnx":
        return False
    return holds_half(path)


def _open_mnn(
    path: Path, spec: ModelSpec | None, providers: Sequence[str], threads: int, widen: bool
) -> tuple[ModelSpec, Backend]:
    if spec is not None:
        raise InputError(f"{path}: an MNN model carries its own spec", hint="spec is for ONNX files that carry none")
    if tuple(providers) != ("cpu",):
        raise InputError(f"{path}: an MNN model runs on the CPU, by MNN alone", hint="providers are for ONNX files")
    path = path.resolve()
    info = mnn_file.read_mnn(path)
    from ddpmx.backends.mnn import MnnBackend

    return info.spec, MnnBackend(path, info, threads=threads, widen=widen)
