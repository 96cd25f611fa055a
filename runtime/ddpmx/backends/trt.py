"""Runs a plan on the GPU by TensorRT, from 10.3 on, or TensorRT-RTX.

:class:`TrtEngine` is an open plan, a :class:`DeviceBackend <ddpmx.backends.base.DeviceBackend>`; its networks are its
execution contexts.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ddpmx.backends.base import EXECUTORS, NO_CONDITIONING
from ddpmx.device.discovery import Device, Gpus, ask_for_lazy_loading, gpus
from ddpmx.device.driver import Driver, Handle
from ddpmx.errors import BackendError, FileFormatError, InputError, OutputError
from ddpmx.formats import plan_file
from ddpmx.formats.atomic import atomic_write, make_folder
from ddpmx.formats.envelope import wrap
from ddpmx.formats.plan_file import PlanInfo
from ddpmx.formats.spec import ModelSpec, input_type
from ddpmx.trt import library as trt_library
from ddpmx.trt.compat import check_fits
from ddpmx.trt.library import Library

USED = {
    "Runtime": ("engine_host_code_allowed", "deserialize_cuda_engine"),
    "ICudaEngine": (
        "name",
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_location",
        "num_optimization_profiles",
        "get_tensor_profile_shape",
        "create_execution_context",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "infer_shapes",
        "execute_async_v3",
    ),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TensorLocation": ("DEVICE",),
    "DataType": ("FLOAT", "INT32"),
}
"""Every name of TensorRT that this module uses; a test looks them up in the bindings of 10.3, 10.16 and 11.4."""

USED_RTX = {
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": (
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
    ),
    "IRuntimeCache": ("deserialize", "serialize"),
    "CudaGraphStrategy": ("DISABLED",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
}
"""The names that it also uses where :attr:`Library.is_rtx`: of TensorRT-RTX alone, or of later TensorRTs as well."""


class TrtEngine:
    """An open plan, its weights on the device. A context manager; close its networks first.

    Args:
        path: the plan.
        trust_host_code: whether the plan may contain code for the CPU, which loading it runs.
        cache: a folder in which TensorRT-RTX keeps the kernels that it compiles for this GPU; None for no cache.
        driver: the GPU; by default one of its own, closed with the engine.
        library: which TensorRT; by default the one that the plan needs.
        devices: the GPUs; by default those that the driver lists.

    Attributes:
        info: the plan's description of itself.
        driver: the GPU.
        stream: 0: its networks run in any stream.
        executors: all of them.
        batches: smallest and largest batch of each optimization profile.

    Raises:
        FileFormatError, SpecError: not a plan, or one that is damaged, contains host code or breaks the contract.
        BackendError: it cannot run here; the error names what is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        trust_host_code: bool = False,
        cache: Path | None = None,
        driver: Driver | None = None,
        library: Library | None = None,
        devices: Gpus | None = None,
    ) -> None:
        ask_for_lazy_loading()
        self.path = Path(path)
        self.info = info = plan_file.read_plan(self.path, trust_host_code=trust_host_code)
        found = devices or gpus()
        missing: BackendError | None = None
        if library is None and found.devices:
            try:
                library = trt_library.load(info.flavour)
            except BackendError as error:
                missing = error
        try:
            check_fits(
                self.path,
                info,
                version=library.version if library else None,
                platform=trt_library.host_platform(),
                gpus=found,
            )
        except BackendError as error:
            raise error from missing
        assert library is not None, "check_fits requires it"
        if info.engine.options.get("strip"):
            raise BackendError(
                f"{path}: a plan without weights, which this version of ddpmx does not fill",
                hint=f"ddpmx build {shlex.quote(info.engine.source)}, without --strip",
            )
        self.library, self.device = library, found.devices[0]
        self.stream, self.executors = 0, EXECUTORS
        self._making = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_file: Path | None = None
        with contextlib.ExitStack() as undo:
            self.driver = driver if driver is not None else undo.enter_context(Driver())
            undo.callback(self._drop)
            with self.driver.current():
                self._deserialize(trust_host_code)
                self.batches = _check_io(self.path, library, self._engine, info.spec)
                if library.is_rtx:
                    self._configure(cache)
            self._closing = undo.pop_all()

    def __enter__(self) -> TrtEngine:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.info.spec

    @property
    def description(self) -> str:
        """Library, version and device."""
        return f"{self.library} on {self.device.name}, SM {self.device.sm}"

    def close(self) -> None:
        """Save the cache of compiled kernels, and free everything. Safe to call again."""
        if self._engine is not None:
            self.save_cache()
        self._closing.close()

    def check_batch(self, batch: int) -> int:
        """The profile for this batch: the one with the smallest range, which was tuned for the fewest other sizes.

        Raises:
            InputError: none takes it. It names the plan's ranges.
        """
        fitting = [(high - low, index) for index, (low, high) in enumerate(self.batches) if low <= batch <= high]
        if not fitting:
            ranges = ", ".join(f"{low}…{high}" for low, high in self.batches)
            largest = max(high for _, high in self.batches)
            raise InputError(
                f"{self.path}: the plan takes batches of {ranges}, not {batch}",
                hint=f"--batch {largest}, or a plan for more: ddpmx build {shlex.quote(self.info.engine.source)} "
                f"--batch 1,{batch},{batch}",
            )
        return min(fitting)[1]

    def network(
        self,
        batch: int,
        *,
        x: int,
        t: int,
        out: int,
        var: int = 0,
        conditioning: Mapping[str, int] = NO_CONDITIONING,
        stream: int,
    ) -> TrtContext:
        """An execution context of its own, see :meth:`ddpmx.backends.base.DeviceBackend.network`.

        Args:
            batch: the number of images.
            x, t, out, var: device addresses. If the plan has an output ``var`` and ``var`` is 0, it gets memory of its own.
            conditioning: those of its conditioning inputs, by name.
            stream: the stream in which the profile is set; it is not kept.

        Raises:
            BackendError: TensorRT refuses, or its memory does not suffice.
            InputError: the plan does not take this batch.
        """
        with self._making:  # contexts may run in several threads, but share one cache of compiled kernels
            return TrtContext(self, batch, {"x": x, "t": t, **conditioning, self.spec.prediction: out}, var, stream)

    def save_cache(self) -> None:
        """Save the kernels that TensorRT-RTX has compiled, for a faster next start. A failure is ignored."""
        if self._cache is None or self._cache_file is None:
            return
        with contextlib.suppress(OutputError, BackendError, RuntimeError, TypeError):
            with self.driver.current():
                data = bytes(memoryview(self._cache.serialize()))
            if data and data != _content(self._cache_file):
                with atomic_write(self._cache_file) as stream:
                    stream.write(data)

    def _drop(self) -> None:
        """Release TensorRT's objects in the order that it requires, each while the context is current."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BackendError):
                stack.enter_context(self.driver.current())
            self._cache = None
            self._config = None
            self._engine = None
            self._runtime = None

    def _deserialize(self, trust_host_code: bool) -> None:
        library, path = self.library, self.path
        library.logger.lines.clear()
        self._runtime = library.made("runtime", lambda: library.trt.Runtime(library.logger))
        self._runtime.engine_host_code_allowed = trust_host_code
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # mapped, since on a Jetson a copy would take memory from the GPU
            self._engine = library.made(f"engine of {path}", lambda: self._runtime.deserialize_cuda_engine(data))
        name = str(self._engine.name)
        if name != f"{self.spec.to_text()} {wrap(plan_file.RECORD_PREFIX, self.info.engine.to_json())}":
            raise FileFormatError(
                f"{path}: {library} reads another network name from this plan than the file holds",
                note=ascii(name)[:200],
                hint=plan_file.rebuild_command(path, self.info.engine),
            )

    def _configure(self, folder: Path | None) -> None:
        """Configure TensorRT-RTX, which compiles kernels when it runs.

        Its own CUDA graphs would conflict with ours. Unless it specialises kernels at once, it begins with kernels for any
        shape, and those would be captured for good.
        """
        trt, library = self.library.trt, self.library
        self._config = library.made("configuration", self._engine.create_runtime_config)
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._config.dynamic_shapes_kernel_specialization_strategy = eager
        if folder is None:
            return
        with contextlib.suppress(OutputError):
            self._cache_file = make_folder(folder) / cache_name(library, self.device, self.info)
        cache = library.made("runtime cache", self._config.create_runtime_cache)
        data = _content(self._cache_file) if self._cache_file else b""
        if data:
            with contextlib.suppress(RuntimeError, TypeError):
                cache.deserialize(data)  # False for a cache of another version or GPU, which starts empty then
        if self._config.set_runtime_cache(cache):
            self._cache = cache
        library.logger.lines.clear()  # its messages about an old cache explain no later error


class TrtContext:
    """One execution context, bound to a batch size and to device memory. Close it before its engine.

    See :meth:`TrtEngine.network`.

    Raises:
        BackendError: TensorRT refuses.
    """

    def __init__(self, engine: TrtEngine, batch: int, addresses: dict[str, int], var: int, stream: int) -> None:
        profile = engine.check_batch(batch)
        self._engine, self._library = engine, engine.library
        self._context: Any = None
        self._own_var: Handle | None = None
        # TensorRT-RTX compiles kernels for this batch at the first run, and promises them only from the next one on
        self._general = engine.library.is_rtx
        try:
            with engine.driver.current():
                self._prepare(batch, profile, addresses, var, stream)
        except BaseException:
            self.close()
            raise

    def _prepare(self, batch: int, profile: int, addresses: dict[str, int], var: int, stream: int) -> None:
        engine, library = self._engine, self._library
        library.logger.lines.clear()
        arguments = () if engine._config is None else (engine._config,)
        make: Callable[[], Any] = lambda: engine._engine.create_execution_context(*arguments)  # noqa: E731
        self._context = context = library.made("execution context", make)
        _demand(library, context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        engine.driver.wait_for_stream(stream, "choosing a profile")
        for name, dims in engine.spec.inputs.items():
            shape = (batch, *dims)
            _demand(library, context.set_input_shape(name, shape), f"{name} of shape {shape}")
        if engine.spec.learns_variance:
            if not var:  # the engine writes it, wanted or not
                self._own_var = engine.driver.allocate(4 * batch * math.prod(engine.spec.shape), "the variance")
                var = self._own_var.value
            addresses = addresses | {"var": var}
        for name, address in addresses.items():
            _demand(library, context.set_tensor_address(name, address), f"the address {address:#x} for {name}")
        if unknown := context.infer_shapes():
            raise BackendError(f"{library} does not know the shapes of {', '.join(unknown)}", note=library.last_words())

    def enqueue(self, stream: int) -> None:
        """Put one run into a stream, and wait for nothing.

        Raises:
            BackendError: TensorRT refuses; the note is its own last message.
        """
        if self._context is None:
            raise BackendError("the execution context is closed")
        if self._general:
            self._general = False
            self._execute(stream)
        self._execute(stream)

    def _execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise BackendError(
                f"{self._library} refuses to run the network",
                note=self._library.last_words() or None,
                hint="`ddpmx doctor` shows the driver and the libraries that are loaded",
            )

    def close(self) -> None:
        """Free its memory on the device. Wait for the stream first."""
        if self._context is not None:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(BackendError):
                    stack.enter_context(self._engine.driver.current())
                self._context = None
        if self._own_var is not None:
            self._own_var.close()

    def __enter__(self) -> TrtContext:
        """The context itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()


def cache_name(library: Library, device: Device, info: PlanInfo) -> str:
    """The cache's file name: a cache is valid for one version and one GPU, and holds one plan here."""
    gpu = "".join(c if c.isalnum() else "-" for c in device.name)
    return f"{library.flavour}-{library.version}-{gpu}-{info.engine.key[:16]}.runtime".lower()


def _check_io(path: Path, library: Library, engine: Any, spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Check inputs and outputs against the contract.

    Returns:
        Smallest and largest batch of each profile.

    Raises:
        FileFormatError: they differ; the note names them.
    """
    trt, image = library.trt, list(spec.shape)
    inside, outside = trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT
    types = {name: trt.DataType.INT32 if input_type(name) is np.int32 else trt.DataType.FLOAT for name in spec.inputs}
    wanted = {name: (inside, types[name], list(dims)) for name, dims in spec.inputs.items()}
    wanted |= dict.fromkeys(spec.outputs, (outside, trt.DataType.FLOAT, image))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    faults = [f"no {name}" for name in wanted if name not in names]
    for name in names:
        mode, dtype = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        dims = [int(dim) for dim in engine.get_tensor_shape(name)]
        if (
            (mode, dtype, dims[1:]) != wanted.get(name)
            or not dims
            or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
        ):
            faults.append(f"{name}: {mode} {dtype} {dims}")
    profiles = []
    if not faults:
        for index in range(engine.num_optimization_profiles):
            ranges = [[dims[0] for dims in engine.get_tensor_profile_shape(name, index)] for name in spec.inputs]
            low, high = max(r[0] for r in ranges), min(r[2] for r in ranges)
            profiles.append((int(low), int(high)))
        if not profiles:
            faults.append("no profile of batches")
    if faults:
        raise FileFormatError(
            f"{path}: the plan has other inputs and outputs than the contract asks for",
            note="; ".join(faults),
            hint="build it from what `ddpmx export` writes",
        )
    return tuple(profiles)


def _demand(library: Library, granted: bool, what: str) -> None:
    """Raise if one of TensorRT's setters returned False; it logs the reason."""
    if not granted:
        raise BackendError(f"{library} does not take {what}", note=library.last_words() or None)


def _content(file: Path) -> bytes:
    """The content of a file; empty if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError:
        return b""
