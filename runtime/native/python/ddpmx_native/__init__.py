"""The paths of libddpmx in this wheel, for build systems and for programs that load it.

Nothing is loaded here. ``python -m ddpmx_native`` prints the same paths for a shell.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

__all__ = ["cmake_dir", "include", "library", "onnxruntime_library", "pkgconfig_dir"]

_HERE = Path(__file__).resolve().parent


def library() -> Path:
    """``libddpmx.so``, for dlopen.

    Raises:
        FileNotFoundError: this is the source tree, not an installed wheel; also from the functions below.
    """
    return _found(_HERE / "lib" / "libddpmx.so")


def include() -> Path:
    """The folder with ``ddpmx/ddpmx.h`` and ``ddpmx/ddpmx.hpp``, for ``-I``."""
    return _found(_HERE / "include")


def cmake_dir() -> Path:
    """The folder with ``ddpmxConfig.cmake``, for ``cmake -Dddpmx_DIR=``."""
    return _found(_HERE / "lib" / "cmake" / "ddpmx")


def pkgconfig_dir() -> Path:
    """The folder with ``ddpmx.pc``, for ``PKG_CONFIG_PATH``."""
    return _found(_HERE / "lib" / "pkgconfig")


def onnxruntime_library() -> Path:
    """ONNX Runtime's library in the wheel ``onnxruntime`` (or ``-gpu``), for ``$DDPMX_ORT_LIBRARY``. It is not imported.

    Raises:
        FileNotFoundError: there is no such wheel, or it contains no shared library.
    """
    spec = importlib.util.find_spec("onnxruntime")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    found = [path for folder in folders for path in folder.glob("capi/libonnxruntime.so*")]
    if not found:
        seen = f"none in {', '.join(map(str, folders))}" if folders else "onnxruntime is not installed"
        raise FileNotFoundError(f"there is no libonnxruntime.so here: {seen}; pip install onnxruntime")
    return max(found, key=_version)


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path.name))


def _found(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: install the wheel, pip install ./runtime/native")
    return path
