"""model.parity.npz: PyTorch's float32 outputs, so that any file can be compared with them where there is no torch.

Inputs are not stored but recomputed from the images and the seed, bit for bit: noise is a function of its index here.
Outputs are stored at up to :data:`ELEMENTS` elements of an image, spread over all of it, so that records of large images
stay small.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import Backend
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import FileFormatError, SpecError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.npz import read_npz
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.reduced import Reduced
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.guidance import GuidedBackend, guided
from ddpmx.sampling.pixels import from_uint8

ELEMENTS = 4096
"""Most elements of one output that are stored: all of a 32×32 image in colour."""

MAX_BYTES = 64 << 20
TRAINED = 0.5
"""A network with a loss below this is trained: it explains half of the target's variance of 1. Untrained, the loss is 1 or
more."""

FORMAT = "ddpmx-parity1"
_MOST = {"t": 4096, "x0": 16, "at": 64, "final": 16}
_JSON_FIELDS = frozenset({"spec", "made_with", "seed", "real", "loss", "steps"})  # all other fields are arrays
_OPTIONAL_JSON = frozenset({"reduced", "ignores_time", "guidance"})
_BY_SPEC = frozenset({"y", "final_y", "var", "state_var", "state_x0"})  # if the network has such an input or output
_OPTIONAL = _BY_SPEC | {"unit", "state_unit", "drift"}  # the last three are in no record of ddpmx 1.0 and earlier
QUANTILES = 64

GUIDANCE = 2.0
"""w of the recorded chain of a network that can be guided: what its users draw with, and both of its answers count."""

MAX_GUIDANCE = 1e6
"""A larger number is a damaged record."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A record of PyTorch's outputs. E is the number of elements stored of each output.

    Attributes:
        spec: of the float32 network.
        made_with: the backend that computed the outputs, "torch 2.13.0, cpu".
        seed: of all noise in the record.
        real: whether the images are the user's rather than the network's own.
        loss: L_simple of the network on these inputs, in units of the target's variance.
        t: int32 [K], the recorded timesteps.
        x0: uint8 [n, C, H, W], images.
        out: float32 [K, n, E], the outputs at x_t drawn from q(x_t | x_0).
        steps: of the recorded chain, S.
        at: int64 [M], after how many of these steps a state is recorded.
        state: float32 [M, C, H, W], the recorded states x_t of the chain's first image.
        state_out: float32 [M, E], the outputs for ``state``.
        final: uint8 [m, C, H, W], the m images at the end of the chain.
        y: int32 [K, n], the class for each of ``out``; only if the network has classes.
        final_y: int32 [m], the class of each image of the chain; only if the network has classes.
        var: float32 [K, n, E], the second outputs that belong to ``out``; only if the network learns its variance.
        state_var: float32 [M, E], the second outputs that belong to ``state_out``; only if it learns its variance.
        state_x0: uint8 [M, C, H, W], the input x0_prev for each of ``state``, rounded to 256 levels beforehand; only if the
            network is self-conditioned. For ``out`` x0_prev is 0.
        unit: float32 [K], the RMS of the largest term that each of ``out`` is a sum of; only if the network's own range
            of images is another, and it does not predict ε. See :func:`ddpmx.parity.allowed.allowed`.
        state_unit: float32 [M], the same for ``state_out``.
        drift: float32 [64], quantiles of how far the first image of the chain moves, in levels of uint8, under a known
            error of the outputs; see :func:`ddpmx.parity.propagation.pixels_bound`. Of pixels that are not saturated.
        reduced: the same checks of the module in half precision or bfloat16, if it was exported so.
        ignores_time: whether the network ignores t, by its exporter's word.
        guidance: w of the chain, see :mod:`ddpmx.sampling.guidance`; 1 is none. The outputs for ``state`` are not guided.

    A condition image is not stored: it is noise, see :func:`ddpmx.sampling.conditioning.example`.
    """

    spec: ModelSpec
    made_with: str
    seed: int
    real: bool
    loss: float
    t: NDArray[np.int32]
    x0: NDArray[np.uint8]
    out: Float32
    steps: int
    at: NDArray[np.int64]
    state: Float32
    state_out: Float32
    final: NDArray[np.uint8]
    y: NDArray[np.int32] | None = None
    final_y: NDArray[np.int32] | None = None
    var: Float32 | None = None
    state_var: Float32 | None = None
    state_x0: NDArray[np.uint8] | None = None
    unit: Float32 | None = None
    state_unit: Float32 | None = None
    drift: Float32 | None = None
    reduced: Reduced | None = None
    ignores_time: bool = False
    guidance: float = 1.0

    def __post_init__(self) -> None:
        """Check types, shapes and ranges of all fields.

        Raises:
            FileFormatError: a field is missing, or does not fit the others.
        """
        spec, shape = self.spec, self.spec.shape
        for name in ("t", "x0", "at", "final"):
            if getattr(self, name).ndim < 1:
                raise FileFormatError(f"the record's {name!r} is a single number, not an array")
        for name, most in _MOST.items():
            if len(getattr(self, name)) > most:
                raise FileFormatError(f"the record's {name!r} has more than {most} entries")
        k, n, m, kept = len(self.t), len(self.x0), len(self.at), len(elements(shape))
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "t": (np.int32, (k,)),
            "x0": (np.uint8, (n, *shape)),
            "out": (np.float32, (k, n, kept)),
            "at": (np.int64, (m,)),
            "state": (np.float32, (m, *shape)),
            "state_out": (np.float32, (m, kept)),
            "final": (np.uint8, (len(self.final), *shape)),
        }
        if spec.classes is not None:
            expected |= {"y": (np.int32, (k, n)), "final_y": (np.int32, (len(self.final),))}
        if spec.learns_variance:
            expected |= {"var": (np.float32, (k, n, kept)), "state_var": (np.float32, (m, kept))}
        if spec.self_condition:
            expected["state_x0"] = (np.uint8, (m, *shape))
        expected |= {
            name: (np.float32, dims)
            for name, dims in {"unit": (k,), "state_unit": (m,), "drift": (QUANTILES,)}.items()
            if getattr(self, name) is not None
        }
        if surplus := [name for name in sorted(_BY_SPEC - expected.keys()) if getattr(self, name) is not None]:
            raise FileFormatError(f"the record holds {surplus[0]!r}, which its network does not have")
        for name, (dtype, dims) in expected.items():
            array = getattr(self, name)
            if array is None:
                raise FileFormatError(f"the record has no {name!r}")
            if array.dtype != dtype or array.shape != dims or 0 in array.shape:
                raise FileFormatError(f"the record's {name!r} is {array.dtype} {list(array.shape)}, not {list(dims)}")
            if dtype == np.float32 and not np.isfinite(array).all():
                raise FileFormatError(f"the record's {name!r} holds NaN or infinities")
        for labels in (self.y, self.final_y):
            if labels is not None and not np.all((labels >= 0) & (labels < spec.label_count)):
                raise FileFormatError("the record's numbers are out of range")
        if not (
            type(self.steps) is int
            and 1 <= self.steps <= spec.timesteps
            and np.all((self.t >= 0) & (self.t < spec.timesteps))
            and np.all((self.at >= 0) & (self.at < self.steps))
            and np.all(np.diff(self.at) > 0)
            and type(self.seed) is int
            and 0 <= self.seed <= noise.MAX_SEED
            and isinstance(self.made_with, str)
            and self.made_with.isprintable()
            and len(self.made_with) <= 200
            and isinstance(self.real, bool)
            and isinstance(self.ignores_time, bool)
            and type(self.guidance) is float
            and math.isfinite(self.guidance)
            and abs(self.guidance) <= MAX_GUIDANCE
            and (self.guidance == 1 or spec.null_class)
            and isinstance(self.loss, float)
            and math.isfinite(self.loss)
        ):
            raise FileFormatError("the record's numbers are out of range")

    @property
    def trained(self) -> bool:
        """Whether a free-running chain of this network is meaningful. With random weights it saturates."""
        return self.loss < TRAINED

    @property
    def scale(self) -> float:
        """RMS of all recorded outputs: the unit of errors."""
        return float(np.sqrt(np.mean(np.square(self.out, dtype=np.float64))))

    @property
    def var_scale(self) -> float:
        """The unit of errors of the second output: 1 where it is a place in −1…1, else the RMS of what was recorded."""
        if self.var is None or self.spec.variance == "learned_range":
            return 1.0
        return max(1.0, float(np.sqrt(np.mean(np.square(self.var, dtype=np.float64)))))

    def table(self) -> Table:
        """The coefficient table of the recorded chain."""
        return chain_table(self.spec, self.steps)

    def inputs(self, k: int) -> Float32:
        """x_t of each image at ``t[k]``, float32 [n, C, H, W]."""
        return diffuse(self.spec.make_schedule(), from_uint8(self.x0), int(self.t[k]), self.seed)

    def conditioning_at(self, k: int) -> dict[str, NDArray[Any]]:
        """The conditioning inputs for ``out[k]``, by name, [n, …] each."""
        n = len(self.x0)
        conditioning = example(self.spec, np.arange(n), seed=self.seed)
        if self.y is not None:
            conditioning["y"] = self.y[k]
        if self.spec.self_condition:
            conditioning["x0_prev"] = np.zeros((n, *self.spec.shape), np.float32)
        return conditioning

    def state_conditioning(self) -> dict[str, NDArray[Any]]:
        """The conditioning inputs for ``state``, by name, [M, …] each: those of the chain's first image."""
        m = len(self.at)
        conditioning = {name: np.repeat(array[:1], m, axis=0) for name, array in self.chain_conditioning().items()}
        if self.state_x0 is not None:
            conditioning["x0_prev"] = from_uint8(self.state_x0)
        return conditioning

    def chain_conditioning(self) -> dict[str, NDArray[Any]]:
        """The class and the condition image of each image of the chain, by the names of the inputs, [m, …] each."""
        conditioning = example(self.spec, np.arange(len(self.final)), seed=self.seed)
        if self.final_y is not None:
            conditioning["y"] = self.final_y
        return conditioning

    @property
    def chain_rows(self) -> int:
        """Rows of the network's batch in the recorded chain: two for each image where it is guided."""
        return len(self.final) * (1 if guided(self.spec, self.guidance) is None else 2)

    def guided(self, backend: Backend) -> Backend:
        """The network with which the recorded chain runs: ``backend``, or the guided one."""
        guidance = guided(self.spec, self.guidance)
        return backend if guidance is None else GuidedBackend(backend, self.spec, guidance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record.

        Raises:
            OutputError: it could not be written; an earlier file is untouched.
        """
        values = {
            "format": FORMAT,
            "spec": self.spec.to_json(whole=True),
            **{name: getattr(self, name) for name in sorted(_JSON_FIELDS - {"spec"})},
        }
        if self.reduced is not None:
            values["reduced"] = self.reduced.to_json()
        if self.ignores_time:
            values["ignores_time"] = True
        if self.guidance != 1:
            values["guidance"] = self.guidance
        text = np.frombuffer(json.dumps(values).encode(), np.uint8)
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _JSON_FIELDS | _OPTIONAL_JSON}
        arrays = {name: array for name, array in parts.items() if array is not None}
        packed = io.BytesIO()  # where a write fails, zipfile has an error of its own
        np.savez_compressed(packed, about=text, **arrays)
        with atomic_write(path) as stream:
            stream.write(packed.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read a record that :meth:`save` wrote.

        Raises:
            FileFormatError, SpecError: the file is missing, damaged, or not a parity record.
        """
        path = Path(path)
        arrays = read_npz(path, max_bytes=MAX_BYTES)
        try:
            about = arrays.pop("about", None)
            if about is None or about.dtype != np.uint8:
                raise FileFormatError("not a parity record", note=f"it holds {', '.join(arrays)[:200] or 'nothing'}")
            values = parse_json(about.tobytes())
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise FileFormatError("a parity record of another version of ddpmx")
            values["spec"] = ModelSpec.from_json(values.get("spec"))
            if "reduced" in values:
                values["reduced"] = Reduced.from_json(values["reduced"])
            needed = {f.name for f in fields(cls)} - _JSON_FIELDS - _OPTIONAL - _OPTIONAL_JSON
            if set(values) - _OPTIONAL_JSON != _JSON_FIELDS or set(arrays) - _OPTIONAL != needed:
                raise FileFormatError("a parity record with other fields than this ddpmx expects")
            parts: dict[str, Any] = {**values, **arrays}
            return cls(**parts)
        except (FileFormatError, SpecError) as error:
            raise type(error)(
                f"{path}: {error.fact}", note=error.note, hint=error.hint or "`ddpmx export` writes it"
            ) from error


def chain_table(spec: ModelSpec, steps: int) -> Table:
    """The table of a recorded chain: ancestral, over ``steps`` of the T timesteps.

    A network that learned the variance of single steps is recorded with σ² = β̃ where some are left out.
    """
    variance = "fixed_small" if spec.variance == "learned" and steps < spec.timesteps else spec.variance
    return make_table(spec.make_schedule(), spec.prediction, variance, steps=steps)


def elements(shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Indices of the stored elements of a flat image: all, or :data:`ELEMENTS` of them spread by the golden ratio."""
    size = math.prod(shape)
    if size <= ELEMENTS:
        return np.arange(size)
    stride = next(s for s in range(int(size * 0.6180339887), size) if math.gcd(s, size) == 1)
    return np.sort(np.arange(ELEMENTS, dtype=np.int64) * stride % size)


def diffuse(schedule: Schedule, x0: Float32, t: int, seed: int) -> Float32:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (equation 4), with the noise of (seed, image, t): float32 [n, C, H, W]."""
    signal = np.float32(np.sqrt(schedule.alpha_bar[t]))
    x_t: Float32 = signal * x0 + np.float32(np.sqrt(schedule.one_minus_alpha_bar[t])) * diffusion_noise(x0, t, seed)
    return x_t


def diffusion_noise(x0: Float32, t: int, seed: int) -> Float32:
    """The ε of :func:`diffuse`."""
    size = math.prod(x0.shape[1:])
    return noise.normal(seed, np.arange(len(x0)), t, Purpose.DIFFUSE, size).reshape(x0.shape)


def recorded_steps(
    steps: int, shape: tuple[int, int, int], *, budget: int = 3 << 19, most: int = 32
) -> NDArray[np.int64]:
    """After which steps of a chain its state is recorded: 2…32, evenly spaced, that fit into 1.5 MiB; always the last."""
    count = int(np.clip(budget // (4 * math.prod(shape)), 2, most))
    return np.unique(np.round(np.linspace(0, steps - 1, min(count, steps))).astype(np.int64))
