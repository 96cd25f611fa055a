"""ModelSpec: all that a model file says about itself, as one short text that survives in every kind of file."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ddpmx.errors import InputError, SpecError
from ddpmx.samplers import PREDICTIONS, VARIANCES, Prediction, Variance, make_table
from ddpmx.schedule import Schedule, is_number, make_schedule, schedule_params
from ddpmx.sealed import seal, unseal

PREFIX = "ddpmx1"

MAX_TEXT = 4095
"""Bytes. A TensorRT plan carries its network's name, which holds this much and no more."""

MAX_ELEMENTS = 2**28
"""C·H·W: 1 GiB of float32 for one image. A larger shape is a damaged file."""

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelSpec:
    """What a network is, apart from its weights.

    Attributes:
        shape: (C, H, W) of one image.
        timesteps: T. The network is asked at t = 0…T−1.
        schedule: name of the variance schedule, see :data:`ddpmx.schedule.SCHEDULES`.
        schedule_params: its parameters, defaults filled in.
        prediction: what the network answers: ``eps``, ``x0`` or ``v``.
        variance: σ² of the ancestral chain, ``fixed_small`` (β̃), ``fixed_large`` (β), or ``learned_range``: between the
            two, as the network's second answer ``var`` says.
        clip: the largest |x̂_0| that the chain keeps, or None for no clipping.
        precision: of the numbers inside the graph; its inputs and outputs are float32 and int32 whatever this says.
        weights: sha256 of the weights that it was exported from, or None.
        ddpmx: the version that wrote this.

    Images are in [−1, 1], t is the whole number 0…T−1.
    """

    shape: tuple[int, int, int]
    timesteps: int = 1000
    schedule: str = "linear"
    schedule_params: Mapping[str, float] = field(default_factory=dict)
    prediction: Prediction = "eps"
    variance: Variance = "fixed_large"
    clip: float | None = 1.0
    precision: Precision = "fp32"
    weights: str | None = None
    ddpmx: str = ""
    _schedule: Schedule = field(init=False, repr=False, compare=False)
    _coefficients: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and that they fit together.

        Raises:
            SpecError: they do not.
        """
        shape = self.shape
        if not (isinstance(shape, (tuple, list)) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            raise SpecError(f"shape must be three whole numbers above 0, [C, H, W], not {shape!r}")
        if int(shape[0]) * int(shape[1]) * int(shape[2]) > MAX_ELEMENTS:
            raise SpecError(f"shape {list(shape)} is more than {MAX_ELEMENTS} numbers for one image")
        for name, value, choices in (
            ("prediction", self.prediction, PREDICTIONS),
            ("variance", self.variance, VARIANCES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in choices:
                raise SpecError(f"{name} is {value!r}", hint=f"one of: {', '.join(choices)}")
        clip = self.clip
        if clip is not None and not (is_number(clip) and clip > 0):
            raise SpecError(f"clip must be a number above 0, or null for none, not {clip!r}")
        if self.weights is not None and not (isinstance(self.weights, str) and _SHA256.fullmatch(self.weights)):
            raise SpecError("weights must be a sha256 of 64 hexadecimal digits")
        if not isinstance(self.ddpmx, str) or not isinstance(self.schedule, str):
            raise SpecError("ddpmx and schedule must be text")
        if not self.ddpmx.isprintable():
            raise SpecError("ddpmx must be a version, and this cannot be printed")
        if not isinstance(self.schedule_params, Mapping):
            raise SpecError("schedule_params must be an object")
        try:
            params = schedule_params(self.schedule, self.schedule_params)
            schedule = make_schedule(self.schedule, self.timesteps, params)
        except InputError as error:
            raise SpecError(error.fact, note=error.note, hint=error.hint) from error
        coefficients = make_table(schedule, self.prediction, self.variance).coefficients.astype("<f4")
        set_once = object.__setattr__
        set_once(self, "shape", tuple(shape))
        set_once(self, "schedule_params", params)
        set_once(self, "clip", None if clip is None else float(clip))
        set_once(self, "_schedule", schedule)
        set_once(self, "_coefficients", f"{zlib.crc32(coefficients.tobytes()):08x}")

    def make_schedule(self) -> Schedule:
        """The variance schedule."""
        return self._schedule

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed.

        Raises:
            SpecError: the result does not fit together.
        """
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with a checksum of the float32 coefficients of the whole chain."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _field_names()}
        values["shape"] = list(self.shape)
        values["schedule_params"] = dict(self.schedule_params)
        values["coefficients"] = self._coefficients
        return values

    @classmethod
    def from_json(cls, values: object) -> ModelSpec:
        """The spec that :meth:`to_json` made.

        ``coefficients``, where present, must be what this ddpmx computes: a schedule that means something else here
        than where the file was written would give wrong images without an error.

        Raises:
            SpecError: not such an object, an unknown or a missing field, values out of range, or another checksum.
        """
        if not isinstance(values, dict):
            raise SpecError("a spec is a JSON object", note=f"this is {type(values).__name__}")
        values = dict(values)
        checksum = values.pop("coefficients", None)
        if unknown := sorted(set(map(str, values)) - set(_field_names())):
            raise SpecError(
                f"the spec has fields that this ddpmx does not know: {', '.join(unknown)[:200]}",
                note=f"it was written by ddpmx {values.get('ddpmx') or 'of no stated version'}"[:200],
                hint="a newer ddpmx may read it",
            )
        if "shape" not in values:
            raise SpecError("the spec does not say the shape of an image", hint='"shape": [C, H, W]')
        spec = cls(**values)
        if checksum is not None and checksum != spec.to_json()["coefficients"]:
            raise SpecError(
                f"the schedule {spec.schedule!r} gives other coefficients here than where the file was written",
                note=f"checksum {checksum!r} in the file, {spec.to_json()['coefficients']!r} here",
                hint='the file is damaged, or was edited by hand: then leave "coefficients" out',
            )
        return spec

    def to_text(self) -> str:
        """One line of text: a prefix, its length, its CRC and compact JSON.

        Raises:
            SpecError: it would be longer than :data:`MAX_TEXT` bytes.
        """
        text = seal(PREFIX, self.to_json())
        if len(text) > MAX_TEXT:
            raise SpecError(f"the spec takes {len(text)} bytes, and a model file holds {MAX_TEXT}")
        return text

    @classmethod
    def from_text(cls, text: str) -> ModelSpec:
        """The spec that :meth:`to_text` made.

        Raises:
            SpecError: a foreign, shortened or changed text, or what :meth:`from_json` refuses.
        """
        return cls.from_json(unseal(PREFIX, text))


def _field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(ModelSpec) if f.init]
