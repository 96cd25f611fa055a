"""The machine's state, without which a figure of speed says little: clocks, heat, power, and how many threads there are.

NVIDIA's management library (NVML) comes with the driver, and is asked by ctypes. A Jetson before Thor has none, or one
that answers little; there the kernel's files tell. Nothing here raises: what does not answer is None.
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
"""What the functions take. All of them give an nvmlReturn_t, and 0 is success."""

_CLOCK_SM, _CLOCK_MEMORY, _TEMPERATURE_GPU = 1, 2, 0
_SLOWED_BY = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""NVML's reasons for a lowered clock, without those that are a choice: idle, set clocks, a display."""

_IGPU = re.compile(r"gv11b|gp10b|ga10b|gpu.*|.*\.gpu|.*-gpc-\d+")
"""What the kernel calls a Jetson's GPU among the devices whose clock it scales."""


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment. None is what did not answer.

    Attributes:
        driver: NVIDIA's driver, "580.65.06".
        sm_clock, sm_clock_max: MHz.
        memory_clock, memory_clock_max: MHz.
        temperature: °C.
        power, power_limit: watts.
        slowed_by: what holds the clocks down.
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
    """How a Jetson is set.

    Attributes:
        mode: nvpmodel's power mode, "MAXN_SUPER", or its number where the name is not known.
        clocks_fixed: whether the GPU's lowest clock is its highest, as ``jetson_clocks`` leaves it.
        gpu: the GPU's clocks and temperature, as the kernel tells them.
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
        load: how many processes wanted to run in the last minute, on average; this one counts.
    """

    model: str
    threads: int
    load: float | None


def gpu_state(ordinal: int = 0, *, nvml: Any = None, cuda: Any = None, root: Path = Path("/")) -> GpuState | None:
    """A GPU now: from NVML, and what that leaves open from the files of a Jetson.

    Args:
        ordinal: which one, in CUDA's order. NVML's own order is another: the PCI address leads from one to the other.
        nvml: the loaded library, for those who bring their own.
        cuda: the loaded driver, likewise.
        root: where the system's files are.

    Returns:
        None if nothing answers.
    """
    state = None
    with contextlib.suppress(OSError, AttributeError):  # no library, or none of its first functions
        nvml = nvml or ctypes.CDLL(NVML)
        bus = _bus(cuda or ctypes.CDLL(CUDA), ordinal)
        with _started(nvml):
            state = _ask(nvml, bus)
    told = jetson(root)
    if told is None:
        return state
    filled = {name: value for name, value in vars(state or GpuState()).items() if value not in (None, ())}
    return GpuState(**{**vars(told.gpu), **filled})


def jetson(root: Path = Path("/")) -> Jetson | None:
    """How this Jetson is set, or None if it is none."""
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
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        threads = os.cpu_count() or 1
    load = None
    with contextlib.suppress(OSError, AttributeError):
        load = round(os.getloadavg()[0], 2)
    return Cpu(" ".join((model or platform.processor() or platform.machine()).split()), threads, load)


# --- NVML -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(nvml: Any) -> Iterator[None]:
    if error := _function(nvml, "nvmlInit_v2")():
        raise OSError(f"NVML does not start: {error}")
    try:
        yield
    finally:
        _function(nvml, "nvmlShutdown")()


def _function(nvml: Any, name: str) -> Any:
    function = getattr(nvml, name)
    function.argtypes, function.restype = NVML_FUNCTIONS[name], c_int
    return function


def _bus(cuda: Any, ordinal: int) -> bytes:
    """A GPU's PCI address, which CUDA and NVML agree on."""
    device, text = c_int(), ctypes.create_string_buffer(32)
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        or cuda.cuDeviceGetPCIBusId(text, len(text), device)
    ):
        raise OSError("the driver does not say where this GPU is")
    return text.value


def _ask(nvml: Any, bus: bytes) -> GpuState | None:
    handle = c_void_p()
    if _function(nvml, "nvmlDeviceGetHandleByPciBusId_v2")(bus, ctypes.byref(handle)):
        return None

    def ask(name: str, *which: int, kind: Any = c_uint) -> int | None:
        """One number. Older libraries lack a function, and many GPUs an answer."""
        value = kind()
        try:
            error = _function(nvml, name)(handle, *which, ctypes.byref(value))
        except AttributeError:
            return None
        return None if error else int(value.value)

    version = ctypes.create_string_buffer(96)
    refused = _function(nvml, "nvmlSystemGetDriverVersion")(version, len(version))
    power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", kind=c_ulonglong) or 0
    return GpuState(
        driver=None if refused else version.value.decode(errors="replace"),
        sm_clock=ask("nvmlDeviceGetClockInfo", _CLOCK_SM),
        sm_clock_max=ask("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
        memory_clock=ask("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
        memory_clock_max=ask("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
        temperature=ask("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        slowed_by=tuple(why for bit, why in _SLOWED_BY.items() if reasons & bit),
    )


# --- a Jetson's files -------------------------------------------------------------------------------------------------


def _igpus(root: Path) -> Iterator[Path]:
    """The folders of the kernel's that hold the clocks of a GPU on the chip."""
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
    """What stands in a file, or nothing."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if re.fullmatch(r"-?\d{1,15}", text) else None
