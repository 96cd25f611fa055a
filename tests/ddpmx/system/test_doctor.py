"""What is installed here: everything that is missing or broken is one sentence, never a crash."""

from __future__ import annotations

import ctypes
import enum
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.device import discovery
from ddpmx.device.discovery import Device, Gpus
from ddpmx.errors import BackendError
from ddpmx.system import doctor
from ddpmx.trt import library as trt_library
from ddpmx.trt.library import Library

# --- TensorRT's modules ----------------------------------------------------------------------------------------------


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


def module(version: str) -> SimpleNamespace:
    return SimpleNamespace(__version__=version, ILogger=ILogger)


@pytest.fixture
def load(monkeypatch):
    """``load(flavour, tensorrt=…)``: the import of each name gives a module or raises an exception."""

    def call(flavour=None, **modules):
        def import_module(name):
            found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(trt_library, "importlib", SimpleNamespace(import_module=import_module))
        return trt_library.load.__wrapped__(flavour)

    return call


@pytest.mark.parametrize(
    ("flavour", "parts"),
    [
        (None, ("TensorRT is not installed", "tensorrt-rtx-cu13", "tensorrt-cu12", "Jetson", sys.prefix)),
        ("TensorRT", ("TensorRT is not installed", "tensorrt-cu12", "--system-site-packages")),
        ("TensorRT-RTX", ("TensorRT-RTX is not installed", "pip install tensorrt-rtx-cu13")),
    ],
)
def test_without_tensorrt_the_error_says_how_to_install_it(load, flavour, parts):
    with pytest.raises(BackendError) as caught:
        load(flavour)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        FileNotFoundError("libnvinfer.so.10: cannot open shared object file"),
        RuntimeError("libnvinfer.so.10: cannot open shared object file"),
        ModuleNotFoundError("No module named 'libnvinfer.so.10: cannot open shared object file'", name="other"),
    ],
)
def test_the_error_says_why_a_module_does_not_load(load, error):
    with pytest.raises(BackendError) as caught:
        load(tensorrt=error)
    assert "tensorrt: " in str(caught.value)
    assert "libnvinfer.so.10: cannot open" in str(caught.value)


def test_a_module_without_a_version_is_not_taken_for_tensorrt(load):
    """An empty folder of that name is a namespace package."""
    with pytest.raises(BackendError, match="__version__"):
        load(tensorrt=SimpleNamespace())


def test_tensorrt_comes_before_tensorrt_rtx(load):
    both = {"tensorrt": module("10.3.0"), "tensorrt_rtx": module("1.7.1.116")}
    assert str(load(**both)) == "TensorRT 10.3.0"
    assert str(load("TensorRT-RTX", **both)) == "TensorRT-RTX 1.7.1.116"
    assert load("TensorRT-RTX", tensorrt_rtx_bindings=module("1.7.1.116")).is_rtx
    assert load(tensorrt=ImportError("broken"), tensorrt_rtx=module("1.7.1.116")).is_rtx


@pytest.mark.parametrize(
    ("version", "release"), [("10.3.0.26", (10, 3)), ("10.13.0.35.post1", (10, 13)), ("11.4", (11, 4))]
)
def test_releases_are_compared_as_numbers(version, release):
    library = Library(module(version), "TensorRT", version, None)
    assert library.release == release
    assert not library.is_rtx


@pytest.fixture
def library(load) -> Library:
    return load(tensorrt=module("10.3.0"))


def test_last_words_are_the_errors_once(library):
    for severity, text in (
        (Severity.ERROR, "no memory"),
        (Severity.WARNING, "slow"),
        (Severity.INFO, "chatter"),
        (Severity.INTERNAL_ERROR, "assertion"),
        (Severity.ERROR, "no memory"),
    ):
        library.logger.log(severity, text)
    assert library.last_words() == "no memory; assertion"
    assert library.last_words() == ""


def test_without_errors_the_last_warnings_are_the_last_words(library):
    for text in "abcde":
        library.logger.log(Severity.WARNING, text)
    assert library.last_words() == "c; d; e"


def test_last_words_keep_both_ends(library):
    library.logger.log(Severity.ERROR, "begin" + "x" * 5000 + "end")
    words = library.last_words()
    assert words.startswith("begin")
    assert words.endswith("end")
    assert len(words) < 620
    for i in range(1000):
        library.logger.log(Severity.ERROR, str(i))
    assert len(library.logger.lines) < 1000


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 1   /usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0
7f01-7f02 r--p 00000000 08:01 1   /usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0
7f02-7f03 r-xp 00000000 08:01 2   /venv/lib/tensorrt_libs/libnvinfer.so.10
7f03-7f04 r-xp 00000000 08:01 3   /venv/lib/tensorrt_rtx_libs/libtensorrt_rtx.so.1
7f04-7f05 r-xp 00000000 08:01 4   /usr/lib/libnvinfer_plugin.so.10
7f05-7f06 r-xp 00000000 08:01 5   /usr/lib/libnvonnxparser.so.10
7f06-7f07 rw-p 00000000 00:00 0   [heap]
7f07-7f08 rw-p 00000000 00:00 0
"""


def test_the_libraries_that_are_loaded_are_listed_once(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: MAPS)
    assert trt_library.loaded_from() == [
        "/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0",
        "/venv/lib/tensorrt_libs/libnvinfer.so.10",
        "/venv/lib/tensorrt_rtx_libs/libtensorrt_rtx.so.1",
    ]


def test_without_proc_no_libraries_are_listed(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert trt_library.loaded_from() == []


# --- GPUs ------------------------------------------------------------------------------------------------------------

LIBCUDA = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *n) { *n = COUNT; return LIST; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *name, int len, int d) { strncpy(name, d ? "Orin" : "NVIDIA RTX 4090", len); return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = which == 75 ? 8 : which == 76 ? (d ? 7 : 9) : -1; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int d) { *bytes = d ? (size_t)8 << 30 : (size_t)24 << 30; return 0; }
int cuGetErrorName(int error, const char **name) {
  if (error != 999) { *name = NULL; return 1; }
  *name = "CUDA_ERROR_UNKNOWN";
  return 0;
}
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """``driver(count=2)``: what is found with a driver that was compiled for the test."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("not verified here: the discovery of GPUs (no C compiler)")

    def discover(count: int = 2, init: int = 0, listing: int = 0) -> Gpus:
        source, stub = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
        source.write_text(LIBCUDA)
        defines = [f"-DCOUNT={count}", f"-DINIT={init}", f"-DLIST={listing}"]
        subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", stub, source], check=True, timeout=60)
        monkeypatch.setattr(discovery, "DRIVER", str(stub))
        return discovery.gpus.__wrapped__()

    return discover


def test_gpus_are_those_that_the_driver_lists(driver):
    found = driver()
    assert found.devices == (Device("NVIDIA RTX 4090", "8.9", 24 << 30), Device("Orin", "8.7", 8 << 30))
    assert (found.cuda, found.trouble) == ("12.6", None)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"count": 0}, "the NVIDIA driver sees no GPU"),
        ({"init": 999}, "does not start: CUDA_ERROR_UNKNOWN"),
        ({"init": 5}, "does not start: error 5"),
        ({"listing": 999}, "lists no devices: CUDA_ERROR_UNKNOWN"),
    ],
)
def test_a_driver_s_troubles_are_reported(driver, faults, message):
    found = driver(**faults)
    assert (found.devices, found.cuda) == ((), "12.6")
    assert message in found.trouble


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(discovery, "DRIVER", "libcuda-that-is-not-here.so.1")
    found = discovery.gpus.__wrapped__()
    assert (found.devices, found.cuda) == ((), None)
    assert "no NVIDIA driver" in found.trouble


def test_a_library_that_is_no_driver_is_a_trouble(monkeypatch):
    monkeypatch.setattr(discovery, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": lambda _: ctypes.CDLL(None)}))
    assert discovery.gpus.__wrapped__().trouble


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashes Python (signal 11)"),
        ("\nprint('hello')", "printed 'hello'"),
        ("\nprint('[1]')", "printed '[1]'"),
        ("\npass", "printed ''"),
        ("\nraise ImportError('libcudart.so.12 is missing')", "ImportError: libcudart.so.12 is missing"),
        ("\nimport os\nos._exit(3)", "exit code 3"),
        (
            "\nimport sys\nsys.stdout.buffer.write(b'\\xff\\xfe')",
            "printed",
        ),
        (
            "\nimport sys\nsys.stderr.buffer.write(b'\\xff broken\\n')\nsys.exit(1)",
            "broken",
        ),
    ],
)
def test_a_probe_that_fails_reports_how(code, message):
    assert message in doctor._probe(code)["missing"]


def test_a_probe_s_last_line_counts():
    assert doctor._probe("\nprint('a banner')\nprint(json.dumps({'version': '1'}))") == {"version": "1"}


def test_a_probe_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.5)
    assert "did not finish" in doctor._probe("\nimport time\ntime.sleep(60)")["missing"]


def test_the_version_of_a_package_is_found():
    assert doctor._package("numpy") == {"version": np.__version__}
    assert doctor._package("no-such-package-anywhere") == {"missing": "not installed"}


CHAINS = "chains on the GPU"
EVERYTHING = {
    "torch": {"version": "2.9.0", "cuda": "12.6", "gpu": True},
    "onnxruntime": {"version": "1.23.0", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
    "MNN": {"version": "3.6.1", "no_converter": None},
    "torch-fidelity": {"version": "0.4.0"},
    "TensorRT": {"version": "10.3.0", "libraries": ["/usr/lib/libnvinfer.so.10"]},
    "TensorRT-RTX": {"version": "1.7.1.116", "libraries": []},
    CHAINS: {"version": "by CUDA 12.6", "why_no_while": None},
}
GPU = Gpus((Device("Orin", "8.7", 8 << 30),), "12.6")
NO_GPU = Gpus(trouble="there is no NVIDIA driver")


@pytest.fixture
def examine(monkeypatch):
    """``examine(gpus, torch={"missing": …})``: the findings if everything else is here."""

    def call(gpus=GPU, packages=True, **changes):
        changes = {CHAINS: {"missing": gpus.trouble}} | changes if gpus.trouble else changes
        results = EVERYTHING | {name.replace("_", "-"): value for name, value in changes.items()}
        by_code = {code: results[name] for name, code in doctor._PROBES.items()}
        monkeypatch.setattr(doctor, "_probe", by_code.__getitem__)
        found = {"version": "1"} if packages else {"missing": "not installed"}
        monkeypatch.setattr(doctor, "_package", lambda name: found)
        monkeypatch.setattr(doctor, "gpus", lambda: gpus)
        report = doctor.examine()
        assert json.loads(json.dumps(report.to_json()))["machine"]["gpu_trouble"] == gpus.trouble
        return {finding.what: finding for finding in report.findings}

    return call


def test_everything_works_if_everything_is_here(examine):
    findings = examine()
    assert [what for what, finding in findings.items() if not finding.works] == []
    assert "GPU" in findings["train"].why
    assert "/usr/lib/libnvinfer.so.10" in findings["build with TensorRT"].why


def test_without_a_gpu_only_what_needs_none_works(examine):
    findings = examine(NO_GPU, torch={"version": "2.9.0+cpu", "cuda": None, "gpu": False})
    assert {what for what, finding in findings.items() if not finding.works} == {
        "generate --provider cuda",
        "generate, parity, bench with a .plan",
        "build with TensorRT",
    }
    for what in ("generate --provider cuda", "generate, parity, bench with a .plan", "build with TensorRT"):
        assert "no NVIDIA driver" in findings[what].why
    assert "CPU" in findings["train"].why


def test_every_finding_names_what_is_missing(examine):
    missing = {"missing": "no"}
    names = ("torch", "onnxruntime", "MNN", "torch_fidelity", "TensorRT", "TensorRT_RTX")
    findings = examine(NO_GPU, False, **dict.fromkeys(names, missing))
    assert not any(finding.works for finding in findings.values())
    assert "torch, safetensors, onnx, onnxscript" in findings["export"].why
    assert findings["export"].fix == "pip install torch safetensors onnx onnxscript"
    assert findings["score with an ODE"].fix == "pip install 'ddpmx[flow]'"
    assert findings["serve"].fix == "pip install 'ddpmx[serve]'"
    assert findings["generate --ray"].fix == "pip install 'ddpmx[ray]'"
    assert findings["generate --format parquet"].fix == "pip install 'ddpmx[data]'"
    assert findings["generate --out with an address, such as s3://…"].why == "without fsspec"
    assert findings["eval fid"].why == "without torch-fidelity (no)"
    assert "tensorrt-rtx-cu13" in findings["build with TensorRT-RTX"].fix
    assert findings["build with TensorRT-RTX"].why == "no"


def test_an_onnxruntime_without_cuda_is_distinguished_from_a_missing_gpu(examine):
    cpu = {"version": "1.23.0", "providers": ["CPUExecutionProvider"]}
    assert "onnxruntime-gpu" in examine(onnxruntime=cpu)["generate --provider cuda"].fix
    assert examine(NO_GPU, onnxruntime=cpu)["generate --provider cuda"].fix is None


def test_an_mnn_without_its_converter_is_a_finding(examine):
    what = "build --for mnn, generate, parity with an .mnn"
    assert examine()[what].why == "MNN 3.6.1"
    without = examine(MNN={"version": "3.6.1", "no_converter": "this MNN comes without its converter"})[what]
    assert (without.works, without.why) == (False, "MNN 3.6.1, but this MNN comes without its converter")
    assert examine(MNN={"missing": "MNN is not installed"})[what].fix == "pip install 'ddpmx[mnn]'"


def test_the_executor_of_plans_is_named_with_its_reason(examine):
    what = "generate, parity, bench with a .plan"
    assert "one launch (executor while)" in examine()[what].why
    old = {"version": "by CUDA 12.2", "why_no_while": "the driver has no cuGraphAddNode_v2"}
    assert examine(**{CHAINS: old})[what].why.endswith("executor graph; not while: the driver has no cuGraphAddNode_v2")
    missing = {"missing": "not installed"}
    found = examine(TensorRT=missing)[what]
    assert (found.works, found.why[:13]) == (True, "TensorRT-RTX,")
    assert not examine(TensorRT=missing, TensorRT_RTX=missing)[what].works


def test_two_libraries_at_once_are_a_finding(examine):
    two = {"version": "10.3.0", "libraries": ["/usr/lib/libnvinfer.so.10", "/venv/libnvinfer.so.10"]}
    assert not examine(TensorRT=two)["TensorRT alone"].works


@pytest.mark.parametrize(
    ("model", "release", "jetson"),
    [
        ("NVIDIA Jetson Orin Nano\0", "# R36 (release)\n", "NVIDIA Jetson Orin Nano; # R36 (release)"),
        ("NVIDIA Jetson Orin Nano\0", None, "NVIDIA Jetson Orin Nano"),
        ("Raspberry Pi 5\0", None, None),
        ("", "", None),
        (None, None, None),
    ],
)
def test_a_jetson_is_recognised_by_its_board(monkeypatch, model, release, jetson):
    def read_text(self, **_):
        text = model if self.name == "model" else release
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert doctor._jetson() == jetson


@pytest.mark.slow
def test_doctor_imports_nothing_from_the_current_folder(tmp_path):
    for name in ("json.py", "onnxruntime.py", "torch.py"):
        (tmp_path / name).write_text("open('run', 'w')\n")
    code = "from ddpmx.system import doctor; doctor.examine()"
    environment = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[:] = [p for p in sys.path if p]; " + code],
        cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
