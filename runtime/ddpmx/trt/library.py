"""Loads TensorRT or TensorRT-RTX behind one interface, with a logger that keeps the library's messages.

They are two libraries with the same classes. Never load both in one process.
"""

from __future__ import annotations

import functools
import importlib
import platform
import re
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpmx.errors import BackendError
from ddpmx.formats.plan_file import FLAVOURS
from ddpmx.trt.compat import install_hint

MODULES = {"TensorRT": ("tensorrt",), "TensorRT-RTX": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""The names of each flavour's Python module, in the order in which they are tried."""

_REMEMBERED = 200
_LIBRARY = re.compile(r"/.*/lib(nvinfer|tensorrt_rtx)\.so[^\s/]*")


@dataclass(frozen=True)
class Library:
    """A loaded TensorRT.

    Attributes:
        trt: its Python module.
        flavour: ``TensorRT`` or ``TensorRT-RTX``.
        version: the version that the module reports.
        logger: the logger for all of its objects.
    """

    trt: Any
    flavour: str
    version: str
    logger: Any = field(repr=False)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.flavour == "TensorRT-RTX"

    @property
    def release(self) -> tuple[int, ...]:
        """(major, minor)."""
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:2])

    def __str__(self) -> str:
        """For messages: "TensorRT 10.3.0"."""
        return f"{self.flavour} {self.version}"

    def made(self, what: str, make: Callable[[], Any]) -> Any:
        """Create one of TensorRT's objects with ``make()``.

        Args:
            what: the object's name, for the message.
            make: creates it; None or an exception means that TensorRT refused.

        Raises:
            BackendError: the object could not be created. Its note is TensorRT's own message.
        """
        trouble = ""
        try:
            made = make()
        except (TypeError, RuntimeError) as error:  # pybind11, if the factory function returned nullptr
            made, trouble = None, str(error)
        if made is None:
            raise BackendError(
                f"{self} cannot make the {what}",
                note=self.last_words() or trouble or None,
                hint="`ddpmx doctor` shows the driver and the libraries that are loaded",
            )
        return made

    def last_words(self, limit: int = 600) -> str:
        """Return the library's own error messages, and clear them."""
        lines = [text for severity, text in self.logger.lines if severity <= self.trt.ILogger.Severity.ERROR]
        lines = lines or [text for _, text in list(self.logger.lines)[-3:]]
        self.logger.lines.clear()
        text = "; ".join(dict.fromkeys(lines))
        return text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :]


@functools.lru_cache(maxsize=4)
def load(flavour: str | None = None) -> Library:
    """Import a TensorRT.

    Args:
        flavour: the one to load; by default the first that is installed, TensorRT before TensorRT-RTX.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    troubles = []
    for name in FLAVOURS if flavour is None else (flavour,):
        for module in MODULES[name]:
            try:
                trt = importlib.import_module(module)
                return Library(trt, name, str(trt.__version__), _make_logger(trt))
            except ModuleNotFoundError as error:
                if error.name != module:
                    troubles.append(f"{module}: {error}")
            except Exception as error:  # a library that it needs is missing or has another version
                troubles.append(f"{module}: {str(error).strip()[:300]}")
    raise BackendError(
        f"{flavour or 'TensorRT'} is not installed here",
        note="; ".join(troubles) or f"Python {platform.python_version()} in {sys.prefix} has no such module",
        hint=install_hint(flavour) if flavour else f"{install_hint('TensorRT-RTX')} on RTX cards; {install_hint(None)}",
    )


def loaded_from() -> list[str]:
    """Paths of the TensorRT libraries in this process. Two of one flavour are a common cause of odd failures."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted({match[0] for line in maps.splitlines() if (match := _LIBRARY.search(line))})


def host_platform() -> str:
    """Operating system and machine: "linux x86_64"."""
    return f"{platform.system().lower()} {platform.machine().lower()}"


def _make_logger(trt: Any) -> Any:
    """A logger that keeps the last messages instead of printing them.

    TensorRT takes one logger per process and ignores later ones. So each library has one logger for the whole process.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings need the base's own __init__, not super()
            self.lines: deque[tuple[Any, str]] = deque(maxlen=_REMEMBERED)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append((severity, msg))

    return Logger()
