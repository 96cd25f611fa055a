"""What a record keeps of half precision comes back as it was."""

from __future__ import annotations

import json
import math

from ddpmx.parity.check import Check
from ddpmx.parity.reduced import RANGE, RANGE_BOUND, Reduced, range_check


def test_an_overflow_is_still_one_after_the_record():
    kept = range_check("fp16", {"a": 1.0, "b": math.inf})
    skipped = Check("free chain", math.nan, 0.9, at_least=True, skipped="untrained")
    made = Reduced("fp16", "by hand", (kept, skipped), {"a": 1.0, "b": math.inf})
    again = Reduced.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert (again.checks[0], again.largest) == (kept, made.largest)
    assert str(again.checks[0]).startswith(f"{RANGE}, module in real half: inf > {RANGE_BOUND:.3g}")
    assert math.isnan(again.checks[1].value)
    assert again.checks[1].skipped == "untrained"
