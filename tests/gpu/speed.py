"""Measures a plan's time for many images, from Python to uint8 on the host, without loading and the first chain.

python tests/gpu/speed.py model.plan OUT.json [COUNT [STEPS]]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ddpmx
from ddpmx.errors import DdpmxError
from ddpmx.pipeline import Pipeline


def measure(pipeline: Pipeline, name: str, n: int, *, rounds: int, **sampling: Any) -> dict[str, Any]:
    """The seconds for ``n`` images, round by round, as JSON values.

    Args:
        pipeline: the model.
        name: of the plan.
        n: images.
        rounds: how often they are drawn after the first time.
        **sampling: of the chain.
    """
    batch = pipeline.check_request(n, batch=n)  # the largest batch that the plan takes
    seconds = []
    for seed in range(rounds + 1):  # the first run compiles, measures and captures
        begun = time.perf_counter()
        pipeline.generate(n, seed=seed, batch=batch, **sampling)
        seconds.append(time.perf_counter() - begun)
    return {
        "plan": name,
        "runs_on": pipeline.backend,
        "images": n,
        "batch": batch,
        "steps": len(pipeline.table(**sampling)),
        "first_s": seconds[0],
        "seconds": seconds[1:],
    }


def main(plan: str, output: str, count: str = "256", steps: str = "") -> None:
    sampling = {"steps": int(steps)} if steps else {}
    with ddpmx.load(plan) as pipeline:
        found = measure(pipeline, Path(plan).name, int(count), rounds=3, **sampling)
    Path(output).write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DdpmxError as error:
        sys.exit(f"Error: {error}")
