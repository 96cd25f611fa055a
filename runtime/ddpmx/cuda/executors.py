"""Chooses a chain's executor: the fastest that really works here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddpmx.backends.base import EXECUTORS
from ddpmx.cuda.device_chain import Choice, DeviceChain, Enqueue
from ddpmx.cuda.kernels import Kernels
from ddpmx.cuda.watch import Timeout
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, InputError

_PROBE_STEPS, _PROBE_SECONDS = 3, 10.0


def why_no_while(driver: Driver, kernels: Kernels) -> str | None:
    """Why WHILE nodes do not work here, or None if they do. Once per driver a chain of three steps is really run.

    Version numbers do not suffice: a driver may export the functions on a platform that refuses the node. The probe's body
    is that of a real chain without an engine, on one pixel.
    """
    with kernels.lock:
        if kernels.why_no_while is None:
            kernels.why_no_while = _probe(driver, kernels)
    return kernels.why_no_while or None


def _probe(driver: Driver, kernels: Kernels) -> str:
    """The reason, or an empty text if they work."""
    rows = np.tile(np.array([1, 0, 1, 0, 0], np.float64), (_PROBE_STEPS, 1))
    table = Table(np.arange(_PROBE_STEPS)[::-1].copy(), rows)
    try:
        with DeviceChain(driver, kernels, (1, 1, 1), 1, table) as chain:
            chain.prepare(lambda stream: None, "while", timeout=_PROBE_SECONDS)
            output = np.zeros(1, np.float32)  # there is no engine to write it
            with driver.current():
                driver.copy_in(chain.out, output, chain.stream)
                driver.wait_for_stream(chain.stream)
            chain.run(seed=0, images=[0], timeout=_PROBE_SECONDS)
    except BackendError as error:
        return _reason(error)
    return ""


def choose_executor(
    chain: DeviceChain, enqueue: Enqueue, executor: str = "auto", *, among: Sequence[str] = EXECUTORS
) -> Choice:
    """Prepare a chain with its engine and the fastest executor that works with it here.

    Args:
        chain: the chain; it is ready to run afterwards.
        enqueue: as for :meth:`DeviceChain.prepare`.
        executor: ``auto``, or the one to use.
        among: what ``auto`` may choose from, in this order; the last one has to work.

    Returns:
        The executor, and why those before it were rejected.

    Raises:
        BackendError: the requested executor does not work, or, with ``auto``, none does.
        InputError: there is no such executor.
    """
    rejected: list[tuple[str, str]] = []
    chain.choice = None
    names = among if executor == "auto" else (executor,)
    for name in names:
        try:
            if name == "while" and (why := why_no_while(chain.driver, chain.kernels)):
                raise BackendError(
                    "WHILE nodes do not work here", note=why, hint="--executor graph gives the same images"
                )
            chain.prepare(enqueue, name)
        except Timeout:  # it may run for ever, and blocks its stream
            raise
        except BackendError as error:
            if name == names[-1]:
                raise
            rejected.append((name, _reason(error)))
            continue
        chain.choice = Choice(name, tuple(rejected))
        return chain.choice
    raise InputError("there is no executor to choose from")


def _reason(error: BackendError) -> str:
    return ": ".join(filter(None, (error.fact, error.note)))
