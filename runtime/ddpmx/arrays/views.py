"""Views of other libraries' arrays, without a copy.

:func:`view` reads how NumPy, PyTorch, CuPy, JAX and the like describe their arrays: by ``__dlpack__`` (DLPack up to 1.x),
``__cuda_array_interface__`` (2 and 3) or ``__array_interface__``. Importing this module loads no driver.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpmx.arrays.dlpack import (
    CPU,
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    DEVICES,
    FOREIGN,
    IS_COPIED,
    KINDS,
    MAX_NDIM,
    READ_ONLY,
    ArrayInterface,
    DLDataType,
    Owner,
    delete,
    open_capsule,
    rename,
)
from ddpmx.errors import BackendError, InputError

if TYPE_CHECKING:
    from ddpmx.device.driver import Driver


@dataclass(frozen=True, eq=False)
class View:
    """Another library's array: C-contiguous, aligned, of numbers in this machine's byte order.

    A context manager; closing releases the array before the view itself is collected. Arrays of :meth:`numpy` keep it
    longer. On a GPU, close it when the work that reads it has run, not when it is enqueued: the owner may reuse the memory
    at once.

    Attributes:
        address: of its first element, on the GPU or the host.
        shape: up to 32 axes.
        dtype: of its elements.
        on_device: whether it is in a GPU's memory.
        ordinal: which GPU's, in CUDA's order; None on the host, or if the array does not declare it.
        wait_for: the stream whose present work has to finish before it is read (1 is the default stream), or None if there
            is nothing to wait for.
        writable: whether it may be written to, because the caller asked for that.
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
        """The same memory as a NumPy array, read-only unless the view is writable.

        Raises:
            InputError: it is in a GPU's memory, or the view was closed.
        """
        kept = tuple(self._kept)
        if not kept:
            raise InputError("the view of the array was closed")
        if self.on_device:
            raise InputError("the array is in a GPU's memory, which NumPy cannot read", hint="copy it to the host")
        return np.asarray(ArrayInterface(self.address, self.shape, self.dtype, kept, self.writable))

    def close(self) -> None:
        """Release the array. Safe to call again."""
        self._kept.clear()

    def __enter__(self) -> View:
        """The view itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Release the array."""
        self.close()


def view(thing: object, *, stream: int = 0, writable: bool = False) -> View:
    """View another library's array without copying it.

    Args:
        thing: a NumPy array, or an object with ``__cuda_array_interface__``, ``__dlpack__`` or ``__array_interface__``.
        stream: the CUDA stream in which it will be used. DLPack's producer has that stream wait for the array. 0 if the
            stream is not known yet: then see ``wait_for``. −1 if nothing has to wait.
        writable: whether it will be written to.

    Raises:
        InputError: it is not an array, or not C-contiguous, aligned, of plain numbers, on the host or an NVIDIA GPU; or
            read-only although ``writable``; or its description of itself is invalid.
    """
    try:
        return _view(thing, stream, writable)
    except InputError:
        raise
    except Exception as error:  # foreign code may raise anything, with a message that may itself raise
        try:
            note = f"{type(error).__name__}: {error}"
        except Exception:
            note = type(error).__name__
        raise InputError(f"cannot use the memory of this {_name(thing)}", note=note) from error


def _view(thing: Any, stream: int, writable: bool) -> View:
    if isinstance(thing, np.ndarray):
        if isinstance(thing, np.ma.MaskedArray):
            raise InputError("masked arrays are not supported", hint="fill it: array.filled(0)")
        strides, read_only = thing.strides, not thing.flags.writeable
        return _checked(thing, thing.ctypes.data, thing.shape, thing.dtype, strides, read_only, writable, (thing,))
    gpu = getattr(thing, "__cuda_array_interface__", None)
    dlpack = hasattr(thing, "__dlpack__") and hasattr(thing, "__dlpack_device__")
    # Version 2, PyTorch's, declares no stream; DLPack does, where it is there as well
    if gpu is not None and not (dlpack and isinstance(gpu, dict) and gpu.get("version") == 2):
        return _by_interface(thing, gpu, writable, stream, on_device=True)
    if dlpack:
        return _by_dlpack(thing, stream, writable)
    host = getattr(thing, "__array_interface__", None)
    if host is not None:
        return _by_interface(thing, host, writable, stream, on_device=False)
    raise InputError(
        f"{_name(thing)} is not an array",
        note="it has neither __cuda_array_interface__ nor __dlpack__ nor __array_interface__",
        hint="numpy.asarray may convert it",
    )


def _by_interface(thing: Any, declared: Any, writable: bool, stream: int, *, on_device: bool) -> View:
    """By ``__cuda_array_interface__`` or, on the host, ``__array_interface__``."""
    if not isinstance(declared, dict) or not {"shape", "typestr", "data", "version"} <= declared.keys():
        raise _malformed(thing, f"the array interface is {declared!r}")
    if on_device and declared["version"] not in (2, 3):
        raise InputError(
            f"version {declared['version']!r} of __cuda_array_interface__ is not supported", hint="2 and 3 are"
        )
    if declared.get("mask") is not None:
        raise InputError("masked arrays are not supported", hint="fill it first")
    typestr, data = declared["typestr"], declared["data"]
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
        wait_for = declared.get("stream", 1 if declared["version"] == 2 else None)  # 1: the default stream
        if wait_for is not None and not (_is_int(wait_for) and 0 < wait_for < 1 << 64):
            raise _malformed(thing, f"stream is {wait_for!r}")
        wait_for = None if wait_for is None or wait_for == stream else int(wait_for)
        if hasattr(thing, "__dlpack_device__"):
            ordinal = _device(thing)[1]
    address, read_only = data[0], bool(data[1])
    keeps = (thing, declared)  # the memory may belong to the dictionary alone, as a NumPy scalar's does
    where = {"on_device": on_device, "ordinal": ordinal, "wait_for": wait_for}
    return _checked(
        thing, address, declared["shape"], dtype, declared.get("strides"), read_only, writable, keeps, **where
    )


def _device(thing: Any) -> tuple[int, int]:
    """(kind of device, its index).

    Raises:
        InputError: a device that ddpmx cannot use.
    """
    declared = thing.__dlpack_device__()
    if not isinstance(declared, tuple) or len(declared) != 2 or not all(map(_is_int, declared)) or declared[1] < 0:
        raise _malformed(thing, f"__dlpack_device__ gives {declared!r}")
    kind, index = map(int, declared)
    if kind not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        name = DEVICES.get(kind, f"a device of DLPack's kind {kind}")
        raise InputError(
            f"this {_name(thing)} is on {name}",
            hint="copy it to the host or to an NVIDIA GPU; others are not supported",
        )
    return kind, index


def _by_dlpack(thing: Any, stream: int, writable: bool) -> View:
    """By ``__dlpack__``. The capsule's content is freed exactly once, whatever happens."""
    kind, _ = _device(thing)
    on_device = kind in (CUDA, CUDA_MANAGED)
    options = {"stream": stream or 1} if on_device else {}  # the standard forbids 0 as ambiguous
    try:
        capsule = thing.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # from before DLPack 1.0
        capsule = thing.__dlpack__(**options)
    opened = open_capsule(capsule)
    if opened is None:
        raise _malformed(
            thing, f"__dlpack__ gives {_name(capsule)}: not a DLPack capsule, or one that was consumed before"
        )
    managed, used = opened
    rename(capsule, used)
    owner = Owner(delete, managed.deleter or 0, ctypes.addressof(managed))
    try:
        where = {"on_device": True, "wait_for": None if stream else 1} if on_device else {}
        return _by_managed(thing, kind, managed, owner, writable, where)
    except BaseException:
        owner.end()
        raise


def _by_managed(thing: Any, kind: int, managed: Any, owner: Owner, writable: bool, where: dict[str, Any]) -> View:
    flags = getattr(managed, "flags", 0)
    if getattr(managed, "major", 1) != 1:
        raise InputError(f"DLPack {managed.major}.{managed.minor} is not supported", hint="1.x is")
    tensor = managed.dl_tensor
    device, ndim = tensor.device, tensor.ndim
    if device.type != kind or device.id < 0:
        raise _malformed(thing, f"declared on kind of device {kind}, exported on {device.type}:{device.id}")
    if not 0 <= ndim <= MAX_NDIM or (ndim and not tensor.shape):
        raise _malformed(thing, f"{ndim} dimensions")
    dtype = _dtype(tensor.dtype)
    if writable and flags & IS_COPIED:
        raise InputError("the array is available as a copy only, but must be written to")
    address = tensor.data + tensor.byte_offset if tensor.data else 0
    shape = tuple(tensor.shape[:ndim]) if ndim else ()
    strides = tuple(n * dtype.itemsize for n in tensor.strides[:ndim]) if ndim and tensor.strides else None
    if where:
        where = {**where, "ordinal": device.id}
    keeps = (owner,)
    return _checked(thing, address, shape, dtype, strides, bool(flags & READ_ONLY), writable, keeps, **where)


def _dtype(declared: DLDataType) -> np.dtype[Any]:
    code, bits, lanes = declared.code, declared.bits, declared.lanes
    if lanes == 1 and code in KINDS and bits % 8 == 0 and bits <= (128 if code == 5 else 64):
        try:
            return np.dtype(f"{KINDS[code]}{bits // 8}")
        except TypeError:
            pass
    name = FOREIGN.get(code, f"type {code}") if code not in KINDS else f"{np.dtype(KINDS[code] + '8').kind}{bits}"
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
    """The view, once everything is checked. ``strides`` are in bytes, None for C order."""
    ints = isinstance(shape, tuple) and all(_is_int(n) and 0 <= n < 1 << 63 for n in shape)
    if not ints or len(shape) > MAX_NDIM:
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
        raise InputError(f"the array has the other byte order ({dtype.str})", hint="convert it: array.astype('=f4')")
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
        raise InputError("the array is read-only, but must be written to", hint="copy it")
    return View(int(address), shape, dtype, writable=writable, _kept=list(keeps), **where)


def expect(
    view: View, shape: Sequence[int | None], dtype: DTypeLike, what: str, *, driver: Driver | None = None
) -> View:
    """The view, if it has the expected shape, type and GPU.

    Args:
        view: of the array.
        shape: the expected shape; None is any length.
        dtype: the expected type.
        what: the array's name for messages: "x".
        driver: the expected GPU, for an array on a GPU.

    Raises:
        InputError: another shape or type, or another GPU's memory.
    """
    wanted = np.dtype(dtype)
    fits = len(shape) == len(view.shape) and all(n in (None, m) for n, m in zip(shape, view.shape, strict=True))
    if view.dtype != wanted or not fits:
        text = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{what} must be {wanted.name} [{text}]", note=f"it is {view.dtype.name} {list(view.shape)}")
    if view.on_device and driver is not None and view.address:
        here, there = driver.ordinal, view.ordinal
        if there is None:  # not every array declares it
            try:
                there = driver.ordinal_of(view.address)
            except BackendError as error:
                raise InputError(
                    f"{what} is not in a GPU's memory", note=f"{error.fact}: address {view.address:#x}"
                ) from error
        if there != here:
            raise InputError(f"{what} is on GPU {there}, but the model is on GPU {here}", hint=f"copy it to GPU {here}")
    return view


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _name(thing: object) -> str:
    kind = type(thing)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _malformed(thing: object, note: str) -> InputError:
    return InputError(f"this {_name(thing)} describes its memory incorrectly", note=note)


def _no_type(name: str) -> InputError:
    return InputError(
        f"arrays of {name} are not supported", hint="convert it: x.float() in PyTorch, x.astype('float32')"
    )


LEGACY_STREAM = 1
"""CU_STREAM_LEGACY: the default stream, which waits for others."""


def overlap(x: NDArray[Any] | int, x_bytes: int, out: NDArray[Any] | int, out_bytes: int) -> bool:
    """Whether two arrays, or device addresses, have bytes in common."""
    a, b = (place if isinstance(place, int) else place.ctypes.data for place in (x, out))
    return isinstance(x, int) == isinstance(out, int) and a < b + out_bytes and b < a + x_bytes


def stream_handle(stream: Any) -> int:
    """The handle of a CUDA stream: a number, or an object with ``__cuda_stream__`` or ``cuda_stream``.

    Raises:
        InputError: it is not a stream.
    """
    if hasattr(stream, "__cuda_stream__"):  # (version of the protocol, handle)
        protocol = stream.__cuda_stream__
        stream = (protocol() if callable(protocol) else protocol)[1]
    stream = getattr(stream, "cuda_stream", stream)
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 1 << 64:
        raise InputError(f"a CUDA stream must be a number or an object with one, not {str(stream)[:100]}")
    return stream or LEGACY_STREAM
