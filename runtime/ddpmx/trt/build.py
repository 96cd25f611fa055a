"""model.onnx → model.plan: one code path for TensorRT and TensorRT-RTX, in any version from 10.3 on.

It is part of the runtime because engines do not travel: a Jetson builds its own, and has neither torch nor onnx. The
network is strongly typed, so its precision is that of the graph and not the builder's choice; it is checked all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ddpmx.device.discovery import Gpus, gpus
from ddpmx.errors import BackendError, DdpmxError, FileFormatError, InputError, SpecError
from ddpmx.formats import model_file, onnx_file, plan_file
from ddpmx.formats.envelope import wrap
from ddpmx.formats.output_file import begins_with, check_output
from ddpmx.formats.plan_file import MAX_BATCH, RECORD_PREFIX, PlanInfo, PlanRecord, sidecar_path
from ddpmx.formats.spec import MAX_TEXT, ModelSpec
from ddpmx.trt import library as trt_library
from ddpmx.trt.builder import run_builder
from ddpmx.trt.library import Library, host_platform
from ddpmx.trt.precision import assert_precision, check_weights

SMALLEST_BF16 = (10, 13)
"""The first release whose InstanceNormalization takes bfloat16. JetPack 6 has 10.3."""

SMALLEST_E4M3 = 8.9
"""The first compute capability with E4M3."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build a plan.

    Attributes:
        batch: smallest, best and largest batch; by default that of :func:`default_batch`.
        targets: compute capabilities to build for, TensorRT-RTX only: ("8.6", "8.9"). By default one plan for 8.0 and
            later. TensorRT builds for the GPU of this machine.
        workspace: limit of the engine's scratch memory in bytes; None for the library's default.
        level: the builder's effort, 0…5; None for the library's default.
        tf32: allow float32 products to be rounded to 10 bits of mantissa. TensorRT allows it by default; here it is off,
            since it costs the precision that an fp32 file promises.
        refit: make a plan whose weights can be replaced later.
        strip: make a plan without weights, to be filled from the ONNX file when it is loaded.
        timing_cache: folder for the builder's measurements, which make the next build faster; None for none.
    """

    batch: tuple[int, int, int] | None = None
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    tf32: bool = False
    refit: bool = False
    strip: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: out of range.
        """
        batch = self.batch
        if batch is not None and not (
            len(batch) == 3
            and all(type(n) is int for n in batch)
            and 1 <= batch[0] <= batch[1] <= batch[2] <= MAX_BATCH
        ):
            raise InputError(
                f"the batch must be three ascending whole numbers from 1 to {MAX_BATCH}, not {batch!r}",
                hint="smallest, best, largest: 1,16,64",
            )
        for target in self.targets:
            if not re.fullmatch(r"\d{1,2}\.\d", target):
                raise InputError(f"{target!r} is not a compute capability", hint="for example 8.6")
        if self.workspace is not None and not 1 << 20 <= self.workspace <= 1 << 40:
            raise InputError(f"the workspace must be 1 MB … 1 TB, not {self.workspace} bytes")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"the builder's level must be 0…5, not {self.level}")


@dataclass(frozen=True)
class Built:
    """The result of :func:`build`.

    Attributes:
        info: the plan's description.
        seconds: how long parsing and building took; 0 if the plan was reused.
        reused: whether the plan already existed and was left as it is.
        precision: how the precision was checked, as text for the reader.
    """

    info: PlanInfo
    seconds: float
    reused: bool
    precision: str


def default_batch(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(1, the default batch of a pipeline, up to 64): smaller for large images, whose activations take more memory."""
    largest = int(np.clip((1 << 22) // np.prod(shape), 1, 64))
    return 1, min(16, largest), largest


def build(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: BuildOptions | None = None,
    *,
    spec: ModelSpec | None = None,
    library: Library | None = None,
    devices: Gpus | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Built:
    """Build a plan from an ONNX file that contains its model's description, or with that description.

    Args:
        path: the ONNX file.
        output: the plan to write; by default beside the ONNX file. It appears only when it is complete.
        options: how to build.
        spec: of the model, for a file that does not describe itself; the plan will.
        library: the TensorRT to use; by default the installed one.
        devices: the GPUs; by default those that the driver lists.
        force: build even if the same plan already exists.
        progress: called with (phase, steps done, steps in all).
        cancel: called at every step; the build stops if it returns True.

    Raises:
        InputError: an option cannot be used with this library.
        FileFormatError, SpecError: the file is damaged, is not an ONNX file of ddpmx, or TensorRT's parser refuses it.
        BackendError: there is no TensorRT, it cannot build this plan here, or it did not keep the precision.
        OutputError: the plan cannot be written.
        Cancelled: ``cancel`` returned True.
    """
    options = options or BuildOptions()
    path = Path(path)
    if model_file.identify(path) != "onnx":
        raise FileFormatError(
            f"{path}: not an ONNX file", hint="`ddpmx export` writes the ONNX file from which a plan is built"
        )
    real = path.resolve()  # external weights lie beside the file itself, not beside a link to it
    info = onnx_file.read_onnx(real)
    weights = onnx_file.check_external(real, info)
    # a link to a plan stays a link; the sidecar lies beside its target
    output = Path(os.path.realpath(output if output is not None else path.with_suffix(".plan")))
    for written, what, suffix, begins in (
        (output, "a plan", ".plan", tuple(plan_file.MAGIC)),
        (sidecar_path(output), "a plan's sidecar", "", (b"{",)),
    ):
        check_output(written, [real, *weights], what=what, suffix=suffix, is_ours=partial(begins_with, begins=begins))
    spec = onnx_file.onnx_spec(path, info, spec)
    check_weights(path, spec, info)
    library = library or trt_library.load()
    devices = devices or gpus()
    _check_possible(library, spec, options, devices)
    record = _record(path, [real, *weights], spec, library, options, devices)
    if not force and (there := _already(output, record)):
        return Built(there, 0.0, True, "as when it was built")
    begun = time.monotonic()
    name = f"{spec.to_text()} {wrap(RECORD_PREFIX, record.to_json())}"
    if len(name) > MAX_TEXT:
        raise SpecError(f"{path}: the plan's description takes {len(name)} bytes, and a name holds {MAX_TEXT}")
    plan, layers = run_builder(real, name, spec, record, library, options, devices, progress, cancel)
    precision = assert_precision(plan, spec, info, library, stripped=options.strip)
    seconds = time.monotonic() - begun
    about = {"seconds": round(seconds, 2), "layers": layers, "precision": precision}
    plan_file.write_plan(output, memoryview(plan), spec, record, about)
    return Built(plan_file.read_plan(output), seconds, False, precision)


def _check_possible(library: Library, spec: ModelSpec, options: BuildOptions, devices: Gpus) -> None:
    """Refuse what cannot work, before minutes are spent on it."""
    if not library.is_rtx and not devices.devices:
        raise BackendError(
            f"{library} builds an engine on the GPU that will run it, and there is none here",
            note=devices.trouble,
            hint="run `ddpmx build` on the device; TensorRT-RTX builds for RTX cards without one: "
            "pip install tensorrt-rtx-cu13",
        )
    if not library.is_rtx and options.targets:
        raise InputError(
            f"{library} builds only for the GPU of this machine", hint="omit --target; TensorRT-RTX supports it"
        )
    if spec.precision == "bf16" and not library.is_rtx and library.release < SMALLEST_BF16:
        raise BackendError(
            f"{library} builds no bfloat16 networks of this kind",
            note="its InstanceNormalization takes float32 and float16; 10.13 is the first that takes bfloat16, "
            "and JetPack 6 stays at 10.3",
            hint="export with --fp16",
        )
    older = [one for one in options.targets if float(one) < SMALLEST_E4M3]
    if not library.is_rtx:
        older = [devices.devices[0].sm] if float(devices.devices[0].sm) < SMALLEST_E4M3 else []
    if spec.precision == "fp8" and older:
        raise BackendError(
            f"SM {older[0]} does not compute in E4M3",
            note="8.9 is the first that does: Ada, then Hopper and Blackwell",
            hint="export with --int8",
        )
    if (options.refit or options.strip) and not devices.devices:
        raise BackendError(
            f"{library} needs a GPU to build {'stripped' if options.strip else 'refittable'} plans",
            note=f"it compiles the code that fills in the weights on the device itself; here {devices.trouble}",
            hint="build a plan with its weights, or run this command on the device",
        )


def _record(
    path: Path, files: list[Path], spec: ModelSpec, library: Library, options: BuildOptions, devices: Gpus
) -> PlanRecord:
    """The record of how the plan is built; its key covers everything that the plan depends on."""
    batch = options.batch or default_batch(spec.shape)
    if library.is_rtx:
        targets = tuple(sorted(set(options.targets), key=float)) or ("8.0+",)
    else:
        targets = (devices.devices[0].sm,)
    settings = dataclasses.asdict(options)
    record = PlanRecord(
        flavour=library.flavour,
        version=_full_version(library),
        targets=tuple(targets),
        platform=host_platform(),
        batch=batch,
        onnx=model_file.sha256_of(files),
        source=path.name if plan_file.is_plain_name(path.name) else "model.onnx",
        options={name: settings[name] for name in ("workspace", "level", "tf32", "refit", "strip")},
        key="",
    )
    values = {name: value for name, value in record.to_json().items() if name not in ("key", "source")}
    # the device's name too: two GPUs of one SM may get different kernels
    values["device"] = devices.devices[0].name if devices.devices and not library.is_rtx else None
    values["spec"] = spec.to_json()
    if library.is_rtx:
        values["allocates"] = False  # plans of earlier versions may, and are built again
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(record, key=key)


def _full_version(library: Library) -> str:
    version = re.match(r"\d+(\.\d+){1,3}", library.version)
    if version is None:
        raise BackendError(f"{library.flavour} reports the version {library.version!r}, which is not a version number")
    return version[0]


def _already(output: Path, record: PlanRecord) -> PlanInfo | None:
    """The existing plan, if it is the one that would be built."""
    if not output.is_file():
        return None
    try:
        info = plan_file.read_plan(output)
    except DdpmxError:
        return None
    return info if info.engine.key == record.key else None
