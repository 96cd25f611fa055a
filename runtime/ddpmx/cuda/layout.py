"""The structs that the kernels share with the host, and the kernels' PTX.

``step.h`` holds noise and update, ``chain.h`` and ``each.h`` the structs, ``step.cu``, ``each.cu`` and ``while.cu`` the
kernels. ``make_ptx.py`` makes the ``.ptx`` files from them, which a driver compiles for its GPU.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from pathlib import Path

import numpy as np

THREADS = 256
"""The largest block that the kernels may be launched with."""

KEEP_X = 1
""":attr:`Chain.flags`: ``ddpmx_begin`` leaves x as it is."""


class Done(IntEnum):
    """:attr:`Control.done`: why a chain has ended."""

    RUNNING = 0
    """It has not ended."""
    FINISHED = 1
    """All steps were made."""
    STOPPED = 2
    """The host stopped it."""
    NOT_FINITE = 3
    """The network's output at :attr:`Control.bad_step` was not finite."""
    REFUSED = 4
    """``ddpmx_begin`` refused the chain's numbers."""


class Control(ctypes.Structure):
    """``ddpmx_control``: progress of the device, and the flag that stops it. chain.h describes the fields."""

    stop: int
    step: int
    bad_step: int
    done: int

    _fields_ = [(name, ctypes.c_int32) for name in ("stop", "step", "bad_step", "done")]


class Chain(ctypes.Structure):
    """``ddpmx_chain``: one chain, as the kernels read it. chain.h describes the fields."""

    x: int
    out: int
    var: int
    t: int
    x0: int
    image_bytes: int
    rows: int
    learned: int
    memory: int
    one_ago: int
    two_ago: int
    timesteps: int
    images: int
    control: int
    seed: int
    B: int
    channels: int
    pixels: int
    S: int
    limit: float
    flags: int
    guided: int
    guidance: float
    step: int
    arrived: int
    bad: int
    halted: int

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("x", "out", "var", "t", "x0", "image_bytes", "rows", "learned")),
        *((name, ctypes.c_uint64) for name in ("memory", "one_ago", "two_ago")),
        *((name, ctypes.c_uint64) for name in ("timesteps", "images", "control", "seed")),
        *((name, ctypes.c_int32) for name in ("B", "channels", "pixels", "S")),
        ("limit", ctypes.c_float),
        ("flags", ctypes.c_uint32),
        ("guided", ctypes.c_int32),
        ("guidance", ctypes.c_float),
        ("step", ctypes.c_int32),
        ("arrived", ctypes.c_uint32),
        ("bad", ctypes.c_int32),
        ("halted", ctypes.c_int32),
    ]


class Each(IntFlag):
    """The flags of one image's step, in :data:`EACH`."""

    BEGINS = 1
    """``ddpmx_begin_each`` sets x̂_0 to 0, and x to x_T unless :attr:`OWN_X` is set."""
    OWN_X = 2
    """x is there already."""
    LEARNS = 4
    """σ = exp(c + d·v)."""
    REMEMBERS = 8
    """c and d are the coefficients of x̂_0 one and two steps ago."""
    LAST = 16
    """The image is wanted as bytes after this step."""
    KEEPS_X0 = 32
    """x̂_0 is wanted after this step."""


EACH = np.dtype(
    [
        *((name, np.float32) for name in ("p", "q", "a", "b", "sigma")),
        ("flags", np.uint32),
        *((name, np.int32) for name in ("at", "without")),
        ("image", np.uint32),
        ("t", np.int32),
        *((name, np.uint32) for name in ("seed_low", "seed_high")),
        *((name, np.float32) for name in ("c", "d", "guidance")),
        ("unused", np.uint32),
    ]
)
"""``ddpmx_each``: one image's step. each.h describes the fields."""


class Call(ctypes.Structure):
    """``ddpmx_call``: one call of the network, and the steps after it. each.h describes the fields."""

    x: int
    out: int
    var: int
    x0: int
    one_ago: int
    two_ago: int
    image_bytes: int
    bad: int
    each: int
    count: int
    channels: int
    pixels: int
    limit: float

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("x", "out", "var", "x0", "one_ago", "two_ago", "image_bytes")),
        *((name, ctypes.c_uint64) for name in ("bad", "each")),
        *((name, ctypes.c_int32) for name in ("count", "channels", "pixels")),
        ("limit", ctypes.c_float),
    ]


def ptx(name: str) -> bytes:
    """The PTX of ``step``, ``each`` or ``while``, as ``cuModuleLoadData`` takes it: with a zero at its end."""
    return Path(__file__).with_name(f"{name}.ptx").read_bytes() + b"\0"
