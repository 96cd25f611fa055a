"""Whether the decoder's model is the coder's: its weights, its chain and its arithmetic, and what it computes."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.errors import FileFormatError, InputError, NumericError
from ddpmx.formats import compressed
from ddpmx.formats.compressed import CompressedFile, Header
from ddpmx.pipeline import Pipeline

UInt8 = NDArray[np.uint8]

_CHECK = 1 << 19
"""Draws of the purpose that are signs of pixels."""
_FINE = 8
"""Of a check, steps of a level."""
_APART = 16
"""Steps that another machine's arithmetic cannot explain: half precision that rounds otherwise moves them by 6 or so."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SHOWN = 12
"""Digits of a hash that are shown, or more where these are the same."""
_ARITHMETIC = {
    "fp32": "float32",
    "fp16": "half precision",
    "bf16": "bfloat16",
    "int8": "8-bit integers",
    "fp8": "E4M3",
}


def weights_of(pipeline: Pipeline, model: str | None) -> str:
    """The first 32 digits of the hash by which a decoder knows the model.

    Raises:
        InputError: there is none, or ``model`` is none.
    """
    if model is not None and not (isinstance(model, str) and _SHA256.fullmatch(model.lower())):
        raise InputError(f"model must be a sha256 of 64 hexadecimal digits, not {model!r}")
    found = model.lower() if model is not None else pipeline.spec.weights
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


def check_fits(pipeline: Pipeline, file: CompressedFile, model: str | None) -> None:
    """Check that a file is of this model.

    Raises:
        InputError: it is of another one, or of another file of it.
        FileFormatError: its labels are none of the model's.
    """
    check_model(pipeline)
    spec, header, weights = pipeline.spec, file.header, weights_of(pipeline, model)
    if weights != header.weights:
        there, here = _apart(header.weights, weights)
        note = f"its weights have the sha256 {there}…, those of the model here {here}…"
    elif spec.shape != header.shape:
        note = f"its weights are the same, and its images are {_size(header.shape)}, not {_size(spec.shape)}"
    elif (spec.to_json()["coefficients"], spec.timesteps) != (header.coefficients, header.T):
        note = "its weights are the same, and its chain is not"
    elif spec.precision != header.precision:
        raise InputError(
            f"{file.name}: compressed by the {header.precision} file of this model, not by its {spec.precision} file",
            note="weights that are rounded otherwise decode to other images",
            hint=f"decode by the model's {header.precision} file",
        )
    elif header.labels and (spec.classes is None or max(header.labels) > spec.classes):
        raise FileFormatError(f"{file.name}: it has labels that the model does not")
    else:
        return
    raise InputError(
        f"{file.name}: compressed by another model", note=note, hint="ddpmx info shows the hash of a model's weights"
    )


def check_arithmetic(pipeline: Pipeline, file: CompressedFile) -> None:
    """Raise InputError if the network computes in another precision here than where the images were compressed."""
    there, here = file.header.arithmetic, pipeline.arithmetic
    if there != here:
        raise InputError(
            f"{file.name}: compressed in {_ARITHMETIC[there]}, and the model here computes in {_ARITHMETIC[here]}",
            note=f"by {pipeline.backend}",
            hint="decode by an ONNX file or an MNN model of it, which are computed in float32"
            if there == "fp32"
            else f"decode by the {there} plan that compressed them",
        )


def _apart(a: str, b: str) -> tuple[str, str]:
    """The beginnings of two hashes, with as many digits as it takes to see that they are two."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    shown = max(_SHOWN, same + 4)
    return a[:shown], b[:shown]


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}×{shape[2]}×{shape[0]}"


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
