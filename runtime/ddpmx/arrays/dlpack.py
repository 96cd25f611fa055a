"""DLPack's structs and capsules by ctypes, and owners that keep memory alive while another library uses it.

DLPack 1.x, <https://dmlc.github.io/dlpack>; all versions up to 1.x are read.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
DEVICES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "a simulator", 10: "ROCm", 11: "ROCm's pinned memory"}
DEVICES |= {12: "an extension", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA", 18: "Trainium"}

KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
FOREIGN = {3: "opaque handles", 4: "bfloat16", 7: "float8_e3m4", 8: "float8_e4m3", 9: "float8_e4m3b11fnuz"}
FOREIGN |= {10: "float8_e4m3fn", 11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz"}
FOREIGN |= {14: "float8_e8m0fnu", 15: "float6_e2m3fn", 16: "float6_e3m2fn", 17: "float4_e2m1fn"}

READ_ONLY, IS_COPIED = 1, 2
MAX_NDIM = 32  # NumPy 1's


class DLDevice(ctypes.Structure):
    """Kind of device, and its index."""

    _fields_ = [("type", c_int32), ("id", c_int32)]


class DLDataType(ctypes.Structure):
    """Kind of number, its bits, and how many numbers make an element."""

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
    """The content of a capsule named ``dltensor``."""

    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class DLManagedTensorVersioned(ctypes.Structure):
    """The content of a capsule named ``dltensor_versioned``. Fields up to ``flags`` are the same in all future versions."""

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
"""(name, name once it is consumed, its content)."""


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C API. A separate object, since the argument types of ``pythonapi``'s own are global."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_is_capsule = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, c_char_p)
_pointer = _python("PyCapsule_GetPointer", c_void_p, ctypes.py_object, c_char_p)
rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, c_char_p)
_keep_for_ever = _python("Py_IncRef", None, ctypes.py_object)
_DELETER = ctypes.PYFUNCTYPE(None, c_void_p)  # with the GIL, as NumPy calls it

for _, _used, _ in _LAYOUTS:
    _keep_for_ever(_used)  # a capsule keeps the pointer to its name, and may outlive this module


def open_capsule(capsule: object) -> tuple[Any, bytes] | None:
    """(content of a capsule, its name once consumed); None if it is not a DLPack capsule, or was consumed before."""
    for name, used, layout in _LAYOUTS:
        if _is_capsule(capsule, name):
            return layout.from_address(_pointer(capsule, name)), used
    return None


class Owner:
    """Owns something that must outlive all its users. ``end`` runs once, when the owner is collected, but not at exit.

    At Python's exit others may still be using it, and it ends with the process anyway.
    """

    def __init__(self, end: Callable[..., object], *arguments: object) -> None:
        self._finalizer = weakref.finalize(self, end, *arguments)
        self._finalizer.atexit = False

    def end(self) -> None:
        """End it now, before anybody uses it."""
        self._finalizer()

    def abandon(self) -> None:
        """Never end it."""
        self._finalizer.detach()


def delete(deleter: int, managed: int) -> None:
    """Free a capsule's content, by the addresses of its deleter, if it has one, and of the struct."""
    if deleter:
        _DELETER(deleter)(managed)


class ArrayInterface:
    """An address as an array for NumPy, and the object that has to live as long as that array."""

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
