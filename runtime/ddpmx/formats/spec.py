"""ModelSpec: the description of a model, as one short text that survives in every kind of model file."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import LEARNED_VARIANCES, PREDICTIONS, VARIANCES, Prediction, Variance, make_table
from ddpmx.diffusion.schedule import Schedule, is_number, make_schedule, schedule_params
from ddpmx.errors import InputError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats.envelope import unwrap, wrap

PREFIX = "ddpmx1"

MAX_TEXT = 4095
"""Bytes: the longest name of a network in a TensorRT plan."""

MAX_ELEMENTS = 2**28
"""C·H·W: 1 GiB of float32 for one image. A larger shape is a damaged file."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
EIGHT_BITS: tuple[Precision, ...] = ("int8", "fp8")
"""Those whose convolutions compute in 8 bits, by explicit Q/DQ; what is beside them is in half precision."""

MAX_CLASSES = 1 << 20
MAX_CONDITION = 1 << 12
"""Channels. Both limits are 50 times what is in use; a larger number is a damaged file."""

MAX_CLASS_NAME = 128
"""Bytes of a class's name in UTF-8."""

BETAS = "betas"
"""The schedule that is an array of β, not a formula."""

ConditioningShapes = Mapping[str, tuple[int, ...]]
"""The inputs of a network besides x and t, each with its dimensions for one image."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_UNLESS_SET: dict[str, object] = {
    "classes": None,
    "self_condition": False,
    "condition": None,
    "null_class": False,
    "class_names": None,
    "betas": None,
}
"""Fields that are not written at these values, so that the text of models from before these fields stays the same."""


def beside(precision: Precision) -> Precision:
    """What a graph computes in where it is not in 8 bits: half precision; any other precision as it is."""
    return "fp16" if precision in EIGHT_BITS else precision


def input_type(name: str) -> type[np.int32] | type[np.float32]:
    """The element type of an input: int32 for t and y, float32 for all others."""
    return np.int32 if name in ("t", "y") else np.float32


@dataclass(frozen=True)
class ModelSpec:
    """The description of a network: everything but its weights.

    Attributes:
        shape: (C, H, W) of one image.
        timesteps: T. The network is evaluated at t = 0…T−1.
        schedule: name of the variance schedule, see :data:`ddpmx.diffusion.schedule.SCHEDULES`, or ``betas``.
        schedule_params: its parameters, defaults filled in.
        prediction: the network's output: ``eps``, ``x0``, ``v``, or ``mu``, the mean of x_{t−1} (Ho et al. 2020, Table 2).
        variance: σ² of the ancestral chain, ``fixed_small`` (β̃), ``fixed_large`` (β), or by the network's second output
            ``var``: ``learned_range``, between the two, or ``learned``, exp(var).
        clip: the largest |x̂_0| that the chain keeps, or None for no clipping.
        precision: of the numbers inside the graph; its inputs and outputs are float32 and int32 in every precision.
        weights: sha256 of the weights that were exported, or None.
        ddpmx: the version that wrote this.
        classes: number of classes of a class-conditional network, which takes a label 0…classes−1 as ``y``; None without.
        self_condition: whether it takes x̂_0 of the step before as ``x0_prev``, which is 0 in the first step.
        condition: number of channels of the condition image ``cond``, of the same size as the images; None without.
        null_class: whether y = classes stands for "no class", which classifier-free guidance needs.
        class_names: the name of each class, all different: printable text without a comma, no whole number; None without.
        betas: with the schedule ``betas``, β_t, float64 [T], read-only. It is too long for the text, which holds only its
            checksum; each kind of file stores the array elsewhere.

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
    classes: int | None = None
    self_condition: bool = False
    condition: int | None = None
    null_class: bool = False
    class_names: tuple[str, ...] | None = None
    betas: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    _betas: str = field(init=False, repr=False)  # the checksum of the array, compared in place of it
    _schedule: Schedule = field(init=False, repr=False, compare=False)
    _coefficients: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and that they are consistent.

        Raises:
            SpecError: they are not.
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
                raise SpecError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        clip = self.clip
        if clip is not None and not (is_number(clip) and clip > 0):
            raise SpecError(f"clip must be a number above 0, or null for none, not {clip!r}")
        if self.weights is not None and not (isinstance(self.weights, str) and _SHA256.fullmatch(self.weights)):
            raise SpecError("weights must be a sha256 of 64 hexadecimal digits")
        if not isinstance(self.ddpmx, str) or not isinstance(self.schedule, str):
            raise SpecError("ddpmx and schedule must be text")
        if not self.ddpmx.isprintable():
            raise SpecError("ddpmx must be a printable version")
        if not isinstance(self.schedule_params, Mapping):
            raise SpecError("schedule_params must be an object")
        for name, flag in (("self_condition", self.self_condition), ("null_class", self.null_class)):
            if type(flag) is not bool:
                raise SpecError(f"{name} must be true or false, not {flag!r}")
        if self.null_class and self.classes is None:
            raise SpecError("null_class is for networks with classes, and this one has none")
        for name, count, most in (
            ("classes", self.classes, MAX_CLASSES),
            ("condition", self.condition, MAX_CONDITION),
        ):
            if count is not None and not (type(count) is int and 1 <= count <= most):
                raise SpecError(f"{name} must be a whole number from 1 to {most}, or null for none, not {count!r}")
        names = None if self.class_names is None else self._class_names()
        if (self.condition or 0) * int(shape[1]) * int(shape[2]) > MAX_ELEMENTS:
            raise SpecError(f"condition {self.condition} is more than {MAX_ELEMENTS} numbers for one image")
        betas = None
        try:
            if self.schedule == BETAS or self.betas is not None:
                betas, params = self._free_betas(), {}
                schedule = Schedule.from_betas(betas)
            else:
                params = schedule_params(self.schedule, self.schedule_params)
                schedule = make_schedule(self.schedule, self.timesteps, params)
        except InputError as error:
            raise SpecError(error.fact, note=error.note, hint=error.hint) from error
        coefficients = make_table(schedule, self.prediction, self.variance).coefficients.astype("<f4")
        set_once = object.__setattr__
        set_once(self, "shape", tuple(shape))
        set_once(self, "schedule_params", params)
        set_once(self, "clip", None if clip is None else float(clip))
        set_once(self, "class_names", names)
        set_once(self, "betas", betas)
        set_once(self, "_betas", "" if betas is None else free_betas.checksum(betas))
        set_once(self, "_schedule", schedule)
        set_once(self, "_coefficients", f"{zlib.crc32(coefficients.tobytes()):08x}")

    def _class_names(self) -> tuple[str, ...]:
        """The checked names of the classes."""
        names = self.class_names
        if self.classes is None:
            raise SpecError("class_names are for networks with classes, and this one has none")
        if not isinstance(names, (tuple, list)) or len(names) != self.classes:
            raise SpecError(f"class_names must be {self.classes} names, one for each class")
        for name in names:
            if not is_class_name(name):
                raise SpecError(
                    f"a class cannot have the name {name!r}"[:200],
                    note=f"a name is 1 to {MAX_CLASS_NAME} bytes of printable text without a comma, and no whole number",
                )
        if len(set(names)) < len(names):
            raise SpecError("class_names must differ from each other")
        return tuple(names)

    def _free_betas(self) -> NDArray[np.float64]:
        """The checked array of the schedule ``betas``."""
        if self.schedule != BETAS:
            raise InputError(f"betas belong to the schedule {BETAS!r}, and this is {self.schedule!r}")
        if self.betas is None:
            raise InputError(f"the schedule {BETAS!r} needs an array of β")
        if self.schedule_params:
            raise InputError(f"the schedule {BETAS!r} has no parameters", note=str(dict(self.schedule_params))[:200])
        betas = free_betas.as_betas(self.betas)
        if type(self.timesteps) is not int or self.timesteps != len(betas):
            raise InputError(f"there are {len(betas)} β, and timesteps is {self.timesteps!r}")
        return betas

    def make_schedule(self) -> Schedule:
        """The variance schedule."""
        return self._schedule

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The network's inputs besides x and t, each with its dimensions for one image: ``y``, ``x0_prev``, ``cond``."""
        found: dict[str, tuple[int, ...]] = {}
        if self.classes is not None:
            found["y"] = ()
        if self.self_condition:
            found["x0_prev"] = self.shape
        if self.condition is not None:
            found["cond"] = (self.condition, *self.shape[1:])
        return found

    @property
    def label_count(self) -> int:
        """How many values the input y may have: the classes, and one more with :attr:`null_class`; 0 without classes."""
        return 0 if self.classes is None else self.classes + self.null_class

    def class_number(self, name: str) -> int:
        """The class of this name, or the number itself in a text.

        Raises:
            InputError: no class has this name.
        """
        names = self.class_names or ()
        if name in names:
            return names.index(name)
        if _WHOLE_NUMBER.fullmatch(name):
            return int(name)
        count = self.classes or 0
        raise InputError(
            f"there is no class {name[:80]!r}",
            note="the classes of this model have no names" if count and not names else None,
            hint=f"the model's are {', '.join(names)}"[:200] if names else f"labels: 0…{count - 1}" if count else None,
        )

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """All inputs, each with its dimensions for one image. See :func:`input_type` for their element types."""
        return {"x": self.shape, "t": (), **self.conditioning_shapes}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The network's outputs, each float32 [batch, C, H, W]: its prediction, and ``var`` with a learned variance."""
        return (self.prediction, "var") if self.learns_variance else (self.prediction,)

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second output, ``var``."""
        return self.variance in LEARNED_VARIANCES

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed.

        Raises:
            SpecError: the result is not consistent.
        """
        return dataclasses.replace(self, **changes)

    def to_json(self, *, whole: bool = False) -> dict[str, Any]:
        """Plain JSON values, with a checksum of the float32 coefficients of the whole chain.

        Args:
            whole: with the array of the schedule ``betas``, not only its checksum.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _field_names()}
        for name, default in _UNLESS_SET.items():
            if values[name] is default:
                del values[name]
        if self.betas is not None:
            values["betas"] = self.betas.tolist() if whole else self._betas
        if self.class_names is not None:
            values["class_names"] = list(self.class_names)
        values["shape"] = list(self.shape)
        values["schedule_params"] = dict(self.schedule_params)
        values["coefficients"] = self._coefficients
        return values

    @classmethod
    def from_json(
        cls, values: object, *, betas: NDArray[np.float64] | None = None, where: str = '"betas"'
    ) -> ModelSpec:
        """The spec that :meth:`to_json` made.

        ``coefficients``, where present, must be what this ddpmx computes: a schedule that means something else here
        than where the file was written would give wrong images without an error.

        Args:
            values: the object.
            betas: the array of the schedule ``betas``, if the object holds only its checksum.
            where: the place where that array should be, for the message.

        Raises:
            SpecError: not such an object, an unknown or missing field, values out of range, another checksum, or the
                array of β is missing or does not match.
        """
        if not isinstance(values, dict):
            raise SpecError("a spec must be a JSON object", note=f"this is {type(values).__name__}")
        values = dict(values)
        checksum = values.pop("coefficients", None)
        if unknown := sorted(set(map(str, values)) - set(_field_names())):
            raise SpecError(
                f"the spec has fields that this ddpmx does not know: {', '.join(unknown)[:200]}",
                note=f"it was written by ddpmx {values.get('ddpmx') or 'of an unstated version'}"[:200],
                hint="a newer ddpmx may read it" if values.get("ddpmx") else f"it knows: {', '.join(_field_names())}",
            )
        if "shape" not in values:
            raise SpecError("the spec has no shape of an image", hint='"shape": [C, H, W]')
        declared = values.get("betas")
        if values.get("schedule") == BETAS and (declared is None or isinstance(declared, str)):
            if betas is None:
                raise SpecError(
                    "the schedule is an array of β, and the array is missing", hint=f"it should be in {where}"
                )
            values["betas"] = betas
        spec = cls(**values)
        if isinstance(declared, str) and declared != spec._betas:
            raise SpecError(
                f"the array of β in {where} does not match the spec",
                note=f"checksum {ascii(declared)[:40]} in the spec, {spec._betas!r} there",
                hint="the file is damaged, or was assembled from two",
            )
        if checksum is not None and checksum != spec.to_json()["coefficients"]:
            raise SpecError(
                f"the schedule {spec.schedule!r} gives other coefficients here than in the file",
                note=f"checksum {checksum!r} in the file, {spec.to_json()['coefficients']!r} here",
                hint='the file is damaged, or was edited by hand: then remove "coefficients"',
            )
        return spec

    def to_text(self) -> str:
        """The spec as an envelope, one line of ASCII.

        Raises:
            SpecError: longer than :data:`MAX_TEXT` bytes.
        """
        text = wrap(PREFIX, self.to_json())
        if len(text) > MAX_TEXT:
            raise SpecError(f"the spec takes {len(text)} bytes, and the most is {MAX_TEXT}")
        return text

    @classmethod
    def from_text(cls, text: str, *, betas: NDArray[np.float64] | None = None, where: str = '"betas"') -> ModelSpec:
        """The spec that :meth:`to_text` made.

        Raises:
            SpecError: not such a text, truncated or changed, or refused by :meth:`from_json`.
        """
        return cls.from_json(unwrap(PREFIX, text), betas=betas, where=where)


def is_class_name(name: object) -> bool:
    """Whether a class can have this name in a model file: see :attr:`ModelSpec.class_names`."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name == name.strip(" ")
        and 1 <= len(name.encode("utf-8", "replace")) <= MAX_CLASS_NAME
        and "," not in name
        and not _WHOLE_NUMBER.fullmatch(name)
    )


def _field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(ModelSpec) if f.init]
