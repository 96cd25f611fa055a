"""The whole chain on the device, by one of three executors that give the same bits.

``plain`` launches the engine and ``ddpmx_step`` S times from the host; ``graph`` captures the two once and launches that S
times; ``while`` makes them the body of a CUDA graph's WHILE node, so that a chain is one launch. The kernels count the
steps themselves, so what is launched is the same for every step, and the host does not take part. It follows the chain,
and may stop it, through :class:`ddpmx.cuda.layout.Control` in pinned memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpmx.backends.base import EXECUTORS, NO_CONDITIONING
from ddpmx.cuda import layout
from ddpmx.cuda.kernels import Kernels
from ddpmx.cuda.layout import Chain, Control, Done
from ddpmx.cuda.watch import Timeout, Watch, judge
from ddpmx.device.driver import Driver, Handle
from ddpmx.diffusion.noise import MAX_IMAGE, check_seed
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ConditioningShapes
from ddpmx.sampling.chain import Step
from ddpmx.sampling.conditioning import check_conditioning
from ddpmx.sampling.guidance import Guidance

Enqueue = Callable[[int], None]
"""Enqueues the network into a stream: it reads its inputs and writes out. Raises BackendError; waits for nothing."""

LOOK_AHEAD = 8
"""Steps that ``plain`` and ``graph`` put into the stream ahead of the one that runs: enough that the device never waits
for the host. After a stop these steps are launched in vain."""

BLOCKS_PER_MULTIPROCESSOR = 4
"""As many as step.cu is compiled for; each thread then takes several fours."""

_POLL_EVERY = 0.001  # seconds: how late a chain's end, or Ctrl-C, is noticed


@dataclass(frozen=True)
class Choice:
    """The executor of a chain, and why not another.

    Attributes:
        executor: one of :data:`ddpmx.backends.base.EXECUTORS`.
        rejected: (executor, reason) of those that were tried before it.
    """

    executor: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """``graph; not while: …``."""
        return "; ".join([self.executor, *(f"not {name}: {why}" for name, why in self.rejected)])


class DeviceChain:
    """One chain's memory on the device, for one batch size and one table, which may run any number of times.

    Everything is allocated here, and nothing later but the arrays that are returned. Bind the engine to the addresses in
    :attr:`at` and :attr:`conditioning`, pass what enqueues it to :func:`ddpmx.cuda.executors.choose_executor` or
    :meth:`prepare`, then :meth:`run`. A context manager. Not thread-safe, but two chains of one driver may run in two
    threads.

    Args:
        driver: the GPU.
        kernels: loaded with that driver.
        shape: (C, H, W).
        batch: images at once. Fewer are filled up, so that the engine always sees this many.
        table: the sampler.
        clip: the largest |x̂_0|, or None.
        conditioning_shapes: the conditioning inputs: :attr:`ModelSpec.conditioning_shapes`.
        guidance: of a guided chain. The engine then has two rows for each image, see :attr:`rows`.
        with_x0: keep x̂_0 of each step, for :meth:`steps`.
        description: of what runs the network, for messages.
        stream: the stream to run in, if the network requires one; by default one of the chain's own.

    Attributes:
        rows: of the engine's batch: ``batch``, or guided twice that: first each image with its class, then each without.
        x: address of x_t, float32 [rows, C, H, W]: the engine's input, and after a run the sample.
        t: address of the timesteps, int32 [rows]: its other input.
        out: address of its output, float32 [rows, C, H, W].
        var: address of its output ``var``, float32 [rows, C, H, W]; 0 unless the table learns its variance.
        conditioning: the addresses of the engine's conditioning inputs, by name. ``x0_prev`` is where the chain keeps x̂_0:
            0 at its beginning, and then what each step writes there for the next.
        pixels: address of the images, uint8 [batch, H, W, C].
        stream: the chain's stream.
        control: the chain's progress, and the flag that stops it; in pinned memory.
        choice: the executor, once there is one.
        driver, kernels: as passed.
        lost: whether it was abandoned and may still be running. Nothing of it can be freed then.

    Raises:
        BackendError: the memory does not suffice, or the driver refuses. Nothing stays allocated then.
        InputError: an empty chain, or one whose elements exceed 32 bits.
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
        conditioning_shapes: ConditioningShapes = NO_CONDITIONING,
        guidance: Guidance | None = None,
        with_x0: bool = False,
        description: str = "",
        stream: int = 0,
    ) -> None:
        channels, height, width = shape
        elements = channels * height * width
        fours = batch * -(-elements // 4)
        self.rows, self._guidance = batch * (1 if guidance is None else 2), guidance
        if batch < 1 or len(table) < 1 or not 0 < self.rows * -(-elements // 4) < 1 << 31:
            raise InputError(f"{batch} images of {shape} in {len(table)} steps cannot run as a chain on a GPU")
        self.driver, self.kernels, self._description = driver, kernels, description
        self._shape, self._batch, self._table, self._conditioning_shapes = (
            shape,
            batch,
            table,
            dict(conditioning_shapes),
        )
        self._grid = min(-(-fours // layout.THREADS), BLOCKS_PER_MULTIPROCESSOR * max(1, driver.multiprocessors))
        self._enqueue: Enqueue | None = None
        self._executable: Handle | None = None
        self._graph: Handle | None = None
        self.choice: Choice | None = None
        self._own: list[Handle] = []
        self.lost = False
        self.control = Control()
        self.stream = stream
        try:
            with driver.current():
                kept = table.memory is not None or "x0_prev" in conditioning_shapes
                self._allocate(elements, with_x0 or kept, learned=table.learned is not None)
                self._chain = Chain(
                    x=self.x, out=self.out, var=self.var, t=self.t, x0=self._x0, image_bytes=self.pixels
                )
                self._chain.control = self._pinned.device
                if guidance is not None:
                    self._chain.guided, self._chain.guidance = 1, guidance.scale
                self._chain.B, self._chain.channels, self._chain.pixels = batch, channels, height * width
                self._chain.S, self._chain.limit = len(table), math.inf if clip is None else clip
                # the host's arrays must live until the copies from them are done
                self._images = np.zeros(batch, np.uint32)
                self._chain.images = self._memory(self._images.nbytes, "the images' indices")
                self._at = self._memory(ctypes.sizeof(Chain), "the chain")
                self._chain.rows, *rows = self._upload(np.ascontiguousarray(table.rows, np.float32), "the table")
                self._chain.timesteps, *t = self._upload(np.ascontiguousarray(table.timesteps, np.int32), "timesteps")
                learned: list[Any] = []
                if table.learned is not None:
                    coefficients = np.ascontiguousarray(table.learned, np.float32)
                    self._chain.learned, *learned = self._upload(coefficients, "the table of variances")
                memory: list[Any] = []
                if table.memory is not None:
                    coefficients = np.ascontiguousarray(table.memory, np.float32)
                    self._chain.memory, *memory = self._upload(coefficients, "the table of what is remembered")
                    self._chain.one_ago = self._memory(4 * batch * elements, "the last x0")
                    if coefficients[:, 1].any():
                        self._chain.two_ago = self._memory(4 * batch * elements, "the x0 before")
                driver.wait_for_stream(self.stream, "preparing the chain's memory")
                del rows, t, learned, memory
        except BaseException:
            self.close()
            raise

    def _allocate(self, image: int, with_x0: bool, *, learned: bool) -> None:
        driver, elements = self.driver, self.rows * image
        if not self.stream:
            self.stream = self._keep(driver.stream()).value
        self._pinned = driver.allocate_pinned(ctypes.sizeof(Control), "the control block")
        self._keep(self._pinned)
        self.control = Control.from_address(self._pinned.value)
        self._events = [self._keep(driver.event()) for _ in range(LOOK_AHEAD)]
        self.x = self._memory(4 * elements, "x")
        self.out = self._memory(4 * elements, "the network's output")
        self.var = self._memory(4 * elements, "its variance") if learned else 0
        self.t = self._memory(4 * self.rows, "t")
        self._x0 = self._memory(4 * elements, "x0") if with_x0 else 0
        self.conditioning: dict[str, int] = {}
        for name, dims in self._conditioning_shapes.items():
            size = 4 * self.rows * math.prod(dims)
            self.conditioning[name] = self._x0 if name == "x0_prev" else self._memory(size, name)
            # a class is an index into the engine's tables, so it must be a legal one before any run
            driver.zero(self.conditioning[name], size, self.stream)
        self.pixels = self._memory(self._batch * image, "the images")

    @property
    def at(self) -> dict[str, int]:
        """The addresses of the engine's ``x``, ``t``, ``out`` and ``var``."""
        return {"x": self.x, "t": self.t, "out": self.out, "var": self.var}

    def _keep(self, handle: Handle) -> Handle:
        self._own.append(handle)
        return handle

    def _memory(self, size: int, what: str) -> int:
        return self._keep(self.driver.allocate(size, what)).value

    def _upload(self, array: NDArray[Any], what: str) -> tuple[int, NDArray[Any]]:
        """(address, the array, to be kept until the stream was waited for)."""
        address = self._memory(array.nbytes, what)
        self.driver.copy_in(address, array, self.stream)
        return address, array

    def __enter__(self) -> DeviceChain:
        """The chain itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything, the engine's enqueue included, once the device is done with it. Safe to call again."""
        if self.lost:  # freeing would wait for the device, possibly for ever
            for handle in (*self._own, *filter(None, [self._executable, self._graph])):
                handle.abandon()
        elif self._own and self.settle():
            self.control = Control.from_buffer_copy(self.control)  # still readable after its memory is freed
        self._drop_executable()
        self._enqueue = self.choice = None
        while self._own:
            self._own.pop().close()

    def settle(self) -> bool:
        """Wait until the device is done with the chain. Before that its engine's memory must not be freed.

        Returns:
            Whether the wait succeeded.
        """
        if not self.lost:
            with contextlib.suppress(BackendError), self.driver.current():
                self.driver.wait_for_stream(self.stream)
                return True
        return False

    # --- executors ---------------------------------------------------------------------------------------------------

    def prepare(self, enqueue: Enqueue, executor: str, *, timeout: float = 120.0) -> None:
        """Prepare the chain to run an engine by one executor.

        The engine is run once first: what it does only at its first run (allocating, compiling, measuring) must not be
        captured. The captured step is then run once as well, and has to give the same bits as a plain launch.

        Args:
            enqueue: puts the engine, bound to ``x``, ``t``, ``out`` and ``var``, into a stream.
            executor: ``plain``, ``graph`` or ``while``.
            timeout: seconds after which the captured step is abandoned: a WHILE node may never end.

        Raises:
            BackendError: the engine or the driver refuses. The chain has no executor then, and another one may be tried.
            InputError: there is no such executor.
        """
        if executor not in EXECUTORS:
            raise InputError(f"there is no executor {executor!r}", hint=f"one of {', '.join(EXECUTORS)}")
        self._check_lost()
        self._drop_executable()
        self._enqueue = self.choice = None
        driver = self.driver
        try:
            with self._stopping():
                # A chain that is stopped before it begins: x is noise and t a timestep, which is an index into the
                # engine's tables, and both kernels have run
                self._begin(0, self._batch, None, stop=1)
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
                if self._executable is not None:
                    self._check_capture(enqueue, timeout)
        except BaseException:
            self._drop_executable()
            raise
        self._enqueue, self.choice = enqueue, Choice(executor)

    def _while_graph(self, enqueue: Enqueue) -> Handle:
        driver, condition = self.driver, self.kernels.condition()
        graph = driver.graph()
        try:
            handle, body = driver.add_while(graph)
            with driver.capture(self.stream, into=(graph, body)):
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
        self._graph = graph  # kept: a WHILE node's condition belongs to it
        self._executable = self.driver.instantiate(graph, what)

    def _drop_executable(self) -> None:
        for handle in (self._executable, self._graph):
            if handle is not None:
                handle.close()
        self._executable = self._graph = None

    def unprepare(self) -> bool:
        """Release the engine and what was captured of it, once the device is done with them.

        Returns:
            Whether that succeeded; if not, the engine's memory must stay as well.
        """
        settled = self.settle()
        if settled:
            self._drop_executable()
            self._enqueue = self.choice = None
        return settled

    def _check_lost(self) -> None:
        if self.lost:
            raise BackendError(
                "the chain was abandoned and may still be running", hint="end the process and start again"
            )

    def _check_capture(self, enqueue: Enqueue, timeout: float) -> None:
        """Compare the captured step with the plain one.

        A library may do part of its work while it enqueues: on the host, or in memory that it takes back. Capturing that
        succeeds, and replays old outputs.
        """

        def plain() -> None:
            enqueue(self.stream)
            self._launch_step()

        def captured() -> None:
            if self._executable is not None:
                self.driver.launch_graph(self._executable, self.stream, "the captured step")

        wanted, got = self._one_step(plain, timeout), self._one_step(captured, timeout)
        # a network whose output differs from run to run cannot be compared with anything
        if got != wanted and self._one_step(plain, timeout) == wanted:
            raise BackendError(
                "the captured step gives another output than the plain one",
                note=self._description or None,
                hint="--executor plain gives the right images",
            )

    def _one_step(self, launch: Callable[[], None], timeout: float) -> bytes:
        """The network's output at x_T, and the state after the first step, as bytes."""
        driver = self.driver
        out, x = (np.full((self.rows, *self._shape), np.nan, np.float32) for _ in range(2))
        self._begin(1, self._batch, None)  # other noise than it was captured with
        driver.copy_in(self.out, out, self.stream)  # NaN shows an output that is not written
        driver.wait_for_stream(self.stream, "beginning a step")
        self.control.stop = 1
        launch()
        driver.record(self._events[0], self.stream)
        until = time.monotonic() + timeout
        while not driver.has_come(self._events[0], "running a step"):
            if time.monotonic() > until:
                raise Timeout("the captured step did not finish in time")
            time.sleep(_POLL_EVERY / 10)
        driver.copy_out(out, self.out, self.stream)
        driver.copy_out(x, self.x, self.stream)
        driver.wait_for_stream(self.stream, "fetching a step")
        return out.tobytes() + x.tobytes()

    # --- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        seed: int,
        images: ArrayLike,
        x: NDArray[np.float32] | int | None = None,
        pixels: NDArray[np.uint8] | int | None = None,
        conditioning: Mapping[str, NDArray[Any] | int] = NO_CONDITIONING,
        after: Sequence[int] = (),
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        timeout: float | None = None,
        marks: Sequence[Handle] = (),
    ) -> NDArray[np.uint8] | None:
        """Run the whole chain, and wait for its end.

        Args:
            seed: of the noise, 0…2⁶⁴−1.
            images: the index of each image, 1…batch of them.
            x: float32 [n, C, H, W], the state to begin with instead of x_T ~ N(0, I), or its device address.
            pixels: uint8 [n, H, W, C] for the images, or its device address. By default a new array.
            conditioning: of each image: ``y`` int32 [n], ``cond`` float32 [n, K, H, W], or the device address of such an
                array.
            after: streams whose work so far has to finish before the arrays are read or ``pixels`` is written.
            progress: called with (steps done, steps in all). The numbers rise and end with S; some may be left out.
            cancel: polled until the chain ends; True stops it after the step that is running.
            timeout: seconds after which the chain is abandoned.
            marks: S + 1 events with timing: one is recorded when the first step begins, then one after each step. By
                ``while`` only the first and the last.

        Returns:
            uint8 [n, H, W, C], or None if ``pixels`` is an address.

        Raises:
            NumericError: the network's output was not finite. It names step, t and executor.
            Cancelled: ``cancel`` returned True, even if the last step was running by then.
            BackendError: the engine or the device failed.
            InputError: an invalid seed, image index or array.
        """
        name, n = self._ready(), self._set_images(seed, images)
        check_conditioning(self._conditioning_shapes, conditioning, n)
        driver, size = self.driver, n * math.prod(self._shape)
        channels, height, width = self._shape
        result = pixels if pixels is not None else np.empty((n, height, width, channels), np.uint8)
        if isinstance(result, np.ndarray) and (
            result.shape != (n, height, width, channels) or result.dtype != np.uint8 or not result.flags.c_contiguous
        ):
            raise InputError(f"the images need uint8 {[n, height, width, channels]}, not {result.dtype} {result.shape}")
        watch = Watch(self.control, len(self._table), progress, cancel, timeout, aside=driver.aside)
        with self._stopping():
            for other in after:
                driver.follow(self.stream, other)
            self._set_conditioning(n, conditioning)
            self._begin(seed, n, x)
            if name == "while":
                self._run_whole(watch, marks)
            else:
                self._run_steps(name, watch, marks)
            driver.wait_for_stream(self.stream, f"running the chain by {name}")
            watch.poll()
            judge(self.control, self._table, self._where(name), cancelled=watch.cancelled, own_x=x is not None)
            if isinstance(result, np.ndarray):
                driver.copy_out(result, self.pixels, self.stream)
            elif result != self.pixels:
                driver.copy(result, self.pixels, size, self.stream)
            driver.wait_for_stream(self.stream, "fetching the images")
        return result if isinstance(result, np.ndarray) else None

    def steps(
        self,
        *,
        seed: int,
        images: ArrayLike,
        x: NDArray[np.float32] | int | None = None,
        conditioning: Mapping[str, NDArray[Any] | int] = NO_CONDITIONING,
        after: Sequence[int] = (),
    ) -> Generator[Step, None, None]:
        """The chain step by step, as :func:`ddpmx.sampling.chain.run` gives it.

        By ``plain`` or ``graph``; the device waits between steps. The arrays belong to the chain: copy what must outlive
        the next step. To stop early, close the generator.

        Args:
            seed, images, x, conditioning, after: as for :meth:`run`.

        Yields:
            Each step, with arrays [n, C, H, W] on the host.

        Raises:
            As :meth:`run`. InputError also if the chain was made without ``with_x0``, or runs by ``while``.
        """
        name, n = self._ready(), self._set_images(seed, images)
        if name == "while" or not self._x0:
            raise InputError("only a chain with x0, by plain or graph, runs step by step")
        check_conditioning(self._conditioning_shapes, conditioning, n)
        driver = self.driver
        now, x0, following = (np.empty((n, *self._shape), np.float32) for _ in range(3))
        with self._stopping():
            for other in after:
                driver.follow(self.stream, other)
            self._set_conditioning(n, conditioning)
            self._begin(seed, n, x)
            driver.copy_out(now, self.x, self.stream)
            driver.wait_for_stream(self.stream, "beginning the chain")
        for index, t in enumerate(self._table.timesteps.tolist()):
            self._ready()
            with self._stopping():  # not across the yield: the context is the caller's there
                self._launch_one(name)
                driver.copy_out(x0, self._x0, self.stream)
                driver.copy_out(following, self.x, self.stream)
                driver.wait_for_stream(self.stream, f"running the chain by {name}")
                if self.control.done != Done.RUNNING or index + 1 == len(self._table):
                    judge(self.control, self._table, self._where(name), own_x=x is not None)
            yield Step(t, now, x0, following)
            now, following = following, now

    def _where(self, name: str) -> str:
        return "; ".join(filter(None, (self._description, f"executor {name}")))

    def _ready(self) -> str:
        self._check_lost()
        if self.choice is None:
            raise BackendError("the chain has no engine", hint="choose_executor(chain, enqueue) gives it one")
        return self.choice.executor

    def _set_images(self, seed: int, images: ArrayLike) -> int:
        """Write the images' indices, the last one repeated up to the batch size. Returns how many there are."""
        check_seed(seed)
        indices = np.asarray(images)
        if (
            indices.ndim != 1
            or not 1 <= len(indices) <= self._batch
            or indices.dtype.kind not in "iu"
            or indices.min() < 0
            or indices.max() > MAX_IMAGE
        ):
            raise InputError(
                f"1…{self._batch} images from 0 to 2**32 - 1 are needed, not {np.array2string(indices)[:100]}"
            )
        self._images[: len(indices)] = indices
        self._images[len(indices) :] = indices[-1]
        return len(indices)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Work on the device. Any error, Ctrl-C included, stops the chain and waits for its end."""
        with self.driver.current():
            try:
                yield
            except Timeout:  # waiting has failed already
                self.lost = True
                raise
            except BaseException:
                self.control.stop = 1
                with contextlib.suppress(BackendError):
                    self.driver.wait_for_stream(self.stream)
                raise

    def _begin(self, seed: int, n: int, x: NDArray[np.float32] | int | None, *, stop: int = 0) -> None:
        driver, chain, control = self.driver, self._chain, self.control
        chain.seed, chain.flags = seed, 0 if x is None else layout.KEEP_X
        if x is not None:
            self._fill(self.x, n, x, self._shape, "x")
        if "x0_prev" in self._conditioning_shapes:
            driver.zero(self._x0, 4 * self.rows * math.prod(self._shape), self.stream)
        control.stop, control.step, control.bad_step, control.done = stop, 0, -1, Done.RUNNING
        driver.copy_in(chain.images, self._images, self.stream)
        driver.copy_in(self._at, chain, self.stream)
        driver.launch(self.kernels.begin, self._grid, layout.THREADS, self.stream, (self._at,), "ddpmx_begin")

    def _set_conditioning(self, n: int, conditioning: Mapping[str, NDArray[Any] | int]) -> None:
        """Copy the conditioning of the images. It stays in place through the chain."""
        for name, array in conditioning.items():
            self._fill(self.conditioning[name], n, array, self._conditioning_shapes[name], name)

    def _fill(self, to: int, n: int, source: NDArray[Any] | int, dims: tuple[int, ...], what: str) -> None:
        """Copy ``n`` images' numbers, of four bytes each; the last image is repeated up to the batch size.

        Guided, the rows without a class get the same, and for the class the label of none.
        """
        driver, image = self.driver, 4 * math.prod(dims)
        if isinstance(source, int):
            for begin in range(0, self.rows, self._batch):
                driver.copy(to + begin * image, source, n * image, self.stream)
                for left in range(begin + n, begin + self._batch):
                    driver.copy(to + left * image, source + (n - 1) * image, image, self.stream)
            return
        if source.shape != (n, *dims):
            raise InputError(f"{what} must be {(n, *dims)}, not {source.shape}")
        filled = np.empty((self.rows, *dims), np.float32 if what == "x" else source.dtype)
        filled[:n], filled[n : self._batch] = source, source[-1:]
        if self._guidance is not None:
            filled[self._batch :] = self._guidance.null if what == "y" else filled[: self._batch]
        driver.copy_in(to, filled, self.stream)
        driver.wait_for_stream(self.stream, f"copying {what}")

    def _launch_step(self) -> None:
        step = self.kernels.step
        self.driver.launch(step, self._grid, layout.THREADS, self.stream, (self._at,), "ddpmx_step")

    def _launch_one(self, name: str) -> None:
        """Put one step into the stream."""
        if name == "graph" and self._executable is not None:
            self.driver.launch_graph(self._executable, self.stream, "the graph of a step")
        elif self._enqueue is not None:
            self._enqueue(self.stream)
            self._launch_step()

    def _run_steps(self, name: str, watch: Watch, marks: Sequence[Handle]) -> None:
        driver, doing, total = self.driver, f"running the chain by {name}", len(self._table)
        if marks:
            driver.record(marks[0], self.stream)
        launched = waited = 0
        while waited < launched or (launched < total and watch.goes_on()):
            # after the chain's end the rest of the stream is waited for, and nothing is added
            if launched < total and launched - waited < LOOK_AHEAD and watch.goes_on():
                self._launch_one(name)
                driver.record(self._events[launched % LOOK_AHEAD], self.stream)
                launched += 1
                if marks:
                    driver.record(marks[launched], self.stream)
            else:
                driver.wait_for(self._events[waited % LOOK_AHEAD], doing)
                waited += 1
            watch.poll()

    def _run_whole(self, watch: Watch, marks: Sequence[Handle]) -> None:
        driver = self.driver
        if marks:
            driver.record(marks[0], self.stream)
        if self._executable is not None:
            driver.launch_graph(self._executable, self.stream, "the WHILE node's graph")
        if marks:
            driver.record(marks[-1], self.stream)
        driver.record(self._events[0], self.stream)
        while not driver.has_come(self._events[0], "running the chain by while"):
            watch.poll()
            time.sleep(_POLL_EVERY)
