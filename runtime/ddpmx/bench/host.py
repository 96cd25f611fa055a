"""Measures the chain in NumPy with a network on the CPU, as :func:`ddpmx.pipeline.load` runs it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Backend, Buffers, PartBackend, RowByRow
from ddpmx.bench.figures import WARM_UP_STEPS, Cell, Durations, Settings, beginning, cell
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import to_nhwc

Clock = Callable[[], float]


class _Watched:
    """A backend that records when it was bound, and how long its last run took."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend, self._clock = backend, clock
        self.bound = self.computing = 0.0

    @property
    def description(self) -> str:
        return self._backend.description

    def bind(self, buffers: Buffers) -> None:
        self._backend.bind(buffers)
        self.bound = self._clock()

    def enqueue(self) -> None:
        begun = self._clock()
        self._backend.enqueue()
        self.computing = self._clock() - begun

    def close(self) -> None:
        self._backend.close()


def measure_host(
    backend: Backend, spec: ModelSpec, batch: int, settings: Settings, *, clock: Clock = time.perf_counter
) -> Cell:
    """Measure one line of the table. After each step of the chain the network runs once alone, on the same arrays.

    Args:
        backend: the network.
        spec: its description.
        batch: images at once.
        settings: how long to measure.
        clock: the current time in seconds.

    Raises:
        NumericError, BackendError: as :func:`ddpmx.sampling.chain.run`.
    """
    table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
    notes: tuple[str, ...] = ()
    # as the pipeline does before it runs a chain
    if isinstance(backend, PartBackend):
        part = chain.choose_part(backend, spec, batch)
        notes = (f"in parts of {part}",) if 1 < part < batch else ()
    elif chain.executed_batch(backend, spec, batch, batch) < batch:
        backend = RowByRow(backend)
        notes = ("each image alone: an image's output depends on its place in the batch here",)
    step, warm_up = _warm_up(backend, spec, batch, table, settings.seconds / 5, clock)
    steps, rounds = settings.plan(step, len(table))
    chains = [_chain(backend, spec, batch, beginning(table, steps), clock) for _ in range(rounds)]
    measured = Durations(
        rounds,
        steps=[s for c in chains for s in c.steps],
        bare=[s for c in chains for s in c.bare],
        ratios=[r for c in chains for r in c.ratios],
        host=sum(c.host for c in chains),
        around=sum(c.around for c in chains) / rounds,
    )
    return cell(
        batch,
        "host",
        measured,
        steps=steps,
        timesteps=len(table),
        warm_up=warm_up,
        memory=peak_memory(),
        notes=notes,
    )


def peak_memory(root: Path = Path("/")) -> int | None:
    """The peak memory of this process so far, in bytes."""
    # unlike getrusage, this does not count the parent's peak before exec
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)


def _warm_up(
    backend: Backend, spec: ModelSpec, batch: int, table: Table, seconds: float, clock: Clock
) -> tuple[float, int]:
    """Run ten steps, or fewer if they are slow, but at least two. (seconds per step after the first, steps run)"""
    begun = clock()
    indices = np.arange(batch)
    first = beginning(table, WARM_UP_STEPS)
    ended = []
    for _ in _walk(backend, spec, first, indices):
        ended.append(clock())
        if len(ended) >= 2 and ended[-1] - begun > seconds:
            break
    return (ended[-1] - ended[0]) / max(1, len(ended) - 1), len(ended)


def _chain(backend: Backend, spec: ModelSpec, batch: int, table: Table, clock: Clock) -> Durations:
    """Measure one chain: a step and the bare network in turns."""
    watched = _Watched(backend, clock)
    indices = np.arange(batch)
    steps, bare, host = [], [], 0.0
    around = begun = clock()
    last = None
    for step in _walk(watched, spec, table, indices):
        ended = clock()
        if last is None:  # the time before the first step is not part of it
            around, begun = watched.bound - around, watched.bound
        steps.append(ended - begun)
        host += steps[-1] - watched.computing
        last = step
        backend.enqueue()
        begun = clock()
        bare.append(begun - ended)
    assert last is not None, "a table has steps"
    ended = clock()
    to_nhwc(last.x0)
    around += clock() - ended
    return Durations(1, steps, bare, [sum(steps) / max(sum(bare), 1e-9)], host, around)


def _walk(backend: Backend, spec: ModelSpec, table: Table, indices: NDArray[np.int64]) -> Iterator[chain.Step]:
    start, conditioning = chain.initial(0, indices, spec.shape), example(spec, indices)
    return chain.run(
        backend,
        table,
        start,
        seed=0,
        images=indices,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=conditioning,
    )
