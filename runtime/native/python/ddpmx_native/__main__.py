"""Prints the paths of libddpmx, for build systems.

``cc program.c $(python -m ddpmx_native --cflags --libs)``, and
``cmake -B build -Dddpmx_DIR=$(python -m ddpmx_native --cmake-dir)``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

import ddpmx_native as native


def _cflags() -> str:
    return shlex.quote(f"-I{native.include()}")


def _libs() -> str:
    folder = native.library().parent
    return shlex.join([f"-L{folder}", "-lddpmx", f"-Wl,-rpath,{folder}"])


VALUES: dict[str, tuple[Callable[[], object], str]] = {
    "library": (native.library, "libddpmx.so"),
    "include": (native.include, "the folder of the headers"),
    "cmake-dir": (native.cmake_dir, "the value for CMake's ddpmx_DIR"),
    "pkgconfig-dir": (native.pkgconfig_dir, "the value for PKG_CONFIG_PATH"),
    "onnxruntime": (native.onnxruntime_library, "ONNX Runtime's library in its wheel, for DDPMX_ORT_LIBRARY"),
    "cflags": (_cflags, "compiler flags"),
    "libs": (_libs, "linker flags, with an rpath to the wheel"),
}


def main() -> int:
    """Print the requested values in one line; without a flag all of them, a line each."""
    parser = argparse.ArgumentParser("python -m ddpmx_native", description="Print the paths of libddpmx.")
    for name, (_, text) in VALUES.items():
        parser.add_argument(f"--{name}", dest="names", action="append_const", const=name, help=text)
    names = parser.parse_args().names
    try:
        if names:
            print(*(VALUES[name][0]() for name in names))
            return 0
        for name, (find, _) in VALUES.items():
            try:
                print(f"{name}: {find()}")
            except FileNotFoundError as error:
                print(f"{name}: {error}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
