"""One figure of the parity ladder and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from ddpmx.formats.spec import Precision


@dataclass(frozen=True)
class Bounds:
    """The bounds on the outputs of files of one precision. Those on one step, on bits and, where a chain amplifies errors,
    on pixels follow from them and from the sampler's table: see :mod:`ddpmx.parity.propagation`.

    Attributes:
        eps: RMS error of the output at the worst t, in units of the RMS of PyTorch's output. Other runtimes' float32 is
            up to 6e-6 away (MNN's Winograd convolutions), real half 2.7e-3, bfloat16 8 times as much; times 2 to 3.
        eps_pixel: largest error of a single element of the output, in the same unit: ten times the RMS. Of 10⁶ numbers
            from N(0, 1) the largest is about 5.
        pixels: share of a free chain's uint8 values that are within one level of PyTorch's.
        levels: RMS of the errors of those values, in levels, for a precision that is judged by its chain; else None. The
            demo's network is up to 1 away in int8 and 2 in E4M3; times 2.5. Its ``pixels`` are those of normal errors of
            that size, erf(1.5 / (levels·√2)), rounded down.
    """

    eps: float
    eps_pixel: float
    pixels: float
    levels: float | None = None


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(eps=2e-5, eps_pixel=2e-4, pixels=0.999),
    "fp16": Bounds(eps=5e-3, eps_pixel=5e-2, pixels=0.99),
    "bf16": Bounds(eps=3e-2, eps_pixel=3e-1, pixels=0.75),
    "int8": Bounds(eps=6e-2, eps_pixel=6e-1, pixels=0.45, levels=2.5),
    "fp8": Bounds(eps=6e-2, eps_pixel=6e-1, pixels=0.23, levels=5.0),
}

BOUNDS_ON_GPU: dict[Precision, Bounds] = BOUNDS | {
    "fp32": Bounds(eps=1e-4, eps_pixel=1e-3, pixels=0.99),
}
"""TensorRT may use Winograd convolutions for float32, which round more often. ``ddpmx build`` turns TF32 off."""


@dataclass(frozen=True)
class Check:
    """One measured figure and its bound.

    Attributes:
        name: what was measured.
        value: the measured value; NaN if it was not measured.
        bound: the largest value allowed, or the smallest one if ``at_least``.
        at_least: whether ``bound`` is a lower bound.
        worst: where the value was worst, as text for the reader.
        skipped: why it was not measured, or None.
        why: what the bound follows from, as text for the reader.
        judged: what was judged: ``file``, or the module in a stated precision.
    """

    name: str
    value: float
    bound: float
    at_least: bool = False
    worst: str = ""
    skipped: str | None = None
    why: str = ""
    judged: str = "file"

    @property
    def passed(self) -> bool:
        """Whether the bound holds. A check that was skipped counts as passed."""
        holds = self.value >= self.bound if self.at_least else self.value <= self.bound
        return self.skipped is not None or bool(holds)

    @property
    def title(self) -> str:
        """The name, with what was judged where that is not the file."""
        return self.name if self.judged == "file" else f"{self.name}, {self.judged}"

    def __str__(self) -> str:
        """One line: ``ε, RMS: 1.2e-06 ≤ 2e-05 (worst at t = 999)``."""
        if self.skipped is not None:
            return f"{self.title}: not judged, {self.skipped}"
        sign = ("≥" if self.at_least else "≤") if self.passed else ("<" if self.at_least else ">")
        figure = (
            f"{self.value:.2%} {sign} {100 * self.bound:.3g}%"
            if self.at_least
            else f"{self.value:.3g} {sign} {self.bound:.3g}"
        )
        return f"{self.title}: {figure}" + (f" ({self.worst})" if self.worst else "")
