"""The tests of libddpmx's own project: plain, under the address and undefined-behaviour sanitizers, and, of what threads
share, under the thread sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from native.conftest import ROOT, build_native, tool

pytestmark = pytest.mark.slow

SOURCES = ROOT / "runtime" / "native" / "tests"
NOTHING_VERIFIED = 77
TESTS = sorted(path.stem for path in SOURCES.iterdir() if path.name.startswith("test_"))


MEMORY = ["test_c_api", "test_c_memory", "test_device_faults"]
"""The tests that reach all code with pointers, except the readers, which the fuzzers check in the same way."""

SHARED = ["test_c_api", "test_device_runner"]
"""The tests with several threads."""


def run(program: Path, **environment: str) -> None:
    done = subprocess.run([program], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    if done.returncode == NOTHING_VERIFIED:
        pytest.skip(f"not verified here: {program.name} ({done.stdout.strip()[-300:]})")
    assert done.returncode == 0, f"{program.name}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def sanitized(kinds: str, targets: list[str]) -> Path:
    """A build with sanitizers, if this compiler has them."""
    folder = ROOT / "build" / f"native-{kinds.replace(',', '-')}"
    if not (folder / "CMakeCache.txt").exists():  # else .ci/fuzz has configured it, for clang, and compiled most of it
        probe = subprocess.run(
            [shutil.which("c++") or "c++", f"-fsanitize={kinds}", "-x", "c++", "-", "-o", os.devnull],
            input="int main() {}",
            capture_output=True,
            text=True,
        )
        if probe.returncode:
            pytest.skip(f"not verified here: libddpmx under -fsanitize={kinds} ({probe.stderr.strip()[-200:]})")
    options = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_UNITY_BUILD=ON", "-DDDPMX_TENSORRT=OFF")
    return build_native(folder, f"-DDDPMX_SANITIZE={kinds}", *options, targets=targets)


@pytest.fixture(scope="module")
def with_addresses() -> Path:
    return sanitized("address,undefined", MEMORY)


@pytest.fixture(scope="module")
def with_threads() -> Path:
    return sanitized("thread", SHARED)


def test_ctest_finds_the_tests(native_build):
    """By ctest, as a C++ programmer runs them; each of them is run below."""
    ctest = tool("ctest")
    assert ctest is not None
    listed = subprocess.run([ctest, "--test-dir", native_build, "--show-only"], capture_output=True, text=True)
    assert all(f": {name}\n" in listed.stdout for name in TESTS)
    assert "test_c_api" in TESTS


@pytest.mark.parametrize("name", TESTS)
def test_plain(name, native_build, ort_library):
    run(native_build / "tests" / name, DDPMX_ORT_LIBRARY=str(ort_library))


@pytest.mark.parametrize("name", MEMORY)
def test_addresses_and_undefined_behaviour(name, with_addresses):
    options = "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1"
    run(with_addresses / "tests" / name, ASAN_OPTIONS=options, UBSAN_OPTIONS="print_stacktrace=1")


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_threads(name, with_threads):
    run(with_threads / "tests" / name, TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1")
