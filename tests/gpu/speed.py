"""Measures a plan's time for many images, from Python to uint8 on the host, without loading and the first chain.

python tests/gpu/speed.py model.plan OUT.json [COUNT [STEPS]]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ddpmx
from ddpmx.errors import DdpmxError


def main(plan: str, output: str, count: str = "256", steps: str = "") -> None:
    n, sampling = int(count), {"steps": int(steps)} if steps else {}
    with ddpmx.load(plan) as pipeline:
        batch = pipeline.check_request(n, batch=n)  # the largest batch that the plan takes
        begun = time.perf_counter()
        pipeline.generate(n, batch=batch, **sampling)  # the first run compiles, measures and captures
        first, rounds = time.perf_counter() - begun, []
        for seed in (1, 2, 3):
            begun = time.perf_counter()
            pipeline.generate(n, seed=seed, batch=batch, **sampling)
            rounds.append(time.perf_counter() - begun)
        found = {
            "plan": Path(plan).name,
            "runs_on": pipeline.backend,
            "images": n,
            "batch": batch,
            "steps": len(pipeline.table(**sampling)),
            "first_s": first,
            "seconds": rounds,
        }
    Path(output).write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DdpmxError as error:
        sys.exit(f"Error: {error}")
