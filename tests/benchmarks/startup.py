"""Start-up times: imports over those of Python and numpy, ``ddpmx --help`` over that of Python.

python tests/benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CASES = (
    ("import ddpmx, over starting Python", ["-c", "import ddpmx"], ["-c", "pass"], 0.05),
    ("import ddpmx.pipeline, over import numpy", ["-c", "import ddpmx.pipeline"], ["-c", "import numpy"], 0.05),
    ("ddpmx --help, over starting Python", ["-m", "ddpmx_cli.main", "--help"], ["-c", "pass"], 0.3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for name, case, base, goal in CASES:
        extra = [seconds(case) - seconds(base) for _ in range(rounds + 1)][1:]
        print(f"{name}: median {statistics.median(extra):.3f} s (goal: at most {goal} s)")


def seconds(arguments: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
