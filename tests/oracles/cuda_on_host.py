"""The kernels of ``ddpmx/cuda`` on a CPU: their source, compiled by a C++ compiler with ``cuda_on_host.h``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddpmx.backends.base import Buffers
from ddpmx.cuda.layout import Chain, Control, Done
from ddpmx.diffusion.samplers import Table
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import Guidance, GuidedBackend
from ddpmx.sampling.pixels import to_nhwc
from oracles import conditioning, gaussian

HERE = Path(__file__).parent
STRICT = ("-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


class Unavailable(RuntimeError):  # noqa: N818 (not a fault of the kernels)
    """This machine cannot run them: no C++ compiler, or a C library without coroutines."""


def compiler() -> str | None:
    """A C++ compiler."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path, sources: Path, flags: Sequence[str] = STRICT) -> ctypes.CDLL:
    """The library of the kernels in ``sources``.

    Raises:
        Unavailable: there is no C++ compiler, or the C library has no coroutines.
    """
    found = compiler()
    if found is None:
        raise Unavailable("no C++ compiler")
    probe = folder / "probe.cpp"
    probe.write_text("#include <ucontext.h>\nint main() { ucontext_t c; return getcontext(&c); }\n")
    if subprocess.run([found, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        raise Unavailable("no ucontext.h")
    library = folder / "kernels.so"
    command = [found, "-std=c++17", *flags, "-shared", "-fPIC", f"-I{sources}", f"-I{HERE}"]
    done = subprocess.run(
        [*command, str(HERE / "cuda_on_host.cpp"), "-o", str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kernels = ctypes.CDLL(str(library))
    for launch in (kernels.begin, kernels.step, kernels.begin_each, kernels.step_each):
        launch.argtypes, launch.restype = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint], ctypes.c_bool
    kernels.go_on.argtypes, kernels.go_on.restype = [ctypes.c_void_p, ctypes.c_ulonglong], ctypes.c_longlong
    kernels.has_fma.restype = ctypes.c_bool
    return kernels


class Toy:
    """The closed-form network of ``gaussian.py`` for images of any shape, as a Backend.

    Conditioning adds to its output, see ``conditioning.py``. The output ``var``, if there is one, exceeds −1…1.

    Args:
        poison: (t, values): at that t the last elements of the first image's output are these values.
        poisoned: which output.
    """

    description = "toy"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        poison: tuple[int, Sequence[float]] | None = None,
        poisoned: Literal["out", "var"] = "out",
    ) -> None:
        self.poison, self.poisoned = poison, poisoned
        self._mu = np.linspace(-0.5, 0.5, int(np.prod(shape))).reshape(shape)
        self._slope, self._offset = gaussian.coefficients(gaussian.SPEC.make_schedule())

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        x, t, out, var = self.buffers.x, self.buffers.t, self.buffers.out, self.buffers.var
        slope, offset = (c[t][:, None, None, None] for c in (self._slope, self._offset))
        out[...] = slope * x - offset * self._mu
        out += conditioning.effect(self.buffers.inputs())
        if var is not None:
            var[...] = 0.7 * x - self._mu
        if self.poison is not None and t[0] == self.poison[0]:
            values, output = self.poison[1], out if self.poisoned == "out" else var
            assert output is not None
            output[0].reshape(-1)[-len(values) :] = values

    def close(self) -> None:
        pass


class Device:
    """One chain in "device memory", ready for :meth:`begin`.

    ``offset`` shifts x, out, x0, var and what is remembered by so many floats; ``var_offset`` shifts var alone and
    ``ago_offset`` two_ago alone, by some more.
    """

    GUARD = 0xA5

    def __init__(
        self,
        kernels: ctypes.CDLL,
        table: Table,
        shape: tuple[int, int, int],
        *,
        seed: int,
        images: Sequence[int],
        clip: float | None = 1.0,
        grid: int = 3,
        block: int = 32,
        order: int = 0,
        offset: int = 0,
        var_offset: int = 0,
        ago_offset: int = 0,
        with_x0: bool = True,
        guidance: Guidance | None = None,
        labels: Sequence[int] = (),
    ) -> None:
        batch, rows = len(images), len(images) * (1 if guidance is None else 2)
        C, H, W = shape
        self.kernels, self.grid, self.block, self.order = kernels, grid, block, order
        floats = [self._floats(rows, shape, offset + more) for more in (0, 0, 0, var_offset)]
        floats += [self._floats(batch, shape, offset + more) for more in (0, ago_offset)]
        self._memory = [memory for memory, _ in floats]
        self.x, self.out, self.x0, self.var, self.one_ago, self.two_ago = (array for _, array in floats)
        size = batch * C * H * W
        self._image_bytes = np.full(size + 8, self.GUARD, np.uint8)
        self.pixels = self._image_bytes[:size].reshape(batch, H, W, C)
        self.t = np.full(rows, -1, np.int32)
        self.rows = np.ascontiguousarray(table.rows, np.float32)
        learns = table.learned is not None
        self.learned = np.zeros((0, 2)) if table.learned is None else np.ascontiguousarray(table.learned, np.float32)
        self.memory = np.zeros((0, 2)) if table.memory is None else np.ascontiguousarray(table.memory, np.float32)
        remembers_two = bool(self.memory[:, 1].any())
        self.timesteps = table.timesteps.astype(np.int32)
        self.images = np.array(images, np.uint32)
        self.control = Control()
        self.chain = Chain(
            x=self.x.ctypes.data,
            out=self.out.ctypes.data,
            t=self.t.ctypes.data,
            x0=self.x0.ctypes.data if with_x0 else 0,
            image_bytes=self.pixels.ctypes.data,
            rows=self.rows.ctypes.data,
            var=self.var.ctypes.data if learns else 0,
            learned=self.learned.ctypes.data if learns else 0,
            memory=self.memory.ctypes.data if table.memory is not None else 0,
            one_ago=self.one_ago.ctypes.data if table.memory is not None else 0,
            two_ago=self.two_ago.ctypes.data if remembers_two else 0,
            timesteps=self.timesteps.ctypes.data,
            images=self.images.ctypes.data,
            control=ctypes.addressof(self.control),
            seed=seed,
            B=batch,
            channels=C,
            pixels=H * W,
            S=len(table),
            limit=np.inf if clip is None else clip,
            guided=guidance is not None,
            guidance=0.0 if guidance is None else guidance.scale,
            # left over from an earlier chain
            step=17,
            arrived=3,
            bad=1,
            halted=1,
        )
        y = None if guidance is None else np.array([*labels, *[guidance.null] * batch], np.int32)
        self.buffers = Buffers(self.x, self.t, self.out, self.var if learns else None, y)

    def _floats(self, batch: int, shape: tuple[int, int, int], offset: int) -> tuple[np.ndarray, np.ndarray]:
        size = batch * int(np.prod(shape))
        memory = np.full(size + 8 + 4, np.nan, np.float32)
        start = -(memory.ctypes.data // 4) % 4 + offset  # 16 bytes aligned, and then not
        return memory, memory[start : start + size].reshape(batch, *shape)

    def begin(self) -> None:
        assert self.kernels.begin(ctypes.addressof(self.chain), self.grid, self.block, self.order), "not a legal launch"

    def step(self) -> None:
        if self.order:
            self.order += 1  # another order for every launch
        assert self.kernels.step(ctypes.addressof(self.chain), self.grid, self.block, self.order), "not a legal launch"

    def go_on(self) -> int:
        return int(self.kernels.go_on(ctypes.addressof(self.chain), 0xC0FFEE_0000_0001))

    def run(self, backend: Toy) -> Iterator[int]:
        """begin, then network and step, until the chain ends. Yields how many steps it reports as finished."""
        backend.bind(self.buffers)
        self.begin()
        yield self.control.step
        while not self.chain.halted:
            backend.enqueue()
            self.step()
            yield self.control.step

    def _floats_of(self) -> tuple[np.ndarray, ...]:
        return self.x, self.out, self.x0, self.var, self.one_ago, self.two_ago

    def in_bounds(self) -> bool:
        """Whether nothing was written beside the arrays."""
        floats = all(
            np.isnan(memory).sum() == memory.size - array.size + np.isnan(array).sum()
            for memory, array in zip(self._memory, self._floats_of(), strict=True)
        )
        return floats and bool((self._image_bytes[self.pixels.size :] == self.GUARD).all())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def first_difference(
    device: Device,
    table: Table,
    shape: tuple[int, int, int],
    *,
    seed: int,
    indices: Sequence[int],
    clip: float | None = 1.0,
    guidance: Guidance | None = None,
    labels: Sequence[int] = (),
) -> str | None:
    """Where the kernels differ from NumPy's chain, or None."""
    backend = Toy(shape)
    drawn = np.array(indices, np.int64)
    x_start = chain.initial(seed, drawn, shape)
    spec = gaussian.SPEC.replace(shape=shape, classes=conditioning.CLASSES, null_class=True)
    network = Toy(shape) if guidance is None else GuidedBackend(Toy(shape), spec, guidance)
    expected = chain.run(
        network,
        table,
        x_start,
        seed=seed,
        images=drawn,
        clip=clip,
        conditioning_shapes={} if guidance is None else {"y": ()},
        conditioning={} if guidance is None else {"y": np.array(labels, np.int32)},
    )
    counts = device.run(backend)

    def is_same(rows: np.ndarray, images: np.ndarray) -> bool:
        """Also in the rows without a class."""
        return same_bits(rows, images if guidance is None else np.concatenate([images, images]))

    if next(counts) != 0 or not is_same(device.x, x_start) or list(device.t) != [table.timesteps[0]] * len(device.t):
        return "at the start"
    for index, step in enumerate(expected):
        if next(counts, None) != index + 1:
            return f"in the count after step {index}"
        if not is_same(device.x, step.x_next):
            return f"in x after step {index}"
        if device.chain.x0 and not is_same(device.x0, step.x0):
            return f"in x0 after step {index}"
        last = index + 1 == len(table)
        if list(device.t) != [table.timesteps[index if last else index + 1]] * len(device.t):
            return f"in t after step {index}"
        if not last and not (device.pixels == Device.GUARD).all():
            return f"in images after step {index} already"
    if not same_bits(device.pixels, to_nhwc(step.x0)):
        return "in the images"
    if next(counts, None) is not None or not device.chain.halted:
        return "at the end: it does not end"
    seen: tuple[Any, ...] = (device.control.done, device.control.step, device.control.bad_step, device.chain.arrived)
    if seen != (Done.FINISHED, len(table), -1, 0):
        return f"in what it reports at the end, {seen}"
    return None if device.in_bounds() else "outside its own memory"
