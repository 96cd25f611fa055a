"""A batch whose images are at steps of their own, in "device memory", beside a chain in NumPy for each image alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpmx.cuda.group import Group
from ddpmx.cuda.layout import EACH, Call
from ddpmx.diffusion.samplers import Table
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import combine
from ddpmx.sampling.pixels import to_nhwc

FLOATS = ("x", "out", "var", "x0", "one_ago", "two_ago")


@dataclass
class Image:
    """One image: its sampler, where it is, and when it joins.

    Attributes:
        table, seed, index: of its chain.
        row, without: its rows; ``without`` of a guided one.
        guidance: w.
        joins: the call before which it begins.
        own_x: whether it begins with x of its own.
        keeps_x0: whether x̂_0 is wanted after each step.
    """

    table: Table
    row: int
    index: int = 0
    seed: int = 0
    without: int = -1
    guidance: float = 0.0
    joins: int = 0
    own_x: bool = False
    keeps_x0: bool = True
    walk: chain.Walk = field(init=False)
    group: Group = field(init=False)


class Mixed:
    """The kernels of each.cu on arrays of R rows, and what NumPy makes of the same arrays.

    ``offset`` shifts all arrays by so many floats, ``ago_offset`` what was remembered two steps ago by some more.
    """

    GUARD = 0xA5

    def __init__(
        self,
        kernels: Any,
        images: Sequence[Image],
        shape: tuple[int, int, int],
        rows: int,
        *,
        clip: float | None = 1.0,
        grid: int = 3,
        block: int = 32,
        order: int = 0,
        offset: int = 0,
        ago_offset: int = 0,
        poison: tuple[int, int, str, float] | None = None,
    ) -> None:
        self.kernels, self.images, self.shape, self.order = kernels, images, shape, order
        self.launch = grid, block
        self.poison = poison
        self.rng = np.random.default_rng(7)
        n, size = int(np.prod(shape)), rows * int(np.prod(shape))
        self.memory, self.have, self.want = {}, {}, {}
        for name in FLOATS:
            memory = np.full(size + 16, np.nan, np.float32)
            start = -(memory.ctypes.data // 4) % 4 + offset + (ago_offset if name == "two_ago" else 0)
            self.memory[name] = memory
            self.have[name] = memory[start : start + size].reshape(rows, *shape)
            self.have[name][...] = self.rng.standard_normal((rows, *shape))  # of others, to be left alone
            self.want[name] = self.have[name].copy()
        self.bytes = np.full(size + 8, self.GUARD, np.uint8)
        self.want_bytes = self.bytes.copy()
        self.pixels, self.want_pixels = (
            each[:size].reshape(rows, *shape[1:], shape[0]) for each in (self.bytes, self.want_bytes)
        )
        self.bad = np.full(len(images) + 1, -7, np.int32)
        self.entries = np.zeros(len(images) + 1, EACH)[: len(images)]
        self.aligned = np.zeros(len(images) * EACH.itemsize + 16, np.uint8)
        at = -self.aligned.ctypes.data % 16
        self.entries = self.aligned[at : at + len(images) * EACH.itemsize].view(EACH)
        self.call = Call(
            **{name: array.ctypes.data for name, array in self.have.items()},
            image_bytes=self.pixels.ctypes.data,
            bad=self.bad.ctypes.data,
            each=self.entries.ctypes.data,
            channels=shape[0],
            pixels=n // shape[0],
            limit=np.inf if clip is None else clip,
        )
        for image in images:
            drawn = np.array([image.index])
            image.walk = chain.Walk(image.table, (1, *shape), seed=image.seed, images=drawn, clip=clip)
            both = [image.row] + [image.without] * (image.without >= 0)
            image.group = Group(
                image.table, image.seed, drawn, np.array(both), guidance=image.guidance, own_x=image.own_x
            )

    def run(self) -> str | None:
        """Calls until all images are drawn. Where the kernels first differ from NumPy, or None."""
        number = 0
        while active := [each for each in self.images if each.walk.done < len(each.walk)]:
            now = [each for each in active if each.joins <= number]
            if not self.step(now):
                return f"before call {number}"
            for name in ("x", "x0", "one_ago", "two_ago"):
                if self.have[name].tobytes() != self.want[name].tobytes():
                    return f"in {name} after call {number}"
            if self.bytes.tobytes() != self.want_bytes.tobytes():
                return f"in the images after call {number}"
            if (self.bad[: len(now)] != 0).any() or (self.bad[len(now) :] != -7).any():
                return f"in what is bad after call {number}"
            number += 1
        outside = any(
            np.isnan(memory).sum() != memory.size - self.have[name].size for name, memory in self.memory.items()
        )
        return "outside its own memory" if outside else None

    def step(self, now: Sequence[Image]) -> bool:
        """One call, with random outputs, on the device and in NumPy. Whether those that joined began alike."""
        self.bad[:], self.call.count = -7, len(now)
        for place, image in enumerate(now):
            image.group.write(self.entries[place : place + 1], keeps_x0=image.keeps_x0)
            self.bad[place] = 0
            if image.group.done == 0:
                x = chain.initial(image.seed, np.array([image.index]), self.shape)
                if image.own_x:
                    x = self.rng.standard_normal(x.shape).astype(np.float32)
                for row in image.group.rows:
                    self.want["x"][row], self.want["x0"][row] = x[0], 0
                    if image.own_x:
                        self.have["x"][row] = x[0]
            image.group.done += 1
        assert self.kernels.begin_each(ctypes.addressof(self.call), *self.launch, self.order), "not a legal launch"
        alike = all(self.have[name].tobytes() == self.want[name].tobytes() for name in ("x", "x0"))
        for name in ("out", "var"):
            self.have[name][...] = 0.8 * self.rng.standard_normal(self.have[name].shape)
        if self.poison is not None and self.poison[0] == self.images[0].group.done:
            _, row, name, value = self.poison
            self.have[name][row].reshape(-1)[-1] = value
        self.order += 1 if self.order else 0
        assert self.kernels.step_each(ctypes.addressof(self.call), *self.launch, self.order), "not a legal launch"
        for image in now:
            self._walk(image)
        return alike

    def _walk(self, image: Image) -> None:
        """The same step in NumPy, of this image alone."""
        row, table = slice(image.row, image.row + 1), image.table
        out, var = (self.have[name][row].copy() for name in ("out", "var"))
        if image.without >= 0:
            without = self.have["out"][image.without : image.without + 1]
            with np.errstate(invalid="ignore"):
                combine(np.float32(image.guidance), out.copy(), without, out)
        if not (np.isfinite(out).all() and (table.learned is None or np.isfinite(var).all())):
            return
        x = self.want["x"][row].copy()
        step = image.walk.step(x, out, var if table.learned is not None else None, "")
        for both in image.group.rows:
            self.want["x"][both] = step.x_next[0]
            if image.keeps_x0:
                self.want["x0"][both] = step.x0[0]
        if table.memory is not None:
            self.want["two_ago"][row] = self.want["one_ago"][row]
            self.want["one_ago"][row] = step.x0
        if image.walk.done == len(image.walk):
            self.want_pixels[row] = to_nhwc(step.x0)
