"""The installed MNN: its engine and its converter, neither of which may print, install or send anything.

The package's own converter command (``mnnconvert``) runs ``pip install`` for a logging library where that is missing, and
sends what it converted to its makers. The extension module below that command does neither, so that is what is called.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpmx.errors import BackendError

OLDEST = (3, 0)
"""The first release whose converter keeps a dynamic batch and an int32 t."""

_INSTALL = "pip install 'ddpmx[mnn]'"
_importing = threading.Lock()


def load() -> Any:
    """The module ``MNN``.

    Raises:
        BackendError: it is not installed, does not load, or is too old.
    """
    with _importing:
        if sys.modules.get("MNN") is not None:
            return _checked(sys.modules["MNN"])
        try:
            with _quiet():
                import MNN
        except ImportError as error:
            raise BackendError("MNN is not installed", note=str(error), hint=_INSTALL) from error
        except Exception as error:
            raise BackendError("MNN does not load", note=str(error)[:300], hint=_INSTALL) from error
    return _checked(MNN)


def converter() -> Path:
    """The extension module with the converter, which lies beside the package.

    Raises:
        BackendError: MNN is not installed, or comes without a converter.
    """
    try:
        package = importlib.util.find_spec("MNN")
    except (ImportError, ValueError):
        package = None
    if package is None or package.origin is None:
        raise BackendError("MNN is not installed", hint=_INSTALL)
    folder = Path(package.origin).parent.parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (file := folder / f"_tools{suffix}").is_file():
            return file
    raise BackendError(
        "this MNN comes without its converter",
        note=f"there is no _tools module in {folder}",
        hint=f"{_INSTALL}; or convert on another machine, an .mnn file runs everywhere",
    )


def _checked(module: Any) -> Any:
    version = str(module.version())
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise BackendError(f"MNN {version} is too old", note="3.0 is the first that works here", hint=_INSTALL)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what MNN's C++ prints to standard output when it is imported: that output may be somebody's JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
