"""The whole chain on the device, by one of three executors that give the same bits.

``plain`` launches the engine and ``ddpmx_step`` S times from the host; ``graph`` captures the two once and launches that S
times; ``while`` makes them the body of a CUDA graph's WHILE node, so that a chain is one launch. The kernels count the
steps themselves, so what is launched is the same for every step, and the host has nothing to say while it runs. It looks
on, and may ask for an end, through :class:`ddpmx.cuda.Control` in pinned memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpmx import cuda
from ddpmx.chain import Step
from ddpmx.cuda import Chain, Control, Done
from ddpmx.cuda.driver import Driver, Handle
from ddpmx.errors import BackendError, Cancelled, InputError, NumericError
from ddpmx.noise import MAX_IMAGE, check_seed
from ddpmx.samplers import Table

Enqueue = Callable[[int], None]
"""Puts the network into a stream: reads x and t, writes out. Raises BackendError; waits for nothing."""

EXECUTORS = ("while", "graph", "plain")
"""In the order in which they are tried."""

LOOK_AHEAD = 8
"""Steps that ``plain`` and ``graph`` put into the stream ahead of the one that runs: enough that the device never waits
for the host, and what it does in vain after a stop."""

BLOCKS_PER_MULTIPROCESSOR = 4
"""As many as step.cu is compiled for; each thread then takes several fours."""

_LOOK_EVERY = 0.001  # seconds; what a chain's end is noticed late, once, and at which Ctrl-C is heard
_PROBE_STEPS, _PROBE_SECONDS = 3, 10.0


@dataclass(frozen=True)
class Choice:
    """Which executor it is, and why not another.

    Attributes:
        executor: one of :data:`EXECUTORS`.
        rejected: (executor, reason) of those that were tried before it.
    """

    executor: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """For people."""
        return "; ".join([self.executor, *(f"not {name}: {why}" for name, why in self.rejected)])


class Kernels:
    """The kernels of ``step.ptx``, and of ``while.ptx`` when asked for. One per driver; closing it is the driver's.

    Attributes:
        begin, step: the functions.

    Raises:
        BackendError: the driver does not compile them.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        with driver.current():
            module = driver.module(cuda.ptx("step"), "step.ptx")
            self.begin, self.step = (driver.function(module, name) for name in ("ddpmx_begin", "ddpmx_step"))
        self._condition: int | None = None
        self._why_no_while: str | None = None

    def condition(self) -> int:
        """``ddpmx_condition``.

        Raises:
            BackendError: the driver is older than CUDA 12.4 and does not know what it calls.
        """
        if self._condition is None:
            module = self._driver.module(cuda.ptx("while"), "while.ptx")
            self._condition = self._driver.function(module, "ddpmx_condition")
        return self._condition

    def why_no_while(self) -> str | None:
        """Why WHILE nodes do not work here, or None if they do: one of three steps was really run, once per driver.

        Version numbers do not tell: a driver may export the functions, and a platform still refuse the node.
        """
        if self._why_no_while is None:
            self._why_no_while = self._probe()
        return self._why_no_while or None

    def _probe(self) -> str:
        """The reason, or nothing. The body is the chain's own without an engine, on one pixel."""
        rows = np.tile(np.array([1, 0, 1, 0, 0], np.float64), (_PROBE_STEPS, 1))
        table = Table(np.arange(_PROBE_STEPS)[::-1].copy(), rows)
        try:
            with DeviceChain(self._driver, self, (1, 1, 1), 1, table) as chain:
                chain.prepare(lambda stream: None, "while", probe=False)
                chain.run(seed=0, images=[0], timeout=_PROBE_SECONDS)
        except BackendError as error:
            return ": ".join(filter(None, (error.fact, error.note)))
        return ""


class _Timeout(BackendError):  # noqa: N818 - inside this module only
    """The chain did not end in its time, and may never."""


class DeviceChain:
    """The memory of one chain on the device, for one batch size and one table, and what runs it again and again.

    Everything is allocated here and nothing later but the arrays that are returned. Bind the engine to ``x``, ``t`` and
    ``out``, give what enqueues it to :func:`choose_executor` or :meth:`prepare`, then :meth:`run`. A context manager.
    For one thread at a time; two chains of one driver may run in two threads.

    Args:
        driver: the GPU.
        kernels: loaded with that driver.
        shape: (C, H, W).
        batch: images at once. Fewer are filled up, so that the engine always sees this many.
        table: the sampler.
        clip: the largest |x̂_0|, or None.
        with_x0: keep x̂_0 of each step, for :meth:`steps`.
        description: of what computes the network, for messages.

    Attributes:
        x: address of x_t, float32 [batch, C, H, W]: the engine's input, and after a run the sample.
        t: address of the timesteps, int32 [batch]: its other input.
        out: address of its answer, float32 [batch, C, H, W].
        levels: address of the images, uint8 [batch, H, W, C].
        stream: the chain's stream.
        control: what the device says and may be asked; in pinned memory.
        choice: the executor, once there is one.

    Raises:
        BackendError: the memory does not suffice, or the driver refuses. Nothing stays allocated then.
        InputError: no such batch.
    """

    def __init__(
        self,
        driver: Driver,
        kernels: Kernels,
        shape: tuple[int, int, int],
        batch: int,
        table: Table,
        *,
        clip: float | None = 1.0,
        with_x0: bool = False,
        description: str = "",
    ) -> None:
        channels, height, width = shape
        elements = channels * height * width
        fours = batch * -(-elements // 4)
        if batch < 1 or len(table) < 1 or not 0 < fours < 1 << 31:
            raise InputError(f"{batch} images of {shape} in {len(table)} steps make no chain on a GPU")
        self._driver, self._kernels, self._description = driver, kernels, description
        self._shape, self._batch, self._table = shape, batch, table
        self._grid = min(-(-fours // cuda.THREADS), BLOCKS_PER_MULTIPROCESSOR * max(1, driver.multiprocessors))
        self._enqueue: Enqueue | None = None
        self._executable: Handle | None = None
        self.choice: Choice | None = None
        self._own: list[Handle] = []
        self._lost = False
        self.control = Control()
        self._images = np.zeros(batch, np.uint32)
        # of the host's memory nothing may go while a copy from it is under way
        self._rows = np.ascontiguousarray(table.rows, np.float32)
        self._timesteps = np.ascontiguousarray(table.timesteps, np.int32)
        try:
            with driver.current():
                self._allocate(batch * elements, with_x0)
                limit = math.inf if clip is None else clip
                self._chain = Chain(
                    x=self.x,
                    out=self.out,
                    t=self.t,
                    x0=self._x0,
                    levels=self.levels,
                    rows=self._memory(self._rows.nbytes, "the table"),
                    timesteps=self._memory(self._timesteps.nbytes, "the timesteps"),
                    images=self._memory(self._images.nbytes, "the images' indices"),
                    control=self._pinned.device,
                    B=batch,
                    channels=channels,
                    pixels=height * width,
                    S=len(table),
                    limit=limit,
                )
                self._at = self._memory(ctypes.sizeof(Chain), "the chain")
                driver.copy_in(self._chain.rows, self._rows, self.stream)
                driver.copy_in(self._chain.timesteps, self._timesteps, self.stream)
                driver.wait_for_stream(self.stream, "preparing the chain's memory")
        except BaseException:
            self.close()
            raise

    def _allocate(self, elements: int, with_x0: bool) -> None:
        driver = self._driver
        self._stream = self._keep(driver.stream())
        self.stream = self._stream.value
        self._pinned = driver.allocate_pinned(ctypes.sizeof(Control), "the control block")
        self._keep(self._pinned)
        self.control = Control.from_address(self._pinned.value)
        self._events = [self._keep(driver.event()) for _ in range(LOOK_AHEAD)]
        self.x = self._memory(4 * elements, "x")
        self.out = self._memory(4 * elements, "the network's answer")
        self.t = self._memory(4 * self._batch, "t")
        self._x0 = self._memory(4 * elements, "x0") if with_x0 else 0
        self.levels = self._memory(elements, "the images")

    def _keep(self, handle: Handle) -> Handle:
        self._own.append(handle)
        return handle

    def _memory(self, size: int, what: str) -> int:
        return self._keep(self._driver.allocate(size, what)).value

    def __enter__(self) -> DeviceChain:
        """The chain itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything, the engine's enqueue included, once the device has done with it. Again is harmless."""
        if self._lost:  # freeing would wait for the device as well, and for ever
            for handle in (*self._own, *filter(None, [self._executable])):
                handle.abandon()
        elif self._own:
            with contextlib.suppress(BackendError), self._driver.current():
                self._driver.wait_for_stream(self._own[0].value)
                self.control = Control.from_buffer_copy(self.control)  # it may still be read, its memory not
        self._drop_executable()
        self._enqueue = self.choice = None
        while self._own:
            self._own.pop().close()

    # --- which executor ----------------------------------------------------------------------------------------------

    def prepare(self, enqueue: Enqueue, executor: str, *, probe: bool = True) -> None:
        """Get ready to run the engine by one executor.

        The engine is run once: what it does at its first run only (it allocates, compiles and measures) must not be
        captured.

        Args:
            enqueue: puts the engine, bound to ``x``, ``t`` and ``out``, into a stream.
            executor: ``plain``, ``graph`` or ``while``.
            probe: see first, with a small chain, that WHILE nodes work here.

        Raises:
            BackendError: the engine or the driver refuses. The chain has no executor then, and another one may be tried.
            InputError: no such executor.
        """
        if executor not in EXECUTORS:
            raise InputError(f"there is no executor {executor!r}", hint=f"one of {', '.join(EXECUTORS)}")
        self._drop_executable()
        self._enqueue = self.choice = None
        driver = self._driver
        if executor == "while" and probe and (why := self._kernels.why_no_while()):
            raise BackendError("WHILE nodes do not work here", note=why, hint="--executor graph gives the same images")
        with self._stopping():
            # A chain that is stopped before it begins: x is noise and t a timestep, which is an index into the engine's
            # tables, and both kernels have run
            self._begin(0, self._batch, None, self.levels, stop=1)
            self._launch_step()
            enqueue(self.stream)
            driver.wait_for_stream(self.stream, "running the network for the first time")
            if executor == "graph":
                with driver.capture(self.stream) as graphs:
                    enqueue(self.stream)
                    self._launch_step()
                self._instantiate(graphs[0] if graphs else None, "the graph of a step")
            elif executor == "while":
                self._instantiate(self._while_graph(enqueue), "the WHILE node's graph")
        self._enqueue, self.choice = enqueue, Choice(executor)

    def _while_graph(self, enqueue: Enqueue) -> Handle:
        driver, condition = self._driver, self._kernels.condition()
        graph = driver.graph()
        try:
            handle, body = driver.add_while(graph)
            with driver.capture(self.stream, into=body):
                enqueue(self.stream)
                self._launch_step()
                driver.launch(condition, 1, 1, self.stream, (self._at, handle), "ddpmx_condition")
        except BaseException:
            graph.close()
            raise
        return graph

    def _instantiate(self, graph: Handle | None, what: str) -> None:
        if graph is None:
            raise BackendError("the capture of a step gave no graph")
        with graph:
            self._executable = self._driver.instantiate(graph, what)

    def _drop_executable(self) -> None:
        if self._executable is not None:
            self._executable.close()
            self._executable = None

    # --- a chain -----------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        seed: int,
        images: ArrayLike,
        x: NDArray[np.float32] | None = None,
        levels: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> NDArray[np.uint8] | None:
        """Run the whole chain.

        Args:
            seed: of the noise, 0…2⁶⁴−1.
            images: the index of each image, 1…batch of them.
            x: float32 [n, C, H, W], the state to begin with instead of x_T ~ N(0, I).
            levels: device address for the images, uint8 [batch, H, W, C]; nothing is copied to the host then.
            progress: called with (steps done, steps in all). The numbers rise and end with S; some may be left out.
            cancel: asked again and again until the chain is through; True ends it after the step that is under way.
            timeout: seconds after which the chain is given up.

        Returns:
            uint8 [n, H, W, C], or None with ``levels``.

        Raises:
            NumericError: the network's answer was not finite. It names step, t and executor.
            Cancelled: ``cancel`` said so, even if it was the last step that was under way.
            BackendError: the engine or the device failed.
            InputError: no such seed or images.
        """
        name, n = self._ready(), self._set_images(seed, images)
        driver = self._driver
        watch = _Watch(self.control, len(self._table), progress, cancel, timeout)
        with self._stopping():
            self._begin(seed, n, x, self.levels if levels is None else levels)
            if name == "while":
                self._run_whole(watch)
            else:
                self._run_steps(name, watch)
            driver.wait_for_stream(self.stream, f"running the chain by {name}")
            watch.look()
            self._judge(name, watch.cancelled)
            if levels is not None:
                return None
            channels, height, width = self._shape
            result = np.empty((n, height, width, channels), np.uint8)
            driver.copy_out(result, self.levels, self.stream)
            driver.wait_for_stream(self.stream, "fetching the images")
        return result

    def steps(self, *, seed: int, images: ArrayLike, x: NDArray[np.float32] | None = None) -> Iterator[Step]:
        """The chain step by step, as :func:`ddpmx.chain.run` gives it: by ``plain`` or ``graph``, and the device waits.

        The arrays are the chain's own: copy what must outlive the next step. To stop, stop asking.

        Args:
            seed, images, x: as for :meth:`run`.

        Yields:
            Each step, with arrays [n, C, H, W] on the host.

        Raises:
            As :meth:`run`. InputError also if the chain was made without ``with_x0``, or is to run by ``while``.
        """
        name, n = self._ready(), self._set_images(seed, images)
        if name == "while" or not self._x0:
            raise InputError("only a chain that keeps x0, by plain or graph, can be watched step by step")
        driver = self._driver
        now, x0, after = (np.empty((n, *self._shape), np.float32) for _ in range(3))
        with self._stopping():
            self._begin(seed, n, x, self.levels)
            driver.copy_out(now, self.x, self.stream)
            driver.wait_for_stream(self.stream, "beginning the chain")
        for index, t in enumerate(self._table.timesteps.tolist()):
            with self._stopping():  # not across the yield: the context is the caller's there
                self._launch_one(name)
                driver.copy_out(x0, self._x0, self.stream)
                driver.copy_out(after, self.x, self.stream)
                driver.wait_for_stream(self.stream, f"running the chain by {name}")
                if self.control.done != Done.RUNNING or index + 1 == len(self._table):
                    self._judge(name, False)
            yield Step(t, now, x0, after)
            now, after = after, now

    def _ready(self) -> str:
        if self.choice is None:
            raise BackendError("the chain has no engine", hint="choose_executor(chain, enqueue) gives it one")
        return self.choice.executor

    def _set_images(self, seed: int, images: ArrayLike) -> int:
        """How many there are. The last one fills up what the batch has left."""
        check_seed(seed)
        given = np.asarray(images)
        if (
            given.ndim != 1
            or not 1 <= len(given) <= self._batch
            or given.dtype.kind not in "iu"
            or given.min() < 0
            or given.max() > MAX_IMAGE
        ):
            raise InputError(
                f"1…{self._batch} images from 0 to 2**32 - 1 are needed, not {np.array2string(given)[:100]}"
            )
        self._images[: len(given)] = given
        self._images[len(given) :] = given[-1]
        return len(given)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Work on the device. Whatever goes wrong, Ctrl-C too, ends the chain and waits for that."""
        with self._driver.current():
            try:
                yield
            except _Timeout:  # waiting is what has failed
                self._lost = True
                raise
            except BaseException:
                self.control.stop = 1
                with contextlib.suppress(BackendError):
                    self._driver.wait_for_stream(self.stream)
                raise

    def _begin(self, seed: int, n: int, x: NDArray[np.float32] | None, levels: int, *, stop: int = 0) -> None:
        driver, chain, control = self._driver, self._chain, self.control
        chain.seed, chain.flags, chain.levels = seed, 0, levels
        if x is not None:
            if x.shape != (n, *self._shape):
                raise InputError(f"x must be {(n, *self._shape)}, not {x.shape}")
            filled = np.empty((self._batch, *self._shape), np.float32)
            filled[:n], filled[n:] = x, x[-1:]
            chain.flags = cuda.X_IS_GIVEN
            driver.copy_in(self.x, filled, self.stream)
            driver.wait_for_stream(self.stream, "copying x")
        control.stop, control.step, control.bad_step, control.done = stop, 0, -1, Done.RUNNING
        driver.copy_in(chain.images, self._images, self.stream)
        driver.copy_in(self._at, chain, self.stream)
        driver.launch(self._kernels.begin, self._grid, cuda.THREADS, self.stream, (self._at,), "ddpmx_begin")

    def _launch_step(self) -> None:
        step = self._kernels.step
        self._driver.launch(step, self._grid, cuda.THREADS, self.stream, (self._at,), "ddpmx_step")

    def _launch_one(self, name: str) -> None:
        """One step into the stream."""
        if name == "graph" and self._executable is not None:
            self._driver.launch_graph(self._executable, self.stream, "the graph of a step")
        elif self._enqueue is not None:
            self._enqueue(self.stream)
            self._launch_step()

    def _run_steps(self, name: str, watch: _Watch) -> None:
        driver, doing, total = self._driver, f"running the chain by {name}", len(self._table)
        launched = waited = 0
        while waited < launched or (launched < total and watch.goes_on()):
            # after an end what is in the stream is still waited for, and nothing is added
            if launched < total and launched - waited < LOOK_AHEAD and watch.goes_on():
                self._launch_one(name)
                driver.record(self._events[launched % LOOK_AHEAD], self.stream)
                launched += 1
            else:
                driver.wait_for(self._events[waited % LOOK_AHEAD], doing)
                waited += 1
            watch.look()

    def _run_whole(self, watch: _Watch) -> None:
        driver = self._driver
        if self._executable is not None:
            driver.launch_graph(self._executable, self.stream, "the WHILE node's graph")
        driver.record(self._events[0], self.stream)
        while not driver.has_come(self._events[0], "running the chain by while"):
            watch.look()
            time.sleep(_LOOK_EVERY)

    def _judge(self, name: str, cancelled: bool) -> None:
        """How the chain has ended."""
        control, total = self.control, len(self._table)
        done = control.done
        where = "; ".join(filter(None, (self._description, f"executor {name}")))
        if done == Done.NOT_FINITE:
            step = control.bad_step
            raise NumericError(
                f"the network's answer at t = {self._table.timesteps[step]} is not finite",
                note=f"step {step + 1} of {total}; {where}",
                hint="if the file is fp16, try fp32: an activation may exceed 65504",
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


class _Watch:
    """What the host does meanwhile: it tells about progress, and asks whether to go on."""

    def __init__(
        self,
        control: Control,
        total: int,
        progress: Callable[[int, int], None] | None,
        cancel: Callable[[], bool] | None,
        timeout: float | None,
    ) -> None:
        self._control, self._total = control, total
        self._progress, self._cancel = progress, cancel
        self._seen, self.cancelled = 0, False
        self._until = math.inf if timeout is None else time.monotonic() + timeout

    def goes_on(self) -> bool:
        """Whether more steps are wanted, as far as the host knows."""
        return not self.cancelled and self._control.done == Done.RUNNING

    def look(self) -> None:
        """Once in a while."""
        if self._cancel is not None and self.goes_on() and self._cancel():
            self.cancelled = True
            self._control.stop = 1
        step = self._control.step
        if step > self._seen:
            self._seen = step
            if self._progress is not None:
                self._progress(step, self._total)
        if time.monotonic() > self._until:
            raise _Timeout("the chain does not come to its end")


def choose_executor(chain: DeviceChain, enqueue: Enqueue, executor: str = "auto") -> Choice:
    """Give the chain its engine, and the fastest executor that works here with it.

    Args:
        chain: the chain; it is ready to run afterwards.
        enqueue: as for :meth:`DeviceChain.prepare`.
        executor: ``auto``, or one to insist on.

    Returns:
        Which one it is, and why those before it are not.

    Raises:
        BackendError: the one that was asked for does not work, or, of ``auto``, not even ``plain``.
        InputError: no such executor.
    """
    rejected: list[tuple[str, str]] = []
    for name in EXECUTORS if executor == "auto" else (executor,):
        try:
            chain.prepare(enqueue, name)
        except BackendError as error:
            if name == (EXECUTORS[-1] if executor == "auto" else executor):
                raise
            rejected.append((name, ": ".join(filter(None, (error.fact, error.note)))))
            continue
        break
    chain.choice = Choice(name, tuple(rejected))
    return chain.choice
