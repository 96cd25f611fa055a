"""Whether the decoder's model is the coder's: its weights and its chain, and what it computes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.errors import FileFormatError, InputError, NumericError
from ddpmx.formats import compressed
from ddpmx.formats.compressed import Header
from ddpmx.pipeline import Pipeline

UInt8 = NDArray[np.uint8]

_CHECK = 1 << 19
"""Draws of the purpose that are signs of pixels."""
_FINE = 8
"""Of a check, steps of a level."""
_APART = 16
"""Steps that another machine's arithmetic cannot explain: a model in half precision, computed in half there and not here,
moves them by 6 or so."""


def weights_of(pipeline: Pipeline, model: str | None) -> str:
    """The first 32 digits of the hash by which a decoder knows the model.

    Raises:
        InputError: there is none.
    """
    found = model if model is not None else pipeline.spec.weights
    if found is None:
        raise InputError(
            "the model does not state the hash of its weights, by which a decoder would know it",
            hint="model=…, the sha256 of its file, for coder and decoder",
        )
    return found[:32]


def check_model(pipeline: Pipeline) -> None:
    """Raise InputError if a model takes more than a file can hold."""
    if pipeline.spec.condition is not None:
        raise InputError("a model that takes a condition image does not compress others")


def check_fits(pipeline: Pipeline, header: Header, model: str | None) -> None:
    """Raise InputError if a file is of another model, FileFormatError if its labels are none of the model's."""
    check_model(pipeline)
    spec, weights = pipeline.spec, weights_of(pipeline, model)
    ours = (weights, spec.to_json()["coefficients"], spec.shape, spec.timesteps)
    if ours != (header.weights, header.coefficients, header.shape, header.T):
        raise InputError(
            "the images were compressed by another model",
            note=f"its weights begin with {header.weights[:12]}, those of the model here with {weights[:12]}"
            if weights != header.weights
            else "its weights are the same, and its chain is not",
            hint="ddpmx info shows the hash of a model's weights",
        )
    if header.labels and (spec.classes is None or max(header.labels) > spec.classes):
        raise FileFormatError("the file has labels that the model does not")


def check_of(header: Header, pixels: UInt8) -> bytes:
    """Sums of the levels with signs by chance, divided by √ of how many there are, in eighths of a level, modulo 256.

    Levels that are off by e on average (root mean square) move each of them by about e; one level in a thousand that is
    off by 1, as between machines, by 0.03.
    """
    flat = pixels.reshape(-1).astype(np.float64)
    count = -(-flat.size // 32)
    found = []
    for k in range(compressed.CHECK_BYTES):
        words = noise.words(header.seed, [0], 0, Purpose.CODEC, count, repeat=_CHECK | k)[0]
        signs = 1 - 2.0 * (words[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).reshape(-1)[: flat.size]
        found.append(math.floor(_FINE * float(signs @ flat) / math.sqrt(flat.size) + 0.5) & 255)
    return bytes(found)


def compare(there: bytes, here: bytes, t: int) -> None:
    """Raise NumericError if checks are not of the same images."""
    apart = max(min((a - b) % 256, (b - a) % 256) for a, b in zip(there, here, strict=True))
    if apart > _APART:
        raise other_network(t, f"checks of the images are up to {apart / _FINE:g} levels apart")


def other_network(t: int, note: str) -> NumericError:
    """The error of a network that computes something else."""
    return NumericError(
        f"the network here does not compute what it did where the images were compressed, at t = {t}",
        note=note,
        hint="the same model file, in the same precision",
    )
