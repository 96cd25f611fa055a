"""The host's side of a chain on the device: reports its progress, stops it, and raises the error that it ended with."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from ddpmx.cuda.layout import Control, Done
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, Cancelled, NumericError


class Timeout(BackendError):  # noqa: N818 - between these modules only
    """The chain did not finish in time, and may never."""


class Watch:
    """What the host does while a chain runs: it calls ``progress`` and ``cancel``.

    Args:
        control: the chain's control block.
        total: the number of steps.
        progress, cancel, timeout: as for :meth:`ddpmx.cuda.device_chain.DeviceChain.run`.
        aside: a context in which ``progress`` and ``cancel`` are called.

    Attributes:
        cancelled: whether ``cancel`` has returned True.
    """

    def __init__(
        self,
        control: Control,
        total: int,
        progress: Callable[[int, int], None] | None,
        cancel: Callable[[], bool] | None,
        timeout: float | None,
        *,
        aside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._control, self._total = control, total
        self._progress, self._cancel = progress, cancel
        self._seen, self.cancelled, self._aside = 0, False, aside
        self._until = math.inf if timeout is None else time.monotonic() + timeout

    def goes_on(self) -> bool:
        """Whether more steps are wanted, as far as the host knows."""
        return not self.cancelled and self._control.done == Done.RUNNING

    def poll(self) -> None:
        """Read the control block and call the callbacks. Called repeatedly.

        Raises:
            Timeout: the chain's time is over.
        """
        if self._cancel is not None and self.goes_on():
            with self._aside():
                self.cancelled = bool(self._cancel())
            if self.cancelled:
                self._control.stop = 1
        step = self._control.step
        if step > self._seen:
            self._seen = step
            if self._progress is not None:
                with self._aside():
                    self._progress(step, self._total)
        if time.monotonic() > self._until:
            raise Timeout("the chain did not finish in time")


def judge(control: Control, table: Table, where: str, *, cancelled: bool = False, own_x: bool = False) -> None:
    """Raise the error with which a chain has ended, if any.

    Args:
        control: the chain's control block.
        table: its sampler.
        where: backend and executor, for messages.
        cancelled: whether the host has stopped it.
        own_x: whether it began with the caller's own state.

    Raises:
        NumericError: the network's output was not finite.
        Cancelled: it was stopped, even if the last step was running by then.
        BackendError: the kernels refused it, or it ended without giving a reason.
    """
    total = len(table)
    done = control.done
    if done == Done.NOT_FINITE:
        step = control.bad_step
        raise NumericError(
            f"the network's output at t = {table.timesteps[step]} is not finite",
            note=f"step {step + 1} of {total}; {where}",
            hint="check the x that was passed: it may hold NaN or infinities"
            if own_x and step == 0
            else "if the file is fp16, try fp32: an activation may exceed 65504",
        )
    if cancelled or done == Done.STOPPED:
        raise Cancelled("cancelled before the chain finished", note=f"after {control.step} of {total} steps")
    if done == Done.REFUSED:
        raise BackendError("the kernels refuse this chain", note=where)
    if done != Done.FINISHED or control.step != total:
        raise BackendError(
            f"the chain ended after {control.step} of {total} steps without giving a reason",
            note=where,
            hint="--executor plain; and report this",
        )
