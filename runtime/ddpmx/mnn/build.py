"""model.onnx → model.mnn: MNN's converter, in a process of its own, and the description that the file carries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpmx.errors import BackendError, Cancelled, DdpmxError, FileFormatError, InputError
from ddpmx.formats import mnn_file, model_file, onnx_file
from ddpmx.formats.atomic import atomic_write, write_error
from ddpmx.formats.mnn_file import MAX_PART, MnnInfo, MnnRecord
from ddpmx.formats.output_file import check_output
from ddpmx.formats.plan_record import is_plain_name
from ddpmx.formats.spec import EIGHT_BITS, ModelSpec
from ddpmx.mnn import library
from ddpmx.mnn.graph import keep_images_apart

_CONVERT = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_tools", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_tools", loader))
loader.exec_module(module)
module.mnnconvert(["mnnconvert", *sys.argv[2:]])
"""

_SMALL, _MIDDLE = 32 * 32, 64 * 64  # pixels


@dataclass(frozen=True)
class BuiltMnn:
    """The result of :func:`build`.

    Attributes:
        info: the file's description.
        seconds: how long it took; 0 if the file was there already.
        reused: whether the file was there already, and was left as it is.
    """

    info: MnnInfo
    seconds: float
    reused: bool


def default_part(shape: tuple[int, int, int]) -> int:
    """How many images run in one call: of small images several, which shares the cost of a call.

    It decides the last bits of an image, so it goes by the shape alone, and is written into the file.
    """
    pixels = shape[1] * shape[2]
    return 8 if pixels < _SMALL else 4 if pixels < _MIDDLE else 1


def build(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    spec: ModelSpec | None = None,
    part: int | None = None,
    low_memory: bool = False,
    force: bool = False,
    cancel: Callable[[], bool] | None = None,
) -> BuiltMnn:
    """Make an .mnn file of an ONNX file that contains its model's description, or with that description.

    Args:
        path: the ONNX file, in fp32 or fp16.
        output: the file to write; by default beside the ONNX file. It appears only when it is complete.
        spec: of the model, for a file that does not describe itself.
        part: how many images run in one call, 1…64; by default :func:`default_part`.
        low_memory: take a sixth more time, and 60 % of the memory.
        force: convert even if the same file already exists.
        cancel: called repeatedly; the conversion stops if it returns True.

    Raises:
        InputError: ``part`` is out of range.
        FileFormatError, SpecError: the file is damaged, or not an ONNX file of ddpmx.
        BackendError: there is no MNN, or it cannot convert this file.
        OutputError: the file cannot be written.
        Cancelled: ``cancel`` returned True.
    """
    path = Path(path)
    if part is not None and not (type(part) is int and 1 <= part <= MAX_PART):
        raise InputError(f"part must be a whole number from 1 to {MAX_PART}, not {part!r}")
    if model_file.identify(path) != "onnx":
        raise FileFormatError(
            f"{path}: not an ONNX file", hint="`ddpmx export` writes the ONNX file that MNN's converter takes"
        )
    real = path.resolve()  # external weights lie beside the file itself, not beside a link to it
    info = onnx_file.read_onnx(real)
    beside = onnx_file.check_external(real, info)
    output = Path(os.path.realpath(output if output is not None else path.with_suffix(".mnn")))
    check_output(output, [real, *beside], what="an MNN model", suffix=".mnn", is_ours=mnn_file.has_network)
    spec = onnx_file.onnx_spec(path, info, spec)
    if spec.precision == "bf16":
        raise InputError(f"{path}: MNN runs no bfloat16 networks", hint="export with --fp16, or without")
    if spec.precision in EIGHT_BITS:
        raise InputError(
            f"{path}: MNN runs no networks with explicit Q/DQ",
            hint="export without --int8 and --fp8; MNN has 8-bit weights of its own: ddpmx build --for mnn --low-memory",
        )
    module = library.load()
    record = MnnRecord(
        version=".".join(str(module.version()).split(".")[:4]),
        onnx=model_file.sha256_of([real, *beside]),
        source=path.name if is_plain_name(path.name) else "model.onnx",
        network="0" * 64,
        part=part or default_part(spec.shape),
        memory="low" if low_memory else "normal",
    )
    if not force and (there := _already(output, spec, record)):
        return BuiltMnn(there, 0.0, True)
    begun = time.monotonic()
    try:
        network = _convert(real, beside, library.converter(), cancel, apart=record.part > 1)
    except OSError as error:  # of temporary files
        raise write_error(output, error) from error
    data = mnn_file.describe_network(network, spec, record)
    with atomic_write(output) as stream:
        stream.write(data)
    return BuiltMnn(mnn_file.read_mnn(output), time.monotonic() - begun, False)


def _convert(onnx: Path, beside: list[Path], tools: Path, cancel: Callable[[], bool] | None, *, apart: bool) -> bytes:
    """What MNN's converter makes of an ONNX file. It runs in a process of its own: it prints, and may crash.

    With ``apart``, of a copy in which neighbours make no difference: see :mod:`ddpmx.mnn.graph`.
    """
    with tempfile.TemporaryDirectory(prefix="ddpmx-") as folder:
        made, log, source = Path(folder, "model.mnn"), Path(folder, "log"), onnx
        if apart:
            changed, convolutions = keep_images_apart(onnx.read_bytes())
            if convolutions:
                source = Path(folder, "model.onnx")
                source.write_bytes(changed)
                for file in beside:  # weights are looked for beside the copy
                    link = Path(folder, file.relative_to(onnx.parent))
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file)
        # without its flag --fp16, which also rounds the frequencies of the time embedding: an fp16 ONNX file does not
        options = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(made), "--bizCode", "ddpmx"]
        with log.open("wb") as stream:
            command = [sys.executable, "-c", _CONVERT, str(tools), *options]
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    if cancel is not None and cancel():
                        raise Cancelled("cancelled before the file was converted")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
            finally:
                process.kill()
                process.wait()
        if process.returncode != 0 or not made.is_file():
            words = log.read_text(errors="replace").strip().splitlines()
            said = next((line for line in reversed(words) if "rror" in line or "upport" in line), "".join(words[-1:]))
            ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            raise BackendError(
                f"{onnx}: MNN's converter cannot convert this file", note=f"{ended}: {said[-300:] or 'it said nothing'}"
            )
        try:
            library.load().Interpreter(str(made))  # the converter ends with 0 even where the disk was full
        except Exception as error:  # MNN raises plain exceptions
            raise BackendError(
                f"{onnx}: MNN's converter wrote a file that MNN refuses",
                note=f"{made.stat().st_size} bytes: {str(error)[:300]}",
                hint=f"there may be no room for temporary files: free some space in {tempfile.gettempdir()}",
            ) from error
        return made.read_bytes()


def _already(output: Path, spec: ModelSpec, record: MnnRecord) -> MnnInfo | None:
    """The existing file, if it is the one that would be made."""
    if not output.is_file():
        return None
    try:
        info = mnn_file.read_mnn(output)
    except DdpmxError:
        return None
    same = dataclasses.replace(info.record, network=record.network, source=record.source) == record
    return info if same and info.spec == spec else None
