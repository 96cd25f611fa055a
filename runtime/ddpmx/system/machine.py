"""The machine's state, without which a speed means little: clocks, temperature, power, and the number of threads.

NVIDIA's management library (NVML) comes with the driver and is called through ctypes. A Jetson before Thor has none, or
one with few functions; there the values come from the kernel's files. Nothing here raises: an unknown value is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmx.device.cores import usable_cores
from ddpmx.device.discovery import DRIVER as CUDA

NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"

NVML_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlSystemGetDriverVersion": (c_char_p, c_uint),
    "nvmlDeviceGetHandleByPciBusId_v2": (c_char_p, POINTER(c_void_p)),
    "nvmlDeviceGetClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetMaxClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetTemperature": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetPowerUsage": (c_void_p, POINTER(c_uint)),
    "nvmlDeviceGetEnforcedPowerLimit": (c_void_p, POINTER(c_uint)),
    "nvmlDeviceGetCurrentClocksThrottleReasons": (c_void_p, POINTER(c_ulonglong)),
}
"""The functions' argument types. All of them return an nvmlReturn_t, which is 0 on success."""

_CLOCK_SM, _CLOCK_MEMORY, _TEMPERATURE_GPU = 1, 2, 0
_SLOWED_BY = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""NVML's reasons for a lowered clock, without deliberate ones: idle, set clocks, a display."""

_IGPU = re.compile(r"gv11b|gp10b|ga10b|gpu.*|.*\.gpu|.*-gpc-\d+")
"""The kernel's names for a Jetson's GPU among the devices whose clock it scales."""


@dataclass(frozen=True)
class GpuState:
    """The state of a GPU at one moment. An unknown value is None.

    Attributes:
        driver: version of NVIDIA's driver, "580.65.06".
        sm_clock, sm_clock_max: MHz.
        memory_clock, memory_clock_max: MHz.
        temperature: °C.
        power, power_limit: watts.
        slowed_by: reasons why the clocks are lowered.
    """

    driver: str | None = None
    sm_clock: int | None = None
    sm_clock_max: int | None = None
    memory_clock: int | None = None
    memory_clock_max: int | None = None
    temperature: float | None = None
    power: float | None = None
    power_limit: float | None = None
    slowed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Jetson:
    """The settings of a Jetson.

    Attributes:
        mode: nvpmodel's power mode, "MAXN_SUPER", or its number if the name is not known.
        clocks_fixed: whether the GPU's lowest clock equals its highest, as after ``jetson_clocks``.
        gpu: the GPU's clocks and temperature, from the kernel's files.
    """

    mode: str | None
    clocks_fixed: bool | None
    gpu: GpuState


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        model: its name.
        threads: hardware threads that this process may use.
        load: the load average of the last minute; it includes this process.
    """

    model: str
    threads: int
    load: float | None


def gpu_state(ordinal: int = 0, *, nvml: Any = None, cuda: Any = None, root: Path = Path("/")) -> GpuState | None:
    """The current state of a GPU: from NVML, with missing values filled in from a Jetson's files.

    Args:
        ordinal: index of the GPU in CUDA's order. NVML has its own order, so the GPU is found by its PCI address.
        nvml: the loaded NVML, instead of the system's.
        cuda: the loaded driver, instead of the system's.
        root: root folder of the system's files.

    Returns:
        The state, or None if nothing is known.
    """
    state = None
    with contextlib.suppress(OSError, AttributeError):  # no library, or none of its first functions
        nvml = nvml or ctypes.CDLL(NVML)
        bus = _bus(cuda or ctypes.CDLL(CUDA), ordinal)
        with _started(nvml):
            state = _query(nvml, bus)
    board = jetson(root)
    if board is None:
        return state
    filled = {name: value for name, value in vars(state or GpuState()).items() if value not in (None, ())}
    return GpuState(**{**vars(board.gpu), **filled})


def jetson(root: Path = Path("/")) -> Jetson | None:
    """The settings of this Jetson, or None on other machines."""
    status = _read(root / "var/lib/nvpmodel/status")
    mode = re.search(r"pmode:\s*(\d+)", status)
    gpu = next(_igpus(root), None)
    if not mode and gpu is None:
        return None
    name = None
    if mode:
        number = int(mode[1])
        config = _read(root / "etc/nvpmodel.conf")
        found = re.search(rf"^<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)", config, re.MULTILINE)
        name = found[1] if found else f"mode {number}"
    clocks = {what: _number(gpu / f"{what}_freq") if gpu else None for what in ("cur", "min", "max")}
    now, least, most = (clocks[what] for what in ("cur", "min", "max"))
    return Jetson(
        mode=name,
        clocks_fixed=None if least is None or most is None else least == most,
        gpu=GpuState(
            sm_clock=None if now is None else now // 1_000_000,
            sm_clock_max=None if most is None else most // 1_000_000,
            temperature=_igpu_temperature(root),
        ),
    )


def cpu(root: Path = Path("/")) -> Cpu:
    """This machine's processor."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    model = found[1] if found else _read(root / "proc/device-tree/model").strip("\0\n ")
    load = None
    with contextlib.suppress(OSError, AttributeError):
        load = round(os.getloadavg()[0], 2)
    return Cpu(" ".join((model or platform.processor() or platform.machine()).split()), usable_cores(), load)


# --- NVML -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(nvml: Any) -> Iterator[None]:
    if error := _function(nvml, "nvmlInit_v2")():
        raise OSError(f"NVML does not start: error {error}")
    try:
        yield
    finally:
        _function(nvml, "nvmlShutdown")()


def _function(nvml: Any, name: str) -> Any:
    function = getattr(nvml, name)
    function.argtypes, function.restype = NVML_FUNCTIONS[name], c_int
    return function


def _bus(cuda: Any, ordinal: int) -> bytes:
    """The PCI address of a GPU, by which both CUDA and NVML know it."""
    device, text = c_int(), ctypes.create_string_buffer(32)
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        or cuda.cuDeviceGetPCIBusId(text, len(text), device)
    ):
        raise OSError("the driver does not report the PCI address of this GPU")
    return text.value


def _query(nvml: Any, bus: bytes) -> GpuState | None:
    """The state of the GPU at a PCI address, or None if NVML does not know it."""
    handle = c_void_p()
    if _function(nvml, "nvmlDeviceGetHandleByPciBusId_v2")(bus, ctypes.byref(handle)):
        return None

    def value_of(name: str, *which: int, kind: Any = c_uint) -> int | None:
        """One number, or None: older libraries lack some functions, and many GPUs do not support all of them."""
        value = kind()
        try:
            error = _function(nvml, name)(handle, *which, ctypes.byref(value))
        except AttributeError:
            return None
        return None if error else int(value.value)

    version = ctypes.create_string_buffer(96)
    refused = _function(nvml, "nvmlSystemGetDriverVersion")(version, len(version))
    power, limit = value_of("nvmlDeviceGetPowerUsage"), value_of("nvmlDeviceGetEnforcedPowerLimit")
    reasons = value_of("nvmlDeviceGetCurrentClocksThrottleReasons", kind=c_ulonglong) or 0
    return GpuState(
        driver=None if refused else version.value.decode(errors="replace"),
        sm_clock=value_of("nvmlDeviceGetClockInfo", _CLOCK_SM),
        sm_clock_max=value_of("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
        memory_clock=value_of("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
        memory_clock_max=value_of("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
        temperature=value_of("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        slowed_by=tuple(why for bit, why in _SLOWED_BY.items() if reasons & bit),
    )


# --- a Jetson's files -------------------------------------------------------------------------------------------------


def _igpus(root: Path) -> Iterator[Path]:
    """The kernel's folders with the clocks of an integrated GPU."""
    if not _read(root / "proc/device-tree/model").startswith("NVIDIA"):
        return
    folder = root / "sys/class/devfreq"
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        node = _read(device / "device/of_node/name").strip("\0\n ")
        if _IGPU.fullmatch(node or device.name):
            yield device


def _igpu_temperature(root: Path) -> float | None:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if _read(zone / "type").strip().lower() in ("gpu-therm", "gpu-thermal"):
            degrees = _number(zone / "temp")
            return None if degrees is None else degrees / 1000
    return None


def _read(file: Path) -> str:
    """The text of a file, or "" if it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if re.fullmatch(r"-?\d{1,15}", text) else None
