"""One figure of the parity ladder and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from ddpmx.formats.spec import Precision


@dataclass(frozen=True)
class Bounds:
    """The bounds for files of one precision.

    Attributes:
        eps: RMS error of the output at the worst t, in units of the RMS of PyTorch's output.
        eps_pixel: largest error of a single element of the output, in the same unit.
        step: RMS error of x_{t−1} at the worst t.
        pixels: share of a free chain's uint8 values that are within one level of PyTorch's.
        bits: change of the variational bound, in bits per dimension.
    """

    eps: float
    eps_pixel: float
    step: float
    pixels: float
    bits: float


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(eps=2e-5, eps_pixel=2e-4, step=4e-7, pixels=0.999, bits=1e-5),
    "fp16": Bounds(eps=5e-3, eps_pixel=5e-2, step=1e-4, pixels=0.99, bits=1e-3),
    "bf16": Bounds(eps=3e-2, eps_pixel=3e-1, step=6e-4, pixels=0.75, bits=1e-2),
}

BOUNDS_ON_GPU: dict[Precision, Bounds] = BOUNDS | {
    "fp32": Bounds(eps=1e-4, eps_pixel=1e-3, step=2e-6, pixels=0.99, bits=1e-4),
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
    """

    name: str
    value: float
    bound: float
    at_least: bool = False
    worst: str = ""
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the bound holds. A check that was skipped counts as passed."""
        holds = self.value >= self.bound if self.at_least else self.value <= self.bound
        return self.skipped is not None or bool(holds)

    def __str__(self) -> str:
        """One line: ``ε, RMS: 1.2e-06 ≤ 2e-05 (worst at t = 999)``."""
        if self.skipped is not None:
            return f"{self.name}: not judged, {self.skipped}"
        sign = ("≥" if self.at_least else "≤") if self.passed else ("<" if self.at_least else ">")
        figure = (
            f"{self.value:.2%} {sign} {100 * self.bound:g}%"
            if self.at_least
            else f"{self.value:.3g} {sign} {self.bound:g}"
        )
        return f"{self.name}: {figure}" + (f" ({self.worst})" if self.worst else "")
