"""Measures a chain on a GPU by events in the chain's stream, and the network alone in the same stream."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from ddpmx.backends.base import CopyingBackend, DeviceBackend, DeviceNetwork
from ddpmx.bench.figures import WARM_UP_STEPS, Cell, Durations, Settings, beginning, cell
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.driver import Driver, Handle
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.chain import executed_batch
from ddpmx.sampling.conditioning import example

Clock = Callable[[], float]

_ALONE = (
    "generate is slower: an image's output depends on its place in this batch, so it runs each one alone, as batch 1"
)


class DeviceBench:
    """Measures the network of one file. Nothing stays on the device from one line of the table to the next.

    Args:
        device: the network.
        spec: its description.
        settings: how long to measure.
        backend: the same network for arrays on the host, or None. It tells whether images may run side by side.
        free_before: bytes that were free on the device before the file was opened, or None.
        clock: the current time in seconds.
        thread_clock: the CPU time of the calling thread in seconds.
    """

    def __init__(
        self,
        device: DeviceBackend,
        spec: ModelSpec,
        settings: Settings,
        *,
        backend: CopyingBackend | None = None,
        free_before: int | None = None,
        clock: Clock = time.perf_counter,
        thread_clock: Clock = time.thread_time,
    ) -> None:
        self._device, self._spec, self._settings, self._free_before = device, spec, settings, free_before
        self._clock, self._thread_clock, self._backend = clock, thread_clock, backend
        self._alone: dict[int, bool] = {}
        self._kernels = Kernels.of(device.driver)
        self._table = make_table(spec.make_schedule(), spec.prediction, spec.variance)
        self._step: dict[int, float] = {}

    def measure(self, batch: int, executor: str) -> Cell:
        """Measure one line of the table.

        Args:
            batch: images at once.
            executor: ``auto``, or one of :data:`ddpmx.backends.base.EXECUTORS`.

        Returns:
            The figures, or why this executor does not work with this batch.

        Raises:
            NumericError: the network's output was not finite.
            InputError: there is no such executor, or the network does not take this batch.
        """
        if executor not in ("auto", *self._device.executors):  # not tried: a failure may affect other lines too
            return Cell(batch, executor, failed=f"{self._device.description} does not support it")
        try:
            if batch not in self._alone:
                self._alone[batch] = self._run_alone(batch)
            with self._device.driver.current():
                if batch not in self._step:
                    self._step[batch] = self._rehearse(batch)
                return self._measure(batch, executor)
        except BackendError as error:
            return Cell(batch, executor, failed=": ".join(filter(None, (error.fact, error.note))))

    def _run_alone(self, batch: int) -> bool:
        """Whether the pipeline would run each image of this batch alone."""
        if self._backend is None:
            return False
        try:
            return executed_batch(self._backend, self._spec, batch, batch) < batch
        finally:
            self._backend.release()

    def _rehearse(self, batch: int) -> float:
        """Warm up, and return the rough duration of a step in seconds."""
        table = beginning(self._table, WARM_UP_STEPS)
        with self._chain(batch, "plain", table) as (chain, _), self._marks(2) as (begin, end):
            driver = self._device.driver
            images = np.arange(batch)
            conditioning = example(self._spec, images)
            chain.run(seed=0, images=images, conditioning=conditioning)
            driver.record(begin, chain.stream)
            chain.run(seed=0, images=images, conditioning=conditioning)
            driver.record(end, chain.stream)
            driver.wait_for(end)
            return driver.milliseconds(begin, end) / 1e3 / len(table)

    def _measure(self, batch: int, executor: str) -> Cell:
        driver, total = self._device.driver, len(self._table)
        steps, rounds = self._settings.plan(self._step[batch], total)
        with contextlib.ExitStack() as stack:
            chain, notes = stack.enter_context(self._chain(batch, executor, beginning(self._table, steps)))
            marks = stack.enter_context(self._marks(steps + 1))
            images = np.arange(batch)
            conditioning = example(self._spec, images)
            pixels = np.empty((batch, *self._spec.shape[1:], self._spec.shape[0]), np.uint8)
            chain.run(seed=0, images=images, pixels=pixels, conditioning=conditioning)
            memory = None if self._free_before is None else max(0, self._free_before - driver.free_memory()[0])
            bare, note = stack.enter_context(self._bare(batch, chain))
            bare(steps)
            assert chain.choice is not None, "the chain is prepared"
            name = chain.choice.executor
            times, alone, ratios, host, around = [], [], [], 0.0, 0.0
            for _ in range(rounds):
                begun, begun_thread = self._clock(), self._thread_clock()
                chain.run(seed=0, images=images, pixels=pixels, conditioning=conditioning, marks=marks)
                host += self._thread_clock() - begun_thread
                whole = driver.milliseconds(marks[0], marks[-1]) / 1e3
                around += max(0.0, self._clock() - begun - whole)
                if name == "while":
                    times.append(whole / steps)
                else:
                    times += [driver.milliseconds(a, b) / 1e3 for a, b in itertools.pairwise(marks)]
                alone.append(bare(steps) / steps)
                ratios.append(whole / steps / max(alone[-1], 1e-9))
        return cell(
            batch,
            name,
            Durations(rounds, times, alone, ratios, host, around / rounds),
            steps=steps,
            timesteps=total,
            warm_up=2 * min(WARM_UP_STEPS, total) + steps,
            apart=name != "while",
            memory=memory,
            notes=(*notes, *note, *([_ALONE] if self._alone.get(batch) else [])),
        )

    @contextlib.contextmanager
    def _chain(self, batch: int, executor: str, table: Table) -> Iterator[tuple[DeviceChain, tuple[str, ...]]]:
        """Yield (a chain that is ready to run, notes on its executor), and free the chain afterwards."""
        device = self._device
        with DeviceChain(
            device.driver,
            self._kernels,
            self._spec.shape,
            batch,
            table,
            clip=self._spec.clip,
            conditioning_shapes=self._spec.conditioning_shapes,
            description=device.description,
            stream=device.stream,
        ) as chain:
            network = self._network(batch, chain)
            try:
                choice = choose_executor(chain, network.enqueue, executor, among=device.executors)
                yield chain, tuple(f"not {name}: {why}" for name, why in choice.rejected)
            finally:
                chain.settle()
                network.close()

    def _network(self, batch: int, chain: DeviceChain) -> DeviceNetwork:
        return self._device.network(batch, **chain.at, conditioning=chain.conditioning, stream=chain.stream)

    @contextlib.contextmanager
    def _bare(self, batch: int, chain: DeviceChain) -> Iterator[tuple[Callable[[int], float], tuple[str, ...]]]:
        """Yield (a function that runs the network alone ``n`` times and returns the seconds on the device, notes).

        It uses a second network on the chain's memory and stream, since a captured network belongs to its graph.
        """
        driver, stream = self._device.driver, chain.stream
        network = self._network(batch, chain)
        executable: Handle | None = None
        notes: tuple[str, ...] = ()
        try:
            network.enqueue(stream)  # the set-up of its first run must not be captured
            driver.wait_for_stream(stream, "running the network for the first time")
            try:
                if "graph" not in self._device.executors:
                    raise BackendError("the network cannot be captured")
                executable = _captured(driver, network, stream)
            except BackendError as error:
                notes = (f"the network alone was enqueued step by step, not by a graph: {error.fact}",)
            with self._marks(2) as (begin, end):

                def run(times: int) -> float:
                    driver.record(begin, stream)
                    for _ in range(times):
                        if executable is None:
                            network.enqueue(stream)
                        else:
                            driver.launch_graph(executable, stream, "the network's graph")
                    driver.record(end, stream)
                    driver.wait_for(end, "running the network alone")
                    return driver.milliseconds(begin, end) / 1e3

                yield run, notes
        finally:
            with contextlib.suppress(BackendError):  # it may still run after Ctrl-C
                driver.wait_for_stream(stream)
            if executable is not None:
                executable.close()
            network.close()

    @contextlib.contextmanager
    def _marks(self, count: int) -> Iterator[list[Handle]]:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._device.driver.event(timing=True)) for _ in range(count)]


def _captured(driver: Driver, network: DeviceNetwork, stream: int) -> Handle:
    with driver.capture(stream) as graphs:
        network.enqueue(stream)
    if not graphs:
        raise BackendError("the capture produced no graph")
    with graphs[0]:
        return driver.instantiate(graphs[0], "the network's graph")
