"""Runs a network's chains on its GPU, for :class:`ddpmx.pipeline.Pipeline`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.device_array import DeviceArray
from ddpmx.backends.base import Backend, CopyingBackend, DeviceNetwork
from ddpmx.cuda.device_chain import Choice, DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.driver import Driver
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain, evaluation
from ddpmx.sampling.chain import Step
from ddpmx.sampling.evaluation import Call, Outputs
from ddpmx.sampling.guidance import Guidance, GuidedBackend, guided_batches
from ddpmx.sampling.runner import Job, rows


class DeviceRunner:
    """Runs a :class:`ddpmx.sampling.runner.Job` on the device. The last chain is kept, for the next job of the same kind.

    Args:
        backend: the network; closed with the runner.
        spec: the model.
        executor: ``auto``, or one of :data:`ddpmx.backends.base.EXECUTORS`.

    Raises:
        InputError: the network does not support that executor.
    """

    def __init__(self, backend: CopyingBackend, spec: ModelSpec, executor: str = "auto") -> None:
        self._backend, self._device, self._spec, self._executor = backend, backend.device, spec, executor
        if executor not in ("auto", *self._device.executors):
            raise InputError(
                f"{self._device.description} does not support executor {executor!r}",
                hint=f"auto, {', '.join(self._device.executors)}",
            )
        self._key: Any = None
        self._chain: DeviceChain | None = None
        self._network: DeviceNetwork | None = None
        self._executed: dict[tuple[int, int, bool], int] = {}
        self._choice: Choice | None = None
        self._alone = False

    @property
    def description(self) -> str:
        """Library, device and, once a chain was prepared, its executor."""
        parts = [self._device.description, *(["one image at a time"] if self._alone else [])]
        return ", ".join(parts + ([f"executor {self._choice}"] if self._choice is not None else []))

    @property
    def driver(self) -> Driver:
        """The network's GPU."""
        return self._device.driver

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest batch of each range that the network takes."""
        return self._device.batches

    def run(self, job: Job, *, x: NDArray[np.float32] | int | None, pixels: NDArray[np.uint8] | int) -> None:
        """Run a chain, see :meth:`ddpmx.sampling.runner.Runner.run`."""
        n, alone = len(job.images), self._is_alone(job)
        size, shapes = math.prod(self._spec.shape), self._spec.conditioning_shapes
        prepared = self._prepared(job, self._batch_of(job, with_x0=False), with_x0=False)
        reported = [0]
        for first in range(0, n, 1 if alone else n):
            part = slice(first, first + 1 if alone else n)
            prepared.run(
                seed=job.seed,
                images=job.images[part],
                x=None if x is None else rows(x, part, self._spec.shape),
                conditioning={name: rows(array, part, shapes[name]) for name, array in job.conditioning.items()},
                pixels=pixels + size * first if isinstance(pixels, int) else pixels[part],
                after=job.after if first == 0 else (),
                progress=_share(job.progress, first, n, reported) if alone else job.progress,
                cancel=job.cancel,
            )

    def steps(self, job: Job, *, x: NDArray[np.float32] | int | None) -> Generator[Step, None, None]:
        """Run a chain step by step, see :meth:`ddpmx.sampling.runner.Runner.steps`."""
        if self._is_alone(job) and len(job.images) > 1:
            raise InputError(
                f"{self._device.description} gives an image other bits in a batch than alone, so only one can be watched "
                "at a time",
                hint="batch = 1 (--batch 1)",
            )
        return self._prepared(job, self._batch_of(job, with_x0=True), with_x0=True).steps(
            seed=job.seed, images=job.images, x=x, conditioning=job.conditioning, after=job.after
        )

    def evaluate(self, call: Call) -> Outputs:
        """Run the network alone, see :meth:`ddpmx.sampling.runner.Runner.evaluate`. The last chain is given up for it."""
        n = len(call.images)
        measured = self._measured(n, call.batch, call.guidance)
        size = 1 if measured == 1 else n
        executed = max(measured, size, min(low for low, _ in self._batches_of(call.guidance)))
        self._release()
        parts = [
            evaluation.run(
                self._guided(call.guidance), self._spec, call.rows(slice(at, at + size)), slice(size), executed
            )
            for at in range(0, n, size)
        ]
        out, var = (None if parts[0][i] is None else np.concatenate([part[i] for part in parts]) for i in (0, 1))
        assert out is not None
        return Outputs(out, var)

    def array(self, shape: tuple[int, ...]) -> DeviceArray:
        """See :meth:`ddpmx.sampling.runner.Runner.array`."""
        return DeviceArray.allocate(self._device.driver, shape, np.uint8, "the images")

    def share(self) -> DeviceRunner:
        """See :meth:`ddpmx.sampling.runner.Runner.share`."""
        return DeviceRunner(self._backend.share(), self._spec, self._executor)

    def close(self) -> None:
        """Free everything. Safe to call again."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._backend.close)
            self._release()

    # --- internals ---------------------------------------------------------------------------------------------------

    def _is_alone(self, job: Job) -> bool:
        """Whether images have to run one by one, since neighbours make a difference."""
        self._alone = self._measured(job.batch, job.batch, job.guidance) == 1 < job.batch
        return self._alone

    def _batch_of(self, job: Job, *, with_x0: bool) -> int:
        """The batch size at which the network runs the job's images."""
        if self._chain is not None and self._key == self._key_of(job, job.batch, with_x0):
            return job.batch  # padding costs less than another chain
        measured = self._measured(len(job.images), job.batch, job.guidance)
        return max(measured, min(low for low, _ in self._batches_of(job.guidance)))

    def _batches_of(self, guidance: Guidance | None) -> tuple[tuple[int, int], ...]:
        """Smallest and largest batch of images of each range."""
        return self.batches if guidance is None else guided_batches(self.batches)

    def _guided(self, guidance: Guidance | None) -> Backend:
        """The network, or both halves of a guided one, from the host."""
        return self._backend if guidance is None else GuidedBackend(self._backend, self._spec, guidance)

    def _measured(self, n: int, batch: int, guidance: Guidance | None) -> int:
        """See :func:`ddpmx.sampling.chain.executed_batch`; measured once for every size."""
        key = n, batch, guidance is not None
        if key not in self._executed:
            fewer = n if any(low <= n <= high for low, high in self._batches_of(guidance)) else batch
            self._release()  # a small device has no room for both
            self._executed[key] = chain.executed_batch(self._guided(guidance), self._spec, fewer, batch)
            self._backend.release()
        return self._executed[key]

    def _prepared(self, job: Job, batch: int, *, with_x0: bool) -> DeviceChain:
        """The chain, with its network and executor."""
        key = self._key_of(job, batch, with_x0)
        if self._chain is not None and key == self._key:
            return self._chain
        self._release()
        self._backend.release()  # of the last evaluation
        device = self._device
        try:
            with device.driver.current():
                self._chain = made = DeviceChain(
                    device.driver,
                    Kernels.of(device.driver),
                    self._spec.shape,
                    batch,
                    job.table,
                    clip=self._spec.clip,
                    conditioning_shapes=self._spec.conditioning_shapes,
                    guidance=job.guidance,
                    with_x0=with_x0,
                    description=device.description,
                    stream=device.stream,
                )
                self._network = network = device.network(
                    made.rows, **made.at, conditioning=made.conditioning, stream=made.stream
                )
                choice = choose_executor(made, network.enqueue, self._wanted(with_x0), among=self._among(with_x0))
        except BaseException:
            self._release()
            raise
        self._key, self._choice = key, choice
        return made

    @staticmethod
    def _key_of(job: Job, batch: int, with_x0: bool) -> tuple[Any, ...]:
        """What identifies a chain: a job with the same key can use it."""
        table = job.table
        optional = (b"" if columns is None else columns.tobytes() for columns in (table.learned, table.memory))
        return batch, with_x0, job.guidance, table.timesteps.tobytes(), table.rows.tobytes(), *optional

    def _wanted(self, stepwise: bool) -> str:
        """Step by step the host acts after every step, which a WHILE node does not allow."""
        return "auto" if stepwise and self._executor == "while" else self._executor

    def _among(self, stepwise: bool) -> tuple[str, ...]:
        return tuple(name for name in self._device.executors if not (stepwise and name == "while"))

    def _release(self) -> None:
        """Free the last chain, after its network."""
        chain, network = self._chain, self._network
        self._network = self._chain = self._key = None
        with contextlib.ExitStack() as stack:
            if chain is not None:
                stack.callback(chain.close)
            if network is not None and (chain is None or chain.unprepare()):
                stack.callback(network.close)


def _share(
    progress: Callable[[int, int], None] | None, done: int, n: int, reported: list[int]
) -> Callable[[int, int], None] | None:
    """The progress of image ``done`` of ``n``, which run one after the other, as that of one chain.

    ``reported`` holds the last number that was reported.
    """
    if progress is None:
        return None
    report = progress  # for mypy: not None inside the function either

    def share(step: int, total: int) -> None:
        now = (done * total + step) // n
        if now > reported[0]:
            reported[0] = now
            report(now, total)

    return share
