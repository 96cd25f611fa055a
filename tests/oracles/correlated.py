"""A diffusion model whose data are N(μ, Σ) with correlated pixels, known in closed form:

    E[ε | x_t] = √(1−ᾱ_t)·(ᾱ_t·Σ + (1−ᾱ_t)·I)⁻¹·(x_t − √ᾱ_t·μ)

as a Backend in NumPy, in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Buffers
from ddpmx.formats.spec import ModelSpec
from oracles import conditioning

Float64 = NDArray[np.float64]


class Correlated:
    """Its output is E[ε | x_t], and what :func:`oracles.conditioning.effect` adds.

    Args:
        spec: the model.
        mean: μ, of the shape [C, H, W].
        covariance: Σ, [C·H·W, C·H·W].
        v: the output ``var``, if there is one.
        sways: the output depends on the "size" of the batch, or on an image's "place" in it.
    """

    description = "closed form"

    def __init__(
        self, spec: ModelSpec, mean: Float64, covariance: Float64, *, v: float = 0.0, sways: str | None = None
    ) -> None:
        self.mean, self.v, self.sways = mean.reshape(-1), v, sways
        self.values, self.vectors = np.linalg.eigh(covariance)
        self.alpha_bar = spec.make_schedule().alpha_bar
        self.calls = 0

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        self.calls += 1
        x, out = self.buffers.x, self.buffers.out
        kept = self.alpha_bar[self.buffers.t][:, None]
        centred = (x.reshape(len(x), -1) - np.sqrt(kept) * self.mean) @ self.vectors
        scaled = np.sqrt(1 - kept) * centred / (kept * self.values + 1 - kept)
        # einsum: a row's bits do not depend on how many there are, as those of a matrix product may
        out[...] = np.einsum("nk,ik->ni", scaled, self.vectors).reshape(x.shape)
        out += conditioning.effect(self.buffers.inputs())
        if self.buffers.var is not None:
            self.buffers.var[...] = self.v
        if self.sways == "size":
            out += np.float32(1e-3 * len(x))
        elif self.sways == "place":
            out += np.float32(1e-3) * np.arange(len(x), dtype=np.float32)[:, None, None, None]

    def close(self) -> None:
        pass


def smooth(shape: tuple[int, int, int], *, deviation: float = 0.3, reach: float = 2.0) -> Float64:
    """Σ of pixels that resemble their neighbours: deviation²·exp(−distance/reach); channels are independent."""
    channels, height, width = shape
    y, x = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
    distance = np.hypot(y[:, None] - y[None], x[:, None] - x[None])
    return np.kron(np.eye(channels), deviation**2 * np.exp(-distance / reach))
