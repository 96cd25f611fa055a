"""The machine's state: a fake NVML without a GPU, and the files of a Jetson in a folder.

NVML's numbers are those of nvml.h: clocks 1 and 2 are SM and memory, power is in milliwatts.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_uint, c_ulonglong, c_void_p

import pytest

from ddpmx.system import machine
from ddpmx.system.machine import NVML_FUNCTIONS, GpuState

HANDLE = 0x7F00_1234_5678
BUS = b"0000:3B:00.0"


class Function:
    """A ctypes function: its arguments must fit the declared types."""

    def __init__(self, call):
        self.call = call
        self.argtypes = self.restype = None

    def __call__(self, *arguments):
        if self.argtypes is not None:
            assert len(arguments) == len(self.argtypes)
            assert self.restype is c_int
            for argtype, argument in zip(self.argtypes, arguments, strict=True):
                argtype.from_param(argument)
        return self.call(*arguments) or 0


class FakeCuda:
    """The functions of the driver that give the PCI address of a GPU."""

    def __init__(self, ordinal=2, error=0):
        self.cuInit = Function(lambda flags: error)
        self.cuDeviceGet = Function(self._get)
        self.cuDeviceGetPCIBusId = Function(self._bus)
        self.ordinal = ordinal

    def _get(self, out, ordinal):
        assert ordinal == self.ordinal
        out._obj.value = 100 + ordinal

    def _bus(self, text, size, device):
        assert (size, device.value) == (32, 100 + self.ordinal)
        text.value = BUS


class FakeNvml:
    """NVML with one GPU, without the functions ``lacks`` of newer versions; the functions ``refuses`` return an error."""

    def __init__(self, *, lacks=(), refuses=(), reasons=0x24):
        self.started = 0
        functions = {
            "nvmlInit_v2": self._start,
            "nvmlShutdown": self._stop,
            "nvmlSystemGetDriverVersion": self._version,
            "nvmlDeviceGetHandleByPciBusId_v2": self._handle,
            "nvmlDeviceGetClockInfo": lambda h, which, out: self._give(h, out, c_uint, {1: 1755, 2: 2619}[which]),
            "nvmlDeviceGetMaxClockInfo": lambda h, which, out: self._give(h, out, c_uint, {1: 1980, 2: 2619}[which]),
            "nvmlDeviceGetTemperature": lambda h, which, out: self._give(h, out, c_uint, {0: 61}[which]),
            "nvmlDeviceGetPowerUsage": lambda h, out: self._give(h, out, c_uint, 645_500),
            "nvmlDeviceGetEnforcedPowerLimit": lambda h, out: self._give(h, out, c_uint, 700_000),
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda h, out: self._give(h, out, c_ulonglong, reasons),
        }
        assert set(functions) == set(NVML_FUNCTIONS)
        for name, function in functions.items():
            if name not in lacks:
                setattr(self, name, Function((lambda *_: 3) if name in refuses else function))

    def _start(self):
        self.started += 1

    def _stop(self):
        self.started -= 1

    def _version(self, text, size):
        assert size == len(text) >= 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        text.value = b"580.65.06"

    def _handle(self, bus, out):
        assert (bus, self.started) == (BUS, 1)
        out._obj.value = HANDLE

    def _give(self, handle, out, kind, value):
        assert (handle.value, self.started) == (HANDLE, 1)
        assert isinstance(out._obj, kind)
        out._obj.value = value


STATE = GpuState("580.65.06", 1755, 1980, 2619, 2619, 61, 645.5, 700.0, ("power cap", "heat (software)"))


@pytest.fixture
def no_jetson(tmp_path):
    return tmp_path / "root"


def test_nvml_reports_the_gpu_of_cuda_s_ordinal(no_jetson):
    nvml = FakeNvml()
    assert machine.gpu_state(2, nvml=nvml, cuda=FakeCuda(ordinal=2), root=no_jetson) == STATE
    assert nvml.started == 0


@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        ("nvmlSystemGetDriverVersion", {"driver": None}),
        ("nvmlDeviceGetClockInfo", {"sm_clock": None, "memory_clock": None}),
        ("nvmlDeviceGetMaxClockInfo", {"sm_clock_max": None, "memory_clock_max": None}),
        ("nvmlDeviceGetTemperature", {"temperature": None}),
        ("nvmlDeviceGetPowerUsage", {"power": None}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_limit": None}),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", {"slowed_by": ()}),
    ],
)
def test_a_value_that_a_gpu_does_not_support_is_none_and_the_rest_is_known(no_jetson, function, unknown):
    nvml = FakeNvml(refuses=(function,))
    assert machine.gpu_state(2, nvml=nvml, cuda=FakeCuda(), root=no_jetson) == GpuState(**{**vars(STATE), **unknown})
    assert nvml.started == 0


def test_without_a_function_of_newer_versions_the_rest_is_known(no_jetson):
    nvml = FakeNvml(lacks=("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksThrottleReasons"))
    state = machine.gpu_state(2, nvml=nvml, cuda=FakeCuda(), root=no_jetson)
    assert state == GpuState(**{**vars(STATE), "power_limit": None, "slowed_by": ()})


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(refuses=("nvmlInit_v2",)),
        FakeNvml(refuses=("nvmlDeviceGetHandleByPciBusId_v2",)),
        FakeNvml(lacks=("nvmlDeviceGetHandleByPciBusId_v2",)),
        FakeNvml(lacks=("nvmlInit_v2",)),
    ],
    ids=["does not start", "does not know the GPU", "too old", "no NVML"],
)
def test_without_a_working_nvml_there_is_no_state(no_jetson, nvml):
    assert machine.gpu_state(2, nvml=nvml, cuda=FakeCuda(), root=no_jetson) is None
    assert nvml.started == 0


def test_without_a_working_driver_there_is_no_state(no_jetson):
    nvml = FakeNvml()
    assert machine.gpu_state(2, nvml=nvml, cuda=FakeCuda(error=100), root=no_jetson) is None


def test_deliberately_lowered_clocks_are_not_called_slowed(no_jetson):
    state = machine.gpu_state(2, nvml=FakeNvml(reasons=0x1 | 0x2 | 0x10 | 0x100), cuda=FakeCuda(), root=no_jetson)
    assert state.slowed_by == ()


def test_every_nvml_function_takes_a_handle_as_a_pointer():
    for name, arguments in NVML_FUNCTIONS.items():
        if name.startswith("nvmlDeviceGet") and "Handle" not in name:
            assert arguments[0] is c_void_p, name
            assert ctypes.sizeof(arguments[0]) == 8


# --- a Jetson ---------------------------------------------------------------------------------------------------------

CONFIG = """# comments
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
< PM_CONFIG DEFAULT=2 >
"""


@pytest.fixture
def orin(tmp_path):
    """The files of an Orin Nano that ddpmx reads."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
    write("proc/cpuinfo", "processor\t: 0\nCPU part\t: 0xd42\n")
    write("var/lib/nvpmodel/status", "pmode:0002")
    write("etc/nvpmodel.conf", CONFIG)
    for device, (name, now, least, most) in {
        "17000000.gpu": ("gpu\0", 612_000_000, 306_000_000, 1_020_000_000),
        "bwmgr": ("mc\0", 1, 2, 3),
    }.items():
        folder = f"sys/class/devfreq/{device}"
        write(f"{folder}/device/of_node/name", name)
        for what, value in (("cur", now), ("min", least), ("max", most)):
            write(f"{folder}/{what}_freq", f"{value}\n")
    for index, (zone, degrees) in enumerate((("cpu-thermal", 48_000), ("gpu-thermal", 46_593))):
        write(f"sys/class/thermal/thermal_zone{index}/type", f"{zone}\n")
        write(f"sys/class/thermal/thermal_zone{index}/temp", f"{degrees}\n")
    return tmp_path


def test_a_jetson_s_mode_clocks_and_temperature_are_read(orin):
    gpu = GpuState(sm_clock=612, sm_clock_max=1020, temperature=46.593)
    assert machine.jetson(orin) == machine.Jetson("MAXN_SUPER", False, gpu)


def test_equal_lowest_and_highest_clocks_are_fixed(orin):
    (orin / "sys/class/devfreq/17000000.gpu/min_freq").write_text("1020000000\n")
    assert machine.jetson(orin).clocks_fixed is True


def test_a_mode_without_a_name_is_its_number(orin):
    (orin / "etc/nvpmodel.conf").write_text(CONFIG.replace("ID=2", "ID=22"))
    assert machine.jetson(orin).mode == "mode 2"


@pytest.mark.parametrize("content", ["", "-", "12 MHz", "9" * 40])
def test_values_of_unreadable_files_are_unknown(orin, content):
    for name in ("cur", "min", "max"):
        (orin / f"sys/class/devfreq/17000000.gpu/{name}_freq").write_text(content)
    (orin / "sys/class/thermal/thermal_zone1/temp").write_text(content)
    (orin / "var/lib/nvpmodel/status").write_text(content)
    assert machine.jetson(orin) == machine.Jetson(None, None, GpuState())


def test_without_nvml_a_jetson_s_gpu_is_read_from_its_files(orin):
    state = machine.gpu_state(0, nvml=FakeNvml(refuses=("nvmlInit_v2",)), cuda=FakeCuda(ordinal=0), root=orin)
    assert state == GpuState(sm_clock=612, sm_clock_max=1020, temperature=46.593)


def test_nvml_s_values_take_precedence_over_the_files(orin):
    nvml = FakeNvml(refuses=("nvmlDeviceGetTemperature",))
    state = machine.gpu_state(0, nvml=nvml, cuda=FakeCuda(ordinal=0), root=orin)
    assert (state.sm_clock, state.temperature) == (1755, 46.593)


def test_other_machines_are_not_a_jetson(no_jetson):
    assert machine.jetson(no_jetson) is None


def test_a_board_of_another_maker_is_not_a_jetson(orin):
    (orin / "proc/device-tree/model").write_text("Radxa ROCK 5B\0")
    (orin / "var/lib/nvpmodel/status").unlink()
    assert machine.jetson(orin) is None


# --- the processor ----------------------------------------------------------------------------------------------------


def test_the_processor_is_named(tmp_path, orin):
    assert machine.cpu(orin).model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    (orin / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Some   CPU @ 3.0GHz\nprocessor\t: 1\n")
    assert machine.cpu(orin).model == "Some CPU @ 3.0GHz"


def test_this_machine_s_processor_has_threads_and_a_name():
    cpu = machine.cpu()
    assert cpu.threads >= 1
    assert cpu.model.strip()
