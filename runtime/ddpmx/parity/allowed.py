"""How far a file's outputs may be from PyTorch's: the precision's bounds, at each recorded t."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpmx.formats.spec import Precision
from ddpmx.parity.check import Bounds
from ddpmx.parity.reference import Reference
from ddpmx.sampling.chain import Float32


@dataclass(frozen=True)
class Allowed:
    """The bounds on the outputs of one file, in units of the RMS of PyTorch's outputs.

    Attributes:
        eps: RMS error at each recorded t, float64 [K].
        eps_pixel: largest error, at each recorded t.
        state_eps: RMS error at each recorded state of the chain, float64 [M].
        usual: the bounds of the precision, from which they come.
    """

    eps: NDArray[np.float64]
    eps_pixel: NDArray[np.float64]
    state_eps: NDArray[np.float64]
    usual: Bounds

    def why(self, bound: float, usual: float) -> str:
        """What a bound on an output follows from."""
        if bound == usual:
            return f"{usual:g} of the RMS of PyTorch's outputs, by the precision"
        return (
            f"{usual:g} by the precision × {bound / usual:.3g}: so large is the output, or a term that it is a sum of"
        )


def allowed(bounds: Mapping[Precision, Bounds], precision: Precision, reference: Reference) -> Allowed:
    """The bounds on the outputs of a file: those of the precision, relative to the numbers that are rounded.

    Their unit is the RMS of all recorded outputs; where the outputs for one t, or for one state of a chain, are more than
    twice as large, half of theirs. A network with another range of images than −1…1 that does not predict ε has outputs of
    that range, which are converted by a sum: v = (c/a)·v' + … (see :class:`ddpm_export.Adapter`). Where the terms are 50
    times as large as the sum, float32's roundings are so too, in every library and in PyTorch, and the unit is the largest
    term. Half precision's bound is not widened by that: there the digits are lost.
    """
    usual, float32, scale = bounds[precision], bounds["fp32"], reference.scale

    def at(out: Float32, unit: Float32 | None, own: float, wide: float) -> NDArray[np.float64]:
        flat = out.reshape(len(out), -1).astype(np.float64)
        here = np.maximum(1.0, np.sqrt(np.square(flat).mean(axis=1)) / (2 * scale))
        terms = here if unit is None else np.maximum(here, unit.astype(np.float64) / scale)
        limits: NDArray[np.float64] = np.maximum(own * here, wide * terms)
        return limits

    return Allowed(
        at(reference.out, reference.unit, usual.eps, float32.eps),
        at(reference.out, reference.unit, usual.eps_pixel, float32.eps_pixel),
        at(reference.state_out, reference.state_unit, usual.eps, float32.eps),
        usual,
    )
