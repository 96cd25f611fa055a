"""The symbols that libddpmx.so exports, and what it needs of a machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXPORTED = {
    "ddpmx_abi_version",
    "ddpmx_backend",
    "ddpmx_class_name",
    "ddpmx_close",
    "ddpmx_describe",
    "ddpmx_generate",
    "ddpmx_last_error",
    "ddpmx_open",
    "ddpmx_open_options_init",
    "ddpmx_output_size",
    "ddpmx_request_init",
    "ddpmx_status_name",
    "ddpmx_version",
}
NEEDED = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux"}
"""Part of every Linux. The libraries that compute the network are opened at run time."""

FLOOR = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
"""The versions of Ubuntu 22.04, and so of JetPack 6."""

HEADER = Path(__file__).parents[2] / "runtime" / "native" / "include" / "ddpmx" / "ddpmx.h"


def output_of(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"not verified here: the symbols and needs of libddpmx.so (no {command[0]})")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_exactly_the_headers_functions_are_exported(native_build):
    listed = output_of("nm", "-D", "--defined-only", native_build / "libddpmx.so").splitlines()
    functions = {line.split()[-1] for line in listed if line.split()[-2] != "A"}
    assert functions == {f"{name}@@DDPMX_1" for name in EXPORTED}
    declared = set(re.findall(r"^DDPMX_API .*?(ddpmx_\w+)\(", HEADER.read_text(), re.MULTILINE))
    assert declared == EXPORTED


def test_it_needs_nothing_but_the_system(native_build):
    dynamic = output_of("readelf", "-d", native_build / "libddpmx.so")
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed
    assert all(any(name.startswith(allowed) for allowed in NEEDED) for name in needed), needed
    assert "libddpmx.so.1" in re.findall(r"\(SONAME\).*\[(.*)\]", dynamic)
    assert not re.search(r"\((RPATH|RUNPATH|TEXTREL)\)", dynamic)


def test_it_loads_on_jetpack_6(native_build):
    needed = output_of("readelf", "-V", native_build / "libddpmx.so")
    for name, newest in FLOOR.items():
        versions = [tuple(map(int, v.split("."))) for v in re.findall(rf"Name: {name}_([\d.]+)", needed)]
        assert versions, name
        assert max(versions) <= newest, f"{name} {max(versions)}"
