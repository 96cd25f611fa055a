"""load(path) → Pipeline: the public face of the runtime."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpmx.arrays.protocols import AnyArray, CudaStream, Labels, Target
from ddpmx.arrays.views import View, expect, overlap, stream_handle, view
from ddpmx.backends.base import EXECUTORS, Backend, CopyingBackend
from ddpmx.backends.open import OpenOptions, is_half, open_model
from ddpmx.diffusion.samplers import Table
from ddpmx.errors import Cancelled, FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec, Precision
from ddpmx.models import shipped
from ddpmx.sampling import request as requests
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.evaluation import Call, Evaluation, Outputs, evaluated, timesteps
from ddpmx.sampling.guidance import guided, guided_batches
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.request import Conditioning, Images, Request, Sampling, SamplingOptions
from ddpmx.sampling.runner import HostRunner, Job, Runner, fitting_batch, rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ddpmx.arrays.device_array import DeviceArray


class GenerateOptions(SamplingOptions, total=False):
    """The keywords of :meth:`Pipeline.generate` that do not decide what it returns."""

    seed: int
    first: int
    batch: int | None
    labels: Labels | None
    cond: AnyArray | None
    guidance: float
    x: AnyArray | None
    stream: CudaStream | None
    progress: Callable[[int, int], None] | None
    cancel: Callable[[], bool] | None
    preview: Callable[[int, Preview], None] | None
    sampling: Sampling | None
    conditioning: Conditioning | None


class Pipeline:
    """A model file, ready to run. A context manager. For one thread; :meth:`share` makes one for another.

    Attributes:
        spec: the model.
        arithmetic: the precision in which its network computes: the spec's, or fp32 where that was asked for. What fp16
            means then is the backend's: ONNX Runtime's CPU computes it in half on some processors alone.
    """

    def __init__(self, spec: ModelSpec, backend: Backend, *, executor: str = "auto") -> None:
        self.spec = spec
        self.arithmetic: Precision = spec.precision
        self._widened: Callable[[], Pipeline | None] | None = None
        if executor not in ("auto", *EXECUTORS):
            raise InputError(f"there is no executor {executor!r}", hint=f"auto, {', '.join(EXECUTORS)}")
        self._runner: Runner
        if isinstance(backend, CopyingBackend):
            from ddpmx.cuda.device_runner import DeviceRunner

            self._runner = DeviceRunner(backend, spec, executor)
        elif executor != "auto":
            raise InputError(f"executor {executor!r} runs a chain on a GPU, and {backend.description} does not")
        else:
            self._runner = HostRunner(backend, spec)
        self._schedule = spec.make_schedule()
        self._begin()

    def _begin(self) -> None:
        self._closed = self._busy = False
        self._turn = 0
        # who forgets to close it gets the memory back when nobody needs it
        self._closing = weakref.finalize(self, self._runner.close)
        self._closing.atexit = False

    @property
    def backend(self) -> str:
        """What computes the network: library, version and device; on a GPU, after a chain, the executor too."""
        return self._runner.description

    @property
    def default_batch(self) -> int:
        """How many images run at once by default: 1…16, fewer if they are large. It depends on the file alone."""
        return fitting_batch(self._runner.batches, requests.default_batch(self.spec))

    def __enter__(self) -> Pipeline:
        """The pipeline itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything that is not shared with others. The pipeline cannot be used afterwards.

        Raises:
            InputError: it is running a chain: this was called from one of its callbacks, or from another thread.
        """
        if self._busy:
            raise InputError("the pipeline is running a chain", hint="close it afterwards; cancel ends a chain")
        self._closed = True
        self._closing()

    def share(self) -> Pipeline:
        """Another pipeline on the same open file, for another thread. The weights are in memory once.

        Each has to be closed; the file is closed with the last. All give the same images.

        Raises:
            InputError: this one is closed.
            BackendError: the library runs in one thread only, or there is not enough memory.
        """
        self._check_open()
        other = object.__new__(Pipeline)
        other.spec, other._schedule, other._runner = self.spec, self._schedule, self._runner.share()
        other.arithmetic, other._widened = self.arithmetic, self._widened
        other._begin()
        return other

    @contextmanager
    def in_float32(self) -> Iterator[Pipeline]:
        """The same model computed in float32, and so alike on every processor: for what has to be the same everywhere.

        An ONNX file or an MNN model in half precision is opened once more (:mod:`ddpmx.formats.widen`), and closed at the
        end. What is in float32 already is this pipeline itself, and so is a plan, which computes as it was built.

        Raises:
            InputError: the pipeline is closed.
            FileFormatError: the file is another one now, or cannot be computed in float32.
            BackendError: as for :func:`load`.
        """
        self._check_open()
        wide = None if self._widened is None else self._widened()
        if wide is None:
            yield self
            return
        with wide:
            yield wide

    def table(self, sampling: Sampling | None = None, **options: Unpack[SamplingOptions]) -> Table:
        """The sampler as a table of coefficients, see :func:`ddpmx.diffusion.samplers.make_table`.

        Args:
            sampling: how the chain is run; or its fields as keywords.
            **options: the fields of :class:`Sampling`.

        Raises:
            InputError: as there, and for a learned variance that the network does not give.
        """
        return requests.merge_sampling(sampling, options).table(self.spec, self._schedule)

    def check_request(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        labels: Labels | None = None,
        guidance: float = 1.0,
        sampling: Sampling | None = None,
        conditioning: Conditioning | None = None,
        **options: Unpack[SamplingOptions],
    ) -> int:
        """Check the arguments of :meth:`generate`, before anything is prepared for them.

        ``labels`` are checked if they are passed; that they are missing is found by :meth:`generate`.

        Returns:
            ``batch``, or its default; or another one, if that is all that a plan takes.

        Raises:
            InputError: one is out of its range, the images would not fit into memory, or the pipeline is closed.
            SpecError: the schedule does not go with this sampler.
        """
        sampling = requests.merge_sampling(sampling, options)
        conditioning = requests.merge_conditioning(conditioning, labels, None, guidance)
        return self._request(n, seed, first, batch, sampling, conditioning).batch

    def _request(
        self, n: int, seed: int, first: int, batch: int | None, sampling: Sampling, conditioning: Conditioning
    ) -> Request:
        self._check_open()
        return requests.check_request(
            self.spec,
            n,
            seed=seed,
            first=first,
            batch=batch,
            sampling=sampling,
            labels=conditioning.labels,
            guidance=conditioning.guidance,
            ranges=self._runner.batches,
            schedule=self._schedule,
        )

    @overload
    def generate(
        self, n: int, *, out: None = ..., on_device: Literal[False] = ..., **options: Unpack[GenerateOptions]
    ) -> NDArray[np.uint8]: ...

    @overload
    def generate(
        self, n: int, *, out: None = ..., on_device: Literal[True], **options: Unpack[GenerateOptions]
    ) -> DeviceArray: ...

    @overload
    def generate(
        self, n: int, *, out: Target, on_device: Literal[False] = ..., **options: Unpack[GenerateOptions]
    ) -> Target: ...

    def generate(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        labels: Labels | None = None,
        cond: AnyArray | None = None,
        guidance: float = 1.0,
        x: AnyArray | None = None,
        out: AnyArray | None = None,
        on_device: bool = False,
        stream: CudaStream | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        preview: Callable[[int, Preview], None] | None = None,
        sampling: Sampling | None = None,
        conditioning: Conditioning | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AnyArray:
        """Draw images. Image i of a seed is the same whatever else is drawn with it.

        Arrays may be anyone's: what speaks DLPack or ``__cuda_array_interface__`` (torch, cupy, numba, …) is read and
        written where it is, on the host or, if the chain runs there, on the GPU.

        Args:
            n: how many, at least 1.
            seed: 0…2⁶⁴−1.
            first: the index of the first one: ``generate(8)`` equals ``generate(4)`` and ``generate(4, first=4)``.
            batch: how many run at once, at most; by default :attr:`default_batch`. A plan may take fewer. Where the
                device's arithmetic depends on the batch, an image does so by its last bits, but never on ``n``,
                ``first`` or its neighbours.
            labels: the class of each image, whole numbers [n], or one for all; on the host. For models that have classes.
                Without them a model that knows "no class" draws images of none.
            cond: float32 [n, K, H, W], the condition of each image. For models that have one.
            guidance: w of classifier-free guidance (Ho & Salimans 2022), for models that know "no class":
                out_∅ + w·(out_y − out_∅), with two rows of the network's batch for each image. 1 is none, 0 the network
                without classes.
            x: float32 [n, C, H, W], states to begin with, at the table's first timestep; by default x_T ~ N(0, I). With
                ``start`` x_t at that t: the rest of the chain is then a denoiser. For a network that conditions on
                itself, x̂_0 is 0 at its first step, wherever that is.
            out: uint8 [n, H, W, C], C-contiguous, where the images go.
            on_device: leave them on the GPU.
            stream: the CUDA stream in which ``x`` and ``cond`` were, or are being, written and ``out`` last used: a number,
                or an object with ``__cuda_stream__`` or ``cuda_stream``. What is in it by now is waited for, on the
                device. When :meth:`generate` returns, everything is done.
            progress: called repeatedly with (steps done, steps in all) over all batches.
            cancel: called repeatedly; True stops the chain.
            preview: called after each step with the position in the result of the batch's first image, and the state, in
                arrays of its own. On a GPU the device then waits for the host in every step.
            sampling: how the chain is run; or its fields as keywords.
            conditioning: labels and condition in one; or as keywords.
            **options: the fields of :class:`Sampling`: ``steps=50, sampler="ddim"``.

        Returns:
            uint8 [n, H, W, C]: ``out``, or a :class:`ddpmx.arrays.device_array.DeviceArray` with ``on_device``, or else a
            NumPy array.

        Raises:
            InputError: a number out of its range, an array that does not fit, or the pipeline is already running a chain.
            Cancelled: ``cancel`` returned True. What ``out`` holds then is undefined, as after every error.
            NumericError: the network's output was not finite.
            BackendError: the network could not be run.
        """
        channels, height, width = shape = self.spec.shape
        conditioning = requests.merge_conditioning(conditioning, labels, cond, guidance)
        request = self._request(n, seed, first, batch, requests.merge_sampling(sampling, options), conditioning)
        n, batch, table = request.n, request.batch, request.table
        if x is None and request.sampling.start is not None:
            raise InputError(
                f"missing x: a chain that starts at t = {request.sampling.start} needs its states there",
                note="only x_T can be drawn without the network",
                hint=f"x: float32 [{n}, {channels}, {height}, {width}], x_t at that t",
            )
        if on_device and out is not None:
            raise InputError("on_device allocates the array for the images, but out was passed too")
        total, size = -(-n // batch) * len(table), channels * height * width
        with ExitStack() as stack:
            stack.enter_context(self._work())
            after = [] if stream is None else [stream_handle(stream)]
            start = None if x is None else self._take(stack, x, (n, *shape), np.float32, "x", after)
            inputs, shapes = self._inputs(stack, request, conditioning, after), self.spec.conditioning_shapes
            result: AnyArray
            target: NDArray[Any] | int
            if out is not None:
                result = out
                target = self._take(stack, out, (n, height, width, channels), np.uint8, "out", after, writable=True)
            elif on_device:
                result = array = self._runner.array((n, height, width, channels))
                target = array.address
            else:
                result = target = np.empty((n, height, width, channels), np.uint8)
            if start is not None and out is not None and overlap(start, 4 * n * size, target, n * size):
                raise InputError("x and out share memory", hint="pass another array as out")
            if preview is not None and isinstance(target, int):
                raise InputError(
                    "preview needs the images in host memory", hint="leave on_device out, or pass an out there"
                )
            for number, (at, indices) in enumerate(request.batches()):
                part, done = slice(at, at + len(indices)), number * len(table)
                job = Job(
                    table,
                    request.seed,
                    indices,
                    batch,
                    progress=_after(progress, done, total),
                    cancel=cancel,
                    after=tuple(after) if number == 0 else (),
                    conditioning={name: rows(array, part, shapes[name]) for name, array in inputs.items()},
                    guidance=guided(self.spec, request.guidance),
                )
                begin = start + 4 * size * at if isinstance(start, int) else None if start is None else start[part]
                pixels = target + size * at if isinstance(target, int) else target[part]
                if preview is None or isinstance(pixels, int):
                    self._runner.run(job, x=begin, pixels=pixels)
                else:
                    self._run_watched(job, begin, pixels, partial(preview, at))
        return result

    def stream(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        labels: Labels | None = None,
        cond: AnyArray | None = None,
        guidance: float = 1.0,
        sampling: Sampling | None = None,
        conditioning: Conditioning | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Preview]:
        """Watch ``n`` images come into being together: a :class:`Preview` for every step. Break off to cancel.

        The arrays are copies. The last preview's ``x0`` are the images that :meth:`generate` gives with this ``batch``,
        or, if that is less than ``n``, with ``n``. The arguments are those of :meth:`generate`.

        Raises:
            As :meth:`generate`, and InputError for a ``start``: what is watched here begins with noise.
        """
        sampling = requests.merge_sampling(sampling, options)
        conditioning = requests.merge_conditioning(conditioning, labels, cond, guidance)
        if sampling.start is not None:
            raise InputError(
                f"stream begins with x_T, not at t = {sampling.start}",
                hint="generate(…, x=…, start=…, preview=…) shows a chain from your own states",
            )
        request = self._request(n, seed, first, batch, sampling, conditioning)
        batch, twice = max(request.n, request.batch), guided(self.spec, request.guidance)
        requests.check_batch(self.spec, batch, guided=twice is not None)
        ranges = self._runner.batches if twice is None else guided_batches(self._runner.batches)
        if batch > (largest := fitting_batch(ranges, batch)):
            raise InputError(f"{n} images cannot be streamed together", note=f"the plan takes at most {largest}")
        ((_, indices),) = request.batches(batch)
        with ExitStack() as stack:
            after: list[int] = []
            inputs = self._inputs(stack, request, conditioning, after)
            job = Job(
                request.table,
                request.seed,
                indices,
                batch,
                after=tuple(after),
                conditioning=inputs,
                guidance=twice,
            )
            with self._work():
                turn = self._turn
                steps = self._runner.steps(job, x=None)
            stack.enter_context(closing(steps))
            for _ in range(len(request.table)):
                self._check_open()
                if turn != self._turn:
                    raise InputError(
                        "another chain was started in this pipeline, which ended this one",
                        hint="run it in a pipeline of its own: pipeline.share()",
                    )
                with self._work(again=True):
                    step = next(steps)
                    seen = Preview(step.t, step.x.copy(), step.x0.copy())
                yield seen

    def evaluate(
        self,
        x: AnyArray,
        t: int | Sequence[int] | NDArray[np.integer[Any]],
        *,
        first: int = 0,
        batch: int | None = None,
        labels: Labels | None = None,
        cond: AnyArray | None = None,
        guidance: float = 1.0,
        x0_prev: AnyArray | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        conditioning: Conditioning | None = None,
    ) -> Evaluation:
        """Run the network alone: what it says of states x_t at t. Tasks that are no chain are made of this.

        An image's result does not depend on what else is evaluated with it, as in :meth:`generate`. A stream that is
        open ends.

        Args:
            x: float32 [n, C, H, W], x_t, on the host.
            t: 0…T−1, one for all images, or one for each.
            first: the index of the first image; it matters where an image's bits depend on its place in a batch (MNN).
            batch: how many run at once, at most; by default :attr:`default_batch`.
            labels, cond, guidance, conditioning: as for :meth:`generate`; ``cond`` on the host.
            x0_prev: float32 [n, C, H, W], x̂_0 of the step before, for a network that conditions on itself; 0 by default,
                as in a chain's first step.
            progress: called repeatedly with (images done, images in all).
            cancel: called before each batch; True stops the work.

        Returns:
            x̂_0, ε and the network's outputs, see :class:`ddpmx.sampling.evaluation.Evaluation`.

        Raises:
            InputError: a number out of its range, an array that does not fit, or the pipeline is running a chain.
            Cancelled: ``cancel`` returned True.
            NumericError: the network's output was not finite.
            BackendError: the network could not be run.
        """
        self._check_open()
        conditioning = requests.merge_conditioning(conditioning, labels, cond, guidance)
        with ExitStack() as stack:
            stack.enter_context(self._work())
            states = self._on_host(stack, x, None, "x")
            n = len(states)
            images = requests.check_images(
                self.spec,
                n,
                first=first,
                batch=batch,
                labels=conditioning.labels,
                guidance=conditioning.guidance,
                ranges=self._runner.batches,
            )
            at = timesteps(t, n, self.spec.timesteps)
            inputs: dict[str, NDArray[Any]] = {}
            for name, array in self._inputs(stack, images, conditioning, []).items():
                if isinstance(array, int):
                    raise _on_gpu(name)
                inputs[name] = array
            if x0_prev is not None:
                if not self.spec.self_condition:
                    raise InputError("the model does not condition on itself, but x0_prev was passed")
                inputs["x0_prev"] = self._on_host(stack, x0_prev, n, "x0_prev")
            call = Call(
                states, at, np.arange(first, first + n), images.batch, inputs, guided(self.spec, images.guidance)
            )
            parts = []
            for start in range(0, n, images.batch):
                if cancel is not None and cancel():
                    raise Cancelled("cancelled before the network had run for all images")
                parts.append(self._runner.evaluate(call.rows(slice(start, start + images.batch))))
                if progress is not None:
                    progress(min(start + images.batch, n), n)
            out = np.concatenate([part.out for part in parts])
            var = [part.var for part in parts if part.var is not None]
            return evaluated(self.spec, self._schedule, states, at, Outputs(out, np.concatenate(var) if var else None))

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _work(self, *, again: bool = False) -> Iterator[None]:
        """One chain at a time, since all use the same buffers. A new chain, unless ``again``, ends a stream."""
        if self._busy:
            raise InputError(
                "the pipeline is already running a chain",
                hint="pipeline.share() gives another thread or a callback one of its own",
            )
        self._busy = True
        self._turn += not again
        try:
            yield
        finally:
            self._busy = False

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the pipeline is closed", hint="load the file again")

    def _run_watched(
        self,
        job: Job,
        x: NDArray[np.float32] | int | None,
        pixels: NDArray[np.uint8],
        preview: Callable[[Preview], None],
    ) -> None:
        """Run a chain with a preview after every step."""
        with closing(self._runner.steps(job, x=x)) as steps:
            for done in range(len(job.table)):
                if job.cancel is not None and job.cancel():
                    raise Cancelled("cancelled before the chain finished")
                step = next(steps)
                if done + 1 == len(job.table):
                    pixels[...] = to_nhwc(step.x0)
                preview(Preview(step.t, step.x.copy(), step.x0.copy()))
                if job.progress is not None:
                    job.progress(done + 1, len(job.table))

    def _inputs(
        self, stack: ExitStack, request: Request | Images, conditioning: Conditioning, after: list[int]
    ) -> Mapping[str, NDArray[Any] | int]:
        """The network's inputs for the images beside x and t. Without guidance to a class there is no class."""
        found: dict[str, NDArray[Any] | int] = {}
        n, labels = request.n, request.labels if request.guidance != 0 else None
        if labels is not None:
            found["y"] = labels
        elif self.spec.classes is not None:
            found["y"] = class_labels(self.spec, n, None)
        dims = self.spec.conditioning_shapes.get("cond")
        if dims is None and conditioning.cond is not None:
            raise InputError("the model takes no condition, but cond was passed")
        if dims is not None:
            if conditioning.cond is None:
                raise InputError(
                    "missing cond: the model takes a condition image",
                    hint=f"cond: float32 [{n}, {', '.join(map(str, dims))}]",
                )
            found["cond"] = self._take(stack, conditioning.cond, (n, *dims), np.float32, "cond", after)
        return found

    def _on_host(self, stack: ExitStack, thing: AnyArray, n: int | None, what: str) -> NDArray[np.float32]:
        """The caller's float32 [n, C, H, W], which has to be on the host; n is its own where it is None."""
        seen: View = stack.enter_context(view(thing))
        if seen.on_device:
            raise _on_gpu(what)
        n = n if n is not None else seen.shape[0] if seen.shape else 0
        expect(seen, (n, *self.spec.shape), np.float32, what)
        return _finite(seen.numpy(), what)

    def _take(
        self,
        stack: ExitStack,
        thing: AnyArray,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        what: str,
        after: list[int],
        *,
        writable: bool = False,
    ) -> NDArray[Any] | int:
        """The caller's array: as NumPy's if it is on the host, as an address if it is where the chain runs."""
        seen: View = stack.enter_context(view(thing, writable=writable))
        driver = self._runner.driver
        if seen.on_device and driver is None:
            raise InputError(
                f"{what} is in GPU memory, but the chain runs on the CPU", hint="copy it to the host first"
            )
        expect(seen, shape, dtype, what, driver=driver)
        if not seen.on_device:
            return _finite(seen.numpy(), what)
        if seen.wait_for is not None:
            after.append(seen.wait_for)
        return seen.address


def load(
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    providers: Sequence[str] = ("cpu",),
    fallback: bool = False,
    threads: int = 0,
    executor: str = "auto",
    trust_host_code: bool = False,
    cache: str | os.PathLike[str] | None = None,
    widen: bool = False,
) -> Pipeline:
    """Open a model file.

    Args:
        path: the name of a model that comes along (``"garments"``, ``"emoji"``), a ``model.plan`` that ``ddpmx build``
            made here, a ``model.onnx`` that ``ddpmx export`` wrote, or another one together with ``spec``.
        spec: for an ONNX file that does not describe itself.
        providers: ONNX Runtime's execution providers, for an ONNX file: ``cpu``, ``cuda``, ``tensorrt`` or ``rtx``.
        fallback: whether another provider than the first may be used.
        threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        executor: how a chain runs on a GPU, one of :data:`ddpmx.backends.base.EXECUTORS`; ``auto``: the fastest that works.
        trust_host_code: whether a plan may hold code for the CPU, which loading it runs.
        cache: a folder where TensorRT-RTX keeps what it compiles for this GPU, so that the next start is faster.
        widen: compute a file in fp16, bf16 or 8 bits in float32, with the weights that it has: on every processor alike,
            see :mod:`ddpmx.formats.widen`. Not for plans.

    Raises:
        FileFormatError: no model file, a damaged one, or one of a kind that does not run.
        SpecError: the file does not say what it is, or contradicts itself.
        BackendError: the library that would run it is missing, or has no such provider, or this machine cannot run it.
        InputError: no such executor, or a plan that is to be widened.
    """
    path = shipped.find(path)
    options: OpenOptions = {
        "spec": spec,
        "providers": providers,
        "fallback": fallback,
        "threads": threads,
        "trust_host_code": trust_host_code,
        "cache": cache,
    }
    pipeline = _opened(path, executor, options, widen=widen)
    if not widen:
        absolute = Path(os.path.abspath(path))  # it is opened again, and from another folder perhaps
        pipeline._widened = partial(_opened_again, absolute, executor, options, pipeline.spec)
    return pipeline


def _opened_again(path: Path, executor: str, options: OpenOptions, spec: ModelSpec) -> Pipeline | None:
    """The file of a pipeline, widened; None if that makes no difference."""
    if not is_half(path):
        return None
    pipeline = _opened(path, executor, options, widen=True)
    if pipeline.spec != spec:
        pipeline.close()
        raise FileFormatError(f"{path}: has changed since it was opened", hint="load it again")
    return pipeline


def _opened(path: Path, executor: str, options: OpenOptions, *, widen: bool) -> Pipeline:
    whole: OpenOptions = {**options, "widen": widen}
    spec, backend = open_model(path, **whole)
    try:
        pipeline = Pipeline(spec, backend, executor=executor)
    except BaseException:
        backend.close()
        raise
    if widen:
        pipeline.arithmetic = "fp32"
    return pipeline


def _finite(array: NDArray[Any], what: str) -> NDArray[Any]:
    """The array.

    Raises:
        InputError: it holds NaN or infinities.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{what} holds NaN or infinities")
    return array


def _on_gpu(what: str) -> InputError:
    return InputError(f"{what} is in GPU memory, and has to be on the host", hint=f"{what}.cpu() in PyTorch")


def _after(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    """The progress of one batch as that of all."""
    if progress is None:
        return None
    report = progress  # for mypy: it is not None in there either
    return lambda done, _: report(before + done, total)
