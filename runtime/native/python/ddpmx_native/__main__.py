"""Where libddpmx is, for build systems.

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


WHAT: dict[str, tuple[Callable[[], object], str]] = {
    "library": (native.library, "libddpmx.so"),
    "include": (native.include, "the folder of the headers"),
    "cmake-dir": (native.cmake_dir, "what CMake's ddpmx_DIR has to be"),
    "pkgconfig-dir": (native.pkgconfig_dir, "for PKG_CONFIG_PATH"),
    "onnxruntime": (native.onnxruntime_library, "ONNX Runtime's library in its wheel, for DDPMX_ORT_LIBRARY"),
    "cflags": (_cflags, "for a compiler"),
    "libs": (_libs, "for a linker, with an rpath to the wheel"),
}


def main() -> int:
    """Print what was asked for in one line; without a flag everything, a line each."""
    parser = argparse.ArgumentParser("python -m ddpmx_native", description="Where libddpmx is.")
    for name, (_, text) in WHAT.items():
        parser.add_argument(f"--{name}", dest="asked", action="append_const", const=name, help=text)
    asked = parser.parse_args().asked
    try:
        if asked:
            print(*(WHAT[name][0]() for name in asked))
            return 0
        for name, (find, _) in WHAT.items():
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
