"""The reverse step on a GPU: its kernels as CUDA source and as PTX, and the structs that they share with the host.

``step.h`` states noise and update, ``chain.h`` the structs, ``step.cu`` and ``while.cu`` the kernels, and ``make_ptx.py``
makes the ``.ptx`` files from them, which a driver compiles for whatever GPU it has.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

THREADS = 256
"""The largest block that the kernels may be launched with."""

X_IS_GIVEN = 1
""":attr:`Chain.flags`: ``ddpmx_begin`` leaves x alone."""


class Done(IntEnum):
    """:attr:`Control.done`: why a chain has come to its end."""

    RUNNING = 0
    """It has not."""
    FINISHED = 1
    """All steps were made."""
    STOPPED = 2
    """The host asked for it."""
    NOT_FINITE = 3
    """So was the network's answer, at :attr:`Control.bad_step`."""
    REFUSED = 4
    """``ddpmx_begin`` was given numbers that make no chain."""


class Control(ctypes.Structure):
    """``ddpmx_control``: what the host may see and ask while the device runs. What each field is stands in chain.h."""

    stop: int
    step: int
    bad_step: int
    done: int

    _fields_ = [(name, ctypes.c_int32) for name in ("stop", "step", "bad_step", "done")]


class Chain(ctypes.Structure):
    """``ddpmx_chain``: one chain, as the kernels read it. What each field is stands in chain.h."""

    x: int
    out: int
    var: int
    t: int
    x0: int
    image_bytes: int
    rows: int
    learned: int
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
    step: int
    arrived: int
    bad: int
    halted: int

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("x", "out", "var", "t", "x0", "image_bytes", "rows", "learned")),
        *((name, ctypes.c_uint64) for name in ("timesteps", "images", "control", "seed")),
        *((name, ctypes.c_int32) for name in ("B", "channels", "pixels", "S")),
        ("limit", ctypes.c_float),
        ("flags", ctypes.c_uint32),
        ("step", ctypes.c_int32),
        ("arrived", ctypes.c_uint32),
        ("bad", ctypes.c_int32),
        ("halted", ctypes.c_int32),
    ]


def ptx(name: str) -> bytes:
    """The PTX of ``step`` or ``while``, as ``cuModuleLoadData`` takes it: with a zero at its end."""
    return Path(__file__).with_name(f"{name}.ptx").read_bytes() + b"\0"
