"""One figure of the ladder, and what it may be."""

from __future__ import annotations

from dataclasses import dataclass

from ddpmx.formats.spec import Precision


@dataclass(frozen=True)
class Bounds:
    """What a file of one precision has to keep.

    Attributes:
        eps: RMS of the answer's error at the worst t.
        eps_pixel: the largest error of a single number.
        step: RMS of x_{t−1}'s error at the worst t.
        pixels: share of a free chain's uint8 values within one level of PyTorch's.
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
"""TensorRT's float32 convolutions may be Winograd's, which round more often; TF32 is off in what ``ddpmx build`` makes."""


@dataclass(frozen=True)
class Check:
    """One figure.

    Attributes:
        name: which.
        value: measured; NaN if it was not.
        bound: what it may be.
        at_least: whether the bound is one from below.
        worst: where it was worst, for people.
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
        """Whether it holds. What was not measured does not fail."""
        holds = self.value >= self.bound if self.at_least else self.value <= self.bound
        return self.skipped is not None or bool(holds)

    def __str__(self) -> str:
        """ "ε: 1.2e-06 ≤ 2e-05 (worst at t = 999)"."""
        if self.skipped is not None:
            return f"{self.name}: not judged, {self.skipped}"
        sign = ("≥" if self.at_least else "≤") if self.passed else ("<" if self.at_least else ">")
        figure = (
            f"{self.value:.2%} {sign} {100 * self.bound:g}%"
            if self.at_least
            else f"{self.value:.3g} {sign} {self.bound:g}"
        )
        return f"{self.name}: {figure}" + (f" ({self.worst})" if self.worst else "")
