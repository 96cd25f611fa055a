"""Runs the chain of one batch: on the host in NumPy, here, or on a GPU, in :mod:`ddpmx.cuda.device_runner`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.device_array import DeviceArray
from ddpmx.backends.base import Backend, PartBackend, RowByRow, SharedBackend
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, Cancelled, InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain, evaluation
from ddpmx.sampling.chain import Step
from ddpmx.sampling.evaluation import Call, Outputs
from ddpmx.sampling.guidance import Guidance, GuidedBackend
from ddpmx.sampling.pixels import to_nhwc

if TYPE_CHECKING:
    from ddpmx.device.driver import Driver


@dataclass(frozen=True)
class Job:
    """One chain.

    Attributes:
        table: the sampler.
        seed: of the noise.
        images: int64 [n], the index of each image.
        batch: the batch size at which the network is to run if neighbours make a difference; n or more.
        progress: called with (steps done, steps in all).
        cancel: polled; True stops the chain.
        after: CUDA streams whose work so far has to finish before the caller's arrays are read or written.
        conditioning: of each image: ``y`` int32 [n], ``cond`` float32 [n, K, H, W], or the address of such an array on
            the device where the chain runs.
        guidance: of a guided chain, or None.
    """

    table: Table
    seed: int
    images: NDArray[np.int64]
    batch: int
    progress: Callable[[int, int], None] | None = None
    cancel: Callable[[], bool] | None = None
    after: tuple[int, ...] = ()
    conditioning: Mapping[str, NDArray[Any] | int] = field(default_factory=dict)
    guidance: Guidance | None = None


def fitting_batch(ranges: tuple[tuple[int, int], ...], wanted: int) -> int:
    """The largest batch up to ``wanted`` that a network takes, or else its smallest.

    Args:
        ranges: the smallest and the largest batch of each range that the network takes.
        wanted: images at once.
    """
    fewer = [min(high, wanted) for low, high in ranges if low <= wanted]
    return max(fewer) if fewer else min(low for low, _ in ranges)


def rows(array: NDArray[Any] | int, part: slice, dims: tuple[int, ...]) -> NDArray[Any] | int:
    """Some images' rows of an array, or of an array at an address, with ``dims`` numbers of four bytes for each image."""
    return array + 4 * math.prod(dims) * int(part.start) if isinstance(array, int) else array[part]


class Runner(Protocol):
    """Runs chains. Not thread-safe."""

    @property
    def description(self) -> str:
        """What really computes: library, version and device."""

    @property
    def driver(self) -> Driver | None:
        """The GPU it runs on, whose addresses may be passed for arrays; None on the host."""

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest batch of each range that the network takes."""

    def run(self, job: Job, *, x: NDArray[np.float32] | int | None, pixels: NDArray[np.uint8] | int) -> None:
        """Run a chain to its end. An image does not depend on its neighbours.

        Args:
            job: the chain.
            x: float32 [n, C, H, W], the state to begin with; by default x_T ~ N(0, I).
            pixels: uint8 [n, H, W, C], the images are written here.

        Raises:
            NumericError: the network's output was not finite.
            Cancelled: ``cancel`` returned True.
            BackendError: the network could not be run.
        """

    def steps(self, job: Job, *, x: NDArray[np.float32] | int | None) -> Generator[Step, None, None]:
        """The same chain step by step, without ``progress`` and ``cancel``. The arrays belong to the runner."""

    def evaluate(self, call: Call) -> Outputs:
        """Run the network once for each image, without a chain. An image does not depend on its neighbours.

        Raises:
            NumericError: an output was not finite.
            BackendError: the network could not be run.
        """

    def array(self, shape: tuple[int, ...]) -> DeviceArray:
        """A new uint8 array on the GPU.

        Raises:
            InputError: there is no GPU.
            BackendError: its memory does not suffice.
        """

    def share(self) -> Runner:
        """Another runner of the same network, for another thread. The network is closed with the last runner."""

    def close(self) -> None:
        """Free everything. Safe to call again."""


class HostRunner:
    """The chain in NumPy.

    Args:
        backend: computes ε; closed with the runner.
        spec: the model.
    """

    def __init__(self, backend: Backend, spec: ModelSpec) -> None:
        self._backend, self._spec = backend, spec
        self._executed: dict[tuple[int, int, bool], int] = {}
        self._parts: dict[int, int] = {}

    @property
    def description(self) -> str:
        """The backend's description."""
        return self._backend.description

    @property
    def driver(self) -> Driver | None:
        """None: the chain runs on the host."""
        return None

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Any batch."""
        return ((1, 1 << 32),)

    def run(self, job: Job, *, x: NDArray[np.float32] | int | None, pixels: NDArray[np.uint8] | int) -> None:
        """See :meth:`Runner.run`."""
        if isinstance(pixels, int):
            raise InputError("the chain runs on the CPU and cannot write images to GPU memory")
        with contextlib.closing(self.steps(job, x=x)) as steps:
            for done in range(len(job.table)):
                if job.cancel is not None and job.cancel():
                    raise Cancelled("cancelled before the chain finished")
                step = next(steps)
                if job.progress is not None:
                    job.progress(done + 1, len(job.table))
        # The chain ends at x_next. At t = 0 that is x̂_0 exactly, since there A = 1 and B = σ = 0; a table that stops
        # short of t = 0 ends with the same row, so x̂_0 is the sample there as well.
        pixels[...] = to_nhwc(step.x0)

    def steps(self, job: Job, *, x: NDArray[np.float32] | int | None) -> Generator[Step, None, None]:
        """See :meth:`Runner.steps`."""
        if isinstance(x, int):
            raise InputError("the chain runs on the CPU, but its first state is in GPU memory")
        backend, rows, executed = self._arranged(job.images, job.batch, job.guidance)
        conditioning: dict[str, NDArray[Any]] = {}
        for name, array in job.conditioning.items():
            if isinstance(array, int):
                raise InputError(f"the chain runs on the CPU, but its {name} is in GPU memory")
            conditioning[name] = _placed(array, rows, executed)
        indices = _placed(job.images, rows, executed)
        x = chain.initial(job.seed, indices, self._spec.shape) if x is None else _placed(x, rows, executed)
        yield from (
            Step(step.t, step.x[rows], step.x0[rows], step.x_next[rows])
            for step in chain.run(
                backend,
                job.table,
                x,
                seed=job.seed,
                images=indices,
                clip=self._spec.clip,
                conditioning_shapes=self._spec.conditioning_shapes,
                conditioning=conditioning,
            )
        )

    def evaluate(self, call: Call) -> Outputs:
        """See :meth:`Runner.evaluate`."""
        backend, rows, executed = self._arranged(call.images, call.batch, call.guidance)
        return evaluation.run(backend, self._spec, call, rows, executed)

    def array(self, shape: tuple[int, ...]) -> DeviceArray:
        """Refused: see :meth:`Runner.array`."""
        raise InputError("the chain runs on the CPU, and so are its images", hint="on_device needs an engine on a GPU")

    def share(self) -> HostRunner:
        """See :meth:`Runner.share`."""
        if not isinstance(self._backend, SharedBackend):
            raise BackendError(f"{self.description} runs in one thread only", hint="load the file again for another")
        return HostRunner(self._backend.share(), self._spec)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def _arranged(
        self, images: NDArray[np.int64], batch: int, guidance: Guidance | None
    ) -> tuple[Backend, slice | NDArray[np.int64], int]:
        """What computes, the row of each image in its batch, and that batch's size: so that neighbours do not matter."""
        n = len(images)
        if isinstance(self._backend, PartBackend):
            part = self._part(self._backend, batch)
            # image i is always number i mod part of its part, whatever else is drawn
            number, place = np.divmod(images, part)
            parts, which = np.unique(number, return_inverse=True)
            rows = which * part + place
            whole = slice(int(rows[0]), int(rows[0]) + n)
            ascending = np.array_equal(rows, np.arange(whole.start, whole.stop))
            return self._network(guidance), whole if ascending else rows, len(parts) * part
        network, executed = self._network(guidance), self._measured(n, batch, guidance)
        return RowByRow(network) if executed < n else network, slice(n), max(n, executed)

    def _network(self, guidance: Guidance | None) -> Backend:
        """The network, or both halves of a guided one. With parts, each half is cut in the same way."""
        return self._backend if guidance is None else GuidedBackend(self._backend, self._spec, guidance)

    def _part(self, backend: PartBackend, batch: int) -> int:
        """The size of the parts of a batch; measured once for every size, see :func:`ddpmx.sampling.chain.choose_part`."""
        if batch not in self._parts:
            self._parts[batch] = chain.choose_part(backend, self._spec, batch)
        backend.use_part(self._parts[batch])
        return self._parts[batch]

    def _measured(self, n: int, batch: int, guidance: Guidance | None) -> int:
        """See :func:`ddpmx.sampling.chain.executed_batch`; measured once for every size."""
        key = n, batch, guidance is not None
        if key not in self._executed:
            self._executed[key] = chain.executed_batch(self._network(guidance), self._spec, n, batch)
        return self._executed[key]


def _placed(array: NDArray[Any], rows: slice | NDArray[np.int64], executed: int) -> NDArray[Any]:
    """The array with its rows at these places, among as many rows as the network runs; its last row fills the others."""
    if len(array) == executed and isinstance(rows, slice):
        return array
    placed = np.repeat(array[-1:], executed, axis=0)
    placed[rows] = array
    return placed
