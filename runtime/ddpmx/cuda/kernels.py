"""The chain's kernels, compiled by the driver for its GPU."""

from __future__ import annotations

import threading

from ddpmx.cuda import layout
from ddpmx.device.driver import Driver


class Kernels:
    """The kernels of ``step.ptx``, and on demand those of ``each.ptx`` and ``while.ptx``. The driver closes them.

    Attributes:
        begin, step: the functions.
        why_no_while: the result of :func:`ddpmx.cuda.executors.why_no_while`, or None before its first call.
        lock: guards what is loaded or measured once.

    Raises:
        BackendError: the driver cannot compile them.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        with driver.current():
            module = driver.module(layout.ptx("step"), "step.ptx")
            self.begin, self.step = (driver.function(module, name) for name in ("ddpmx_begin", "ddpmx_step"))
        self._condition: int | None = None
        self._each: tuple[int, int] | None = None
        self.why_no_while: str | None = None
        self.lock = threading.RLock()

    @classmethod
    def of(cls, driver: Driver) -> Kernels:
        """The kernels of a driver: loaded once, for all chains and threads."""
        with driver.lock:
            kernels = driver.shared.get("kernels")
            if not isinstance(kernels, cls):
                driver.shared["kernels"] = kernels = cls(driver)
            return kernels

    def condition(self) -> int:
        """The kernel ``ddpmx_condition``.

        Raises:
            BackendError: the driver is older than CUDA 12.4 and lacks a function that it calls.
        """
        with self.lock:
            if self._condition is None:
                module = self._driver.module(layout.ptx("while"), "while.ptx")
                self._condition = self._driver.function(module, "ddpmx_condition")
            return self._condition

    def each(self) -> tuple[int, int]:
        """The kernels ``ddpmx_begin_each`` and ``ddpmx_step_each``.

        Raises:
            BackendError: the driver cannot compile them.
        """
        with self.lock:
            if self._each is None:
                module = self._driver.module(layout.ptx("each"), "each.ptx")
                begin, step = (self._driver.function(module, name) for name in ("ddpmx_begin_each", "ddpmx_step_each"))
                self._each = begin, step
            return self._each
