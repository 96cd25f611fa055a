"""A CUDA driver without a GPU: an object with the functions of libcuda that :class:`ddpmx.device.driver.Driver` calls.

"Device memory" is the host's, kernels are ``cuda_on_host``'s. What is put into a stream runs when it is waited for and not
before, one kernel for each query of an event, so that a missing wait shows. It is as strict as CUDA: arguments must have
the declared types, a context must be current, a capture must not be disturbed, nothing is freed twice. Time, weak memory
and what a real driver compiles are not simulated: it tests control flow only.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ddpmx.device.driver import FUNCTIONS

ERRORS = {
    1: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    2: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    201: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    222: ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."),
    400: ("CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"),
    500: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    600: ("CUDA_ERROR_NOT_READY", "device not ready"),
    700: ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
    801: ("CUDA_ERROR_NOT_SUPPORTED", "operation not supported"),
    900: ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"),
    901: ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"),
}
CONDITIONAL = ("cuGraphConditionalHandleCreate", "cuGraphAddNode_v2", "cuStreamBeginCaptureToGraph")

WITHOUT_CONTEXT = re.compile(r"cuInit|cuDriver|cuGetError|cuDevice|cuCtx")
FREEING = re.compile(r"Free|Destroy|Unload|Release|Pop|Push|GetError|EndCapture")

Work = Callable[[], Iterator[None]]
"""One entry of a stream or graph. It yields after each kernel."""


class Failure(Exception):  # noqa: N818
    """The error code that a function returns."""

    def __init__(self, code: int) -> None:
        self.code = code


class Stream:
    def __init__(self) -> None:
        self.queue: deque[Iterator[None]] = deque()
        self.capture: list[Work] | None = None
        self.into = 0
        self.invalidated = False


class Function:
    """A function as ``ctypes`` has it: it checks its arguments against ``argtypes`` and returns a number."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        assert self.restype is ctypes.c_int
        assert len(arguments) == len(self.argtypes), self.name
        for argtype, argument in zip(self.argtypes, arguments, strict=True):
            argtype.from_param(argument)  # TypeError if it does not fit
        plain = [
            a if hasattr(a, "_obj") or isinstance(a, ctypes.Array | bytes) else getattr(a, "value", a)
            for a in arguments
        ]
        return self.cuda._called(self.name, plain)


class FakeCuda:
    """The library. ``kernels`` come from ``cuda_on_host.build``.

    Attributes:
        live: kind → handles that were made and not freed.
        calls: names of all calls, in their order.
        fail: name → (which call of it fails, from 1, or 0 for all; the error).
        fail_at: which call of any function fails, from 1; calls that free or report are not counted.
        faults: misuse that a real driver may answer with undefined behaviour.
        lacking: functions that the driver does not export.
        burst: how many kernels run at each query of an event.
        broken: the error that every call which runs kernels gives from now on.
    """

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.kernels = kernels
        self.live: dict[str, dict[int, Any]] = {}
        self.calls: list[str] = []
        self.fail: dict[str, tuple[int, int]] = {}
        self.fail_at, self.counted = 0, 0
        self.faults: list[str] = []
        self.lacking: tuple[str, ...] = ()
        self.launches: list[str] = []
        self.retained = 0
        self.conditions: dict[int, int] = {}
        self.on_kernel: Callable[[str], None] = lambda name: None
        self.broken = 0
        self.burst = 1
        self._next = 0x1000
        self.legacy = Stream()  # the default stream always exists
        self._contexts = threading.local()

    def __getattr__(self, name: str) -> Function:
        if name not in FUNCTIONS or name in self.lacking:
            raise AttributeError(f"undefined symbol: {name}")
        function = Function(self, name)
        setattr(self, name, function)
        return function

    def alive(self) -> dict[str, int]:
        """How many of each kind are not freed."""
        return {kind: len(handles) for kind, handles in self.live.items() if handles}

    def count(self, *names: str) -> int:
        return sum(self.calls.count(name) for name in names)

    def enqueue(self, stream: int, work: Callable[[], None], name: str = "engine") -> None:
        """What a library such as TensorRT does: put kernels of its own into a stream."""

        def run() -> Iterator[None]:
            self.launches.append(name)
            self.on_kernel(name)
            work()
            yield

        self._put(stream, run)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _called(self, name: str, arguments: list[Any]) -> int:
        self.calls.append(name)
        try:
            if not WITHOUT_CONTEXT.match(name) and not self._stack():
                self.faults.append(f"{name} without a context")
                raise Failure(201)
            if not FREEING.search(name):
                self.counted += 1
                if self.counted == self.fail_at:
                    raise Failure(700)
            at, code = self.fail.get(name, (-1, 0))
            if at in (0, self.calls.count(name)):
                raise Failure(code)
            getattr(self, f"_{name}")(*arguments)
        except Failure as failure:
            return failure.code
        return 0

    def _stack(self) -> list[int]:
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def _make(self, kind: str, thing: Any, handle: int = 0) -> int:
        self._next += 0x10
        handle = handle or self._next
        self.live.setdefault(kind, {})[handle] = thing
        return handle

    def _get(self, kind: str, handle: int) -> Any:
        if handle not in self.live.get(kind, {}):
            self.faults.append(f"{handle} is not a {kind}")
            raise Failure(400)
        return self.live[kind][handle]

    def _free(self, kind: str, handle: int) -> Any:
        thing = self._get(kind, handle)
        del self.live[kind][handle]
        return thing

    def _stream(self, handle: int) -> Stream:
        return self.legacy if handle == 1 else self._get("stream", handle)

    def _put(self, handle: int, work: Work) -> None:
        stream = self._stream(handle)
        if stream.capture is not None:
            stream.capture.append(work)
        else:
            stream.queue.append(work())

    def _advance(self, stream: Stream, until: Callable[[], bool] = lambda: False, kernels: int = 1 << 60) -> None:
        """Run what is in the stream."""
        while stream.queue and kernels and not until():
            if self.broken:
                raise Failure(self.broken)
            try:
                next(stream.queue[0])
                kernels -= 1
            except StopIteration:
                stream.queue.popleft()

    def _undisturbed(self) -> None:
        """Waiting and allocating invalidate a capture of this thread's."""
        for stream in self.live.get("stream", {}).values():
            if stream.capture is not None:
                stream.invalidated = True
                raise Failure(900)

    # --- functions ---------------------------------------------------------------------------------------------------

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDriverGetVersion(self, out: Any) -> None:
        out._obj.value = 12060

    def _cuGetErrorName(self, code: int, out: Any) -> None:
        if code not in ERRORS:
            raise Failure(1)
        out._obj.value = ERRORS[code][0].encode()

    def _cuGetErrorString(self, code: int, out: Any) -> None:
        if code not in ERRORS:
            raise Failure(1)
        out._obj.value = ERRORS[code][1].encode()

    def _cuDeviceGet(self, out: Any, ordinal: int) -> None:
        out._obj.value = ordinal

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> None:
        assert attribute == 16
        out._obj.value = 1

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        self.retained += 1
        out._obj.value = 0xC0

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        self.retained -= 1

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        assert context == 0xC0
        self._stack().append(context)

    def _cuCtxPopCurrent_v2(self, out: Any) -> None:
        out._obj.value = self._stack().pop()

    def _cuMemAlloc_v2(self, out: Any, size: int) -> None:
        self._undisturbed()
        buffer = ctypes.create_string_buffer(b"\xa5" * (size + 512))
        out._obj.value = self._make("memory", (buffer, size), -(-ctypes.addressof(buffer) // 256) * 256)

    def _cuMemFree_v2(self, address: int) -> None:
        buffer, _ = self._free("memory", address)
        ctypes.memset(buffer, 0xDD, len(buffer))
        if any(iterator for stream in self.live.get("stream", {}).values() for iterator in stream.queue):
            self.faults.append("memory is freed while kernels may use it")

    def _cuMemHostAlloc(self, out: Any, size: int, flags: int) -> None:
        assert flags == 3
        buffer = ctypes.create_string_buffer(size)
        out._obj.value = self._make("pinned", buffer, ctypes.addressof(buffer))

    def _cuMemFreeHost(self, address: int) -> None:
        self._free("pinned", address)

    def _cuMemHostGetDevicePointer_v2(self, out: Any, address: int, flags: int) -> None:
        self._get("pinned", address)
        out._obj.value = address

    def _move(self, stream: int, to: int, source: int, size: int, device: int, keep: object = None) -> None:
        self._undisturbed()
        if not any(a <= device and device + size <= a + room for a, (_, room) in self.live["memory"].items()):
            self.faults.append("a copy beyond what was allocated")
            raise Failure(1)

        def run() -> Iterator[None]:
            ctypes.memmove(to, source, size)
            _ = keep
            yield

        self._put(stream, run)

    def _cuMemcpyHtoDAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        self._move(stream, to, source, size, to)

    def _cuMemcpyDtoHAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        self._move(stream, to, source, size, source)

    def _cuMemcpyDtoDAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        if to < source + size and source < to + size:
            self.faults.append("a copy onto itself")
        self._move(stream, to, source, size, to)

    def _cuMemsetD32Async(self, to: int, value: int, count: int, stream: int) -> None:
        assert value == 0
        zeros = ctypes.create_string_buffer(4 * count)
        self._move(stream, to, ctypes.addressof(zeros), 4 * count, to, keep=zeros)

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = (8 << 30) - sum(n for _, n in self.live.get("memory", {}).values()), 8 << 30

    def _cuPointerGetAttribute(self, out: Any, attribute: int, address: int) -> None:
        assert attribute == 9
        if not any(a <= address < a + room for a, (_, room) in self.live.get("memory", {}).items()):
            raise Failure(1)
        out._obj.value = 0

    def _cuStreamCreate(self, out: Any, flags: int) -> None:
        assert flags == 1
        out._obj.value = self._make("stream", Stream())

    def _cuStreamDestroy_v2(self, stream: int) -> None:
        if self._free("stream", stream).capture is not None:
            self.faults.append("a stream is freed while it captures")

    def _cuStreamSynchronize(self, stream: int) -> None:
        self._undisturbed()
        self._advance(self._stream(stream))

    def _cuStreamWaitEvent(self, handle: int, event: int, flags: int) -> None:
        assert flags == 0
        other, _ = mine = self._get("event", event)[0]

        def run() -> Iterator[None]:
            self._advance(other, lambda: mine[1])
            return
            yield

        self._put(handle, run)

    def _cuStreamIsCapturing(self, handle: int, out: Any) -> None:
        stream = self._stream(handle)
        out._obj.value = 0 if stream.capture is None else 2 if stream.invalidated else 1

    def _cuStreamBeginCapture_v2(self, handle: int, mode: int) -> None:
        assert mode == 1, "the capture is not thread-local"
        stream = self._stream(handle)
        assert stream.capture is None
        stream.capture, stream.into, stream.invalidated = [], 0, False

    def _cuStreamBeginCaptureToGraph(
        self, handle: int, graph: int, dependencies: None, data: None, count: int, mode: int
    ) -> None:
        self._cuStreamBeginCapture_v2(handle, mode)
        stream = self._stream(handle)
        stream.capture, stream.into = self._body(graph), graph

    def _body(self, graph: int) -> list[Work]:
        _, node = self._owner(graph)
        return node.body

    def _owner(self, body: int) -> tuple[int, While]:
        """The graph, and its WHILE node, that a body belongs to."""
        for graph, nodes in self.live["graph"].items():
            for node in nodes:
                if getattr(node, "body_handle", None) == body:
                    return graph, node
        raise Failure(400)

    def _cuStreamEndCapture(self, handle: int, out: Any) -> None:
        stream = self._stream(handle)
        assert stream.capture is not None, "there was no capture"
        nodes, into = stream.capture, stream.into
        stream.capture = None
        if stream.invalidated:
            if into:  # a real driver frees the body here, and crashes if its graph is destroyed
                self._free("graph", self._owner(into)[0])
            raise Failure(901)
        out._obj.value = into or self._make("graph", nodes)

    def _cuEventCreate(self, out: Any, flags: int) -> None:
        out._obj.value = self._make("event", [None])

    def _cuEventDestroy_v2(self, event: int) -> None:
        self._free("event", event)

    def _cuEventRecord(self, event: int, handle: int) -> None:
        state, stream = self._get("event", event), self._stream(handle)
        mine = [stream, False]
        state[0] = mine

        def run() -> Iterator[None]:
            mine[1] = True
            return
            yield

        self._put(handle, run)

    def _cuEventQuery(self, event: int) -> None:
        self._undisturbed()
        stream, _ = mine = self._get("event", event)[0]
        self._advance(stream, lambda: mine[1], kernels=self.burst)
        if not mine[1]:
            raise Failure(600)

    def _cuEventSynchronize(self, event: int) -> None:
        self._undisturbed()
        stream, _ = mine = self._get("event", event)[0]
        self._advance(stream, lambda: mine[1])
        assert mine[1], "an event that never comes"

    def _cuEventElapsedTime(self, out: Any, begin: int, end: int) -> None:
        assert self._get("event", begin)[0][1]
        assert self._get("event", end)[0][1]
        out._obj.value = 1.5

    def _cuModuleLoadDataEx(self, out: Any, image: bytes, count: int, options: Any, values: Any) -> None:
        assert image.endswith(b"\0")
        assert (count, list(options)) == (2, [5, 6])
        if b"cudaGraphSetConditional" in image and self.lacking:
            ctypes.memmove(values[0], b"ptxas fatal: Unresolved extern function\0", 40)
            raise Failure(222)
        out._obj.value = self._make("module", set(re.findall(rb"\.entry (\w+)", image)))

    def _cuModuleUnload(self, module: int) -> None:
        self._free("module", module)

    def _cuModuleGetFunction(self, out: Any, module: int, name: bytes) -> None:
        if name not in self._get("module", module):
            raise Failure(500)
        out._obj.value = self._make("function", name.decode())

    def _cuFuncGetAttribute(self, out: Any, attribute: int, function: int) -> None:
        self._undisturbed()  # it loads
        self._get("function", function)
        assert attribute == 4
        out._obj.value = 64

    def _cuLaunchKernel(self, function: int, *arguments: Any) -> None:
        gx, gy, gz, bx, by, bz, shared, stream, params, extra = arguments
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, None)
        name = self._get("function", function)
        values = [ctypes.c_uint64.from_address(pointer).value for pointer in params]  # now: the caller's memory goes
        assert len(values) == (2 if name == "ddpmx_condition" else 1)

        def run() -> Iterator[None]:
            self.launches.append(name)
            if name == "ddpmx_condition":
                self.conditions[values[1]] = self.kernels.go_on(*values)
            else:
                launch = getattr(self.kernels, name.removeprefix("ddpmx_"))
                assert launch(values[0], gx, bx, 0), "not a legal launch"
            self.on_kernel(name)
            yield

        self._put(stream, run)

    def _cuGraphCreate(self, out: Any, flags: int) -> None:
        self._undisturbed()
        out._obj.value = self._make("graph", [])

    def _cuGraphDestroy(self, graph: int) -> None:
        self._free("graph", graph)

    def _cuGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> None:
        nodes = self._get("graph", graph)
        if any(getattr(node, "body", None) == [] for node in nodes):
            raise Failure(1)
        out._obj.value = self._make("executable", list(nodes))

    def _cuGraphExecDestroy(self, executable: int) -> None:
        self._free("executable", executable)

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        for work in self._get("executable", executable):
            self._put(stream, work)

    def _cuGraphConditionalHandleCreate(self, out: Any, graph: int, context: int, default: int, flags: int) -> None:
        self._get("graph", graph)
        assert (context, default, flags) == (0xC0, 1, 1)
        self._next += 1
        out._obj.value = self._next << 32

    def _cuGraphAddNode_v2(self, out: Any, graph: int, dependencies: None, data: None, count: int, params: Any) -> None:
        params = params._obj
        assert (params.type, params.conditional.type, params.conditional.size) == (13, 1, 1)
        assert params.conditional.ctx == 0xC0
        node = While(self, params.conditional.handle)
        self._get("graph", graph).append(node)
        out._obj.value = 0x77
        params.conditional.phGraph_out = ctypes.cast(node.bodies, ctypes.POINTER(ctypes.c_void_p))


class While:
    """A WHILE node: its body runs as long as its condition is not 0. At launch it is 1."""

    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.cuda, self.handle = cuda, handle
        self.body: list[Work] = []
        self.body_handle = 0x600D0000 + (handle >> 32) % 0x10000
        self.bodies = (ctypes.c_void_p * 1)(self.body_handle)

    def __call__(self) -> Iterator[None]:
        self.cuda.conditions[self.handle] = 1
        while self.cuda.conditions[self.handle]:
            assert self.cuda.conditions[self.handle] == 1, "a condition of another node"
            for work in self.body:
                yield from work()
