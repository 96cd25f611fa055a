"""Other people's arrays where they lie, without a copy.

:func:`view` reads what NumPy, PyTorch, CuPy, JAX and the like say about an array of theirs: by ``__dlpack__`` (DLPack up
to 1.x), ``__cuda_array_interface__`` (2 and 3) or ``__array_interface__``. Importing this module touches no driver.
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
        return np.asarray(ArrayInterface(self.address, self.shape, self.dtype, kept, self.writable))

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
        name = DEVICES.get(kind, f"a device of DLPack's kind {kind}")
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
    held = open_capsule(capsule)
    if held is None:
        raise _malformed(
            thing, f"__dlpack__ gives {_name(capsule)}: no capsule of DLPack's, or one that was used before"
        )
    managed, used = held
    rename(capsule, used)
    hold = Owner(delete, managed.deleter or 0, ctypes.addressof(managed))
    try:
        where = {"on_device": True, "wait_for": None if stream else 1} if on_device else {}
        return _by_managed(thing, kind, managed, hold, writable, where)
    except BaseException:
        hold.end()
        raise


def _by_managed(thing: Any, kind: int, managed: Any, hold: Owner, writable: bool, where: dict[str, Any]) -> View:
    flags = getattr(managed, "flags", 0)
    if getattr(managed, "major", 1) != 1:
        raise InputError(f"the array comes by DLPack {managed.major}.{managed.minor}", hint="1.x is understood")
    tensor = managed.dl_tensor
    device, ndim = tensor.device, tensor.ndim
    if device.type != kind or device.id < 0:
        raise _malformed(thing, f"announced on kind of device {kind}, given on {device.type}:{device.id}")
    if not 0 <= ndim <= MAX_NDIM or (ndim and not tensor.shape):
        raise _malformed(thing, f"{ndim} dimensions")
    dtype = _dtype(tensor.dtype)
    if writable and flags & IS_COPIED:
        raise InputError("the array can be had as a copy only, and is to be written to")
    address = tensor.data + tensor.byte_offset if tensor.data else 0
    shape = tuple(tensor.shape[:ndim]) if ndim else ()
    strides = tuple(n * dtype.itemsize for n in tensor.strides[:ndim]) if ndim and tensor.strides else None
    if where:
        where = {**where, "ordinal": device.id}
    keeps = (hold,)
    return _checked(thing, address, shape, dtype, strides, bool(flags & READ_ONLY), writable, keeps, **where)


def _dtype(said: DLDataType) -> np.dtype[Any]:
    code, bits, lanes = said.code, said.bits, said.lanes
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
    """The view, if all of it makes sense. ``strides`` are in bytes, None for C order."""
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
        if there is None:  # not everybody says
            try:
                there = driver.ordinal_of(view.address)
            except BackendError as error:
                raise InputError(
                    f"{what} is in no GPU's memory", note=f"{error.fact}: address {view.address:#x}"
                ) from error
        if there != here:
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


LEGACY_STREAM = 1
"""CU_STREAM_LEGACY: the default stream, which waits for others, and in which most people work."""


def overlap(x: NDArray[Any] | int, x_bytes: int, out: NDArray[Any] | int, out_bytes: int) -> bool:
    """Whether two arrays, or device addresses, have bytes in common."""
    a, b = (place if isinstance(place, int) else place.ctypes.data for place in (x, out))
    return isinstance(x, int) == isinstance(out, int) and a < b + out_bytes and b < a + x_bytes


def stream_handle(stream: Any) -> int:
    """The number of somebody's CUDA stream: itself, or an object with ``__cuda_stream__`` or ``cuda_stream``.

    Raises:
        InputError: it is none.
    """
    if hasattr(stream, "__cuda_stream__"):  # (version of the protocol, handle)
        protocol = stream.__cuda_stream__
        stream = (protocol() if callable(protocol) else protocol)[1]
    stream = getattr(stream, "cuda_stream", stream)
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 1 << 64:
        raise InputError(f"a CUDA stream is a number or an object that has one, not {str(stream)[:100]}")
    return stream or LEGACY_STREAM
