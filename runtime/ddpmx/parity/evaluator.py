"""Runs a network on any number of rows, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import NO_CONDITIONING, Backend, Buffers
from ddpmx.errors import NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.evaluation import Outputs
from ddpmx.sampling.runner import fitting_batch

ANY = ((1, 1 << 32),)
"""The batches that a network on the host takes."""


class Evaluator:
    """Runs a network in batches of one size.

    Args:
        backend: the network.
        spec: its description.
        batch: rows per network call.
        progress: called with (network calls done, network calls in all).
        total: how many network calls there will be in all.
        ranges: the smallest and the largest batch of each range that the network takes.
    """

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        batch: int,
        progress: Callable[[int, int], None] | None,
        total: int,
        ranges: tuple[tuple[int, int], ...] = ANY,
    ) -> None:
        self._backend, self._spec, self.batch, self._ranges = backend, spec, batch, ranges
        self._progress, self._done, self._total = progress, 0, total

    def __call__(
        self,
        x: Float32,
        t: NDArray[np.integer],
        conditioning: Mapping[str, NDArray[Any]] = NO_CONDITIONING,
        *,
        batch: int | None = None,
    ) -> Outputs:
        """Compute the outputs for n rows.

        Args:
            x: float32 [n, C, H, W].
            t: [n].
            conditioning: the network's conditioning inputs by name, [n, …] each.
            batch: rows per network call; by default the evaluator's own.

        Raises:
            NumericError: an output is not finite.
            BackendError: the network could not be run.
        """
        size, learned = batch or self.batch, self._spec.learns_variance
        buffers = Buffers.of(size, self._spec.shape, var=learned, conditioning_shapes=self._spec.conditioning_shapes)
        self._backend.bind(buffers)
        out, var = np.empty_like(x), np.empty_like(x) if learned else None
        inputs = {"x": x, "t": t, **conditioning}
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            n = rows.stop - rows.start
            for name, array in buffers.inputs().items():
                array[:n] = inputs[name][rows]
                array[n:] = inputs[name][rows][-1:]
            self._backend.enqueue()
            out[rows] = buffers.out[:n]
            if var is not None and buffers.var is not None:
                var[rows] = buffers.var[:n]
            self.tick()
        for output in (out, var):
            if output is not None and not np.isfinite(output).all():
                bad = int(t[int(np.argmin(np.isfinite(output).reshape(len(output), -1).all(axis=1)))])
                raise NumericError(
                    f"the network's output at t = {bad} is not finite",
                    note=self._backend.description,
                    hint="if the file is fp16, try fp32: an activation may exceed 65504",
                )
        return Outputs(out, var)

    def calls(self, rows: int) -> int:
        """How many network calls ``rows`` rows take in :class:`InBatches`."""
        return -(-rows // self.fitting(rows))

    def fitting(self, rows: int) -> int:
        """Rows per network call where there are ``rows`` of them: no more than the evaluator's own, if the network can."""
        return fitting_batch(self._ranges, min(rows, self.batch))

    def tick(self) -> None:
        """Count one network call that is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


class InBatches:
    """A backend for any number of rows, which an evaluator computes in batches that its network takes.

    Args:
        evaluate: its network must take the same conditioning inputs as the buffers have.
        description: of the network.
    """

    def __init__(self, evaluate: Evaluator, description: str) -> None:
        self._evaluate, self.description = evaluate, description
        self._buffers: Buffers | None = None

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers."""
        self._buffers = buffers

    def enqueue(self) -> None:
        """Compute the outputs of all rows.

        Raises:
            NumericError: one is not finite.
            BackendError: the network could not be run.
        """
        buffers = self._buffers
        assert buffers is not None
        conditioning = {name: array for name, array in buffers.inputs().items() if name not in ("x", "t")}
        rows = len(buffers.x)
        outputs = self._evaluate(buffers.x, buffers.t, conditioning, batch=self._evaluate.fitting(rows))
        buffers.out[...] = outputs.out
        if buffers.var is not None and outputs.var is not None:
            buffers.var[...] = outputs.var

    def close(self) -> None:
        """Do nothing: the network is the evaluator's."""
