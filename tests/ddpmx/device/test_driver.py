"""CUDA's driver through ctypes: cuda.h's declarations, errors, what is freed, and the error without a driver."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmx.cuda.kernels import Kernels
from ddpmx.device import discovery, driver
from ddpmx.device.driver import ENUMS, FUNCTIONS, ConditionalNodeParams, Driver, GraphNodeParams
from ddpmx.errors import BackendError
from oracles import fake_cuda
from oracles.device_chain import Setup, no_driver
from oracles.fake_cuda import FakeCuda


def test_version_multiprocessors_and_timed_events(fake):
    with Driver(library=fake) as gpu, gpu.current():
        assert (gpu.cuda, gpu.multiprocessors) == ("12.6", 1)
        with gpu.stream() as stream, gpu.event(timing=True) as begin, gpu.event(timing=True) as end:
            gpu.record(begin, stream.value)
            gpu.record(end, stream.value)
            gpu.wait_for(end)
            assert gpu.milliseconds(begin, end) == 1.5


def test_lazy_loading_is_requested_unless_the_user_has_set_it(monkeypatch):
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    discovery.ask_for_lazy_loading()
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    discovery.ask_for_lazy_loading()
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_closing_twice_is_harmless(fake):
    s = Setup(fake)
    s.chain.prepare(s.engine, "graph")
    stream = s.chain._own[0]
    for _ in range(2):
        s.chain.close()
    with pytest.raises(BackendError, match="a stream was freed already"):
        _ = stream.value
    s.driver.close()
    for thing in (s.driver, s.chain, stream):
        thing.close()
    with pytest.raises(BackendError, match="driver was closed"), s.driver.current():
        pass


def test_the_driver_frees_what_was_forgotten(fake):
    s = Setup(fake)
    s.chain.prepare(s.engine, "while")
    s.driver.close()
    s.chain.close()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_without_a_name(fake):
    fake.fail["cuInit"] = (1, 12345)
    with pytest.raises(BackendError, match="CUDA error 12345 while starting CUDA") as caught:
        Driver(library=fake)
    assert caught.value.note == "cuInit"


def test_the_compiler_s_log_is_in_the_error(fake, monkeypatch):
    def refuse(self, out, image, count, options, values):
        ctypes.memmove(values[0], b"ptxas: too old\0", 15)
        raise fake_cuda.Failure(222)

    monkeypatch.setattr(FakeCuda, "_cuModuleLoadDataEx", refuse)
    with Driver(library=fake) as gpu, pytest.raises(BackendError) as caught:
        Kernels(gpu)
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION while compiling step.ptx for this GPU" in str(caught.value)
    assert "ptxas: too old" in str(caught.value)
    assert caught.value.hint == "update the NVIDIA driver"


# --- cuda.h ----------------------------------------------------------------------------------------------------------

HEADERS = [Path("/usr/local/cuda/include"), Path("/usr/include")]


def compile_c(folder, source, *flags):
    """The output of a C program that includes cuda.h, or of the preprocessor."""
    include = next((path for path in HEADERS if (path / "cuda.h").is_file()), None)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if include is None or compiler is None:
        pytest.skip(
            "not verified here: that the structs, enums and functions are cuda.h's (no cuda.h, or no C compiler)"
        )
    (folder / "a.c").write_text(f"#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\n{source}")
    target = [] if "-E" in flags else ["-o", str(folder / "a")]
    command = [compiler, *flags, f"-I{include}", str(folder / "a.c"), *target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "-E" in flags:
        return done.stdout
    return subprocess.run([str(folder / "a")], capture_output=True, text=True, check=True).stdout


def test_structs_and_enums_are_cuda_h_s(tmp_path):
    structs = {
        "CUDA_CONDITIONAL_NODE_PARAMS": (
            ConditionalNodeParams,
            {name: getattr(ConditionalNodeParams, name).offset for name, *_ in ConditionalNodeParams._fields_},
        ),
        "CUgraphNodeParams": (
            GraphNodeParams,
            {
                "type": 0,
                "reserved0": 4,
                "reserved1": 16,
                "conditional": 16,
                "reserved2": GraphNodeParams.reserved2.offset,
            },
        ),
    }
    assert GraphNodeParams.conditional.offset == 16
    lines, wanted = [], []
    for c, (python, fields) in structs.items():
        lines.append(f'printf("%zu\\n", sizeof({c}));')
        wanted.append(ctypes.sizeof(python))
        for field, offset in fields.items():
            lines.append(f'printf("%zu\\n", offsetof({c}, {field}));')
            wanted.append(offset)
    for name, value in ENUMS.items():
        lines.append(f'printf("%d\\n", (int){name});')
        wanted.append(value)
    printed = compile_c(tmp_path, f"int main(void) {{ {' '.join(lines)} return 0; }}\n")
    assert [int(line) for line in printed.split()] == wanted


def test_functions_have_cuda_h_s_parameters(tmp_path):
    """Size of each parameter, and whether it is a pointer; names after preprocessing."""
    text = compile_c(tmp_path, "", "-E")
    declared = dict(re.findall(r"CUresult\s+(cu\w+)\(([^)]*)\)\s*;", text))
    # cuda.h 13 declares another function by this name; the driver still exports this one
    declared.setdefault("cuEventElapsedTime", "float *pMilliseconds, CUevent hStart, CUevent hEnd")
    assert [name for name in FUNCTIONS if name not in declared] == []
    parameters = [(name, p.strip()) for name in FUNCTIONS for p in declared[name].split(",")]
    structs = "".join(f"struct p{i} {{ {p.replace('const', '')}; }} s{i};\n" for i, (_, p) in enumerate(parameters))
    # structs of one member; the compiler's own classification shows whether it is a pointer
    members = [re.search(r"(\w+)(\[\])?$", p)[1] for _, p in parameters]
    prints = "".join(
        f'printf("%zu %d\\n", sizeof(s{i}), __builtin_classify_type(s{i}.{member}) == 5);\n'
        for i, member in enumerate(members)
    )
    printed = compile_c(tmp_path, f"{structs}int main(void) {{ {prints} return 0; }}\n")
    mine = [
        (ctypes.sizeof(kind), int(kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents")))
        for name in FUNCTIONS
        for kind in FUNCTIONS[name]
    ]
    assert [tuple(map(int, line.split())) for line in printed.splitlines()] == mine


def test_only_declared_functions_of_the_driver_are_called():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(driver.__file__).parents[1].rglob("*.py"))
    )
    named = set(re.findall(r'"(cu[A-Z]\w+)"', sources))
    assert named == set(FUNCTIONS)


# --- without a driver ------------------------------------------------------------------------------------------------


def test_importing_loads_nothing_heavy():
    code = """
import sys
import ddpmx.device.driver, ddpmx.cuda.device_runner, ddpmx.backends.trt
heavy = ["torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_error_without_a_driver_names_it():
    no_driver()
    with pytest.raises(BackendError, match="there is no NVIDIA driver here") as caught:
        Driver()
    assert "libcuda" in str(caught.value) or "nvcuda" in str(caught.value)
