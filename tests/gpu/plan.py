"""The steps of a check: all of them, or within a budget of minutes the most telling ones first."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from gpu.steps import Must, Step

ROOT = Path(__file__).resolve().parents[2]

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

    def single(self) -> Path:
        """A plan for single images only."""
        return self.engines / "model-fp16-1.plan"

    @property
    def large(self) -> Place:
        """The places of a second network, with random weights, for speed alone."""
        return Place(self.out / "large", self.engines / "large", self.out / "large")


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
    steps.append(peers(options, place, torch))
    if not options.onnx_dir:
        steps += by_torch(options, place, place.run, torch, gpu)
    if not options.quick and not options.onnx_dir:
        steps += [*eight_bits(place, torch, no_plan), training(options, place, torch)]
    return steps


def within_minutes(options: argparse.Namespace, place: Place, doctor: dict[str, Any]) -> list[Step]:
    """The steps of a check that may be cut off at any moment: the most telling first, nothing that only repeats another.

    What has to hold is seen with a small network, which trains in seconds. Speed is measured with the paper's for CIFAR-10
    and random weights.

    Args:
        options, place, doctor: as for :func:`make_steps`.
    """
    libraries, (gpu, *_) = doctor["libraries"], doctor["machine"]["gpus"]
    torch, small = libraries["torch"], argparse.Namespace(**{**vars(options), "quick": True})
    flavours = [name for name in ("TensorRT", "TensorRT-RTX") if "missing" not in libraries[name]]
    no_plan = "" if flavours else f"there is no TensorRT here ({libraries['TensorRT-RTX']['missing']})"
    suites = {name: suite(name, place, must, quick=True) for name, must in SUITES.items()}
    steps = [*suites.values(), *network(small, place, torch, gpu)]
    for precision in reversed(PRECISIONS):
        steps += plans(small, place, precision, gpu, no_plan)
    steps += large_network(options, place, torch, no_plan)
    steps += by_torch(options, place, place.large.run, torch, gpu)
    return [*steps, *eight_bits(place, torch, no_plan), training(options, place, torch, "--only", "diffusers")]


def large_network(options: argparse.Namespace, place: Place, torch: dict[str, Any], no_plan: str) -> list[Step]:
    """The steps that measure the paper's network in fp16, with random weights, and the same network in diffusers."""
    large, why, no_torch = place.large, no_plan, ""
    if "missing" in torch:
        why = no_torch = f"there is no torch here ({torch['missing']})"
    onnx, plan, figures = large.model("fp16"), large.plan("fp16"), place.out / "bench-fp16.json"
    export = ddpmx("export", large.run, "--fp16", "-o", onnx, "--no-parity", "--no-plan")
    build = ddpmx("build", onnx, "-o", plan, "--batch", "1,64,256")
    bench = ddpmx("bench", plan, "--executor", "all", "--batch", "1,64", "--seconds", 1, "-o", figures)
    many, serving = place.out / "speed.json", place.out / "serving.json"
    speed = [python("tests/gpu/speed.py", plan, many, 256), python("tests/gpu/serving.py", plan, serving, 16, 100)]
    steps = [
        Step("large network", python("tests/gpu/network.py", "random", large.run), 120, not_run=no_torch),
        Step("export large", export, 300, needs=(large.run,), makes=(onnx,), not_run=why),
        Step("build large", build, 300, needs=(onnx,), makes=(plan,), not_run=why),
        Step("bench fp16", bench, 120, "if run", (plan,), (figures,), why, engine=True),
        *single_images(large, place.out, why, ["--seconds", 1]),
        Step("many images", speed[0], 120, "", (plan,), (many,), why),
        Step("serving", speed[1], 120, "if run", (plan,), (serving,), why, engine=True),
    ]
    if not why and not torch.get("gpu"):
        why = "torch with CUDA is not here"
    why_not, of_run = "--no-peers" if options.no_peers else why, ["--checkpoint", large.run, "--engine", plan]
    # torch compiles for a minute or more: in a step of its own it keeps no other figures from the report
    for name, kind, batch in (("1", "diffusers", 1), ("64", "diffusers", 64), ("compiled", "compile", 1)):
        found = place.out / f"peers-{name}.json"
        command = peer(found, *of_run, "--only", kind, "--batch", batch)
        steps.append(Step(f"peers {name}", command, 180, "", (plan,), (found,), why_not))
    return steps


def peer(found: Path, *arguments: object) -> list[str]:
    """The command that measures other libraries beside ddpmx in half precision, in 50 steps."""
    few = ["--precision", "fp16", "--steps", 50, "--rounds", 2]
    return python("tests/benchmarks/peers.py", "--json", found, *arguments, *few)


def single_images(place: Place, out: Path, why: str, options: list[object]) -> list[Step]:
    """The steps that measure a plan for one batch size alone, which has no copies of shapes from the host.

    Args:
        place: of the network.
        out: the folder of the figures.
        why: why they are not run, if they are not.
        options: of `ddpmx bench`.
    """
    onnx, plan, figures = place.model("fp16"), place.single(), out / "bench-fp16-1.json"
    build = ddpmx("build", onnx, "-o", plan, "--batch", "1,1,1")
    bench = ddpmx("bench", plan, "--executor", "all", "--batch", 1, *options, "-o", figures)
    return [
        Step("build for 1", build, 300, "", (onnx,), (plan,), why, engine=True),
        Step("bench for 1", bench, 120, "", (plan,), (figures,), why, engine=True),
    ]


def by_torch(
    options: argparse.Namespace, place: Place, run: Path, torch: dict[str, Any], gpu: dict[str, Any]
) -> list[Step]:
    """The steps that measure the chain with torch as its network, unless a plan was measured.

    A plan may be built and not run: TensorRT-RTX builds for GPUs that it does not know.

    Args:
        options, place: of the check.
        run: the network's run.
        torch, gpu: what `ddpmx doctor` says of them.
    """
    why = "" if torch.get("gpu") else "torch with CUDA is not here"
    figures, many = (place.out / f"{name}-torch.json" for name in ("bench", "speed"))
    chain = python("tests/gpu/torch_chain.py", run, figures, many)
    batches: list[object] = ["--batch", "1,4"] if options.quick else []
    if options.quick:
        chain += ["--batch", "1,4", "--images", "16", "--steps", "20"]
    elif gpu["memory"] < 20 << 30:
        chain += ["--images", "64"]
    unless, no_peers = (place.out / "bench-fp16.json",), "--no-peers" if options.no_peers else why
    steps = [Step("chain on torch", chain, 300, "if run", (run,), (figures, many), why, unless=unless)]
    for name, kind, which in (("peers", "diffusers", batches), ("compiled", "compile", batches or ["--batch", 1])):
        found = place.out / f"{name}-torch.json"
        command = peer(found, "--checkpoint", run, "--torch", "--only", kind, *which)
        steps.append(Step(f"{name} on torch", command, 300, "", (run,), (found,), no_peers, unless=unless))
    return steps


def eight_bits(place: Place, torch: dict[str, Any], no_plan: str) -> list[Step]:
    """The steps that export the network in 8 bits and compare its chain with that in half precision, at batch 64."""
    why = no_plan if "missing" not in torch else f"there is no torch here ({torch['missing']})"
    onnx, plan = place.model("int8"), place.plan("int8")
    export = ddpmx("export", place.run, "--int8", "-o", onnx, "--no-plan")
    build = ddpmx("build", onnx, "-o", plan, "--batch", "1,64,64")
    judge = ddpmx("parity", plan, "--against", place.record("int8"), "--report", place.out / "parity-int8")
    half = place.engines / "model-fp16-64.plan"
    other = ddpmx("build", place.model("fp16"), "-o", half, "--batch", "1,64,64")
    both = [Step("build fp16 for 64", other, 300, "", (place.model("fp16"),), (half,))]
    for name, file in (("int8-64", plan), ("fp16-64", half)):
        figures = place.out / f"bench-{name}.json"
        command = ddpmx("bench", file, "--batch", 64, "--seconds", 1, "-o", figures)
        both.append(Step(f"bench {name}", command, 120, "", (file,), (figures,)))
    steps = [
        Step("export int8", export, 900, "", (place.run,), (onnx,)),
        Step("build int8", build, 600, "", (onnx,), (plan,)),
        Step("parity int8", judge, 600, "", (plan, place.record("int8"))),
        *both,
    ]
    return [dataclasses.replace(step, not_run=why) for step in steps]


def training(options: argparse.Namespace, place: Place, torch: dict[str, Any], *only: str) -> Step:
    """The step that trains the paper's network in ddpmx, compiled as well, and in others' loops; or in those named."""
    why = "--no-peers" if options.no_peers else ""
    if "missing" in torch or not torch.get("gpu"):
        why = "torch with CUDA is not here"
    found = place.out / "training.json"
    command = python("tests/benchmarks/training.py", "--steps", 10, "--rounds", 3, "--bf16", "--json", found, *only)
    return Step("training", command, 600, "", makes=(found,), not_run=why)


def suite(name: str, place: Place, must: Must, *, quick: bool) -> Step:
    junit = place.out / f"tests-{name}.xml"
    command = [sys.executable, "-m", "pytest", f"tests/gpu/test_{name}.py", "-v", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60"]  # the stacks of a test that hangs
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
        Step(f"build {precision}", build, 2400, "always", (onnx,), (plan,), no_plan, engine=True),
        Step(f"parity {precision}", judge, 1200, "always", (plan, record), (), no_plan, engine=True),
    ]


def speeds(options: argparse.Namespace, place: Place, precision: str, gpu: dict[str, Any], no_plan: str) -> list[Step]:
    """The steps that measure a plan. They only have to run."""
    plan, figures = place.plan(precision), place.out / f"bench-{precision}.json"
    quick = ["--batch", "1,4", "--seconds", "0.5"] if options.quick else []
    command = ddpmx("bench", plan, "--executor", "all", "-o", figures, *quick)
    steps = [Step(f"bench {precision}", command, 1200, "always", (plan,), (figures,), no_plan, engine=True)]
    if precision == "fp16":
        steps += single_images(place, place.out, no_plan, quick[2:])
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
        steps.append(Step("serving", command, 1200, "always", (plan,), (figures,), no_plan, engine=True))
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
