"""What is here and what files are: nothing that is missing, broken or hostile may be more than a sentence."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx import device, doctor, npz, sealed, tensorrt_library
from ddpmx.describe import describe, safetensors_elements
from ddpmx.device import Device, Gpus
from ddpmx.errors import BackendError, DdpmxError, FileFormatError, SpecError
from ddpmx.planfile import sidecar_path
from ddpmx.tensorrt_library import Library
from oracles import gaussian, wire
from oracles.plans import RECORD, SPEC, elf, make_plan

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

        monkeypatch.setattr(tensorrt_library, "importlib", SimpleNamespace(import_module=import_module))
        return tensorrt_library.load.__wrapped__(flavour)

    return call


@pytest.mark.parametrize(
    ("flavour", "says"),
    [
        (None, ("TensorRT is not installed", "tensorrt-rtx-cu13", "tensorrt-cu12", "Jetson", sys.prefix)),
        ("TensorRT", ("TensorRT is not installed", "tensorrt-cu12", "--system-site-packages")),
        ("TensorRT-RTX", ("TensorRT-RTX is not installed", "pip install tensorrt-rtx-cu13")),
    ],
)
def test_without_tensorrt_it_says_how_to_install_it(load, flavour, says):
    with pytest.raises(BackendError) as caught:
        load(flavour)
    for part in says:
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
def test_a_module_that_does_not_load_says_why(load, error):
    with pytest.raises(BackendError) as caught:
        load(tensorrt=error)
    assert "tensorrt: " in str(caught.value)
    assert "libnvinfer.so.10: cannot open" in str(caught.value)


def test_a_module_that_is_none_is_not_taken_for_tensorrt(load):
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
    assert tensorrt_library.loaded_from() == [
        "/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0",
        "/venv/lib/tensorrt_libs/libnvinfer.so.10",
        "/venv/lib/tensorrt_rtx_libs/libtensorrt_rtx.so.1",
    ]


def test_where_there_is_no_list_none_is_given(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert tensorrt_library.loaded_from() == []


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
    """``driver(count=2)``: what is said of a driver that was compiled for the occasion."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("not verified here: what is asked of a GPU's driver (no C compiler)")

    def ask(count: int = 2, init: int = 0, listing: int = 0) -> Gpus:
        source, stub = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
        source.write_text(LIBCUDA)
        defines = [f"-DCOUNT={count}", f"-DINIT={init}", f"-DLIST={listing}"]
        subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", stub, source], check=True, timeout=60)
        monkeypatch.setattr(device, "_DRIVER", str(stub))
        return device.gpus.__wrapped__()

    return ask


def test_gpus_are_what_the_driver_says(driver):
    found = driver()
    assert found.devices == (Device("NVIDIA RTX 4090", "8.9", 24 << 30), Device("Orin", "8.7", 8 << 30))
    assert (found.cuda, found.trouble) == ("12.6", None)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"count": 0}, "the NVIDIA driver sees no GPU"),
        ({"init": 999}, "does not start: CUDA_ERROR_UNKNOWN"),
        ({"init": 5}, "does not start: error 5"),
        ({"listing": 999}, "lists no devices: CUDA_ERROR_UNKNOWN"),
    ],
)
def test_a_driver_s_troubles_are_told(driver, answers, says):
    found = driver(**answers)
    assert (found.devices, found.cuda) == ((), "12.6")
    assert says in found.trouble


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(device, "_DRIVER", "libcuda-that-is-not-here.so.1")
    found = device.gpus.__wrapped__()
    assert (found.devices, found.cuda) == ((), None)
    assert "no NVIDIA driver" in found.trouble


def test_a_library_that_is_no_driver_is_a_trouble(monkeypatch):
    monkeypatch.setattr(device, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": lambda _: ctypes.CDLL(None)}))
    assert device.gpus.__wrapped__().trouble


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashes Python (signal 11)"),
        ("\nprint('hello')", "it says 'hello'"),
        ("\nprint('[1]')", "it says '[1]'"),
        ("\npass", "it says ''"),
        ("\nraise ImportError('libcudart.so.12 is missing')", "ImportError: libcudart.so.12 is missing"),
        ("\nimport os\nos._exit(3)", "exit code 3"),
        (
            "\nimport sys\nsys.stdout.buffer.write(b'\\xff\\xfe')",
            "it says",
        ),
        (
            "\nimport sys\nsys.stderr.buffer.write(b'\\xff broken\\n')\nsys.exit(1)",
            "broken",
        ),
    ],
)
def test_a_probe_that_fails_says_how(code, says):
    assert says in doctor._probe(code)["missing"]


def test_a_probe_s_last_line_counts():
    assert doctor._probe("\nprint('a banner')\nprint(json.dumps({'version': '1'}))") == {"version": "1"}


def test_a_probe_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.5)
    assert "does not come back" in doctor._probe("\nimport time\ntime.sleep(60)")["missing"]


def test_packages_are_asked_for_their_version():
    assert doctor._package("numpy") == {"version": np.__version__}
    assert doctor._package("no-such-package-anywhere") == {"missing": "not installed"}


EVERYTHING = {
    "torch": {"version": "2.9.0", "cuda": "12.6", "gpu": True},
    "onnxruntime": {"version": "1.23.0", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
    "TensorRT": {"version": "10.3.0", "libraries": ["/usr/lib/libnvinfer.so.10"]},
    "TensorRT-RTX": {"version": "1.7.1.116", "libraries": []},
}
GPU = Gpus((Device("Orin", "8.7", 8 << 30),), "12.6")
NO_GPU = Gpus(trouble="there is no NVIDIA driver")


@pytest.fixture
def examine(monkeypatch):
    """``examine(gpus, torch={"missing": …})``: the findings where everything else is here."""

    def call(gpus=GPU, packages=True, **changes):
        said = EVERYTHING | {name.replace("_", "-"): value for name, value in changes.items()}
        by_code = {code: said[name] for name, code in doctor._PROBES.items()}
        monkeypatch.setattr(doctor, "_probe", by_code.__getitem__)
        found = {"version": "1"} if packages else {"missing": "not installed"}
        monkeypatch.setattr(doctor, "_package", lambda name: found)
        monkeypatch.setattr(doctor, "gpus", lambda: gpus)
        report = doctor.examine()
        assert json.loads(json.dumps(report.to_json()))["machine"]["gpu_trouble"] == gpus.trouble
        return {finding.what: finding for finding in report.findings}

    return call


def test_where_everything_is_here_everything_works(examine):
    findings = examine()
    assert [what for what, finding in findings.items() if not finding.works] == []
    assert "GPU" in findings["train"].why
    assert "/usr/lib/libnvinfer.so.10" in findings["build with TensorRT"].why


def test_without_a_gpu_only_what_needs_none_works(examine):
    findings = examine(NO_GPU, torch={"version": "2.9.0+cpu", "cuda": None, "gpu": False})
    assert {what for what, finding in findings.items() if not finding.works} == {
        "generate --provider cuda",
        "build with TensorRT",
    }
    for what in ("generate --provider cuda", "build with TensorRT"):
        assert "no NVIDIA driver" in findings[what].why
    assert "CPU" in findings["train"].why


def test_where_nothing_is_here_every_finding_says_what_is_missing(examine):
    missing = {"missing": "it says 'no'"}
    findings = examine(NO_GPU, False, torch=missing, onnxruntime=missing, TensorRT=missing, TensorRT_RTX=missing)
    assert not any(finding.works for finding in findings.values())
    assert "torch, safetensors, onnx, onnxscript" in findings["export"].why
    assert findings["export"].fix == "pip install torch safetensors onnx onnxscript"
    assert "tensorrt-rtx-cu13" in findings["build with TensorRT-RTX"].fix
    assert findings["build with TensorRT-RTX"].why == "it says 'no'"


def test_an_onnxruntime_without_cuda_is_told_from_a_missing_gpu(examine):
    cpu = {"version": "1.23.0", "providers": ["CPUExecutionProvider"]}
    assert "onnxruntime-gpu" in examine(onnxruntime=cpu)["generate --provider cuda"].fix
    assert examine(NO_GPU, onnxruntime=cpu)["generate --provider cuda"].fix is None


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
def test_a_jetson_is_known_by_its_board(monkeypatch, model, release, jetson):
    def read_text(self, **_):
        text = model if self.name == "model" else release
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert doctor._jetson() == jetson


# --- describe --------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHTS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
}


@pytest.fixture
def run(tmp_path) -> Path:
    for step, timesteps in ((9, 10), (100, 20)):  # the newest by number, not by name
        folder = tmp_path / "run" / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        model = {"model": SPEC.replace(timesteps=timesteps).to_json(), "network": {"channels": 16}}
        (folder / "spec.json").write_text(json.dumps(model))
        (folder / "ema.safetensors").write_bytes(safetensors(WEIGHTS, bytes(28)))
    return tmp_path / "run"


def test_a_run_is_described_by_its_newest_checkpoint(run):
    told = describe(run)
    assert (told["kind"], told["checkpoint"], told["note"]) == ("checkpoint", "100", None)
    assert told["spec"] == SPEC.to_json()
    assert told["network"] == {"channels": 16}
    assert told["parameters"] == {"ema.safetensors": 7}
    assert told["bytes"] == (run / "checkpoints" / "100" / "ema.safetensors").stat().st_size
    assert describe(run / "checkpoints" / "9")["spec"]["timesteps"] == 10
    assert json.loads(json.dumps(told)) == told


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileFormatError, match="no checkpoint yet"):
        describe(tmp_path)


def test_a_checkpoint_with_a_cut_off_file_is_refused(run):
    file = run / "checkpoints" / "100" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"ema\.safetensors: not a whole"):
        describe(run)


def test_a_checkpoint_s_link_to_nowhere_is_an_error_of_ours(run):
    (run / "checkpoints" / "100" / "more.safetensors").symlink_to("nowhere")
    with pytest.raises(DdpmxError, match=r"more\.safetensors"):
        describe(run)


def tensor(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        b"\xff" * 8,
        b"\xff" * 100,
        (1 << 40).to_bytes(8, "little") + b"{}",
        safetensors(b"{"),
        safetensors(b"[" * 100_000),
        safetensors([]),
        safetensors(3),
        safetensors(b'"abc"'),
        safetensors({"a": 3}),
        safetensors({"a": []}),
        safetensors({"a": {}}),
        safetensors(tensor(), bytes(7)),
        safetensors(tensor(), bytes(9)),
        safetensors(tensor(data_offsets=[0]), bytes(8)),
        safetensors(tensor(data_offsets=["0", "8"]), bytes(8)),
        safetensors(tensor(data_offsets=None), bytes(8)),
        safetensors(tensor(shape=None), bytes(8)),
        safetensors(tensor(shape=2), bytes(8)),
        safetensors(tensor(shape=["many"]), bytes(8)),
        safetensors(tensor(shape=[[2]]), bytes(8)),
        safetensors(tensor(shape=[float("nan")]), bytes(8)),
        safetensors(tensor(shape=[float("inf")]), bytes(8)),
        safetensors(tensor(shape=[-2]), bytes(8)),
        safetensors(tensor(data_offsets=[0, float("inf")]), bytes(8)),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        safetensors_elements(path)


def test_safetensors_are_counted_whatever_they_claim(tmp_path):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(safetensors(tensor(shape=[10**18] * 50), bytes(8)))
    assert safetensors_elements(path) <= 1 << 62


def test_safetensors_itself_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="not verified here: what safetensors itself writes")
    path = tmp_path / "ema.safetensors"
    library.save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, path)
    assert safetensors_elements(path) == 17


def test_an_onnx_file_is_described(gaussian_onnx):
    told = describe(gaussian_onnx)
    assert (told["kind"], told["bytes"], told["note"]) == ("onnx", gaussian_onnx.stat().st_size, None)
    assert told["spec"] == gaussian.SPEC.to_json()
    assert told["inputs"] == {"x": "float32 ['batch', 3, 8, 8]", "t": "int32 ['batch']"}
    assert told["outputs"] == {"eps": "float32 ['batch', 3, 8, 8]"}
    assert told["weights"] == {"float32": 4 * (1000 + 1000 + 192)}
    assert (told["opset"], told["external"]) == (20, [])


def test_weights_beside_an_onnx_file_count(tmp_path):
    graph = wire.field(5, wire.external_tensor("weights.bin"))
    path = tmp_path / "model.onnx"
    path.write_bytes(wire.model({"x": (99, ())}, {}, graph=graph))
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    told = describe(path)
    assert (told["external"], told["bytes"]) == (["weights.bin"], path.stat().st_size + 4)
    assert told["inputs"] == {"x": "type 99 []"}


def test_a_foreign_onnx_file_is_described_with_what_is_missing(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(wire.model({"x": (1, ("N", None, 3))}, {"y": (10, (1,))}))
    told = describe(path)
    assert told["spec"] is None
    assert told["note"].startswith("the file does not say which diffusion model it is")
    assert told["inputs"] == {"x": "float32 ['N', None, 3]"}
    assert told["outputs"] == {"y": "float16 [1]"}


def test_an_onnx_file_with_a_damaged_spec_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(wire.model({}, {}, metadata={"ddpmx": SPEC.to_text()[:-1]}))
    with pytest.raises(SpecError, match="damaged"):
        describe(path)


def test_a_plan_is_described(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan())
    told = describe(path)
    assert (told["kind"], told["flavour"], told["version"]) == ("plan", "TensorRT-RTX", "1.7.1.116")
    assert (told["spec"], told["engine"]) == (SPEC.to_json(), RECORD.to_json())
    assert (told["note"], told["build"]) == (None, None)
    values = {"spec": SPEC.to_json(), "engine": RECORD.to_json(), "bytes": path.stat().st_size}
    sidecar_path(path).write_text(json.dumps(values | {"build": {"layers": 8}}))
    told = describe(path)
    assert told["build"] == {"layers": 8}


def test_a_plan_with_code_for_the_cpu_is_described_and_not_run(tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan(tail=elf(62)))
    assert describe(tmp_path / "model.plan")["spec"] == SPEC.to_json()


def test_a_plan_without_a_name_is_described_with_what_is_missing(tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan(name=b"Unnamed Network 0"))
    told = describe(tmp_path / "model.plan")
    assert (told["spec"], told["version"]) == (None, "1.7.1.116")
    assert told["note"].startswith("the plan does not say which diffusion model it is")


def test_a_plan_with_a_damaged_name_or_a_foreign_sidecar_is_refused(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan().replace(b"timesteps", b"timestep_"))
    with pytest.raises(SpecError, match="damaged"):
        describe(path)
    path.write_bytes(make_plan(record=dataclasses.replace(RECORD, batch=(1, 1, 1))))
    sidecar_path(path).write_text("{}")
    with pytest.raises(SpecError, match="contradicts"):
        describe(path)


# --- sealed texts ----------------------------------------------------------------------------------------------------


def test_sealed_texts_are_found_among_anything():
    first, second = sealed.seal("a1", {"n": 1}), sealed.seal("a1", {"n": 2})
    data = b"\0\xffa1 " + first.encode() + b"\xff" + sealed.seal("b1", {"n": 3}).encode() + second.encode() + b"a1 9"
    found = list(sealed.search("a1", data))
    assert [text for text, _ in found] == [first, second]
    assert [data[end - len(text) : end].decode() for text, end in found] == [first, second]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text.replace('"n"', '"m"'),
        lambda text: text.replace("a1 ", "a1  "),
        lambda text: text.replace("a1 7 ", "a1 8 "),
        lambda text: text.replace("a1 7 ", "a1 0 "),
        lambda text: text.replace("a1 7 ", "a1 99999 "),
        lambda text: "a1 7 " + f"{int(text[5:13], 16) ^ 1:08x}" + text[13:],
    ],
)
def test_damaged_sealed_texts_are_passed_over(damage):
    whole = sealed.seal("a1", {"n": 1})
    assert whole.startswith("a1 7 ")
    damaged = damage(whole)
    assert damaged != whole
    assert list(sealed.search("a1", damaged.encode())) == []
    assert [text for text, _ in sealed.search("a1", f"{damaged} {whole}".encode())] == [whole]
    with pytest.raises(SpecError):
        sealed.unseal("a1", damaged)


def test_sealed_texts_have_a_longest_length():
    assert sealed.unseal("a1", sealed.seal("a1", {"n": "x" * 9991})) == {"n": "x" * 9991}
    with pytest.raises(SpecError, match="9999 is the most"):
        sealed.seal("a1", {"n": "x" * 9992})


# --- .npz of unknown origin ------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + len(header).to_bytes(width, "little") + header.encode() + data


def dtype(descr: object = "<f4", shape: str = "(2,)", fortran: bool = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}\n"


@pytest.fixture
def archive(tmp_path):
    """``archive(a=bytes)`` writes an .npz of these parts."""

    def write(compression: int = zipfile.ZIP_STORED, **parts: bytes) -> Path:
        path = tmp_path / "file.npz"
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in parts.items():
                file.writestr(f"{name}.npy", data)
        return path

    return write


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, save):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(24, dtype=np.int64).reshape(2, 3, 4)),
        "scalar": np.array(7, np.uint8),
        "empty": np.zeros((0, 3), np.float64),
        "flags": np.array([True, False]),
        "big": np.arange(3, dtype=">i4"),
    }
    save(tmp_path / "file.npz", **arrays)
    found = npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        npy(dtype(), bytes(7)),  # a byte short
        npy(dtype(), bytes(9)),  # one too many
        npy(dtype(shape="(10**12,)")),
        npy(dtype(shape="(1000000000000,)"), bytes(8)),
        npy(dtype(shape="(1048576, 1048576, 1048576, 1048576)"), bytes(8)),
        npy(dtype(shape="(-2,)"), bytes(8)),
        npy(dtype(shape="(-1, -2)"), bytes(8)),
        npy(dtype(shape="(2.0,)"), bytes(8)),
        npy(dtype(shape="2"), bytes(8)),
        npy(dtype("|O"), bytes(16)),
        npy(dtype([("a", "|O")]), bytes(16)),
        npy(dtype([("a", "<f4")]), bytes(8)),
        npy(dtype("<U2"), bytes(16)),
        npy(dtype("|S4"), bytes(8)),
        npy(dtype("|V4"), bytes(8)),
        npy(dtype("<M8[s]"), bytes(16)),
        npy("{}"),
        npy("[" * 5000),
        npy("{" * 100_000, version=(2, 0)),
        npy("__import__('os').system('true')"),
        npy(dtype(), bytes(8))[:40],
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(archive, data):
    with pytest.raises(FileFormatError, match=r"file\.npz: not an \.npz that can be read"):
        npz.read_npz(archive(a=data), max_bytes=1 << 20)


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    np.savez(tmp_path / "file.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(FileFormatError):
        npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
    assert not (tmp_path / "opened").exists()


def test_archives_that_unpack_to_too_much_are_refused_unopened(archive, monkeypatch):
    bomb = npy(dtype(shape="(4194304,)"), bytes(1 << 24))
    path = archive(zipfile.ZIP_DEFLATED, a=bomb, b=bomb)
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(npz, "_member", lambda *_: pytest.fail("a part was read"))
    with pytest.raises(FileFormatError, match="unpacks to 32 MiB in 2 parts"):
        npz.read_npz(path, max_bytes=(1 << 25) - 1)
    with pytest.raises(FileFormatError, match="in 257 parts"):
        npz.read_npz(archive(**{f"n{i}": b"" for i in range(257)}), max_bytes=1 << 20)


def test_an_archive_that_lies_about_its_size_gives_no_more_than_it_says(archive):
    part = npy(dtype(shape="(4194304,)"), bytes(1 << 24))
    path = archive(zipfile.ZIP_DEFLATED, a=part)
    data, size = path.read_bytes(), len(part).to_bytes(4, "little")
    assert data.count(size) == 2  # before the part, and in the directory
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(FileFormatError):
        npz.read_npz(path, max_bytes=1 << 20)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x05\x06", b"\x80\x04K\x01."])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "file.npz").write_bytes(data)
    for path in (tmp_path / "file.npz", tmp_path / "missing.npz", tmp_path):
        with pytest.raises(FileFormatError):
            npz.read_npz(path, max_bytes=1 << 20)


def test_truncated_archives_are_refused(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(200), b=np.eye(9))
    whole = stream.getvalue()
    for length in range(0, len(whole), 11):
        (tmp_path / "file.npz").write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)


def test_changed_archives_never_escape(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(200), b=np.eye(9))
    rng = np.random.default_rng(8)
    for _ in range(200):
        data = bytearray(stream.getvalue())
        data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "file.npz").write_bytes(data)
        try:
            npz.read_npz(tmp_path / "file.npz", max_bytes=1 << 20)
        except FileFormatError:
            continue


def test_doctor_runs_nothing_that_lies_in_the_current_folder(tmp_path):
    for name in ("json.py", "onnxruntime.py", "torch.py"):
        (tmp_path / name).write_text("open('run', 'w')\n")
    code = "from ddpmx import doctor; doctor.examine()"
    environment = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[:] = [p for p in sys.path if p]; " + code],
        cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("a.npz", "ema.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(FileFormatError, match="cannot be read"):
        npz.read_npz(tmp_path / "a.npz", max_bytes=1 << 20)
    with pytest.raises(FileFormatError):
        safetensors_elements(tmp_path / "ema.safetensors")


def test_numbers_beyond_all_measure_are_no_json():
    for text in ('{"a": 1e999}', "[-1e999]"):
        with pytest.raises(SpecError):
            sealed.parse_json(text)
