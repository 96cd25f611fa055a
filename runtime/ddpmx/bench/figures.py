"""From measured durations to the figures of one line of the table. There is no clock in here."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpmx.diffusion.samplers import Table

LEAST_STEPS = 3
LEAST_ROUNDS = 3
MOST_ROUNDS = 25
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: approximate time for one batch size and executor, shared by the chain and the bare network.
        steps: length of each chain; None for as many steps as fit.
    """

    seconds: float = 5.0
    steps: int | None = None

    def plan(self, step: float, timesteps: int) -> tuple[int, int]:
        """Divide the time into chains.

        Args:
            step: rough duration of one step in seconds; a bare run of the network is assumed to take as long.
            timesteps: T, the longest possible chain.

        Returns:
            (steps of each chain, number of chains): at least 3 chains of 3 steps, so slow networks take longer than
            :attr:`seconds`.
        """
        pairs = self.seconds / (2 * max(step, 1e-9))
        steps = self.steps or int(min(timesteps, max(LEAST_STEPS, pairs / LEAST_ROUNDS)))
        return steps, int(min(MOST_ROUNDS, max(LEAST_ROUNDS, pairs / steps)))


@dataclass(frozen=True)
class Cell:
    """The figures of one batch size and executor: one line of the table.

    Attributes:
        batch: images at once.
        executor: ``host``, ``plain``, ``graph`` or ``while``.
        failed: why there are no figures, or None.
        warm_up: steps run before the measurement.
        steps: steps of each measured chain.
        rounds: number of measured chains.
        p50_ms, p95_ms: percentiles of the duration of a step; None for ``while``, which has no separate steps.
        mean_ms: mean duration of a step.
        host_us: host time per step: everything but the network on a CPU; this thread's CPU time with a GPU.
        bare_ms: mean duration of the network alone.
        ratio: step ÷ network, median over the chains.
        chain_s: duration of the whole chain of T steps, from noise to uint8.
        extrapolated: whether ``chain_s`` was computed from a part of the chain.
        images_per_s: batch ÷ chain_s.
        memory: bytes: the peak of the process on a CPU, the memory taken on the device with a GPU; None if unknown.
        notes: remarks on this line.
    """

    batch: int
    executor: str
    failed: str | None = None
    warm_up: int = 0
    steps: int = 0
    rounds: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    mean_ms: float | None = None
    host_us: float | None = None
    bare_ms: float | None = None
    ratio: float | None = None
    chain_s: float | None = None
    extrapolated: bool = False
    images_per_s: float | None = None
    memory: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        return dataclasses.asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True)
class Durations:
    """Measured durations, in seconds.

    Attributes:
        rounds: number of measured chains.
        steps: of each step of all chains; or the mean step of each chain if there are no separate steps.
        bare: of the network alone, run after each step or after each chain.
        ratios: one per chain: its steps ÷ as many runs of the network alone.
        host: host time of all chains together.
        around: mean time of a chain before its first step and after its last.
    """

    rounds: int
    steps: Sequence[float]
    bare: Sequence[float]
    ratios: Sequence[float]
    host: float
    around: float


def cell(
    batch: int,
    executor: str,
    measured: Durations,
    *,
    steps: int,
    timesteps: int,
    warm_up: int,
    apart: bool = True,
    memory: int | None = None,
    notes: tuple[str, ...] = (),
) -> Cell:
    """Compute the figures of one line.

    Args:
        batch, executor, warm_up, memory, notes: as in :class:`Cell`.
        measured: the durations.
        steps: steps of each chain.
        timesteps: T.
        apart: whether ``measured.steps`` are single steps rather than means of chains.
    """
    mean = statistics.fmean(measured.steps)
    p50, p95 = (1e3 * float(np.percentile(measured.steps, q)) for q in (50, 95)) if apart else (None, None)
    whole = measured.around + timesteps * mean
    return Cell(
        batch,
        executor,
        warm_up=warm_up,
        steps=steps,
        rounds=measured.rounds,
        p50_ms=p50,
        p95_ms=p95,
        mean_ms=1e3 * mean,
        host_us=1e6 * measured.host / (measured.rounds * steps),
        bare_ms=1e3 * statistics.fmean(measured.bare),
        ratio=statistics.median(measured.ratios),
        chain_s=whole,
        extrapolated=steps < timesteps,
        images_per_s=batch / whole,
        memory=memory,
        notes=notes,
    )


def beginning(table: Table, steps: int) -> Table:
    """The first steps of a chain. Each costs as much as any other; only the last step of a chain adds no noise."""
    return dataclasses.replace(
        table,
        timesteps=table.timesteps[:steps],
        rows=table.rows[:steps],
        learned=None if table.learned is None else table.learned[:steps],
        memory=None if table.memory is None else table.memory[:steps],
    )
