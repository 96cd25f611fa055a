"""load(path) → Pipeline: the public face of the runtime."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ddpmx import chain, images, modelfile, onnxfile, planfile, tensorrt_library
from ddpmx.backends import Backend, RowByRow
from ddpmx.device import gpus
from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError
from ddpmx.noise import MAX_IMAGE, check_seed
from ddpmx.samplers import Sampler, Spacing, Table, Variance, make_table
from ddpmx.spec import ModelSpec

DEFAULT_BATCH, DEFAULT_BATCH_ELEMENTS = 16, 1 << 22
"""16 images at once, fewer of more than 500×500 pixels."""

MAX_RESULT_BYTES = 1 << 36
"""64 GiB of images in one call of generate is a mistake; draw them in parts with ``first``."""

MAX_BATCH_ELEMENTS = 1 << 25
"""n·C·H·W of one batch: 128 MiB of float32, and several times that inside the network and while noise is drawn."""


class Preview(NamedTuple):
    """The chain in motion, for one batch of images.

    Attributes:
        t: the timestep, falling to 0.
        x: float32 [n, C, H, W], x_t.
        x0: float32 [n, C, H, W], x̂_0: where the network thinks it leads. In the last one, the sample itself.
    """

    t: int
    x: NDArray[np.float32]
    x0: NDArray[np.float32]


class Pipeline:
    """A model file, ready to run. A context manager; not thread-safe: one per thread.

    Attributes:
        spec: what the file says about itself.
    """

    def __init__(self, spec: ModelSpec, backend: Backend) -> None:
        self.spec = spec
        self._backend = backend
        self._schedule = spec.make_schedule()
        self._closed = False
        self._executed: dict[tuple[int, int], int] = {}

    @property
    def backend(self) -> str:
        """What really computes the network, for people."""
        return self._backend.description

    @property
    def default_batch(self) -> int:
        """How many images run at once if nothing is said: 1…16, fewer the larger they are. It depends on nothing else."""
        return int(np.clip(DEFAULT_BATCH_ELEMENTS // np.prod(self.spec.shape), 1, DEFAULT_BATCH))

    def __enter__(self) -> Pipeline:
        """The pipeline itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free everything."""
        self.close()

    def close(self) -> None:
        """Free everything. The pipeline cannot be used afterwards."""
        self._closed = True
        self._backend.close()

    def table(
        self,
        *,
        sampler: Sampler = "ancestral",
        steps: int | None = None,
        spacing: Spacing = "linspace",
        eta: float = 0.0,
        variance: Variance | None = None,
    ) -> Table:
        """The sampler as a table, see :func:`ddpmx.samplers.make_table`. ``variance`` overrides the file's."""
        return make_table(
            self._schedule,
            self.spec.prediction,
            variance or self.spec.variance,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            eta=eta,
        )

    def check_request(self, n: int, *, seed: int = 0, first: int = 0, batch: int | None = None) -> int:
        """See that :meth:`generate` would take these numbers, before anything is prepared for them.

        Returns:
            ``batch``, or the default in its place.

        Raises:
            InputError: one is out of its range, the images would not fit into memory, or the pipeline is closed.
        """
        if self._closed:
            raise InputError("the pipeline is closed", hint="load the file again")
        check_seed(seed)
        batch = self.default_batch if batch is None else batch
        for name, value, least in (("n", n, 1), ("first", first, 0), ("batch", batch, 1)):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, np.integer))
                or not least <= value <= MAX_IMAGE + 1
            ):
                raise InputError(f"{name} must be a whole number from {least} to 2**32, not {value!r}")
        if first + n > MAX_IMAGE + 1:
            raise InputError(f"images are numbered 0…2**32 - 1, and {first} + {n} leads past that")
        channels, height, width = self.spec.shape
        if n * channels * height * width > MAX_RESULT_BYTES:
            raise InputError(f"{n} images of {height}×{width} do not fit into memory", hint="draw them in parts")
        if batch * channels * height * width > MAX_BATCH_ELEMENTS:
            raise InputError(
                f"{batch} images of {height}×{width} at once do not fit into memory", hint="a smaller batch"
            )
        return batch

    def generate(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        preview: Callable[[int, Preview], None] | None = None,
        **sampling: Any,
    ) -> NDArray[np.uint8]:
        """Draw images. Image i of a seed is the same whatever else is drawn with it.

        Args:
            n: how many, at least 1.
            seed: 0…2⁶⁴−1.
            first: the index of the first one: ``generate(8)`` equals ``generate(4)`` and ``generate(4, first=4)``.
            batch: how many run at once, at most; by default :attr:`default_batch`. Where the device's arithmetic depends
                on the batch, an image does so by its last bits, but never on ``n``, ``first`` or its neighbours.
            progress: called after each step with (steps done, steps in all) over all batches.
            cancel: asked before each step; True stops the chain.
            preview: called after each step with the position in the result of the batch's first image, and the state.
            **sampling: see :meth:`table`.

        Returns:
            uint8 [n, H, W, C].

        Raises:
            InputError: a number out of its range.
            Cancelled: ``cancel`` said so.
            NumericError: the network's answer was not finite.
        """
        channels, height, width = self.spec.shape
        table = self.table(**sampling)
        batch = self.check_request(n, seed=seed, first=first, batch=batch)
        total = -(-n // batch) * len(table)
        result = np.empty((n, height, width, channels), np.uint8)
        for number, (start, indices) in enumerate(_batches(n, first, batch)):
            sample = result[start : start + len(indices)]
            steps = self._run(table, seed, indices, batch)
            for done in range(number * len(table), (number + 1) * len(table)):
                if cancel is not None and cancel():
                    raise Cancelled("stopped before the chain was through")
                step = next(steps)
                if preview is not None:
                    preview(start, step)
                if progress is not None:
                    progress(done + 1, total)
            sample[...] = images.to_nhwc(step.x0)
        return result

    def stream(
        self, n: int = 1, *, seed: int = 0, first: int = 0, batch: int | None = None, **sampling: Any
    ) -> Iterator[Preview]:
        """Watch ``n`` images come into being together: a :class:`Preview` for every step. Break off to cancel.

        The arrays are copies. The last preview's ``x0`` are the images that :meth:`generate` gives with this ``batch``,
        or, if that is less than ``n``, with ``n``.

        Raises:
            As :meth:`generate`.
        """
        table = self.table(**sampling)
        batch = max(n, self.check_request(n, seed=seed, first=first, batch=batch))
        self.check_request(n, batch=batch)
        ((_, indices),) = _batches(n, first, batch)
        for step in self._run(table, seed, indices, batch):
            yield Preview(step.t, step.x.copy(), step.x0.copy())

    def _run(self, table: Table, seed: int, indices: NDArray[np.int64], batch: int) -> Iterator[Preview]:
        """The chain for ``indices``, run so that other images beside them make no difference."""
        n = len(indices)
        if (n, batch) not in self._executed:
            self._executed[n, batch] = chain.executed_batch(
                self._backend, self.spec.shape, self.spec.timesteps, n, batch
            )
        executed = self._executed[n, batch]
        backend = RowByRow(self._backend) if executed < n else self._backend
        if executed > n:
            indices = np.concatenate([indices, np.repeat(indices[-1:], executed - n)])
        x_start = chain.initial(seed, indices, self.spec.shape)
        steps = chain.run(backend, table, x_start, seed=seed, images=indices, clip=self.spec.clip)
        for step in steps:
            # The chain ends at x_next. At t = 0 that is x̂_0 exactly, since there A = 1 and B = σ = 0; a table that
            # stops short of t = 0 ends with the same row, so x̂_0 is the sample there as well.
            yield Preview(step.t, step.x[:n], step.x0[:n])


def load(
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    providers: Sequence[str] = ("cpu",),
    fallback: bool = False,
    threads: int = 0,
) -> Pipeline:
    """Open a model file.

    Args:
        path: a ``model.onnx`` that ``ddpmx export`` wrote, or another one together with ``spec``.
        spec: for a file that does not describe itself.
        providers: ONNX Runtime's execution providers, see :class:`ddpmx.backends.ort.OrtBackend`.
        fallback: whether another provider than the first may do the work.
        threads: CPU threads; 0 leaves the choice to ONNX Runtime.

    Raises:
        FileFormatError: no model file, a damaged one, or one of a kind that this version does not run.
        SpecError: the file does not say what it is, or contradicts itself.
        BackendError: the library that would run it is missing, or has no such provider, or this machine cannot run it.
    """
    return Pipeline(*open_model(path, spec=spec, providers=providers, fallback=fallback, threads=threads))


def open_model(
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    providers: Sequence[str] = ("cpu",),
    fallback: bool = False,
    threads: int = 0,
) -> tuple[ModelSpec, Backend]:
    """What a file is, and what runs it: :func:`load` without the chain around it. Close the backend after use."""
    path = Path(path)
    kind = modelfile.identify(path)
    if kind == "checkpoint":
        raise FileFormatError(
            f"{path}: a checkpoint, which needs torch to run",
            hint=f"ddpmx export {os.fspath(path)} -o model.onnx, and use that",
        )
    if kind == "plan":
        _refuse_plan(path)
    # A link is followed once and for all: weights lie beside the file that it leads to, and those are checked.
    path = path.resolve()
    info = onnxfile.read_onnx(path)
    onnxfile.check_external(path, info)
    spec = onnxfile.onnx_spec(path, info, spec)

    from ddpmx.backends.ort import OrtBackend

    try:
        return spec, OrtBackend(path, spec.prediction, providers=providers, fallback=fallback, threads=threads)
    except FileFormatError as error:
        if spec.precision != "bf16":
            raise
        raise BackendError(
            f"{path}: ONNX Runtime cannot run this bfloat16 file here",
            note=error.note,
            hint=f"it is made for TensorRT 10.13 and later: ddpmx build {path.name}; fp16 and fp32 files run here",
        ) from error


def _refuse_plan(path: Path) -> NoReturn:
    """Say what is missing to run a plan here."""
    info = planfile.read_plan(path)
    found = gpus()
    version = None
    with contextlib.suppress(BackendError):
        version = tensorrt_library.load(info.flavour).version if found.devices else None
    planfile.check_fits(path, info, version=version, platform=tensorrt_library.host_platform(), gpus=found)
    raise BackendError(
        f"{path}: this version of ddpmx builds plans, and does not run them yet",
        note=f"it was built with {info.flavour} {info.version}, and would fit this GPU",
        hint=f"trtexec runs it; ddpmx runs the ONNX file: ddpmx generate --engine {shlex.quote(info.engine.source)}",
    )


def _batches(n: int, first: int, batch: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(position in the result, image indices) of each batch."""
    for start in range(0, n, batch):
        yield start, np.arange(first + start, first + min(start + batch, n))
