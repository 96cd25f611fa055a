"""Other people's arrays where they lie, and results that stay on the GPU: no copy through the host in either direction.

:func:`view` reads what NumPy, PyTorch, CuPy, JAX and the like say about an array of theirs: by ``__dlpack__`` (DLPack up
to 1.x, <https://dmlc.github.io/dlpack>), ``__cuda_array_interface__`` (2 and 3) or ``__array_interface__``.
:class:`DeviceArray` says the same about memory of ours. Importing this module touches no driver.
"""

from __future__ import annotations

import ctypes
import math
import re
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpmx.errors import BackendError, InputError

if TYPE_CHECKING:
    from ddpmx.cuda.driver import Driver, Handle

# --- DLPack, as in dlpack.h --------------------------------------------------------------------------------------------

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
_DEVICES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "a simulator", 10: "ROCm", 11: "ROCm's pinned memory"}
_DEVICES |= {12: "an extension", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA", 18: "Trainium"}

_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
_FOREIGN = {3: "opaque handles", 4: "bfloat16", 7: "float8_e3m4", 8: "float8_e4m3", 9: "float8_e4m3b11fnuz"}
_FOREIGN |= {10: "float8_e4m3fn", 11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz"}
_FOREIGN |= {14: "float8_e8m0fnu", 15: "float6_e2m3fn", 16: "float6_e3m2fn", 17: "float4_e2m1fn"}

_READ_ONLY, _IS_COPIED = 1, 2
_MAX_NDIM = 32  # NumPy 1's


class DLDevice(ctypes.Structure):
    """Kind of device, and which of them."""

    _fields_ = [("type", c_int32), ("id", c_int32)]


class DLDataType(ctypes.Structure):
    """Kind of number, its bits, and how many make an element."""

    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class DLTensor(ctypes.Structure):
    """An array. Strides are in elements, and NULL for C order."""

    _fields_ = [
        ("data", c_void_p),
        ("device", DLDevice),
        ("ndim", c_int32),
        ("dtype", DLDataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    """What a capsule called ``dltensor`` holds."""

    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class DLManagedTensorVersioned(ctypes.Structure):
    """What a capsule called ``dltensor_versioned`` holds. All up to ``flags`` is the same in every version to come."""

    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("dl_tensor", DLTensor),
    ]


_LAYOUTS: tuple[tuple[bytes, bytes, Any], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", DLManagedTensorVersioned),
    (b"dltensor", b"used_dltensor", DLManagedTensor),
)
"""(name, name once it was taken, what it holds)."""


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C API; one of our own, since the types of ``pythonapi``'s are everybody's."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_is_capsule = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, c_char_p)
_pointer = _python("PyCapsule_GetPointer", c_void_p, ctypes.py_object, c_char_p)
_rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, c_char_p)
_keep_for_ever = _python("Py_IncRef", None, ctypes.py_object)
_DELETER = ctypes.PYFUNCTYPE(None, c_void_p)  # with the GIL, as NumPy calls it

for _, _used, _ in _LAYOUTS:
    _keep_for_ever(_used)  # a capsule keeps the pointer to its name, and may outlive this module


def _opened(capsule: object) -> tuple[Any, bytes] | None:
    """What a capsule holds, and its name once it is taken; None if it is none, or was taken before."""
    for name, used, layout in _LAYOUTS:
        if _is_capsule(capsule, name):
            return layout.from_address(_pointer(capsule, name)), used
    return None


class _Hold:
    """Something that must not go before everybody who uses it has. What ends it runs once, and not at Python's exit.

    At exit others may still be using it, and the process takes it along anyway.
    """

    def __init__(self, end: Callable[..., object], *arguments: object) -> None:
        self._finalizer = weakref.finalize(self, end, *arguments)
        self._finalizer.atexit = False

    def end(self) -> None:
        """End it now: nobody has it yet."""
        self._finalizer()

    def abandon(self) -> None:
        """It is never ended."""
        self._finalizer.detach()


def _delete(deleter: int, managed: int) -> None:
    """Give back what a capsule held, by the addresses of its deleter, if it has one, and of the struct."""
    if deleter:
        _DELETER(deleter)(managed)


class _At:
    """An address that NumPy takes for an array, and what has to live as long as that array."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], keeps: object, writable: bool
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, not writable),
            "shape": shape,
            "typestr": dtype.str,
        }
        self._keeps = keeps


# --- arrays of others --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """Where somebody's array lies. It is C-contiguous, aligned, of numbers in this machine's byte order.

    A context manager; closing lets go of the array before the view itself goes. Arrays of :meth:`numpy` keep it longer.
    On a GPU, close it when what reads it has run, not when it is in a stream: the owner may give the memory away at once.

    Attributes:
        address: of its first element, on the GPU or the host.
        shape: of any length up to 32.
        dtype: NumPy's name for what it holds.
        on_device: whether it is a GPU's memory.
        ordinal: which GPU's, in CUDA's order; None on the host, or if the array does not say.
        wait_for: the stream after whose present work it has its content (1 is the default stream), or None if nothing
            is to be waited for.
        writable: whether it may be written to: it was asked for.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    on_device: bool = False
    ordinal: int | None = None
    wait_for: int | None = None
    writable: bool = False
    _kept: list[object] = field(default_factory=list, repr=False)

    def numpy(self) -> NDArray[Any]:
        """The same memory as NumPy's array, read-only unless the view is writable.

        Raises:
            InputError: it is a GPU's, or the view was closed.
        """
        kept = tuple(self._kept)
        if not kept:
            raise InputError("the view of the array was closed")
        if self.on_device:
            raise InputError("the array is in a GPU's memory, where NumPy cannot read", hint="copy it to the host")
        return np.asarray(_At(self.address, self.shape, self.dtype, kept, self.writable))

    def close(self) -> None:
        """Let go of the array. Again is harmless."""
        self._kept.clear()

    def __enter__(self) -> View:
        """The view itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Let go of the array."""
        self.close()


def view(thing: object, *, stream: int = 0, writable: bool = False) -> View:
    """Look at somebody's array without copying it.

    Args:
        thing: a NumPy array, or what has ``__cuda_array_interface__``, ``__dlpack__`` or ``__array_interface__``.
        stream: the CUDA stream in which it will be used. Who speaks DLPack has that stream wait for the array. 0 if the
            stream is not known yet: then see ``wait_for``. −1 if nobody has to wait.
        writable: whether it will be written to.

    Raises:
        InputError: it is no array, or not C-contiguous, aligned, of plain numbers, on the host or an NVIDIA GPU; or
            read-only although ``writable``; or what it says about itself makes no sense.
    """
    try:
        return _view(thing, stream, writable)
    except InputError:
        raise
    except Exception as error:  # whatever somebody's object may raise, with a message that may itself raise
        try:
            note = f"{type(error).__name__}: {error}"
        except Exception:
            note = type(error).__name__
        raise InputError(f"this {_name(thing)} does not let its memory be used", note=note) from error


def _view(thing: Any, stream: int, writable: bool) -> View:
    if isinstance(thing, np.ndarray):
        if isinstance(thing, np.ma.MaskedArray):
            raise InputError("the array is a masked one", hint="fill it: array.filled(0)")
        strides, read_only = thing.strides, not thing.flags.writeable
        return _checked(thing, thing.ctypes.data, thing.shape, thing.dtype, strides, read_only, writable, (thing,))
    gpu = getattr(thing, "__cuda_array_interface__", None)
    dlpack = hasattr(thing, "__dlpack__") and hasattr(thing, "__dlpack_device__")
    # Version 2, PyTorch's, says nothing about streams; whoever has DLPack as well says it there
    if gpu is not None and not (dlpack and isinstance(gpu, dict) and gpu.get("version") == 2):
        return _by_interface(thing, gpu, writable, stream, on_device=True)
    if dlpack:
        return _by_dlpack(thing, stream, writable)
    host = getattr(thing, "__array_interface__", None)
    if host is not None:
        return _by_interface(thing, host, writable, stream, on_device=False)
    raise InputError(
        f"{_name(thing)} is no array",
        note="it has neither __cuda_array_interface__ nor __dlpack__ nor __array_interface__",
        hint="numpy.asarray may make one of it",
    )


def _by_interface(thing: Any, said: Any, writable: bool, stream: int, *, on_device: bool) -> View:
    """By ``__cuda_array_interface__`` or, of the host, ``__array_interface__``."""
    if not isinstance(said, dict) or not {"shape", "typestr", "data", "version"} <= said.keys():
        raise _malformed(thing, f"the array interface is {said!r}")
    if on_device and said["version"] not in (2, 3):
        raise InputError(f"__cuda_array_interface__ of version {said['version']!r}", hint="2 and 3 are understood")
    if said.get("mask") is not None:
        raise InputError("the array is a masked one", hint="fill it first")
    typestr, data = said["typestr"], said["data"]
    if not isinstance(typestr, str):
        raise _malformed(thing, f"typestr is {typestr!r}")
    if not re.fullmatch(r"[<>|=][biufc]\d{1,2}", typestr):
        raise _no_type(repr(typestr))
    if not isinstance(data, tuple) or len(data) != 2:
        raise _malformed(thing, f"data is {data!r}")
    try:
        dtype = np.dtype(typestr)
    except TypeError as error:
        raise _no_type(repr(typestr)) from error
    ordinal = wait_for = None
    if on_device:
        wait_for = said.get("stream", 1 if said["version"] == 2 else None)  # 1: where nearly everybody works
        if wait_for is not None and not (_is_int(wait_for) and 0 < wait_for < 1 << 64):
            raise _malformed(thing, f"stream is {wait_for!r}")
        wait_for = None if wait_for is None or wait_for == stream else int(wait_for)
        if hasattr(thing, "__dlpack_device__"):
            ordinal = _device(thing)[1]
    at, read_only = data[0], bool(data[1])
    keeps = (thing, said)  # what is pointed to may belong to the dictionary alone, as a NumPy scalar's
    where = {"on_device": on_device, "ordinal": ordinal, "wait_for": wait_for}
    return _checked(thing, at, said["shape"], dtype, said.get("strides"), read_only, writable, keeps, **where)


def _device(thing: Any) -> tuple[int, int]:
    """Kind of device, and which of them.

    Raises:
        InputError: none that ddpmx can use.
    """
    said = thing.__dlpack_device__()
    if not isinstance(said, tuple) or len(said) != 2 or not all(map(_is_int, said)) or said[1] < 0:
        raise _malformed(thing, f"__dlpack_device__ gives {said!r}")
    kind, index = map(int, said)
    if kind not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        name = _DEVICES.get(kind, f"a device of DLPack's kind {kind}")
        raise InputError(
            f"this {_name(thing)} is on {name}", hint="copy it to the host or to an NVIDIA GPU; nothing else is read"
        )
    return kind, index


def _by_dlpack(thing: Any, stream: int, writable: bool) -> View:
    """By ``__dlpack__``. What it gives is given back once, whatever happens."""
    kind, _ = _device(thing)
    on_device = kind in (CUDA, CUDA_MANAGED)
    options = {"stream": stream or 1} if on_device else {}  # 0 would be ambiguous, says the standard
    try:
        capsule = thing.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # of before DLPack 1
        capsule = thing.__dlpack__(**options)
    opened = _opened(capsule)
    if opened is None:
        raise _malformed(
            thing, f"__dlpack__ gives {_name(capsule)}: no capsule of DLPack's, or one that was used before"
        )
    managed, used = opened
    _rename(capsule, used)
    hold = _Hold(_delete, managed.deleter or 0, ctypes.addressof(managed))
    try:
        where = {"on_device": True, "wait_for": None if stream else 1} if on_device else {}
        return _by_managed(thing, kind, managed, hold, writable, where)
    except BaseException:
        hold.end()
        raise


def _by_managed(thing: Any, kind: int, managed: Any, hold: _Hold, writable: bool, where: dict[str, Any]) -> View:
    flags = getattr(managed, "flags", 0)
    if getattr(managed, "major", 1) != 1:
        raise InputError(f"the array comes by DLPack {managed.major}.{managed.minor}", hint="1.x is understood")
    tensor = managed.dl_tensor
    device, ndim = tensor.device, tensor.ndim
    if device.type != kind or device.id < 0:
        raise _malformed(thing, f"announced on kind of device {kind}, given on {device.type}:{device.id}")
    if not 0 <= ndim <= _MAX_NDIM or (ndim and not tensor.shape):
        raise _malformed(thing, f"{ndim} dimensions")
    dtype = _dtype(tensor.dtype)
    if writable and flags & _IS_COPIED:
        raise InputError("the array can be had as a copy only, and is to be written to")
    address = tensor.data + tensor.byte_offset if tensor.data else 0
    shape = tuple(tensor.shape[:ndim]) if ndim else ()
    strides = tuple(n * dtype.itemsize for n in tensor.strides[:ndim]) if ndim and tensor.strides else None
    if where:
        where = {**where, "ordinal": device.id}
    keeps = (hold,)
    return _checked(thing, address, shape, dtype, strides, bool(flags & _READ_ONLY), writable, keeps, **where)


def _dtype(said: DLDataType) -> np.dtype[Any]:
    code, bits, lanes = said.code, said.bits, said.lanes
    if lanes == 1 and code in _KINDS and bits % 8 == 0 and bits <= (128 if code == 5 else 64):
        try:
            return np.dtype(f"{_KINDS[code]}{bits // 8}")
        except TypeError:
            pass
    name = _FOREIGN.get(code, f"type {code}") if code not in _KINDS else f"{np.dtype(_KINDS[code] + '8').kind}{bits}"
    raise _no_type(name if lanes == 1 else f"{lanes} × {name}")


def _checked(
    thing: object,
    address: Any,
    shape: Any,
    dtype: np.dtype[Any],
    strides: Any,
    read_only: bool,
    writable: bool,
    keeps: tuple[object, ...],
    **where: Any,
) -> View:
    """The view, if all of it makes sense. ``strides`` are in bytes, None for C order."""
    ints = isinstance(shape, tuple) and all(_is_int(n) and 0 <= n < 1 << 63 for n in shape)
    if not ints or len(shape) > _MAX_NDIM:
        raise _malformed(thing, f"shape {shape!r}")
    shape = tuple(map(int, shape))
    if strides is not None and (not isinstance(strides, tuple) or len(strides) != len(shape)):
        raise _malformed(thing, f"shape {shape}, strides {strides!r}")
    size = math.prod(shape) * dtype.itemsize
    if not _is_int(address) or not 0 <= address < (1 << 64) - size or size >= 1 << 63 or (size and not address):
        raise _malformed(thing, f"{size} bytes at address {address!r}")
    if dtype.kind not in "biufc":
        raise _no_type(dtype.name)
    if not dtype.isnative:
        raise InputError(f"the array is of the other byte order ({dtype.str})", hint="convert it: array.astype('=f4')")
    if size and strides is not None:
        wanted = dtype.itemsize
        for length, stride in zip(reversed(shape), reversed(strides), strict=True):
            if length > 1 and stride != wanted:
                raise InputError(
                    "the array is not C-contiguous",
                    note=f"shape {shape}, strides {strides} bytes",
                    hint="x.contiguous() in PyTorch, ascontiguousarray(x) in NumPy and CuPy",
                )
            wanted *= length
    if size and address % dtype.alignment:
        raise InputError("the array is not aligned", note=f"{dtype.name} at address {address:#x}", hint="copy it")
    if writable and read_only:
        raise InputError("the array is read-only, and is to be written to", hint="copy it")
    return View(int(address), shape, dtype, writable=writable, _kept=list(keeps), **where)


def expect(
    view: View, shape: Sequence[int | None], dtype: DTypeLike, what: str, *, driver: Driver | None = None
) -> View:
    """The view, if it is what is wanted.

    Args:
        view: an array's.
        shape: its shape; None is any length.
        dtype: its type.
        what: what it is for: "x".
        driver: the GPU on which it is to be, if it is on one.

    Raises:
        InputError: another shape or type, or the memory of another GPU.
    """
    wanted = np.dtype(dtype)
    fits = len(shape) == len(view.shape) and all(n in (None, m) for n, m in zip(shape, view.shape, strict=True))
    if view.dtype != wanted or not fits:
        text = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{what} must be {wanted.name} [{text}]", note=f"it is {view.dtype.name} {list(view.shape)}")
    if view.on_device and driver is not None and view.address:
        here, there = driver.ordinal, view.ordinal
        ask = getattr(driver, "ordinal_of", None)
        if there is None and ask is not None:
            try:
                there = ask(view.address)
            except BackendError as error:
                raise InputError(
                    f"{what} is in no GPU's memory", note=f"{error.fact}: address {view.address:#x}"
                ) from error
        if there not in (None, here):
            raise InputError(f"{what} is on GPU {there}, and the model on GPU {here}", hint=f"copy it to GPU {here}")
    return view


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _name(thing: object) -> str:
    kind = type(thing)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _malformed(thing: object, note: str) -> InputError:
    return InputError(f"what this {_name(thing)} says about its memory makes no sense", note=note)


def _no_type(name: str) -> InputError:
    return InputError(f"arrays of {name} are not read", hint="convert it: x.float() in PyTorch, x.astype('float32')")


# --- arrays of ours ----------------------------------------------------------------------------------------------------


class DeviceArray:
    """An array in a GPU's memory, complete when it is handed out. NumPy's order (C-contiguous).

    ``torch.from_dlpack(array)``, ``cupy.from_dlpack(array)`` and their like take it as it lies there; ``numpy()`` copies
    it to the host. The memory is freed when nobody needs it any more: neither this array, which may be closed,
    nor those who took it by DLPack. A context manager.

    Args:
        memory: at least as many bytes; the array's from now on.
        shape: of the array.
        dtype: of its elements.
        driver: with which the memory was allocated. If that is closed, the memory goes with it: see :meth:`allocate`.
        owned: the driver is the array's alone, and closed in the memory's stead.

    Attributes:
        shape, dtype, driver: as given.
    """

    _device_type = CUDA

    def __init__(
        self, memory: Handle, shape: tuple[int, ...], dtype: DTypeLike, driver: Driver, *, owned: bool = False
    ) -> None:
        self.shape, self.dtype, self.driver = shape, np.dtype(dtype), driver
        self._memory = memory
        self._hold: _Hold | None = _Hold(driver.close if owned else memory.close)
        self._shown: _Hold | None = None

    @classmethod
    def allocate(cls, driver: Driver, shape: tuple[int, ...], dtype: DTypeLike, what: str) -> DeviceArray:
        """A new array of any content, which outlives ``driver``: it has a hold on the GPU of its own.

        Args:
            driver: the GPU.
            shape: of the array.
            dtype: of its elements.
            what: it is, for error messages.

        Raises:
            BackendError: the memory does not suffice.
        """
        own = type(driver)(driver.ordinal, library=driver._library)
        try:
            with own.current():
                memory = own.allocate(max(1, math.prod(shape) * np.dtype(dtype).itemsize), what)
        except BaseException:
            own.close()
            raise
        return cls(memory, shape, dtype, own, owned=True)

    @property
    def address(self) -> int:
        """Of the first element, on the GPU.

        Raises:
            InputError: it was closed.
            BackendError: its driver was.
        """
        return self._held()[0]

    def _held(self) -> tuple[int, _Hold]:
        hold = self._hold
        if hold is None:
            raise InputError("the array was closed")
        return self._memory.value, hold

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface 3. No stream: nothing is to be waited for."""
        address, hold = self._held()
        self._shown = hold  # those who read this keep the array itself, and never say when they are done
        data, dtype = (address if self.nbytes else 0, False), self.dtype.str
        return {"shape": self.shape, "typestr": dtype, "data": data, "strides": None, "version": 3, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind of device, and which of them."""
        return self._device_type, self.driver.ordinal if self._device_type == CUDA else 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of DLPack's with this memory; with ``dl_device=(1, 0)``, the host, with a copy.

        NumPy makes the capsule, of an array that pretends to lie on the host, and the device is put right in it. So what
        deletes it is NumPy's C: a callback in Python could not run while an exception is on its way, which is how a
        consumer that refuses drops a capsule, nor after Python's end.

        Args:
            stream: the consumer's. Nothing has to be waited for in it.
            max_version: the newest DLPack that the consumer reads. NumPy before 2.1 gives the one of before 1.0.
            dl_device: where it is wanted.
            copy: whether it is to be a copy.

        Raises:
            BufferError: it is wanted on another GPU, or as a copy on this one.
            InputError: it was closed.
        """
        options = {"max_version": tuple(max_version)} if max_version is not None else {}
        address, hold = self._held()
        here = self.__dlpack_device__()
        wanted = here if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
        if wanted == here and not copy:
            return self._placed(_capsule(np.asarray(_At(address, self.shape, self.dtype, hold, True)), options))
        if wanted == (CPU, 0) and copy is not False:
            return _capsule(self.numpy(), options)
        raise BufferError(f"an array on DLPack's device {here} is not given {'as a copy ' if copy else ''}on {wanted}")

    def _placed(self, capsule: object) -> object:
        opened = _opened(capsule)
        if opened is None:
            raise BackendError("NumPy gives no capsule of DLPack's", note=f"NumPy {np.__version__}")
        device = opened[0].dl_tensor.device
        device.type, device.id = self.__dlpack_device__()
        return capsule

    def numpy(self) -> NDArray[Any]:
        """A copy on the host. Who has written to the array since has to have waited for that.

        Raises:
            InputError: it was closed.
            BackendError: the driver refuses.
        """
        address, _hold = self._held()  # the hold: another thread may close the array meanwhile
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            with self.driver.current(), self.driver.stream() as stream:
                self.driver.copy_out(host, address, stream.value)
                self.driver.wait_for_stream(stream.value, "copying an array to the host")
        return host

    def __array__(self, *arguments: object, **options: object) -> NDArray[Any]:
        """Refused: nothing crosses the bus unasked.

        Raises:
            InputError: always.
        """
        raise InputError("the array is in a GPU's memory", hint="array.numpy() copies it to the host")

    def abandon(self) -> None:
        """Leave the memory to the end of the process, since freeing it would wait for a device that does not answer."""
        if self._hold is not None:
            self._hold.abandon()
            self._memory.abandon()

    def close(self) -> None:
        """Done with it here; who took it by DLPack or the array interface still has it. Again is harmless."""
        self._hold = None

    def __enter__(self) -> DeviceArray:
        """The array itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def __len__(self) -> int:
        """Of the first axis."""
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        """Type, shape and place."""
        where = "closed" if self._hold is None else f"GPU {self.driver.ordinal}"
        return f"DeviceArray({self.dtype.name} {list(self.shape)}, {where})"


def _capsule(array: NDArray[Any], options: dict[str, Any]) -> Any:
    try:
        return array.__dlpack__(**options)
    except TypeError:  # NumPy before 2.1 knows no versions, and gives what everybody reads
        return array.__dlpack__()
