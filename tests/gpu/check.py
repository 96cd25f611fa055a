"""Runs everything that needs an NVIDIA GPU, by one command, and writes one report to paste.

    python tests/gpu/check.py [--quick] [--no-peers] [--out gpu-report] [--engine-dir DIR] [--onnx-dir DIR]

It makes the paper's CIFAR-10 network (trained for a minute if torch has CUDA), exports fp32 and fp16, builds plans, and
runs tests/gpu, parity, bench and the same network in other libraries, each in a process of its own with a time limit. A
failing step does not stop the rest. OUT/gpu-report.md is the file to paste; it contains no names of users or places.
Without torch, as on a Jetson, --onnx-dir takes model.onnx, model-fp16.onnx and their .parity.npz, which ddpmx export made
on another machine.

Exit code 0 if everything that has to hold was seen to hold (goals of speed do not count), 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
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
from gpu.steps import Must, Result, Step, run  # noqa: E402

SUITES = {"kernels": "always", "chains": "always", "networks": "if run", "engines": "always"}
"""The files of tests/gpu, each in a process of its own, so that a crash in a library does not end the others."""

SMALL = ["--width", "32", "--mult", "1,2,2", "--blocks", "1", "--attention", "8", "--groups", "8", "--dropout", "0"]
PRECISIONS = ("fp32", "fp16")


@dataclasses.dataclass(frozen=True)
class Place:
    """The folders and files of a check."""

    out: Path
    engines: Path
    onnx: Path

    @property
    def run(self) -> Path:
        return self.out / "run"

    def model(self, precision: str) -> Path:
        return self.onnx / ("model.onnx" if precision == "fp32" else f"model-{precision}.onnx")

    def record(self, precision: str) -> Path:
        return self.model(precision).with_suffix(".parity.npz")

    def plan(self, precision: str) -> Path:
        return self.engines / f"model-{precision}.plan"

    def many(self) -> Path:
        """A plan for large batches only."""
        return self.engines / "model-fp16-many.plan"


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def ddpmx(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ddpmx_cli.main", *map(str, arguments)]


def make_steps(options: argparse.Namespace, place: Place, doctor: dict[str, Any]) -> list[Step]:
    """All steps after the first, which is ``ddpmx doctor``.

    Args:
        options: the command line.
        place: folders and files.
        doctor: the output of ``ddpmx doctor --json``.
    """
    libraries, (gpu, *_) = doctor["libraries"], doctor["machine"]["gpus"]
    torch = libraries["torch"]
    steps = [suite(name, place, must, quick=options.quick) for name, must in SUITES.items()]
    steps += network(options, place, torch, gpu)
    flavours = [name for name in ("TensorRT", "TensorRT-RTX") if "missing" not in libraries[name]]
    no_plan = "" if flavours else f"there is no TensorRT here ({libraries['TensorRT-RTX']['missing']})"
    for precision in PRECISIONS:
        steps += plans(options, place, precision, gpu, no_plan)
    steps += [measurement for p in PRECISIONS for measurement in speeds(options, place, p, gpu, no_plan)]
    return [*steps, peers(options, place, torch)]


def suite(name: str, place: Place, must: Must, *, quick: bool) -> Step:
    junit = place.out / f"tests-{name}.xml"
    command = [sys.executable, "-m", "pytest", f"tests/gpu/test_{name}.py", "-q", "-p", "no:cacheprovider"]
    if quick:  # the small network of --quick is trained, built and judged anyway
        command += ["-k", "not trained_network"]
    return Step(f"tests of {name}", [*command, f"--junitxml={junit}"], 2400 if name == "engines" else 900, must)


def network(options: argparse.Namespace, place: Place, torch: dict[str, Any], gpu: dict[str, Any]) -> list[Step]:
    """The steps that make the ONNX files."""
    if options.onnx_dir:
        return []
    if "missing" in torch:
        why = f"there is no torch here ({torch['missing']}): --onnx-dir takes files that were exported elsewhere"
        return [Step("network", must="always", not_run=why)]
    data, steps = place.out / "images.npz", []
    training = ["--no-flip", "--ema", "0.99", "--ema-ramp", "--sample-every", 0, "--save-minutes", 60]
    if options.quick:
        data = ROOT / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"
        small = [*SMALL, "--steps", 300, "--batch", 64, "--lr", "2e-3", "--warmup", 50]
        steps.append(
            Step("network", ddpmx("train", "--data", data, "--out", place.run, *small, *training), 600, "always")
        )
    else:
        steps.append(Step("images", python("tests/gpu/network.py", "images", data), 120, "always", makes=(data,)))
        if torch.get("gpu"):
            batch = 128 if gpu["memory"] >= 20 << 30 else 32
            large = ["--dropout", 0, "--steps", 600, "--batch", batch, "--lr", "2e-4", "--warmup", 100]
            bf16 = ["--bf16"] if float(gpu["sm"]) >= 8 else []
            command = ddpmx("train", "--data", data, "--out", place.run, *large, *training, *bf16)
        else:
            command = python("tests/gpu/network.py", "random", place.run)
        steps.append(Step("network", command, 2400, "always", needs=(data,)))
    for precision in PRECISIONS:
        half = ["--fp16"] if precision == "fp16" else []
        made = place.model(precision), place.record(precision)
        command = ddpmx("export", place.run, *half, "-o", made[0], "--data", data, "--no-plan")
        needs = (place.run / "checkpoints", data)
        steps.append(Step(f"export {precision}", command, 2400, "always", needs=needs, makes=made))
    return steps


def plans(options: argparse.Namespace, place: Place, precision: str, gpu: dict[str, Any], no_plan: str) -> list[Step]:
    """The steps that build a plan and check its parity."""
    onnx, plan, record = place.model(precision), place.plan(precision), place.record(precision)
    small = gpu["memory"] < 12 << 30
    batch = "1,4,16" if options.quick or small else "1,16,64"
    build = ddpmx("build", onnx, "-o", plan, "--batch", batch, *(["--workspace", 512] if small else []))
    judge = ddpmx("parity", plan, "--against", record, "--report", place.out / f"parity-{precision}")
    return [
        Step(f"build {precision}", build, 2400, "always", needs=(onnx,), makes=(plan,), not_run=no_plan),
        Step(f"parity {precision}", judge, 1200, "always", needs=(plan, record), not_run=no_plan),
    ]


def speeds(options: argparse.Namespace, place: Place, precision: str, gpu: dict[str, Any], no_plan: str) -> list[Step]:
    """The steps that measure a plan. They only have to run."""
    plan, figures = place.plan(precision), place.out / f"bench-{precision}.json"
    quick = ["--batch", "1,4", "--seconds", "0.5"] if options.quick else []
    command = ddpmx("bench", plan, "--executor", "all", "-o", figures, *quick)
    steps = [Step(f"bench {precision}", command, 1200, "always", (plan,), (figures,), no_plan)]
    if precision == "fp16":
        seconds, many = place.out / "speed.json", plan
        if gpu["memory"] >= 20 << 30 and not options.quick:
            many = place.many()
            build = ddpmx("build", place.model(precision), "-o", many, "--batch", "64,256,256")
            steps.append(Step("build for 256", build, 2400, "", (place.model(precision),), (many,), no_plan))
        amount = (16, 20) if options.quick else (256,)
        command = python("tests/gpu/speed.py", many, seconds, *amount)
        steps.append(Step("many images", command, 1200, "", (many,), (seconds,), no_plan))
        figures = place.out / "serving.json"
        command = python("tests/gpu/serving.py", plan, figures, *((4, 20) if options.quick else (16, 200)))
        steps.append(Step("serving", command, 1200, "always", (plan,), (figures,), no_plan))
    return steps


def peers(options: argparse.Namespace, place: Place, torch: dict[str, Any]) -> Step:
    why = ""
    if options.no_peers:
        why = "--no-peers"
    elif "missing" in torch or not torch.get("gpu"):
        why = "torch with CUDA is not here"
    elif options.onnx_dir:
        why = "the files are from elsewhere, and so are the weights (--onnx-dir)"
    files = [*map(place.plan, PRECISIONS), *map(place.model, PRECISIONS)]
    measured = ["--batch", "1", "--steps", 20, "--rounds", 2, "--only", "diffusers", "ort"] if options.quick else []
    measured = measured or ["--batch", "1,64", "--steps", 100, "--rounds", 5]
    figures = place.out / "peers.json"
    command = python("tests/benchmarks/peers.py", "--checkpoint", place.run, *measured, "--json", figures)
    command += ["--engine", *map(str, files)]
    return Step("peers", command, 3600, "", needs=tuple(files), makes=(figures,), not_run=why)


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
    for folder in (out / "logs", place.engines):
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
    plan: Callable[[argparse.Namespace, Place, dict[str, Any]], list[Step]] = make_steps,
    look: Callable[[Place, Callable[[Step], Result]], tuple[list[Result], dict[str, Any] | None]] = look_around,
) -> int:
    """The check.

    Args:
        arguments: the command line.
        devices: the GPUs; by default those that the driver lists.
        plan: makes the steps.
        look: runs ``ddpmx doctor``.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="folder for the report and everything else"
    )
    parser.add_argument("--quick", action="store_true", help="a small network and few steps: under two minutes")
    parser.add_argument("--no-peers", action="store_true", help="without runs of other libraries")
    parser.add_argument("--engine-dir", type=Path, help="folder for plans; those that fit are not built again")
    parser.add_argument("--onnx-dir", type=Path, help="model.onnx, model-fp16.onnx and their .parity.npz")
    options = parser.parse_args(arguments)
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

    def runner(step: Step) -> Result:
        print(f"{step.name} …", flush=True)
        result = run(step, place.out / "logs", cwd=ROOT, environment=environment)
        why = f": {result.why}" if result.why else ""
        print(f"{step.name}: {result.status}, {result.seconds:.0f} s{why}", flush=True)
        return result

    stopped, doctor = False, None
    try:
        results, doctor = look(place, runner)
        steps = plan(options, place, doctor) if doctor else []
        for number, step in enumerate(steps):
            try:
                results.append(runner(step))
            except KeyboardInterrupt:
                stopped = True
                results += [Result(s.name, s.must, "not run", why="stopped by Ctrl-C") for s in steps[number:]]
                break
    except KeyboardInterrupt:
        stopped = True
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
    if stopped and not facts["verdict"].startswith("FAILED"):
        facts["verdict"] = "INCOMPLETE: stopped by Ctrl-C"
    written = report.write(place.out, facts, hidden={str(ROOT): "REPO", str(place.out): "OUT"})
    print(f"\n{facts['verdict']}\n{written}: paste this file", flush=True)
    return 130 if stopped else 0 if facts["verdict"].startswith("HOLDS") else 1


def _network(options: argparse.Namespace, doctor: dict[str, Any] | None) -> str:
    """How the network was made, in words."""
    if options.onnx_dir:
        return "files of --onnx-dir, exported on another machine"
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
