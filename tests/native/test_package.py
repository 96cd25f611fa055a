"""libddpmx as users get it: installed, found by CMake and pkg-config, as a folder of their sources, as a wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ddpmx
from conftest import GAUSSIAN_ONNX
from native.conftest import ROOT, SOURCE, tool

pytestmark = pytest.mark.slow

CONSUMER = SOURCE / "tests" / "consumer"
VERSION = ddpmx.__version__
README = (SOURCE / "README.md").read_text(encoding="utf-8")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow", "-pedantic"]


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def prefix(native_build, tmp_path_factory) -> Path:
    """The installed prefix, moved to another place."""
    folder = tmp_path_factory.mktemp("installed")
    run(tool("cmake"), "--install", native_build, "--prefix", folder / "first")
    return (folder / "first").rename(folder / "then there")


@pytest.fixture(scope="module")
def wanted() -> bytes:
    """The images of from_c and from_cpp."""
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        return pipeline.generate(2, seed=7, steps=20).tobytes()


def configure(build: Path, *options: str, source: Path = CONSUMER) -> None:
    run(tool("cmake"), "-S", source, "-B", build, *options)


def check_programs(folder: Path, wanted: bytes, ort: Path, tmp_path: Path, *programs: str, **env: str) -> None:
    for program in programs:
        images = tmp_path / f"{program}.raw"
        run(folder / program, GAUSSIAN_ONNX, images, env={"DDPMX_ORT_LIBRARY": str(ort), **env})
        assert images.read_bytes() == wanted, program


# --- installed -------------------------------------------------------------------------------------------------------


def test_what_is_installed(prefix):
    package = {"", "Version"}
    assert files(prefix) - {"lib/libddpmx_trt.so"} == {
        *(f"include/ddpmx/{name}" for name in ("ddpmx.h", "ddpmx.hpp")),
        *(f"lib/libddpmx.so{suffix}" for suffix in ("", ".1", f".{VERSION}")),
        *(f"lib/cmake/ddpmx/ddpmxConfig{part}.cmake" for part in package),
        *(f"lib/cmake/ddpmx/ddpmxTargets{part}.cmake" for part in ("", "-release")),
        "lib/pkgconfig/ddpmx.pc",
        "share/doc/ddpmx/LICENSE",
    }
    assert (prefix / "lib" / "libddpmx.so").resolve().name == f"libddpmx.so.{VERSION}"


def test_nothing_installed_names_where_it_was_built(prefix, native_build):
    places = [str(native_build).encode(), str(ROOT).encode()]
    texts = [path for path in prefix.rglob("*") if path.suffix in (".cmake", ".pc", ".h", ".hpp")]
    assert len(texts) >= 7
    assert [path.name for path in texts if any(place in path.read_bytes() for place in places)] == []


@pytest.mark.parametrize("standard", [17, 20])
@pytest.mark.parametrize("compilers", [("gcc", "g++"), ("clang", "clang++")], ids=["gcc", "clang"])
def test_found_by_cmake(prefix, wanted, ort_library, tmp_path, compilers, standard):
    found = [shutil.which(name) or shutil.which(f"{name}-14") for name in compilers]
    if None in found:
        pytest.skip(f"not verified here: the headers with {compilers[1]} (there is none)")
    chosen = [f"-DCMAKE_{kind}_COMPILER={path}" for kind, path in zip(("C", "CXX"), found, strict=True)]
    configure(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_STANDARD={standard}", *chosen)
    run(tool("cmake"), "--build", tmp_path / "build")
    check_programs(tmp_path / "build", wanted, ort_library, tmp_path, "from_c", "from_cpp")


def test_another_version_is_refused(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(other LANGUAGES CXX)\nfind_package(ddpmx 9.9 REQUIRED)\n"
    )
    done = subprocess.run(
        [tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"ddpmxConfig.cmake, version: {VERSION}" in done.stderr


def test_found_by_pkg_config(prefix, wanted, ort_library, tmp_path):
    if (pkg_config := shutil.which("pkg-config")) is None:
        pytest.skip("not verified here: ddpmx.pc (no pkg-config)")
    env = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    assert run(pkg_config, "--modversion", "ddpmx", env=env).strip() == VERSION
    flags = shlex.split(run(pkg_config, "--cflags", "--libs", "ddpmx", env=env))
    assert {Path(flag[2:]).resolve() for flag in flags if flag[:2] in ("-I", "-L")} == {
        prefix / "include",
        prefix / "lib",
    }
    run("cc", "-std=c99", *WARNINGS, CONSUMER / "from_c.c", *flags, "-o", tmp_path / "from_c")
    sources = [CONSUMER / "from_cpp.cpp", CONSUMER / "border.cpp"]
    wrapped = re.findall(r"foreach\(function (.*)\)", (CONSUMER / "CMakeLists.txt").read_text())[0].split()
    also = ["-pthread", *(f"-Wl,--wrap=ddpmx_{name}" for name in wrapped)]
    run("c++", "-std=c++17", *WARNINGS, *sources, *flags, *also, "-o", tmp_path / "from_cpp")
    there = {"LD_LIBRARY_PATH": str(prefix / "lib")}
    check_programs(tmp_path, wanted, ort_library, tmp_path, "from_c", "from_cpp", **there)


@pytest.mark.parametrize("name", ["ddpmx.h", "ddpmx.hpp"])
def test_a_header_needs_no_other_before_it(prefix, tmp_path, name):
    for language, standards in (("c", ["c99", "c17"]), ("c++", ["c++17", "c++20"])):
        if name.endswith(".h") or language == "c++":
            source = tmp_path / f"alone.{language}"
            source.write_text(f"#include <ddpmx/{name}>\n")
            for standard in standards:
                run("cc", "-x", language, f"-std={standard}", *WARNINGS, "-fsyntax-only", f"-I{prefix}/include", source)


def test_the_readme_s_program(prefix, ort_library, tmp_path):
    """To its end, and cancelled."""
    (block,) = re.findall(r"^```cpp\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    include, _, body = block.partition("\n\n")
    begin, end = "std::atomic<bool> stop{false};", "  std::vector<std::uint8_t> images = pipeline.generate(request);"
    assert begin in body
    assert end in body
    body = body.replace(begin, "std::atomic<bool> stop{argc > 1};")
    lines = [line + ('\nstd::printf("%zu\\n", images.size());' if end in line else "") for line in body.splitlines()]
    source = (
        f"{include}\n#include <atomic>\n#include <cstdio>\nint main(int argc, char **) {{\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    (tmp_path / "readme.cpp").write_text(source)
    folder = prefix / "lib"
    flags = [f"-I{prefix}/include", f"-L{folder}", "-lddpmx", f"-Wl,-rpath,{folder}"]
    run("c++", "-std=c++17", *WARNINGS, tmp_path / "readme.cpp", *flags, "-o", tmp_path / "readme")
    shutil.copy(GAUSSIAN_ONNX, tmp_path / "model.onnx")
    there = {"cwd": tmp_path, "env": {"DDPMX_ORT_LIBRARY": str(ort_library)}}
    assert run(tmp_path / "readme", **there) == f"{4 * 3 * 8 * 8}\n"
    assert run(tmp_path / "readme", "stop", **there) == ""


def test_the_readme_names_what_there_is():
    cmake = "".join(path.read_text() for path in [SOURCE / "CMakeLists.txt", *(SOURCE / "cmake").glob("*.cmake")])
    header = (SOURCE / "include" / "ddpmx" / "ddpmx.h").read_text()
    options = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert len(options) == 8
    assert [name for name in options if not re.search(rf"(option\(|set\(){name} ", cmake)] == []
    names = set(re.findall(r"DDPMX_[A-Z_]+|ddpmx_[a-z]\w+", README)) - set(options) - {"ddpmx_native", "ddpmx_trt"}
    assert len(names) >= 10
    assert [name for name in names if name not in header and name != "ddpmx_DIR"] == []
    for path in re.findall(r"`((?:tests|runtime)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    count = header.count("\nDDPMX_API ")
    assert count > 10
    assert f"{count} functions" in README


@pytest.mark.long
def test_as_a_folder_of_another_project(native_build, wanted, ort_library, tmp_path):
    """Then there are no tests and no installation by default."""
    cache = (native_build / "CMakeCache.txt").read_text()
    headers = re.search(r"^ORT_INCLUDE:PATH=(.+)$", cache, re.MULTILINE)
    assert headers
    build = ROOT / "build" / "native-within"  # kept, so that only changes are compiled
    configure(
        build,
        f"-DDDPMX_SOURCE={SOURCE}",
        f"-DORT_INCLUDE={headers[1]}",
        "-DCMAKE_UNITY_BUILD=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
    )
    targets = run(tool("cmake"), "--build", build, "--target", "help")
    assert "from_cpp" in targets
    assert "test_" not in targets
    run(tool("cmake"), "--build", build, "--parallel", "2")
    check_programs(build, wanted, ort_library, tmp_path, "from_c", "from_cpp")
    run(tool("cmake"), "--install", build, "--prefix", tmp_path / "none")
    assert not (tmp_path / "none").exists() or files(tmp_path / "none") == set()


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(native_build, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    headers = re.search(r"^ORT_INCLUDE:PATH=(.+)$", (native_build / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert headers
    settings = [f"cmake.define.ORT_INCLUDE={headers[1]}", f"build-dir={ROOT / 'build' / 'native-wheel'}"]
    options = ["--no-deps", *(f"--config-settings={setting}" for setting in settings)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", folder, SOURCE],
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for scikit-build-core" in done.stderr:
        pytest.skip("not verified here: the wheel ddpmx-native (scikit-build-core cannot be downloaded)")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH, as pip would leave it."""
    folder = tmp_path_factory.mktemp("site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    return folder


def ddpmx_native(folder: Path, *flags: str) -> str:
    """The output of ``python -m ddpmx_native``."""
    return run(sys.executable, "-m", "ddpmx_native", *flags, env={"PYTHONPATH": str(folder)}).strip()


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel, figure):
    assert re.fullmatch(rf"ddpmx_native-{re.escape(VERSION)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    assert names - {"ddpmx_native/lib/libddpmx_trt.so"} == {
        *(f"ddpmx_native/{name}" for name in ("__init__.py", "__main__.py", "py.typed")),
        *(f"ddpmx_native/include/ddpmx/{name}" for name in ("ddpmx.h", "ddpmx.hpp")),
        *(f"ddpmx_native/lib/cmake/ddpmx/ddpmxConfig{part}.cmake" for part in ("", "Version")),
        *(f"ddpmx_native/lib/cmake/ddpmx/ddpmxTargets{part}.cmake" for part in ("", "-release")),
        "ddpmx_native/lib/libddpmx.so",
        "ddpmx_native/lib/pkgconfig/ddpmx.pc",
    }
    assert metadata == {"METADATA", "WHEEL", "RECORD", "LICENSE"}
    figure("the wheel ddpmx-native, in kB", wheel.stat().st_size / 1000, at_most=500)


@pytest.mark.slow
def test_the_library_in_the_wheel_needs_only_the_system(unpacked):
    if (readelf := shutil.which("readelf")) is None:
        pytest.skip("not verified here: what the library in the wheel is linked with (no readelf)")
    dynamic = run(readelf, "--dynamic", "--wide", ddpmx_native(unpacked, "--library"))
    needed = set(re.findall(r"\(NEEDED\)\s+Shared library: \[([^]]+)\]", dynamic))
    assert {name for name in needed if not name.startswith("ld-linux")} <= {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
    }
    assert re.search(r"\(SONAME\)\s+Library soname: \[libddpmx\.so\]", dynamic)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


@pytest.mark.slow
def test_a_program_by_the_wheel_s_flags(unpacked, wanted, ort_library, tmp_path):
    flags = shlex.split(ddpmx_native(unpacked, "--cflags", "--libs"))
    run("cc", "-std=c99", *WARNINGS, CONSUMER / "from_c.c", *flags, "-o", tmp_path / "from_c")
    check_programs(tmp_path, wanted, ort_library, tmp_path, "from_c")


@pytest.mark.slow
def test_a_program_by_the_wheel_s_cmake_package(unpacked, wanted, ort_library, tmp_path):
    configure(tmp_path / "build", f"-Dddpmx_DIR={ddpmx_native(unpacked, '--cmake-dir')}")
    run(tool("cmake"), "--build", tmp_path / "build")
    check_programs(tmp_path / "build", wanted, ort_library, tmp_path, "from_c", "from_cpp")


@pytest.mark.slow
def test_the_wheel_says_where_everything_is(unpacked, ort_library):
    here = unpacked / "ddpmx_native"
    assert ddpmx_native(unpacked, "--library") == str(here / "lib" / "libddpmx.so")
    assert ddpmx_native(unpacked, "--include") == str(here / "include")
    assert ddpmx_native(unpacked, "--pkgconfig-dir") == str(here / "lib" / "pkgconfig")
    assert ddpmx_native(unpacked, "--onnxruntime") == str(ort_library)
    lines = ddpmx_native(unpacked).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "library",
        "include",
        "cmake-dir",
        "pkgconfig-dir",
        "onnxruntime",
        "cflags",
        "libs",
    ]


@pytest.fixture
def source_tree():
    """The package without the library, as it is in the repository."""
    path = SOURCE / "python" / "ddpmx_native" / "__init__.py"
    spec = importlib.util.spec_from_file_location("ddpmx_native_of_the_source_tree", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["library", "include", "cmake_dir", "pkgconfig_dir"])
def test_the_source_tree_says_that_it_is_no_wheel(source_tree, name):
    with pytest.raises(FileNotFoundError, match="install the wheel"):
        getattr(source_tree, name)()


def test_onnxruntime_is_found_without_importing_it(ort_library):
    code = (
        "import ddpmx_native, sys; print(ddpmx_native.onnxruntime_library()); assert 'onnxruntime' not in sys.modules"
    )
    env = {"PYTHONPATH": str(SOURCE / "python")}
    assert run(sys.executable, "-c", code, env=env).strip() == str(ort_library)


def test_of_several_onnxruntimes_the_newest(source_tree, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(FileNotFoundError, match="none in"):
        source_tree.onnxruntime_library()
    for version in ("1.9.0", "1.31.1", "1.4.0"):
        (tmp_path / "onnxruntime" / "capi" / f"libonnxruntime.so.{version}").touch()
    assert source_tree.onnxruntime_library().name == "libonnxruntime.so.1.31.1"


@pytest.mark.parametrize("flags", [["--library"], ["--cflags", "--libs"]])
def test_what_is_not_there_is_exit_code_2(flags):
    done = subprocess.run(
        [sys.executable, "-m", "ddpmx_native", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE / "python")},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install ./runtime/native" in done.stderr
    assert "Traceback" not in done.stderr
