"""What a measurement gives: from durations to the figures of one line of the table. No clock in here."""

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
    """How long is measured.

    Attributes:
        seconds: for one batch size and executor, about; the chain and the bare network share them.
        steps: of each chain; None for as many as fit.
    """

    seconds: float = 5.0
    steps: int | None = None

    def plan(self, step: float, timesteps: int) -> tuple[int, int]:
        """How to spend the seconds.

        Args:
            step: seconds that one step takes, roughly; a bare run of the network is taken to last as long.
            timesteps: T; no chain is longer.

        Returns:
            (steps of each chain, chains). Slow networks take longer than :attr:`seconds`: 3 chains of 3 steps
            are always made.
        """
        pairs = self.seconds / (2 * max(step, 1e-9))
        steps = self.steps or int(min(timesteps, max(LEAST_STEPS, pairs / LEAST_ROUNDS)))
        return steps, int(min(MOST_ROUNDS, max(LEAST_ROUNDS, pairs / steps)))


@dataclass(frozen=True)
class Cell:
    """One batch size by one executor. Where it did not work ``failed`` says why, and there are no figures.

    Attributes:
        batch: images at once.
        executor: ``host``, ``plain``, ``graph`` or ``while``.
        failed: why there are no figures.
        warm_up: steps that were made before, and not measured.
        steps: of each measured chain.
        rounds: measured chains.
        p50_ms, p95_ms: percentiles of a step's time; None by ``while``, whose steps cannot be told apart.
        mean_ms: a step's time.
        host_us: per step, the host's part: beside the network on a CPU; this thread's CPU time with a GPU.
        bare_ms: the network's own time, alone.
        ratio: step ÷ network, the median of what was measured in turns.
        chain_s: the whole chain of T steps, from noise to uint8.
        extrapolated: whether ``chain_s`` comes from a part of the chain.
        images_per_s: batch ÷ chain_s.
        memory: bytes; whose, :class:`ddpmx.bench.measure.Report` says.
        notes: what else there is to say.
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
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True)
class Durations:
    """What was measured, in seconds.

    Attributes:
        rounds: measured chains.
        steps: one per step, over all chains; or one per chain, its mean, where steps cannot be told apart.
        bare: beside each of ``steps``, or each chain, the network alone.
        ratios: one per chain: its steps ÷ the network alone as often, measured in turns.
        host: the host's part of all of the chains together.
        around: what a chain takes before its first step and after its last, on average.
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
    """The figures of one line.

    Args:
        batch, executor, warm_up, memory, notes: as in :class:`Cell`.
        measured: the durations.
        steps: of each chain.
        timesteps: T.
        apart: whether ``measured.steps`` are single steps.
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
    """The first steps of a chain. They cost what the others do, noise included, which only the chain's last one lacks."""
    return dataclasses.replace(
        table,
        timesteps=table.timesteps[:steps],
        rows=table.rows[:steps],
        learned=None if table.learned is None else table.learned[:steps],
    )
