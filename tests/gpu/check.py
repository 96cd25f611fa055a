"""Runs everything that needs an NVIDIA GPU, by one command, and writes one report to paste.

    python tests/gpu/check.py [--quick] [--minutes M] [--no-peers] [--out gpu-report] [--engine-dir DIR] [--onnx-dir DIR]

It makes the paper's CIFAR-10 network (trained for a minute if torch has CUDA), exports fp32 and fp16, builds plans, and
runs tests/gpu, parity, bench and the same network in other libraries, each in a process of its own with a time limit. A
failing step does not stop the rest. OUT/gpu-report.md is the file to paste; it contains no names of users or places.
With --minutes the most telling steps come first, none goes beyond that time, and none takes more than a quarter of it; the
report is written after every step, so that it tells what was seen even if the machine goes away.
Without torch, as on a Jetson, --onnx-dir takes model.onnx, model-fp16.onnx and their .parity.npz, which ddpmx export made
on another machine.

Exit code 0 if everything that has to hold was seen to hold (goals of speed do not count), 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # for `gpu`, wherever this is started

from ddpmx.device.discovery import Gpus, gpus  # noqa: E402
from ddpmx.system import machine  # noqa: E402
from gpu import found, report  # noqa: E402
from gpu.plan import PRECISIONS, Place, ddpmx, make_steps, within_minutes  # noqa: E402
from gpu.steps import Result, Step, run_until  # noqa: E402

PARTS = 4
"""No step takes more than this part of the time that --minutes allows."""

# --- the whole check -------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> Place:
    """Make empty folders. A folder that is not a report of this check is left alone.

    Raises:
        SystemExit: the output folder is something else, or files are missing.
    """
    out: Path = options.out.absolute()
    place = Place(
        out,
        options.engine_dir.absolute() if options.engine_dir else out / "engines",
        options.onnx_dir.absolute() if options.onnx_dir else out,
    )
    if options.onnx_dir:
        wanted = [path for precision in PRECISIONS for path in (place.model(precision), place.record(precision))]
        if missing := [path.name for path in wanted if not path.is_file()]:
            raise SystemExit(
                f"Error: {options.onnx_dir}: there is no {', '.join(missing)}\nHint: where torch is, ddpmx export and "
                "ddpmx export --fp16 -o model-fp16.onnx write these files"
            )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / report.NAME).exists())):
        raise SystemExit(f"Error: {options.out}: exists, and is not a report of this check\nHint: another --out")
    for folder in (options.engine_dir, options.onnx_dir):
        if folder and place.out in (folder.resolve(), *folder.resolve().parents):
            raise SystemExit(f"Error: {folder}: lies in {options.out}, which is emptied\nHint: another --out")
    shutil.rmtree(out, ignore_errors=True)
    for folder in (out / "logs", place.engines, place.large.engines):
        folder.mkdir(parents=True, exist_ok=True)
    (out / report.NAME).write_text("not finished\n")
    return place


def look_around(place: Place, runner: Callable[[Step], Result]) -> tuple[list[Result], dict[str, Any] | None]:
    """The result of `ddpmx doctor`, and its output, without which no steps can be planned."""
    result = runner(Step("doctor", ddpmx("doctor", "--json"), 600, "always"))
    with contextlib.suppress(OSError, ValueError):
        text = (place.out / "logs" / "doctor.log").read_text(encoding="utf-8", errors="replace")
        found: dict[str, Any] = json.loads(text[text.index("{") :])
        if found["machine"]["gpus"]:
            return [result], found
        result = dataclasses.replace(result, status="failed", why=str(found["machine"]["gpu_trouble"]))
    return [dataclasses.replace(result, status="failed", why=result.why or "it printed nothing")], None


def main(
    arguments: Sequence[str] | None = None,
    *,
    devices: Gpus | None = None,
    plan: Callable[[argparse.Namespace, Place, dict[str, Any]], list[Step]] | None = None,
    look: Callable[[Place, Callable[[Step], Result]], tuple[list[Result], dict[str, Any] | None]] = look_around,
) -> int:
    """The check.

    Args:
        arguments: the command line.
        devices: the GPUs; by default those that the driver lists.
        plan: makes the steps; by default :func:`gpu.plan.make_steps`, or with ``--minutes`` ``within_minutes``.
        look: runs ``ddpmx doctor``.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="folder for the report and everything else"
    )
    parser.add_argument("--quick", action="store_true", help="a small network and few steps: under two minutes")
    parser.add_argument("--minutes", type=float, help="how long it may take; the most telling steps come first")
    parser.add_argument("--no-peers", action="store_true", help="without runs of other libraries")
    parser.add_argument("--engine-dir", type=Path, help="folder for plans; those that fit are not built again")
    parser.add_argument("--onnx-dir", type=Path, help="model.onnx, model-fp16.onnx and their .parity.npz")
    options = parser.parse_args(arguments)
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: more than 0 are needed")
    if plan is None:
        plan = within_minutes if options.minutes and not (options.quick or options.onnx_dir) else make_steps
    here = devices or gpus()
    if not here.devices:
        print(
            f"Error: there is no NVIDIA GPU here, and this check needs one\nNote: {here.trouble}\n"
            "Hint: `make test` runs all tests that need no GPU; on a machine with a GPU `nvidia-smi` must list it",
            file=sys.stderr,
        )
        return 2
    place = prepare(options)
    begun, results = time.monotonic(), []
    before = machine.gpu_state()
    environment = {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(place.out / "cache")}

    ends, longest = (
        (begun + 60 * options.minutes, 60 * options.minutes / PARTS) if options.minutes else (None, math.inf)
    )

    def runner(step: Step) -> Result:
        print(f"{step.name} …", flush=True)
        logs = place.out / "logs"
        result = run_until(ends, step, logs, cwd=ROOT, environment=environment, longest=longest)
        why = f": {result.why}" if result.why else ""
        print(f"{step.name}: {result.status}, {result.seconds:.0f} s{why}", flush=True)
        return result

    def write(verdict: str = "") -> tuple[dict[str, Any], Path]:
        """The report of what there is so far, with this verdict unless a step has failed."""
        facts = found.gather(
            place.out,
            results,
            quick=options.quick,
            network=_network(options, doctor),
            doctor=doctor,
            state={"before": _plain(before), "after": _plain(machine.gpu_state()), "jetson": _plain(machine.jetson())},
            cpu=_plain(machine.cpu()),
            commit=_commit(),
            seconds=time.monotonic() - begun,
            engines=place.engines,
        )
        if verdict and not facts["verdict"].startswith("FAILED"):
            facts["verdict"] = verdict
        return facts, report.write(place.out, facts, hidden={str(ROOT): "REPO", str(place.out): "OUT"})

    stopped, doctor = False, None
    try:
        results, doctor = look(place, runner)
        steps = plan(options, place, doctor) if doctor else []
        for number, step in enumerate(steps):
            try:
                results.append(runner(step))
                write("INCOMPLETE: not finished yet")
            except KeyboardInterrupt:
                stopped = True
                results += [Result(s.name, s.must, "not run", why="stopped by Ctrl-C") for s in steps[number:]]
                break
    except KeyboardInterrupt:
        stopped = True
    facts, written = write("INCOMPLETE: stopped by Ctrl-C" if stopped else "")
    print(f"\n{facts['verdict']}\n{written}: paste this file", flush=True)
    return 130 if stopped else 0 if facts["verdict"].startswith("HOLDS") else 1


def _network(options: argparse.Namespace, doctor: dict[str, Any] | None) -> str:
    """How the network was made, in words."""
    if options.onnx_dir:
        return "files of --onnx-dir, exported on another machine"
    if options.minutes and not options.quick:
        return (
            "a small U-Net, 16×16 grey, trained for 300 steps on Fashion-MNIST; speed by the paper's CIFAR-10 U-Net, "
            "32×32×3, random weights"
        )
    if options.quick:
        return (
            "a small U-Net, 16×16 grey, trained for 300 steps on Fashion-MNIST (--quick: figures of speed mean nothing)"
        )
    if doctor and doctor["libraries"]["torch"].get("gpu"):
        return (
            "the paper's CIFAR-10 U-Net, 32×32×3, trained for 600 steps on Fashion-MNIST in colour and twice as large"
        )
    return "the paper's CIFAR-10 U-Net, 32×32×3, random weights: its free chain is not judged, since it saturates"


def _plain(thing: Any) -> Any:
    return None if thing is None else dataclasses.asdict(thing)


def _commit() -> str | None:
    """The commit of this checkout; None outside a clone."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or None
    return None


if __name__ == "__main__":
    sys.exit(main())
