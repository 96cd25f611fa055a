"""One training in ddpmx and in other projects' loops: images per second and peak memory, as ratios.

    python tests/benchmarks/training.py [--network demo] [--batch 64] [--steps 20] [--rounds 6] [--bf16] [--json FILE]
    pip install denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3 diffusers==0.42.1

All train the same network, ddpmx's own, on the same images in the same order, with T = 1000, the linear schedule and the
mean squared error of ε. ddpmx runs its ``Trainer``, and again with the network compiled. denoising-diffusion-pytorch runs
its ``GaussianDiffusion`` and the step of its Trainer: Adam, the loss asked for at every step, ema-pytorch. diffusers runs
the step of its example for unconditional training: ``DDPMScheduler.add_noise``, AdamW, ``EMAModel``. None draws samples or
saves. What is not installed is left out, with a line that says so.

Each is a process of its own. They take turns, forwards and backwards in alternation, so that a machine that slows down
slows all alike. The ratio is the median of a run's times ÷ the median of ddpmx's in the same precision; beside it the
smallest and largest ratio of a round. The first steps, in which torch compiles, are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`, wherever this is started

from benchmarks.peers import count
from benchmarks.peers_measure import Different, NotRun, Worker, ratios
from ddpmx.device.discovery import gpus

RUNS = {
    "ddpmx": "ddpmx",
    "compiled": "ddpmx --compile",
    "lucidrains": "denoising-diffusion-pytorch",
    "diffusers": "diffusers' example",
}
SCRIPT = Path(__file__).with_name("training_runs.py")
WARM_STEPS = 3
LOSS_APART = 0.25
"""Largest loss ÷ smallest − 1, over all steps of a precision: beyond it the runs do not train the same."""


@dataclass
class Training(Worker):
    """A training in its process.

    Attributes:
        seconds: of each round.
        losses: their means.
        memory: bytes, the largest: of the GPU's where it computes, else resident.
    """

    script: Path = SCRIPT

    def __post_init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.memory = 0
        super().__post_init__()

    def train(self, steps: int) -> float:
        """Make steps. Returns the seconds.

        Raises:
            NotRun: it failed.
        """
        reply = self.ask("train", steps=steps)
        self.memory = max(self.memory, reply["gpu"] or reply["rss"])
        self.losses.append(reply["loss"])
        return float(reply["seconds"])


def turns(workers: int, rounds: int) -> list[list[int]]:
    """Who runs in which order in each round: forwards, backwards, …"""
    order = list(range(workers))
    return [order if number % 2 == 0 else order[::-1] for number in range(rounds)]


def measure(workers: Sequence[Training], steps: int, rounds: int) -> None:
    """Let all train, in turns.

    Raises:
        NotRun: one failed.
    """
    for order in turns(len(workers), rounds):
        for place in order:
            workers[place].seconds.append(workers[place].train(steps))


def check_losses(workers: Sequence[Training]) -> None:
    """Check that all runs trained the same.

    Raises:
        Different: their mean losses are further apart than :data:`LOSS_APART`, or the networks are of other sizes.
    """
    if len(sizes := {worker.about["parameters"] for worker in workers}) > 1:
        raise Different(f"the networks have {' and '.join(map(str, sorted(sizes)))} parameters")
    for precision in {worker.precision for worker in workers}:
        means = {w.label: statistics.mean(w.losses) for w in workers if w.precision == precision}
        if max(means.values()) > (1 + LOSS_APART) * min(means.values()):
            raise Different(f"their losses are apart in {precision}: {means}")


def rows(workers: Sequence[Training], batch: int, steps: int) -> list[dict[str, Any]]:
    """One row per run, compared with ddpmx in the same precision."""
    found = []
    for worker in workers:
        ours = next(w for w in workers if w.kind == "ddpmx" and w.precision == worker.precision)
        middle, base = (statistics.median(w.seconds) for w in (worker, ours))
        _, low, high = ratios(worker.seconds, ours.seconds)
        found.append(
            {
                "run": worker.label,
                "precision": worker.precision,
                "seconds": list(worker.seconds),
                "ms_per_step": 1000 * middle / steps,
                "images_per_s": batch * steps / middle,
                "ratio": None if worker is ours else middle / base,
                "ratio_range": None if worker is ours else [low, high],
                "memory": worker.memory,
                "memory_ratio": None if worker is ours else worker.memory / ours.memory,
                "loss": statistics.mean(worker.losses),
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| run | | ms per step | images/s | time ÷ ddpmx | peak memory | ÷ ddpmx | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        ratio = memory = "1"
        if row["ratio"] is not None:
            low, high = row["ratio_range"]
            ratio, memory = f"**{row['ratio']:.2f}** ({low:.2f} … {high:.2f})", f"{row['memory_ratio']:.2f}"
        lines.append(
            f"| {row['run']} | {row['precision']} | {row['ms_per_step']:.3g} | {row['images_per_s']:.3g} | {ratio} | "
            f"{row['memory'] / 1e6:.0f} MB | {memory} | {row['loss']:.3f} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Run the benchmark. Returns the report.

    Raises:
        NotRun: ddpmx itself does not run, or a run failed on the way.
        Different: the runs do not train the same.
    """
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    workers: list[Training] = []
    not_run: list[tuple[str, str]] = []
    for precision in ["fp32", *(["bf16"] if options.bf16 else [])]:
        for kind in dict.fromkeys(["ddpmx", *options.only]):
            label = RUNS[kind]
            if kind == "compiled" and options.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
                not_run.append(
                    (f"{label}, {precision}", "there is no C++ compiler, which torch.compile needs on a CPU")
                )
                continue
            job = {name: getattr(options, name) for name in ("device", "threads", "network", "batch", "images")}
            worker = Training(kind, precision, label, job, folder / f"{kind}-{precision}.log")
            stack.callback(worker.close)
            try:
                worker.prepare()
                worker.train(WARM_STEPS)
            except NotRun as error:
                worker.close()
                not_run.append((f"{label}, {precision}", str(error)))
                if kind == "ddpmx":
                    raise
                continue
            worker.losses.clear()
            workers.append(worker)
    measure(workers, options.steps, options.rounds)
    check_losses(workers)
    devices = [device.name for device in gpus().devices][:1] if options.device == "cuda" else []
    return {
        "device": ", ".join([options.device, *devices, platform.machine(), platform.system()]),
        "load_average": load,
        "versions": {"python": platform.python_version(), **{k: v for w in workers for k, v in w.versions.items()}},
        "parameters": workers[0].about["parameters"],
        **{name: getattr(options, name) for name in ("threads", "network", "batch", "steps", "rounds")},
        "rows": rows(workers, options.batch, options.steps),
        "not_run": [{"run": label, "why": why} for label, why in not_run],
    }


def show(report: Mapping[str, Any]) -> None:
    """Print a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(
        f"{report['device']}; {report['threads']} CPU threads, load {report['load_average']} at the start; {versions}"
    )
    print(
        f"network {report['network']}, {report['parameters']:,} parameters; batches of {report['batch']}, "
        f"{report['rounds']} rounds of {report['steps']} steps in turns"
    )
    print(f"TF32 is off everywhere\n\n{table(report['rows'])}")
    for entry in report["not_run"]:
        print(f"\nnot run: {entry['run']}: {entry['why']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0, 1 if the runs do not train the same, or 2 if there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if a GPU is found")
    parser.add_argument("--network", choices=("demo", "cifar10"), help="by default cifar10 on a GPU, demo on a CPU")
    parser.add_argument("--batch", type=count, help="by default 128 on a GPU, 64 on a CPU")
    parser.add_argument("--threads", type=count, help="CPU threads of every run; by default all that there are")
    parser.add_argument("--steps", type=count, default=20, help="of each round")
    parser.add_argument("--rounds", type=count, default=6)
    parser.add_argument("--images", type=count, default=2048, help="that the batches are taken from")
    parser.add_argument("--bf16", action="store_true", help="all runs in bfloat16 as well")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS), help="these beside ddpmx")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each time included")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if gpus().devices else "cpu")
    options.network = options.network or ("cifar10" if options.device == "cuda" else "demo")
    options.batch = options.batch or (128 if options.device == "cuda" else 64)
    options.threads = options.threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            report = run(options, Path(folder), stack)
        except Different as error:
            print(f"No table, since these runs do not train the same.\n{error}", file=sys.stderr)
            return 1
        except NotRun as error:
            print(f"Nothing was measured. {error}", file=sys.stderr)
            return 2
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
