"""Lists the NVIDIA GPUs by the driver itself, with no CUDA toolkit and no package."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: the driver's name for it.
        sm: its compute capability, "8.7".
        memory: bytes; on a Jetson it is shared with the CPU.
    """

    name: str
    sm: str
    memory: int


@dataclass(frozen=True)
class Gpus:
    """The driver's report.

    Attributes:
        devices: the GPUs that this process may use, in CUDA's order.
        cuda: the newest CUDA that the driver supports, "12.6", or None without a driver.
        trouble: why there are no devices, or None.
    """

    devices: tuple[Device, ...] = ()
    cuda: str | None = None
    trouble: str | None = None


def ask_for_lazy_loading() -> None:
    """Have CUDA load kernels when they are first used, which saves hundreds of megabytes on a Jetson.

    CUDA reads the setting when it starts, so this must run before any call of the driver. The user's setting is kept.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")


@functools.lru_cache(maxsize=1)
def gpus() -> Gpus:
    """The GPUs, read once per process. Never raises: ``trouble`` holds what is wrong."""
    ask_for_lazy_loading()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return Gpus(trouble=f"there is no NVIDIA driver: {error}"[:300])
    try:
        return _query(driver)
    except AttributeError as error:  # a function that every driver has
        return Gpus(trouble=f"{DRIVER} is not an NVIDIA driver: {error}"[:300])


def _query(driver: ctypes.CDLL) -> Gpus:
    version = ctypes.c_int()
    cuda = None
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0:
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if error := driver.cuInit(0):
        return Gpus(cuda=cuda, trouble=f"the NVIDIA driver does not start: {_name(driver, error)}")
    count = ctypes.c_int()
    if error := driver.cuDeviceGetCount(ctypes.byref(count)):
        return Gpus(cuda=cuda, trouble=f"the NVIDIA driver lists no devices: {_name(driver, error)}")
    devices = tuple(_device(driver, index) for index in range(count.value))
    return Gpus(devices, cuda, None if devices else "the NVIDIA driver sees no GPU")


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, value, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    sm = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        sm.append(value.value)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return Device(name.value.decode(errors="replace"), f"{sm[0]}.{sm[1]}", memory.value)


def _name(driver: ctypes.CDLL, error: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(error, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {error}"
