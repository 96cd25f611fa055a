"""The host's side of a chain that runs on the device: it looks on, may ask for an end, and says how it ended."""

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
    """The chain did not end in its time, and may never."""


class Watch:
    """What the host does while a chain runs: it tells about progress, and asks whether to go on.

    Args:
        control: the chain's.
        total: how many steps there are.
        progress, cancel, timeout: as for :meth:`ddpmx.cuda.device_chain.DeviceChain.run`.
        aside: a context in which ``progress`` and ``cancel`` are called.

    Attributes:
        cancelled: whether ``cancel`` has said so.
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

    def look(self) -> None:
        """Once in a while."""
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
            raise Timeout("the chain does not come to its end")


def judge(control: Control, table: Table, where: str, *, cancelled: bool = False, given: bool = False) -> None:
    """How a chain has ended.

    Args:
        control: what the device says.
        table: what it was to run.
        where: on what and by which executor, for messages.
        cancelled: whether the host has asked for an end.
        given: whether it began with a state of the caller's.

    Raises:
        NumericError: the network's answer was not finite.
        Cancelled: it was asked to stop, even if it was the last step that was under way.
        BackendError: the kernels refused it, or it ended without a reason.
    """
    total = len(table)
    done = control.done
    if done == Done.NOT_FINITE:
        step = control.bad_step
        raise NumericError(
            f"the network's answer at t = {table.timesteps[step]} is not finite",
            note=f"step {step + 1} of {total}; {where}",
            hint="look at the x that was given: it may hold NaN or infinities"
            if given and step == 0
            else "if the file is fp16, try fp32: an activation may exceed 65504",
        )
    if cancelled or done == Done.STOPPED:
        raise Cancelled("stopped before the chain was through", note=f"after {control.step} of {total} steps")
    if done == Done.REFUSED:
        raise BackendError("the kernels refuse this chain", note=where)
    if done != Done.FINISHED or control.step != total:
        raise BackendError(
            f"the chain ended after {control.step} of {total} steps, and does not say why",
            note=where,
            hint="--executor plain; and report this",
        )
