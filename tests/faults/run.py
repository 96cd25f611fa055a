#!/usr/bin/env python
"""Commands whose n-th write, open, fsync, rename or mkdir fails: old outputs stay whole, nothing is left, and it is said.

    python tests/faults/run.py --count 2000 --seed 0

A process imports everything once and forks for each case. The fault is in the C library, so it meets every writer, whatever
language it is written in. Linux, with a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from faults.world import COMMANDS, LEFT, WHOLE, make, prepare, run_here, tree  # noqa: E402

KINDS = {
    "full disk": (errno.ENOSPC, True),
    "no space once": (errno.ENOSPC, False),
    "I/O error": (errno.EIO, False),
    "no permission": (errno.EACCES, False),
    "interrupted": (errno.EINTR, False),
    "quota": (errno.EDQUOT, True),
    "file size": (errno.EFBIG, False),
}
"""Errors by name, and whether all later calls that need space fail as well. "file size" is the kernel's own limit."""


@dataclass
class World:
    """What a command finds, what it leaves without a fault, and how many calls it makes."""

    folder: Path
    old: dict[str, bytes]
    new: dict[str, dict[str, bytes]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    varies: dict[str, set[str]] = field(default_factory=dict)


def forked(command, folder: Path, arm=lambda: None) -> tuple[int, str, int, int]:
    """Run a command in a process of its own: (exit code, standard error, calls made, faults met)."""
    out = folder.with_name(folder.name + ".out")
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number in (1, 2):
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            arm()
            code = run_here(command, folder)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            counts = [LIBRARY.fault_count(), LIBRARY.fault_hit()] if LIBRARY else [0, 0]
            if LIBRARY:
                LIBRARY.fault_arm(b"", 0, 0, 0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            sys.stderr.flush()
            sys.stdout.flush()
            with open(f"{out}.counts", "w") as stream:
                stream.write(f"{counts[0]} {counts[1]}")
            os._exit(code)
    _, status = os.waitpid(child, 0)
    text = out.read_text(errors="replace")
    counts_file = Path(f"{out}.counts")
    calls, hits = map(int, counts_file.read_text().split()) if counts_file.exists() else (0, 0)
    counts_file.unlink(missing_ok=True)
    out.unlink()
    return os.waitstatus_to_exitcode(status), text, calls, hits


def build_world(root: Path, names: list[str]) -> World:
    folder = root / "world"
    folder.mkdir()

    def call(command) -> None:
        code, text, _, _ = forked(command, folder)
        assert code == 0, text

    make(folder, call, names)
    world = World(folder, tree(folder))
    for name in names:
        command = COMMANDS[name]
        for repeat in range(2):
            case = root / "case"
            shutil.copytree(folder, case)
            code, text, calls, _ = forked(command, case, lambda case=case: arm(case, 0, 0, False))
            assert code == 0, (name, text)
            found = tree(case)
            assert not any(LEFT.search(path) for path in found), (name, sorted(found))
            shutil.rmtree(case)
            if repeat == 0:
                world.new[name], world.calls[name] = found, calls
            else:
                assert found.keys() == world.new[name].keys()
                world.varies[name] = {path for path in found if found[path] != world.new[name][path]}
    return world


def arm(case: Path, nth: int, number: int, for_ever: bool) -> None:
    LIBRARY.fault_arm(os.fsencode(case) + b"/", nth, number, int(for_ever))


def end_the_wait(gives_up: bool) -> None:
    """A training waits where the disk is full. Once it does, let the user give up, or let there be space again."""
    from ddpm_export.training import session

    def sleep(_: float) -> None:
        if gives_up:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            LIBRARY.fault_end()

    session.FULL_DISK_SECONDS = 0.01  # type: ignore[misc]
    time.sleep = sleep  # type: ignore[assignment]


def complaint(world: World, name: str, case: Path, code: int, text: str, hits: int) -> str | None:
    """What is wrong with the end of a case, or None."""
    found, old, new, varies = tree(case), world.old, world.new[name], world.varies[name]
    if "Traceback" in text or "Exception ignored" in text:
        return f"a traceback: {text.strip().splitlines()[-1]}"
    if code not in (0, 130 if "Training waits" in text else 2, 2):
        return f"exit code {code}"
    if code and not re.search(r"^Error: .+" if code == 2 else r"^saved .+", text, re.M):
        return f"exit code {code} without a word"
    if code == 2 and not hits:
        return f"refused without a fault: {text.strip()[-200:]}"
    for path, data in found.items():
        if path.endswith("/") and any(other.startswith(path) for other in new):
            continue  # an empty folder for what could not be written
        if path not in old and path not in new:
            return f"left behind: {path}"
        if data != old.get(path) and data != new.get(path) and path not in varies:
            if path.endswith(".json") and b'"before"' in data and code == 0:
                continue  # a plan's sidecar that describes the plan before as well
            return f"spoiled: {path}"
    if lost := [path for path in old if path in new and path not in found]:
        return f"lost: {lost[0]}"
    for start in WHOLE:
        inside = [path for path in {*found, *old, *new} if path.startswith(start)]
        groups = {path.split("/")[-2] if "checkpoints/" in start else "" for path in inside}
        for group in groups:
            where = start + (f"{group}/" if group and group != "checkpoints" else "")
            part, before, after = (
                {path: data for path, data in state.items() if path.startswith(where) and path not in varies}
                for state in (found, old, new)
            )
            if part not in (before, after) and not (not before and set(part) <= {where}):
                return f"a mixture: {where}"
    if code == 0 and found.keys() != new.keys():
        return f"exit code 0, and not done: {sorted(found.keys() ^ new.keys())[:3]}"
    from ddpmx.errors import DdpmxError
    from ddpmx.formats.plan_file import read_plan

    try:
        read_plan(case / "gaussian.plan")
    except DdpmxError as error:
        return f"the plan cannot be read: {error}"
    return None


def case_of(world: World, seed: int, number: int) -> tuple[str, str, int]:
    """(command, kind of fault, the call that fails) of a case."""
    rng = random.Random(f"{seed} {number}")
    name = list(world.new)[number % len(world.new)]
    kind = rng.choice(list(KINDS))
    most = max(len(data) for data in world.new[name].values()) if kind == "file size" else world.calls[name]
    return name, kind, rng.randint(1, most)


def run_case(world: World, root: Path, seed: int, number: int) -> tuple[str, str, str | None, int]:
    name, kind, nth = case_of(world, seed, number)
    case = root / "case"
    shutil.copytree(world.folder, case)
    error, for_ever = KINDS[kind]

    def start() -> None:
        if kind == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (nth, resource.RLIM_INFINITY))
            arm(case, 0, 0, False)
        else:
            arm(case, nth, error, for_ever)
        if name in ("train", "resume"):
            end_the_wait(gives_up=nth % 2 == 0)

    code, text, _, hits = forked(COMMANDS[name], case, start)
    wrong = complaint(world, name, case, code, text, hits or kind == "file size")
    shutil.rmtree(case)
    return name, kind, wrong and f"case {number}: {name}, {kind} at {nth}: {wrong}", code


def compile_shim(folder: Path) -> Path:
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c"), "-ldl"], check=True)
    return library


LIBRARY = ctypes.CDLL(None) if os.environ.get("LD_PRELOAD", "").endswith("shim.so") else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="only these commands")
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if LIBRARY is None:
        with tempfile.TemporaryDirectory(prefix="ddpmx-") as folder:
            environment = os.environ | {"LD_PRELOAD": str(compile_shim(Path(folder))), "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, __file__, *argv], env=environment).returncode
    wrong, begun, table = [], time.monotonic(), Counter[tuple[str, int]]()
    with tempfile.TemporaryDirectory(prefix="ddpmx-") as folder:
        root = Path(os.path.realpath(folder))
        prepare(root, args.only, args.plant)
        world = build_world(root, args.only)
        print("calls:", ", ".join(f"{name} {calls}" for name, calls in world.calls.items()), flush=True)
        for number in range(args.first, args.first + args.count):
            name, kind, fault, code = run_case(world, root, args.seed, number)
            table[name, code] += 1
            table[kind, code] += 1
            if fault:
                wrong.append(fault)
                print("WRONG", fault, flush=True)
            if (done := number - args.first + 1) % 100 == 0:
                print(f"{done} of {args.count} in {time.monotonic() - begun:.0f} s: {len(wrong)} wrong", flush=True)
    print(f"\n{'':<16}{'done':>8}{'refused':>8}{'given up':>10}")
    for name in (*args.only, *KINDS):
        print(f"{name:<16}{table[name, 0]:>8}{table[name, 2]:>8}{table[name, 130]:>10}")
    print(f"{args.count} faults in {time.monotonic() - begun:.0f} s: {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
