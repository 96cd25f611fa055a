"""TensorRT's builder at work: from an ONNX file to the bytes of a plan."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpmx.device.discovery import Gpus
from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError
from ddpmx.formats.plan_file import PlanRecord
from ddpmx.formats.spec import ModelSpec, input_type
from ddpmx.trt.library import Library
from ddpmx.trt.timing_cache import TimingCache

if TYPE_CHECKING:
    from ddpmx.trt.build import BuildOptions

USED = {
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "BuilderFlag": ("TF32", "REFIT", "STRIP_PLAN", "REFIT_IDENTICAL"),
    "MemoryPoolType": ("WORKSPACE",),
    "DataType": ("FLOAT", "INT32"),
    "INetworkDefinition": (
        "name",
        "num_layers",
        "num_inputs",
        "get_input",
        "num_outputs",
        "get_output",
    ),
    "ITensor": ("name", "dtype", "shape"),
    "IBuilderConfig": (
        "set_flag",
        "clear_flag",
        "set_memory_pool_limit",
        "add_optimization_profile",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "builder_optimization_level",
        "progress_monitor",
    ),
    "IOptimizationProfile": ("set_shape",),
    "ITimingCache": ("serialize",),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node", "node_name", "node_operator"),
    "ILogger": ("log", "Severity"),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
}
"""Every name of TensorRT that this module uses; a test looks them up in the bindings of 10.3, 10.16 and 11.4."""

_TURING_HINT = "TensorRT-RTX cannot multiply float32 matrices on 7.5: `ddpmx export --fp16 --time-table` avoids them"


def run_builder(
    path: Path,
    name: str,
    spec: ModelSpec,
    record: PlanRecord,
    library: Library,
    options: BuildOptions,
    devices: Gpus,
    progress: Callable[[str, int, int], None] | None,
    cancel: Callable[[], bool] | None,
) -> tuple[Any, int]:
    """Parse and build. (the plan's bytes, number of layers before fusion)"""
    trt = library.trt
    library.logger.lines.clear()
    builder = library.made("builder", lambda: trt.Builder(library.logger))
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = library.made("network", lambda: builder.create_network(strongly_typed))
    parser = library.made("parser", lambda: trt.OnnxParser(network, library.logger))
    try:
        with _signals_held():
            parsed = parser.parse_from_file(os.fspath(path))
    except (TypeError, UnicodeError) as error:
        raise FileFormatError(
            f"{str(path)!a}: {library} takes file names in UTF-8 only", hint="rename the file"
        ) from error
    if not parsed:
        raise FileFormatError(
            f"{path}: {library}'s parser refuses this file",
            note=_parser_errors(parser) or library.last_words(),
            hint="ONNX Runtime may run it: ddpmx generate FILE; for TensorRT write that operator with others",
        )
    network.name = name
    _check_network(path, network, spec, trt)
    config = library.made("configuration", builder.create_builder_config)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        image = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((n, *image) for n in record.batch))
    config.add_optimization_profile(profile)
    _set_flags(config, trt, options)
    if library.is_rtx:
        # else it may allocate memory when it runs, and a chain's captured step must not
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        _set_targets(config, trt, options)
    cache = TimingCache(options.timing_cache, library, devices, config)
    with _signals_held() as held:
        monitor = _monitor(trt, progress, lambda: bool(held) or (cancel is not None and cancel()))
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if monitor.stopped:
        raise Cancelled("the build was stopped; nothing was written")
    if plan is None:
        raise BackendError(
            f"{library} could not build an engine from {path}",
            note=library.last_words(),
            hint=_TURING_HINT
            if "7.5" in record.targets
            else "`ddpmx doctor` shows what is installed; if memory is short, try a smaller --batch or another --workspace",
        )
    cache.save(config)
    return plan, network.num_layers


@contextlib.contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Hold back SIGINT and SIGTERM while C++ code runs, and raise them afterwards.

    Python runs a signal's handler at the next Python instruction, which may be in a callback: TensorRT would print the
    handler's exception and continue.
    """
    held: list[int] = []
    before: dict[int, Any] = {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(name) in (signal.SIG_IGN, None):
                continue
            before[name] = signal.signal(name, lambda got, _: held.append(got))
    except ValueError:  # not the main thread, where no handlers run
        pass
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _check_network(path: Path, network: Any, spec: ModelSpec, trt: Any) -> None:
    """Check what the parser read: the contract's inputs with their types, float32 outputs, and only the batch dynamic."""
    faults = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        wanted = trt.DataType.INT32 if input_type(tensor.name) is np.int32 else trt.DataType.FLOAT
        dims, image = _dims(tensor), spec.inputs.get(tensor.name)
        if image is None or tensor.dtype != wanted or dims != [-1, *image]:
            faults.append(f"{tensor.name}: {tensor.dtype} {dims}")
    for index in range(network.num_outputs):
        tensor = network.get_output(index)
        if tensor.dtype != trt.DataType.FLOAT:
            faults.append(f"{tensor.name}: {tensor.dtype}")
    if faults or network.num_inputs != len(spec.inputs) or network.num_outputs != len(spec.outputs):
        raise FileFormatError(
            f"{path}: TensorRT reads inputs and outputs from this file that do not match its spec",
            note="; ".join(faults) or f"{network.num_inputs} inputs, {network.num_outputs} outputs",
        )


def _dims(tensor: Any) -> list[int]:
    try:
        return [int(dim) for dim in tensor.shape]
    except ValueError:  # unknown rank: its length is negative
        return []


def _set_flags(config: Any, trt: Any, options: BuildOptions) -> None:
    flags = trt.BuilderFlag
    # on by default in TensorRT; TensorRT-RTX has the flag too
    (config.set_flag if options.tf32 else config.clear_flag)(flags.TF32)
    if options.refit:
        config.set_flag(flags.REFIT)
    if options.strip:
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)  # with the same weights, no speed is lost
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level


def _set_targets(config: Any, trt: Any, options: BuildOptions) -> None:
    """TensorRT-RTX only: compute capabilities by name, SM86 for 8.6."""
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    names = ["SM" + target.replace(".", "") for target in options.targets]
    if unknown := [target for target, name in zip(options.targets, names, strict=True) if name not in known]:
        raise InputError(
            f"TensorRT-RTX does not build for compute capability {unknown[0]}",
            note=f"it knows {', '.join(f'{name[2:-1]}.{name[-1]}' for name in known)}",
            hint="without --target the plan is for 8.0 and later",
        )
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(known[name], index)


def _monitor(trt: Any, progress: Callable[[str, int, int], None] | None, cancel: Callable[[], bool] | None) -> Any:
    """An IProgressMonitor. No exception may leave its callbacks, which are called from C++."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if cancel is not None and cancel():
                    self.stopped = True
                elif progress is not None:
                    progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            except BaseException as error:
                self.stopped, self.error = True, error
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _parser_errors(parser: Any) -> str:
    """All errors of the parser: it keeps a list, not only the last one."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node()} {error.node_name()!r} ({error.node_operator()})" if error.node() >= 0 else "model"
        lines.append(f"{where}: {error.desc()}")
    return "; ".join(lines)
