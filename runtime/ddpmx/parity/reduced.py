"""What a record knows of its network in real half precision or bfloat16, for machines that compute neither.

ONNX Runtime's CPU computes most of a half-precision graph in float32: it shows what rounding the weights does, and neither
the rounding after every operation nor an overflow. So the exporter runs the module itself with every such rounding, by the
same checks, and keeps their figures and the largest numbers in the record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ddpmx.errors import FileFormatError
from ddpmx.formats.spec import PRECISIONS, Precision
from ddpmx.parity.check import Check

HALF_MAX = 65504.0
"""The largest finite number of half precision."""

RANGE_BOUND = HALF_MAX / 4
"""The largest |activation| allowed: the record sees a few images, and other libraries scale or sum before they round."""

JUDGED: dict[str, str] = {"fp16": "module in real half", "bf16": "module in real bfloat16"}
RANGE = "largest |activation|"


@dataclass(frozen=True)
class Reduced:
    """The checks of the module in one reduced precision, each operation rounded.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        made_with: the backend that computed them.
        checks: their results.
        largest: the largest |activation| of each layer that computes in this precision, over everything that the ladder
            ran, largest first; infinity where one overflowed.
    """

    precision: Precision
    made_with: str
    checks: tuple[Check, ...]
    largest: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values. Null is infinity, or NaN in a check that was skipped."""
        return {
            "precision": self.precision,
            "made_with": self.made_with,
            "checks": [
                {
                    "name": check.name,
                    "value": _number(check.value),
                    "bound": check.bound,
                    "at_least": check.at_least,
                    "worst": check.worst,
                    "skipped": check.skipped,
                    "why": check.why,
                }
                for check in self.checks
            ],
            "largest": {name: _number(value) for name, value in self.largest.items()},
        }

    @classmethod
    def from_json(cls, values: Any) -> Reduced:
        """From :meth:`to_json`.

        Raises:
            FileFormatError: other values.
        """
        try:
            precision, checks, largest = values["precision"], values["checks"], values["largest"]
            if (
                precision not in JUDGED
                or precision not in PRECISIONS
                or not 1 <= len(checks) <= 64
                or len(largest) > 4096
            ):
                raise ValueError
            return cls(
                precision,
                _text(values["made_with"]),
                tuple(
                    Check(
                        _text(one["name"]),
                        _value(one),
                        _float(one["bound"], None),
                        at_least=bool(one["at_least"]),
                        worst=_text(one["worst"]),
                        skipped=None if one["skipped"] is None else _text(one["skipped"]),
                        why=_text(one["why"]),
                        judged=JUDGED[precision],
                    )
                    for one in checks
                ),
                {_text(name): _float(value, math.inf) for name, value in largest.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError("the record's checks in reduced precision cannot be read") from error


def range_check(precision: Precision, largest: dict[str, float]) -> Check | None:
    """The check that half's range is kept; None for bfloat16, which has float32's range, and where nothing is half.

    ``largest`` is in running order. What is too large in one layer is so in those that it is added to, so the first one
    that exceeds the bound is named.
    """
    if precision != "fp16" or not largest:
        return None
    beyond = [name for name, value in largest.items() if value > RANGE_BOUND]
    layer = beyond[0] if beyond else max(largest, key=largest.__getitem__)
    overflowed = [name for name, value in largest.items() if not math.isfinite(value)]
    return Check(
        RANGE,
        largest[layer],
        RANGE_BOUND,
        worst=f"in {layer}" + (f"; overflows in {overflowed[0]}" if overflowed else ""),
        why="a quarter of 65504, where half precision ends",
        judged=JUDGED[precision],
    )


def not_known(precision: Precision, made_with: str) -> Check:
    """The check that says that a record knows nothing of this precision, for a file that ran on a CPU."""
    return Check(
        f"{JUDGED[precision]}: every operation rounded, and the range",
        math.nan,
        0.0,
        skipped=f"the record knows float32 alone ({made_with}), and a CPU computes most of this graph in float32; the "
        f"record that the export in {precision} writes knows it, and so does the GPU that runs the plan",
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _value(one: dict[str, Any]) -> float:
    """A check's value. Null is what was not measured, or an overflow: NaN would say of it neither how much nor too much."""
    return _float(one["value"], math.nan if one["skipped"] is not None or one["at_least"] else math.inf)


def _float(value: Any, missing: float | None) -> float:
    if value is None and missing is not None:
        return missing
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError
    return value
