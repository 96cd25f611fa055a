#!/usr/bin/env python
"""SIGINT and SIGTERM at random times over all commands: exit codes 130 and 143, no traceback, no words of foreign code.

    python tests/faults/signals.py --count 200 --seed 0

Each command is a process of its own, from its start on. A signal that comes when all is done may also end it with 0.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from faults.world import COMMANDS, LEFT, make, tree  # noqa: E402

MORE = {
    name: tuple(shlex.split(line))
    for name, line in {
        "info": "info gaussian.onnx",
        "doctor": "doctor",
        "bench": "bench gaussian.onnx --seconds 0.2 --batch 1",
        "self-test": "parity gaussian.onnx --self-test --report report",
    }.items()
}
EVERY = {**COMMANDS, **MORE}
LATE = 2.0
"""Seconds after which a command that ends with 0 has not just been done when its signal came."""
IN_PLACE = "import sys\nsys.argv[0] = 'ddpmx'\nfrom ddpmx_cli.entry import run\nprint('begun', flush=True)\nrun()"


def start(command, folder: Path) -> subprocess.Popen[str]:
    """Run a command as its script does."""
    return subprocess.Popen(
        [sys.executable, "-c", IN_PLACE, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what was started in the background may have Ctrl-C switched off, and its children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def whole(command, folder: Path) -> tuple[int, str, float]:
    """Run it to its end: exit code, standard error, seconds."""
    begun = time.monotonic()
    process = start(command, folder)
    _, err = process.communicate()
    return process.returncode, err, time.monotonic() - begun


def stopped(command, folder: Path, number: int, after: float) -> str | None:
    """Run a command and send it a signal; what is wrong with its end, or None."""
    process = start(command, folder)
    assert process.stdout is not None
    process.stdout.readline()  # before that it is the interpreter's start, and not ours
    time.sleep(after)
    sent = time.monotonic()
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "it does not end"
    if process.returncode == 0 and time.monotonic() - sent > LATE:
        return "the signal was swallowed"
    if process.returncode not in (128 + number, 0):
        return f"exit code {process.returncode}: {err.strip()[-300:]}"
    if process.returncode and re.search(r"^Error: |Traceback|Exception ignored", err, re.M):
        return f"words: {err.strip()[-300:]}"
    if left := [path for path in tree(folder) if LEFT.search(path)]:
        return f"left behind: {left[0]}"
    return None


def main(argv: list[str]) -> int:
    """0 if every exit code is right, 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=EVERY, default=list(EVERY), help="only these commands")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong, codes = [], Counter[str]()
    with tempfile.TemporaryDirectory(prefix="ddpmx-") as folder:
        world, case = Path(folder) / "world", Path(folder) / "case"
        world.mkdir()

        def call(command) -> None:
            code, err, _ = whole(command, world)
            if code and command[0] != "build":  # without TensorRT there is no plan
                raise RuntimeError(err)

        make(world, call, [name for name in args.only if name not in MORE])
        seconds: dict[str, float] = {}
        missing: dict[str, str] = {}
        for number in range(args.count):
            rng = random.Random(f"{args.seed} {number}")
            name = args.only[number % len(args.only)]
            shutil.copytree(world, case)
            if name not in seconds:
                code, err, seconds[name] = whole(EVERY[name], case)
                if code:
                    missing[name] = err.strip()[-300:]
                    print(f"not verified here: {name}: {missing[name]}", flush=True)
                shutil.rmtree(case)
                shutil.copytree(world, case)
            if name in missing:
                shutil.rmtree(case)
                continue
            which, after = rng.choice((signal.SIGINT, signal.SIGTERM)), rng.uniform(0, seconds[name])
            if fault := stopped(EVERY[name], case, which, after):
                wrong.append(fault)
                print(f"WRONG signal {number}: {name}, {which.name} after {after:.2f} s: {fault}", flush=True)
            codes[name] += 1
            shutil.rmtree(case)
    print(", ".join(f"{name} {count}" for name, count in codes.items()))
    print(f"{sum(codes.values())} signals: {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
