"""Classifier-free guidance (Ho & Salimans 2022): the network runs with each image's class and without, in one batch.

    out = out_∅ + w·(out_y − out_∅)

w = 1 is the class-conditional network alone, 0 the unconditional one, and more than 1 goes beyond the class. The paper's
own w is one less.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpmx.backends.base import Backend, Buffers
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.chain import Float32


@dataclass(frozen=True)
class Guidance:
    """A guided chain.

    Attributes:
        scale: w, neither 0 nor 1, for which one call of the network suffices.
        null: the label that stands for no class.
    """

    scale: float
    null: int


def check_guidance(spec: ModelSpec, scale: float, *, labelled: bool) -> float:
    """w as a float that float32 can hold.

    Args:
        spec: the model.
        scale: w.
        labelled: whether the images have classes.

    Raises:
        InputError: w is no finite number, the network knows no "no class", or there are no classes to be guided to.
    """
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (numbers.Real, np.number)):
        raise InputError(f"guidance must be a number, not {scale!r}")
    w = float(scale)
    if not math.isfinite(w) or abs(w) > float(np.finfo(np.float32).max):
        raise InputError(f"guidance must be a finite number, not {scale!r}", hint="1 is no guidance, 2 to 4 is usual")
    if w == 1:
        return w
    if not spec.null_class:
        raise InputError(
            "the model cannot be guided: it was not trained to do without a class",
            note="its spec has no null_class",
            hint="guidance 1 draws without",
        )
    if w != 0 and not labelled:
        raise InputError("guidance needs the class of each image", hint=f"labels: 0…{(spec.classes or 1) - 1}")
    return w


def guided(spec: ModelSpec, scale: float) -> Guidance | None:
    """What a chain with a checked w needs; None where one call of the network suffices."""
    return None if scale in (0, 1) else Guidance(scale, spec.classes or 0)


def guided_batches(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """How many images a guided chain may run at once, as ranges: an image takes two rows of the network's batch.

    Args:
        ranges: the smallest and the largest batch of each range that the network takes.

    Raises:
        InputError: the network takes no even number.
    """
    halves = [(-(-low // 2), high // 2) for low, high in ranges]
    found = tuple((low, high) for low, high in halves if low <= high)
    if not found:
        taken = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in ranges)
        raise InputError(
            "guidance runs two rows for each image, and the plan takes no even number of rows",
            note=f"it takes {taken}",
            hint="build the plan for a larger batch",
        )
    return found


def combine(scale: np.float32, with_class: Float32, without: Float32, out: Float32) -> None:
    """out_∅ + w·(out_y − out_∅) in float32 and in that order, without fused operations, as ``ddpmx_guide`` in step.h.

    Args:
        scale: w.
        with_class: out_y.
        without: out_∅.
        out: the result is written here; the same shape for all.
    """
    np.subtract(with_class, without, out=out)
    np.multiply(out, scale, out=out)
    np.add(out, without, out=out)


class GuidedBackend:
    """A backend whose outputs are the guided ones of another backend. ``var`` is that of the image's class.

    Args:
        backend: the network.
        spec: the model.
        guidance: w.
    """

    def __init__(self, backend: Backend, spec: ModelSpec, guidance: Guidance) -> None:
        self._backend, self._spec, self._guidance = backend, spec, guidance
        self._scale = np.float32(guidance.scale)
        self._buffers: Buffers | None = None
        self._both: Buffers | None = None

    @property
    def description(self) -> str:
        """The other backend's."""
        return self._backend.description

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers."""
        self._buffers, rows = buffers, 2 * len(buffers.x)
        if self._both is None or len(self._both.x) != rows or (self._both.var is None) != (buffers.var is None):
            self._both = Buffers.of(
                rows,
                self._spec.shape,
                var=buffers.var is not None,
                conditioning_shapes=self._spec.conditioning_shapes,
            )
        self._backend.bind(self._both)

    def enqueue(self) -> None:
        """Compute both outputs of each image, and from them the guided one."""
        buffers, both = self._buffers, self._both
        assert buffers is not None
        assert both is not None
        n = len(buffers.x)
        inputs: dict[str, Any] = both.inputs()
        for name, array in buffers.inputs().items():
            inputs[name][:n] = array
            inputs[name][n:] = self._guidance.null if name == "y" else array
        self._backend.enqueue()
        with np.errstate(over="ignore", invalid="ignore"):  # the chain says which step is not finite
            combine(self._scale, both.out[:n], both.out[n:], buffers.out)
        if buffers.var is not None and both.var is not None:
            buffers.var[...] = both.var[:n]

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()
