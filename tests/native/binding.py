"""libddpmx by ctypes: the structs of the header, and a small wrapper for the tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

STATUS = (
    ["OK", "INPUT", "FILE_FORMAT", "SPEC", "BACKEND", "PLAN_MISMATCH", "NUMERIC", "CANCELLED", "MEMORY", "BUSY", "INTERNAL"]
)  # fmt: skip
PREVIEWS, ON_DEVICE = 1, 2
GUIDED = 4


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("threads", c_int32),
        ("device", c_int32),
        *((name, c_char_p) for name in ("spec", "ort_library", "trt_module", "trt_library", "executor", "cache")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        *((name, c_int32) for name in ("channels", "height", "width", "timesteps", "classes", "condition")),
        ("self_condition", c_int32),
        ("default_batch", c_int32),
        ("prediction", c_char * 8),
        ("variance", c_char * 16),
        ("precision", c_char * 8),
        ("null_class", c_int32),
    ]


class Progress(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("t", c_int32),
        *((name, c_uint64) for name in ("done", "total", "first", "n")),
        ("x", c_void_p),
        ("x0", c_void_p),
    ]


Callback = ctypes.CFUNCTYPE(c_int32, POINTER(Progress), c_void_p)


class Request(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        *((name, c_uint64) for name in ("n", "seed", "first", "batch")),
        *((name, c_char_p) for name in ("sampler", "spacing", "variance")),
        ("eta", c_double),
        ("steps", c_int32),
        ("start", c_int32),
        ("x", c_void_p),
        ("labels", c_void_p),
        ("labels_count", c_uint64),
        ("cond", c_void_p),
        ("stream", c_void_p),
        ("callback", Callback),
        ("user", c_void_p),
        ("guidance", c_double),
    ]


class NativeError(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = STATUS[status], text
        super().__init__(f"{self.status}: {text}")


class Native:
    """The library, loaded from ``path``."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(os.fspath(path))
        for name in ("ddpmx_last_error", "ddpmx_version", "ddpmx_backend", "ddpmx_status_name", "ddpmx_class_name"):
            getattr(self.lib, name).restype = c_char_p
        self.lib.ddpmx_backend.argtypes = [c_void_p]
        self.lib.ddpmx_class_name.argtypes = [c_void_p, c_int32]
        self.lib.ddpmx_close.argtypes = [c_void_p]
        self.lib.ddpmx_describe.argtypes = [c_void_p, POINTER(Model), c_size_t]
        self.lib.ddpmx_generate.argtypes = [c_void_p, POINTER(Request), c_void_p, c_uint64, c_void_p, c_uint64]

    def check(self, status: int) -> None:
        if status:
            raise NativeError(status, self.lib.ddpmx_last_error().decode())

    def open(self, path: Path | str, **options: Any) -> NativePipeline:
        c_options = OpenOptions()
        self.check(self.lib.ddpmx_open_options_init(byref(c_options), ctypes.sizeof(c_options)))
        for name, value in options.items():
            setattr(c_options, name, os.fsencode(value) if isinstance(value, str | Path) else value)
        handle = c_void_p()
        self.check(self.lib.ddpmx_open(os.fsencode(path), byref(c_options), byref(handle)))
        return NativePipeline(self, handle)


class NativePipeline:
    """A pipeline. ``generate`` takes the arguments of Python's."""

    def __init__(self, native: Native, handle: c_void_p) -> None:
        self.native, self.handle = native, handle
        self.model = Model()
        native.check(native.lib.ddpmx_describe(handle, byref(self.model), ctypes.sizeof(self.model)))

    def __enter__(self) -> NativePipeline:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        if self.handle:
            self.native.check(self.native.lib.ddpmx_close(self.handle))
            self.handle = c_void_p()

    def class_name(self, label: int) -> str | None:
        name = self.native.lib.ddpmx_class_name(self.handle, label)
        return None if name is None else name.decode()

    @property
    def backend(self) -> str:
        return self.native.lib.ddpmx_backend(self.handle).decode()

    def generate(
        self,
        n: int,
        *,
        x: np.ndarray | None = None,
        labels: Any = None,
        cond: np.ndarray | None = None,
        callback: Callable[[Progress, np.ndarray | None, np.ndarray | None], int] | None = None,
        previews: bool = False,
        samples: bool = False,
        guidance: float | None = None,
        **numbers: Any,
    ) -> Any:
        """uint8 [n, H, W, C], and with ``samples`` float32 [n, C, H, W] as well."""
        shape = (self.model.channels, self.model.height, self.model.width)
        request = Request()
        self.native.check(self.native.lib.ddpmx_request_init(byref(request), ctypes.sizeof(request)))
        request.n, request.flags = n, PREVIEWS if previews else 0
        for name, value in numbers.items():
            setattr(request, name, value.encode() if isinstance(value, str) else value)
        if guidance is not None:
            request.flags |= GUIDED
            request.guidance = guidance
        kept = []
        for name, array, dtype in (("x", x, np.float32), ("cond", cond, np.float32), ("labels", labels, np.int32)):
            if array is not None:
                kept.append(np.ascontiguousarray(array, dtype))
                setattr(request, name, kept[-1].ctypes.data)
        if labels is not None:
            request.labels_count = np.size(labels)

        def report(progress: Any, user: Any) -> int:
            now = progress.contents
            seen = [
                None
                if not at
                else np.ctypeslib.as_array(ctypes.cast(at, POINTER(ctypes.c_float)), (now.n, *shape)).copy()
                for at in (now.x, now.x0)
            ]
            assert callback is not None
            return int(callback(now, *seen))

        if callback is not None:
            request.callback = Callback(report)
        images = np.empty((n, *shape[1:], shape[0]), np.uint8)
        floats = np.empty((n, *shape), np.float32) if samples else None
        room = (None, 0) if floats is None else (floats.ctypes.data, floats.nbytes)
        self.native.check(
            self.native.lib.ddpmx_generate(self.handle, byref(request), images.ctypes.data, images.nbytes, *room)
        )
        return images if floats is None else (images, floats)


def fields(structure: type[ctypes.Structure]) -> dict[str, int]:
    """The offset of each field, and the size."""
    offsets = {name: getattr(structure, name).offset for name, *_ in structure._fields_}
    return {**offsets, "sizeof": ctypes.sizeof(structure)}
