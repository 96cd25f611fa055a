"""The part of the CUDA driver API that a chain needs, by ctypes, with no toolkit or package of any version.

Functions are looked up by the names that the driver exports (``cuMemAlloc_v2``), whose meaning never changes; their
arguments are in :data:`FUNCTIONS`, and a test compares them with ``cuda.h``. Importing this module loads no driver.

Every function that allocates or launches needs the context to be current in the calling thread: work inside
``with driver.current():``.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_longlong, c_size_t, c_uint, c_uint64, c_void_p
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import NDArray

from ddpmx.device.discovery import DRIVER, ask_for_lazy_loading
from ddpmx.errors import BackendError


class ConditionalNodeParams(ctypes.Structure):
    """``CUDA_CONDITIONAL_NODE_PARAMS``."""

    _fields_ = [
        ("handle", c_uint64),
        ("type", c_int),
        ("size", c_uint),
        ("phGraph_out", POINTER(c_void_p)),
        ("ctx", c_void_p),
    ]


class _AnyNodeParams(ctypes.Union):
    _fields_ = [("reserved1", c_longlong * 29), ("conditional", ConditionalNodeParams)]


class GraphNodeParams(ctypes.Structure):
    """``CUgraphNodeParams``, with the fields of conditional nodes only."""

    _anonymous_ = ("any",)
    _fields_ = [("type", c_int), ("reserved0", c_int * 3), ("any", _AnyNodeParams), ("reserved2", c_longlong)]


ENUMS = {
    "CUDA_ERROR_NOT_READY": 600,
    "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 16,
    "CU_EVENT_BLOCKING_SYNC": 1,
    "CU_EVENT_DISABLE_TIMING": 2,
    "CU_FUNC_ATTRIBUTE_NUM_REGS": 4,
    "CU_GRAPH_COND_ASSIGN_DEFAULT": 1,
    "CU_GRAPH_COND_TYPE_WHILE": 1,
    "CU_GRAPH_NODE_TYPE_CONDITIONAL": 13,
    "CU_JIT_ERROR_LOG_BUFFER": 5,
    "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES": 6,
    "CU_MEMHOSTALLOC_DEVICEMAP": 2,
    "CU_MEMHOSTALLOC_PORTABLE": 1,
    "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9,
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1,
    "CU_STREAM_NON_BLOCKING": 1,
}
"""The numbers of cuda.h's constants."""

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemsetD32Async": (c_uint64, c_uint, c_size_t, c_void_p),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamIsCapturing": (c_void_p, POINTER(c_int)),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuModuleLoadDataEx": (POINTER(c_void_p), c_void_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGraphCreate": (POINTER(c_void_p), c_uint),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    # since CUDA 12.3 and 12.4: a driver without them runs everything but a WHILE node
    "cuGraphConditionalHandleCreate": (POINTER(c_uint64), c_void_p, c_void_p, c_uint, c_uint),
    "cuGraphAddNode_v2": (POINTER(c_void_p), c_void_p, c_void_p, c_void_p, c_size_t, POINTER(GraphNodeParams)),
    "cuStreamBeginCaptureToGraph": (c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_int),
}
"""The arguments of the functions. All of them return a CUresult."""

_LOG = 4096
_LOST = "the process has lost the GPU: end it and start again; `dmesg` names the fault as an Xid"
_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "a smaller batch, or end what else uses the GPU's memory",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_LAUNCH_TIMEOUT": _LOST,
    "CUDA_ERROR_ECC_UNCORRECTABLE": _LOST,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU to itself: see nvidia-smi",
}


class Handle:
    """A resource of the driver, and the function that frees it. A context manager; closing it again is safe.

    Freeing never raises: the errors that it could report belong to work whose errors were reported before.
    """

    def __init__(self, driver: Driver, value: int, free: str, what: str) -> None:
        self._driver, self._value, self._free, self._what = driver, value, free, what
        driver._live[id(self)] = self

    @property
    def value(self) -> int:
        """The driver's number for it: an address, or a handle.

        Raises:
            BackendError: it was freed.
        """
        if id(self) not in self._driver._live:
            raise BackendError(f"{self._what} was freed already", hint="make a new chain; the old one is closed")
        return self._value

    def close(self) -> None:
        """Free it."""
        if self._driver._live.pop(id(self), None) is not None:
            with contextlib.suppress(BackendError), self._driver.current():
                self._driver.call(self._free, self._value, doing=f"freeing {self._what}")

    def abandon(self) -> None:
        """Never free it before the process ends, since freeing would wait for a device that does not respond."""
        self._driver._live.pop(id(self), None)

    def __enter__(self: _H) -> _H:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


_H = TypeVar("_H", bound=Handle)


class Pinned(Handle):
    """Host memory that the device accesses as well.

    Attributes:
        device: its address on the device; ``value`` is its address on the host.
    """

    device: int = 0


class Driver:
    """One GPU through the driver API, in its primary context, which TensorRT and torch use as well.

    A context manager; closing frees everything made with it that was not freed yet. Several threads may use it, each
    inside its own ``with driver.current():``; what is made with it is not thread-safe.

    Args:
        ordinal: which GPU, in CUDA's order.
        library: the loaded driver; by default it is loaded here.

    Attributes:
        ordinal: which GPU it is.
        lock, shared: objects shared by all users of the driver, and the lock for them.
        cuda: the newest CUDA that the driver supports, "12.6".
        multiprocessors: how many the GPU has.

    Raises:
        BackendError: there is no driver or no such GPU, or the driver refuses.
    """

    def __init__(self, ordinal: int = 0, *, library: Any = None) -> None:
        ask_for_lazy_loading()
        if library is None:
            try:
                library = ctypes.CDLL(DRIVER)
            except OSError as error:
                raise BackendError(
                    "there is no NVIDIA driver here",
                    note=str(error),
                    hint="`ddpmx doctor` lists what is here; the ONNX file runs on the CPU",
                ) from error
        self._library = library
        self._functions: dict[str, Any] = {}
        self._live: dict[int, Handle] = {}
        self._context: int | None = None
        self.ordinal = ordinal
        self.lock = threading.RLock()
        self.shared: dict[str, object] = {}
        self.call("cuInit", 0, doing="starting CUDA")
        version, device, count = c_int(), c_int(), c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version), doing="asking for the driver's version")
        self.cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
        self.call("cuDeviceGet", ctypes.byref(device), ordinal, doing=f"looking for GPU {ordinal}")
        self._device = device.value
        attribute = ENUMS["CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"]
        self.call("cuDeviceGetAttribute", ctypes.byref(count), attribute, device, doing="counting multiprocessors")
        self.multiprocessors = count.value
        self._context = self._made("cuDevicePrimaryCtxRetain", self._device, doing="starting the GPU")

    def __enter__(self) -> Driver:
        """The driver itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything that is left, the newest first, and release the context. Safe to call again."""
        if self._context is None:
            return
        for handle in reversed(list(self._live.values())):
            handle.close()
        self.shared.clear()
        self._context = None
        with contextlib.suppress(BackendError):
            self.call("cuDevicePrimaryCtxRelease_v2", self._device, doing="releasing the GPU")

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Inside, the context is current in this thread; afterwards the previous one is again.

        Raises:
            BackendError: the driver is closed.
        """
        if self._context is None:
            raise BackendError("the driver was closed", hint="load the file again")
        self.call("cuCtxPushCurrent_v2", self._context, doing="entering the GPU's context")
        try:
            yield
        finally:
            with contextlib.suppress(BackendError):  # it would hide the error from inside
                self._made("cuCtxPopCurrent_v2", doing="leaving the GPU's context")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside :meth:`current`, for foreign code: the previous context is current again.

        That code may switch to another GPU meanwhile.
        """
        self._made("cuCtxPopCurrent_v2", doing="leaving the GPU's context")
        try:
            yield
        finally:
            self.call("cuCtxPushCurrent_v2", self._context, doing="entering the GPU's context")

    def has(self, name: str) -> bool:
        """Whether the driver exports a function."""
        try:
            self._function(name)
        except AttributeError:
            return False
        return True

    def call(self, name: str, *arguments: Any, doing: str, log: Any = None, ready: bool = True) -> bool:
        """Call a function of the driver.

        Args:
            name: of the function, as in :data:`FUNCTIONS`.
            *arguments: its arguments.
            doing: the purpose, which follows "while" in error messages.
            log: a buffer in which the driver explains an error.
            ready: False if CUDA_ERROR_NOT_READY is a result and not an error.

        Returns:
            Whether the result was CUDA_SUCCESS: always True unless ``ready`` is False.

        Raises:
            BackendError: it names the error, the function and the purpose.
        """
        try:
            function = self._function(name)
        except AttributeError as error:
            raise BackendError(
                f"the NVIDIA driver has no {name}, needed for {doing}",
                note=f"it supports CUDA {self.cuda}" if hasattr(self, "cuda") else str(error),
                hint="update the driver",
            ) from error
        code = function(*arguments)
        if code == 0:
            return True
        if code == ENUMS["CUDA_ERROR_NOT_READY"] and not ready:
            return False
        error_name = self._text("cuGetErrorName", code) or f"CUDA error {code}"
        details = [self._text("cuGetErrorString", code), log.value.decode(errors="replace").strip() if log else ""]
        raise BackendError(
            f"{error_name} while {doing}",
            note=": ".join([name, *filter(None, details)]),
            hint=_HINTS.get(error_name),
        )

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._library, name)
            function.argtypes, function.restype = FUNCTIONS[name], c_int
            self._functions[name] = function
        return function

    def _text(self, name: str, code: int) -> str:
        """The driver's name or text for an error; empty if it has none."""
        text = c_char_p()
        try:
            self._function(name)(code, ctypes.byref(text))
        except AttributeError:
            return ""
        return (text.value or b"").decode(errors="replace")

    def _made(self, name: str, *arguments: Any, doing: str) -> int:
        """The handle that a function writes to its first argument."""
        made = c_void_p()
        self.call(name, ctypes.byref(made), *arguments, doing=doing)
        return made.value or 0

    # --- memory ------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, what: str) -> Handle:
        """``size`` bytes of device memory, 256-byte aligned, with undefined content. ``what`` is for error messages."""
        address = c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), size, doing=f"allocating {size} bytes for {what}")
        return Handle(self, address.value, "cuMemFree_v2", what)

    def allocate_pinned(self, size: int, what: str) -> Pinned:
        """``size`` bytes of host memory that the device accesses as well."""
        doing = f"allocating {size} bytes of pinned memory for {what}"
        flags = ENUMS["CU_MEMHOSTALLOC_PORTABLE"] | ENUMS["CU_MEMHOSTALLOC_DEVICEMAP"]
        pinned = Pinned(self, self._made("cuMemHostAlloc", size, flags, doing=doing), "cuMemFreeHost", what)
        address = c_uint64()
        try:
            self.call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), pinned.value, 0, doing=doing)
        except BackendError:
            pinned.close()
            raise
        pinned.device = address.value
        return pinned

    def free_memory(self) -> tuple[int, int]:
        """(free, total): bytes of the GPU's memory, for all processes."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total), doing="reading the free memory")
        return free.value, total.value

    def ordinal_of(self, address: int) -> int:
        """The GPU in whose memory an address is.

        Raises:
            BackendError: it is in no GPU's memory.
        """
        ordinal, attribute = c_int(), ENUMS["CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL"]
        with self.current():
            doing = "locating an array"
            self.call("cuPointerGetAttribute", ctypes.byref(ordinal), attribute, address, doing=doing)
        return ordinal.value

    def copy_in(self, address: int, source: NDArray[Any] | ctypes.Structure, stream: int) -> None:
        """Copy from the host, in stream order. ``source`` must not change until the copy is done."""
        at, size = _memory(source)
        self.call("cuMemcpyHtoDAsync_v2", address, at, size, stream, doing=f"copying {size} bytes to the GPU")

    def copy_out(self, target: NDArray[Any] | ctypes.Structure, address: int, stream: int) -> None:
        """Copy to the host, in stream order. ``target`` is complete once the stream was waited for."""
        at, size = _memory(target)
        self.call("cuMemcpyDtoHAsync_v2", at, address, size, stream, doing=f"copying {size} bytes from the GPU")

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy within the GPU's memory, in stream order. Source and target must not overlap."""
        self.call("cuMemcpyDtoDAsync_v2", to, source, size, stream, doing=f"copying {size} bytes on the GPU")

    def zero(self, address: int, size: int, stream: int) -> None:
        """Fill ``size`` bytes with zeros, in stream order. ``size`` is a multiple of 4."""
        self.call("cuMemsetD32Async", address, 0, size // 4, stream, doing=f"zeroing {size} bytes on the GPU")

    # --- streams and events ------------------------------------------------------------------------------------------

    def stream(self) -> Handle:
        """A stream that waits for no other stream, not even the default one."""
        flags = ENUMS["CU_STREAM_NON_BLOCKING"]
        return Handle(
            self, self._made("cuStreamCreate", flags, doing="making a stream"), "cuStreamDestroy_v2", "a stream"
        )

    def wait_for_stream(self, stream: int, doing: str = "waiting for the GPU") -> None:
        """Wait until everything in a stream is done. Errors of earlier launches are raised here."""
        self.call("cuStreamSynchronize", stream, doing=doing)

    def follow(self, stream: int, other: int) -> None:
        """Have later work in ``stream`` wait for the present work in ``other``. The host does not wait."""
        with self.event() as event:  # the driver keeps it alive as long as a stream waits for it
            self.record(event, other)
            self.call("cuStreamWaitEvent", stream, event.value, 0, doing="waiting for another stream")

    def event(self, *, timing: bool = False) -> Handle:
        """An event; the host sleeps while it waits for it."""
        flags = ENUMS["CU_EVENT_BLOCKING_SYNC"] | (0 if timing else ENUMS["CU_EVENT_DISABLE_TIMING"])
        return Handle(
            self, self._made("cuEventCreate", flags, doing="making an event"), "cuEventDestroy_v2", "an event"
        )

    def record(self, event: Handle, stream: int) -> None:
        """Record the event in a stream: it completes when the present work in the stream is done."""
        self.call("cuEventRecord", event.value, stream, doing="recording an event")

    def has_come(self, event: Handle, doing: str = "querying the GPU") -> bool:
        """Whether a recorded event has completed."""
        return self.call("cuEventQuery", event.value, doing=doing, ready=False)

    def wait_for(self, event: Handle, doing: str = "waiting for the GPU") -> None:
        """Wait for a recorded event."""
        self.call("cuEventSynchronize", event.value, doing=doing)

    def milliseconds(self, begin: Handle, end: Handle) -> float:
        """The time between two events that were made with ``timing`` and have completed."""
        elapsed = c_float()
        doing = "reading the time between two events"
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), begin.value, end.value, doing=doing)
        return elapsed.value

    # --- kernels -----------------------------------------------------------------------------------------------------

    def module(self, ptx: bytes, what: str) -> Handle:
        """PTX, zero-terminated, compiled by the driver for this GPU.

        Raises:
            BackendError: with the log of the driver's compiler.
        """
        log = ctypes.create_string_buffer(_LOG)
        options = (c_int * 2)(ENUMS["CU_JIT_ERROR_LOG_BUFFER"], ENUMS["CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES"])
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG)  # the size is passed in place of a pointer
        made = c_void_p()
        doing = f"compiling {what} for this GPU"
        self.call("cuModuleLoadDataEx", ctypes.byref(made), ptx, 2, options, values, doing=doing, log=log)
        return Handle(self, made.value or 0, "cuModuleUnload", what)

    def function(self, module: Handle, name: str) -> int:
        """A kernel of a module, loaded. It lives as long as the module."""
        doing = f"loading the kernel {name}"
        function = self._made("cuModuleGetFunction", module.value, name.encode(), doing=doing)
        # Lazy loading may happen at the first launch, which may be in a capture, and a capture forbids loading
        registers, attribute = c_int(), ENUMS["CU_FUNC_ATTRIBUTE_NUM_REGS"]
        self.call("cuFuncGetAttribute", ctypes.byref(registers), attribute, function, doing=doing)
        return function

    def launch(self, function: int, grid: int, block: int, stream: int, arguments: Sequence[int], what: str) -> None:
        """Launch a kernel on a one-dimensional grid. All its arguments are 64-bit numbers."""
        values = [c_uint64(value) for value in arguments]
        pointers = (c_void_p * len(values))(*map(ctypes.addressof, values))  # read before the call returns
        self.call(
            "cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, stream, pointers, None, doing=f"launching {what}"
        )

    # --- graphs ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture(self, stream: int, into: tuple[Handle, int] | None = None) -> Iterator[list[Handle]]:
        """Inside, what is put into the stream is recorded instead of run.

        In thread-local mode: other threads do not disturb it. An exception inside ends the capture and frees what was
        recorded.

        Args:
            stream: any but the default stream.
            into: a graph, and the body of a WHILE node in it to record into; by default a new graph. If the capture is
                invalid at its end, the driver has freed the body, and would free it again with the graph, which crashes
                (NVIDIA's bug 6805256). So the graph is never freed then.

        Yields:
            An empty list. After the block it holds the new graph; with ``into`` it stays empty.

        Raises:
            BackendError: something inside cannot be captured.
        """
        mode = ENUMS["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"]
        captured: list[Handle] = []
        begun = False
        try:
            if into is None:
                self.call("cuStreamBeginCapture_v2", stream, mode, doing="beginning a capture")
            else:
                doing = "beginning the capture of a WHILE node's body"
                self.call("cuStreamBeginCaptureToGraph", stream, into[1], None, None, 0, mode, doing=doing)
            begun = True
            yield captured
        except BaseException as error:
            if not begun and isinstance(error, BackendError):
                raise
            with contextlib.suppress(BackendError):  # the capture is invalid anyway
                self._end_capture(stream, captured, into and into[0])
            for graph in captured:
                graph.close()
            raise
        self._end_capture(stream, captured, into and into[0])

    def _end_capture(self, stream: int, captured: list[Handle], owner: Handle | None) -> None:
        graph = c_void_p()
        try:
            self.call("cuStreamEndCapture", stream, ctypes.byref(graph), doing="ending a capture")
        except BackendError:
            if owner is not None:
                owner.abandon()
            raise
        if owner is None and graph.value:
            captured.append(Handle(self, graph.value, "cuGraphDestroy", "a captured graph"))

    def is_capturing(self, stream: int) -> bool:
        """Whether a stream is being captured."""
        status = c_int()
        self.call("cuStreamIsCapturing", stream, ctypes.byref(status), doing="querying a capture")
        return status.value != 0

    def graph(self) -> Handle:
        """An empty graph."""
        return Handle(self, self._made("cuGraphCreate", 0, doing="making a graph"), "cuGraphDestroy", "a graph")

    def add_while(self, graph: Handle) -> tuple[int, int]:
        """Add a WHILE node whose condition is true at each launch, and then set by its body.

        Returns:
            The condition's handle, for ``cudaGraphSetConditional``, and the node's body, an empty graph.

        Raises:
            BackendError: the driver is older than CUDA 12.4, or the platform does not support such nodes.
        """
        handle = c_uint64()
        flags, doing = ENUMS["CU_GRAPH_COND_ASSIGN_DEFAULT"], "making the condition of a WHILE node"
        name = "cuGraphConditionalHandleCreate"
        self.call(name, ctypes.byref(handle), graph.value, self._context, 1, flags, doing=doing)
        params = GraphNodeParams()
        params.type = ENUMS["CU_GRAPH_NODE_TYPE_CONDITIONAL"]
        params.conditional.handle = handle.value
        params.conditional.type = ENUMS["CU_GRAPH_COND_TYPE_WHILE"]
        params.conditional.size = 1
        params.conditional.ctx = self._context
        node = c_void_p()
        doing = "adding a WHILE node"
        self.call(
            "cuGraphAddNode_v2", ctypes.byref(node), graph.value, None, None, 0, ctypes.byref(params), doing=doing
        )
        return handle.value, params.conditional.phGraph_out[0] or 0

    def instantiate(self, graph: Handle, what: str) -> Handle:
        """An executable graph. The graph itself is not needed any more."""
        made = self._made("cuGraphInstantiateWithFlags", graph.value, 0, doing=f"instantiating {what}")
        return Handle(self, made, "cuGraphExecDestroy", what)

    def launch_graph(self, executable: Handle, stream: int, what: str) -> None:
        """Launch an instantiated graph."""
        self.call("cuGraphLaunch", executable.value, stream, doing=f"launching {what}")


def _memory(thing: NDArray[Any] | ctypes.Structure) -> tuple[int, int]:
    """(address, bytes) of an array or a struct."""
    if isinstance(thing, ctypes.Structure):
        return ctypes.addressof(thing), ctypes.sizeof(thing)
    assert thing.flags.c_contiguous, "only contiguous arrays are copied"
    return thing.ctypes.data, thing.nbytes
