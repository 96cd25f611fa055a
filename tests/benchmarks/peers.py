"""The same chain in other libraries and in ddpmx, as ratios: diffusers, diffusers compiled, loops over other runtimes.

    python tests/benchmarks/peers.py [--small] [--batch 1,64] [--steps 10] [--rounds 5] [--json peers.json]
    python tests/benchmarks/peers.py --checkpoint runs/photos --engine model.plan model.onnx
    python tests/benchmarks/peers.py --checkpoint runs/photos --torch
    python tests/benchmarks/peers.py --only mnn diffusers --batch 1,16 --threads 2 --busy 2

All runs have the same weights, batch and number of steps, and end with images of the same shape in host memory. Each is a
process of its own, so that no library disturbs another's memory or threads; they take turns, call by call. A ratio is the
median over the rounds of a run's time ÷ ddpmx's in the same precision and round. It excludes everything before the first
round, which is listed separately: imports, loading, the first output (in which torch compiles), the first chain (in which
it compiles for the next batch). Peak memory is the largest in any chain of a batch, the first included.

On a CPU ddpmx also runs on MNN models of the same ONNX files; these are compared with all other runs, in a table that has
the goals. With ``--busy N`` N processes compute without pause beside all rounds, and MNN in one thread is a run of its own.

Before anything is timed, each run's ε is compared with the network in float32, and each peer's reverse step with ddpmx's
table at every t. Runs of another network or another chain get no table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`, wherever this is started

from benchmarks import peers_goals
from benchmarks.peers_measure import (
    EPS_BOUND,
    OURS,
    STEP_BOUND,
    Different,
    GpuMemory,
    NotRun,
    Worker,
    busy,
    check_eps,
    check_steps,
    measure,
    rows,
    step_probe,
    table_of,
    warm,
)
from ddpmx.device.discovery import gpus
from ddpmx.diffusion.samplers import FIXED_VARIANCES
from ddpmx.errors import DdpmxError
from ddpmx.formats import model_file, onnx_file
from ddpmx.formats.spec import ModelSpec

PEERS = {
    "diffusers": "diffusers",
    "compile": "diffusers, compiled",
    "ort": "session.run in a loop",
    "mnn": "ddpmx on MNN",
    "mnn-low": "ddpmx on MNN, low memory",
    "openvino": "OpenVINO in a loop",
    "ncnn": "ncnn in a loop",
}
ON_TORCH = "ddpmx on torch"
BY_TORCH = ("diffusers", "compile")
ON_CPU = ("mnn", "mnn-low", "openvino", "ncnn")


class Bench:
    """A benchmark: its options, the running processes, and the runs that were not possible."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self.options, self.folder, self.stack = options, folder, stack
        self.not_run: list[tuple[str, str]] = []
        self.gpu = GpuMemory(options.device)
        self._started = 0

    def start(self, kind: str, label: str, precision: str = "", **job: Any) -> Worker | None:
        """A run in its process, ready; None if it is not possible here, with the reason in ``not_run``."""
        self._started += 1
        job = {"device": self.options.device, "threads": self.options.threads, **job}
        worker = Worker(kind, precision, label, job, self.folder / f"{self._started}.log")
        self.stack.callback(worker.close)
        try:
            with self.gpu.watch(worker):
                return worker.prepare()
        except NotRun as error:
            worker.close()
            self.not_run.append((label, str(error)))
            return None

    def source(self) -> Worker | None:
        """The network, its weights, and, unless files were passed, its ONNX files."""
        options = self.options
        exports = (
            {} if options.engine or options.torch else {p: str(self.folder / f"{p}.onnx") for p in options.precision}
        )
        return self.start(
            "source",
            "the reference, and the runs by torch",
            "fp32",
            checkpoint=options.checkpoint,
            small=options.small,
            weights=str(self.folder / "weights.safetensors"),
            onnx=exports,
        )

    def ours(self, source: Worker | None) -> tuple[list[Worker], list[Path]]:
        """ddpmx's runs, and their files: those passed, or a plan where there is a GPU, or else the ONNX files."""
        if self.options.torch:
            job = {"checkpoint": self.options.checkpoint, "batches": self.options.batch}
            started = [self.start("ddpmx", f"{ON_TORCH}, {p}", p, **job) for p in self.options.precision]
            return [worker for worker in started if worker], []
        files = [Path(file) for file in self.options.engine]
        choices = [[file] for file in files]
        if source and not files:
            files = [Path(file) for file in source.job["onnx"].values()]
            choices = [[file] for file in files]
            if self.options.device == "cuda":
                choices = [[*self.plan(file), file] for file in files]
        workers = []
        for choice in choices:
            for file in choice:
                if worker := self.start("ddpmx", f"ddpmx, {file.name}", file=str(file)):
                    workers.append(worker)
                    break
        return workers, files

    def plan(self, onnx: Path) -> list[Path]:
        """The plan of an ONNX file, if one can be built."""
        plan = onnx.with_suffix(".plan")
        return [plan] if self.build("plan", onnx, plan, batches=self.options.batch) else []

    def build(self, kind: str, onnx: Path, output: Path, **job: Any) -> bool:
        """Make another file of an ONNX file, in a process of its own. Returns whether it could be made."""
        built = self.start(kind, output.name, onnx=str(onnx), file=str(output), **job)
        if built is None:
            return False
        built.close()
        print(f"{output.name}: {built.description}", flush=True)
        return True

    def mnn(self, kind: str, precision: str, onnx: Path) -> list[Worker]:
        """ddpmx on the MNN model of an ONNX file; beside busy processes also in one thread, for comparison."""
        options, name = self.options, PEERS[kind]
        file = self.folder / f"{precision}{kind.removeprefix('mnn')}.mnn"
        if not self.build("mnn model", onnx, file, low_memory=kind == "mnn-low"):
            return []
        found = [self.start(kind, name, precision, file=str(file))]
        if kind == "mnn" and options.busy and options.threads > 1:
            found.append(self.start("mnn1", f"{name}, one thread", precision, file=str(file), threads=1))
        return [worker for worker in found if worker]

    def peers(
        self, ours: Sequence[Worker], files: Sequence[Path], source: Worker | None, spec: ModelSpec
    ) -> list[Worker]:
        """The other libraries' runs, in the precisions in which ddpmx runs."""
        gpu, here = self.options.device == "cuda", {worker.precision for worker in ours}
        onnx: dict[str, Path] = {}
        for file in files:
            if model_file.identify(file) == "onnx":
                spec_of_file = onnx_file.onnx_spec(file, onnx_file.read_onnx(file), None)
                onnx.setdefault(spec_of_file.precision, file)
        wanted = {
            "diffusers": ["fp32", "fp16"] if gpu else ["fp32"],
            "compile": ["fp16"] if gpu else ["fp32"],
            "ort": list(onnx),
            "mnn": [precision for precision in onnx if precision != "bf16"],
            "openvino": list(onnx),
            "ncnn": [precision for precision in onnx if precision == "fp32"],
        }
        wanted["mnn-low"] = wanted["mnn"]
        found = []
        for kind in self.options.only:
            name = PEERS[kind]
            if kind in BY_TORCH and source is None:
                self.not_run.append((name, "without torch there are no weights for it"))
                continue
            if kind in ON_CPU and gpu:
                self.not_run.append((name, "it computes on CPUs"))
                continue
            if not wanted[kind]:
                self.not_run.append((name, "none of the files is an ONNX file that it takes"))
            for precision in wanted[kind]:
                job: dict[str, Any] = {"spec": spec.to_json()}
                if kind not in BY_TORCH:
                    job["file"] = str(onnx[precision])
                elif source:
                    job.update(weights=source.job["weights"], network=source.about)
                if precision not in here:
                    self.not_run.append((f"{name}, {precision}", f"ddpmx does not run in {precision} here"))
                elif kind in peers_goals.BESIDE:
                    found += self.mnn(kind, precision, onnx[precision])
                elif worker := self.start(kind, name, precision, **job):
                    found.append(worker)
        return found

    def able(self, workers: Sequence[Worker], where: str, action: Callable[[Worker], object]) -> list[Worker]:
        """The workers that can run ``action``, if ddpmx can in their precision; the others go to ``not_run``."""
        able = []
        for worker in workers:
            try:
                action(worker)
                able.append(worker)
            except NotRun as error:
                self.not_run.append((f"{worker.label}, {worker.precision}{where}", str(error)))
        ours = {worker.precision for worker in able if worker.kind == "ddpmx"}
        return [worker for worker in able if worker.precision in ours]

    def check(
        self, workers: Sequence[Worker], source: Worker | None, spec: ModelSpec, steps: int
    ) -> tuple[list[Worker], str]:
        """Compare every run with the reference, and time its first output.

        Returns:
            The runs that work, and a line about their errors.

        Raises:
            Different: one does not compute the same.
            NotRun: there is no reference.
        """
        T, batch = spec.timesteps, self.options.batch[0]
        probe, out = str(self.folder / "probe.npz"), str(self.folder / "output.npz")
        x = np.random.default_rng(0).standard_normal((batch, *spec.shape), np.float32)
        np.savez(probe, x=x, t=[T // 2, 0, T // 10, T - 1])
        outputs: dict[int, NDArray[Any]] = {}

        def first_output(worker: Worker) -> None:
            with self.gpu.watch(worker):
                worker.before["first answer"] = worker.ask("eps", file=probe, out=out)["seconds"]
                if worker.kind in OURS:  # which opened its file a second time for ε
                    worker.restart()
            with np.load(out) as arrays:
                outputs[id(worker)] = arrays["eps"]

        workers = self.able(workers, "", first_output)
        if source:
            first_output(source)
        # without torch ddpmx's own output is the reference: the peers are still compared with it
        reference = source or min(workers, key=lambda worker: worker.precision != "fp32", default=None)
        if reference is None:
            raise NotRun("".join(f"\n{label}: {why}" for label, why in self.not_run))
        errors: dict[str, float] = {}
        for worker in workers:
            error = check_eps(worker.label, worker.precision, outputs[id(worker)], outputs[id(reference)])
            errors[worker.precision] = max(errors.get(worker.precision, 0.0), error)

        timesteps = table_of(spec, steps).timesteps
        x, eps = step_probe(spec, timesteps)
        np.savez(probe, x=x, eps=eps, t=timesteps)
        stepped = 0.0
        for worker in (worker for worker in workers if worker.kind not in OURS):
            worker.ask("walk", file=probe, out=out)
            with np.load(out) as walked:
                stepped = max(stepped, check_steps(worker.label, spec, steps, walked))
        found = ", ".join(
            f"{precision} {error:.1e} (≤ {EPS_BOUND[precision]:g})" for precision, error in errors.items()
        )
        against = "torch in float32 on the CPU" if source else f"{reference.label}'s"
        return workers, (
            f"same network: ε against {against}, {found}; same chain: x_{{t−1}} within {stepped:.1e} (≤ {STEP_BOUND:g})"
        )

    def run(self) -> dict[str, Any]:
        """Run the benchmark. Returns the report.

        Raises:
            Different: the runs do not compute the same.
            NotRun: ddpmx itself, or the reference, does not run.
            DdpmxError: a file cannot be read.
        """
        options, load = self.options, round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
        source = self.source()
        ours, files = self.ours(source)
        if not ours:
            raise NotRun("".join(f"\n{label}: {why}" for label, why in self.not_run))
        specs = [ModelSpec.from_json(worker.about) for worker in ours]
        spec = specs[0].replace(precision="fp32", weights=None, ddpmx="")
        if any(other.replace(precision="fp32", weights=None, ddpmx="") != spec for other in specs):
            raise Different("the files do not describe the same chain")
        if spec.variance not in FIXED_VARIANCES or spec.prediction not in ("eps", "x0", "v"):
            raise NotRun(f"the peers' chains are set up for fixed variances of ε, x0 and v, not for {spec.variance}")
        steps = min(options.steps, spec.timesteps)
        if source and (source.about["in_channels"], *source.about["size"]) != spec.shape:
            raise Different(f"the files draw images of {spec.shape}, and the network does not")
        workers = ours + self.peers(ours, files, source, spec)
        workers, same = self.check(workers, source, spec, steps)
        if source:
            source.close()
        found = []
        with busy(options.busy):
            for batch in options.batch:
                for worker in workers:
                    worker.image = (*spec.shape[1:], spec.shape[0])
                here = self.able(workers, f", batch {batch}", partial(warm, batch=batch, steps=steps, gpu=self.gpu))
                found += rows(here, measure(here, batch, steps, options.rounds), batch, steps, options.device)
        network = peers_goals.network_of(int(source.description)) if source else ""
        devices = [device.name for device in gpus().devices][:1] if options.device == "cuda" else []
        return {
            "load_average": load,
            "device": ", ".join([options.device, *devices, platform.machine(), platform.system()]),
            "threads": options.threads,
            "busy": options.busy,
            "versions": {"python": platform.python_version(), **{k: v for w in workers for k, v in w.versions.items()}},
            "network": source.about if source else None,
            "shape": list(spec.shape),
            "timesteps": spec.timesteps,
            "steps": steps,
            "rounds": options.rounds,
            "same": same,
            "before": [{"run": w.label, "precision": w.precision, "says": w.description, **w.before} for w in workers],
            "rows": found,
            "mnn": peers_goals.beside(found, network, options.threads, options.busy),
            "not_run": [{"run": label, "why": why} for label, why in self.not_run],
        }


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(
        f"{report['device']}; {report['threads']} CPU threads, load {report['load_average']} at the start; {versions}"
    )
    size = "×".join(map(str, report["shape"]))
    print(f"images of {size}, {report['steps']} of T = {report['timesteps']} steps, {report['rounds']} rounds in turns")
    print(report["same"] + ("; TF32 is off everywhere" if report["device"].startswith("cuda") else ""))
    print("\nBefore the first round, in seconds (none of it is in the ratios):\n")
    print("| run | | imports | load | first output | first chain, by batch | by |")
    print("|---|---|---|---|---|---|---|")
    for row in report["before"]:
        chains = ", ".join(f"{batch}: {seconds:.2f}" for batch, seconds in row["chain"].items())
        three = " | ".join(f"{row[name]:.2f}" for name in ("imports", "load", "first answer"))
        print(f"| {row['run']} | {row['precision']} | {three} | {chains} | {row['says']} |")
    if report["busy"]:
        print(f"\nBeside {report['busy']} processes that computed without pause in all rounds:")
    print("\n| run | | batch | ms per step | images/s | peak RSS | GPU memory | time ÷ ddpmx | goal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        ratio = "1"
        if row["ratio"] is not None:
            low, high = row["ratio_range"]
            ratio = f"**{row['ratio']:.2f}** ({low:.2f} … {high:.2f})"
        gpu = f"{row['peak_gpu'] / 1e6:.0f} MB" if row["peak_gpu"] is not None else "—"
        goal = f"≥ {row['goal']:g}" if row["goal"] else ""
        print(
            f"| {row['run']} | {row['precision']} | {row['batch']} | {row['ms_per_step']:.3g} | "
            f"{row['images_per_s']:.3g} | {row['peak_rss'] / 1e6:.0f} MB | {gpu} | {ratio} | {goal} |"
        )
    peers_goals.show(report["mnn"])
    for entry in report["not_run"]:
        print(f"\nnot run: {entry['run']}: {entry['why']}")


def batches(text: str) -> list[int]:
    """The batch sizes in "1,64", smallest first."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise ValueError(text)
    return found


def count(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0, 1 if the runs do not compute the same, or 2 if there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", nargs="+", default=[], metavar="FILE", help="ONNX files and plans; by default exported"
    )
    parser.add_argument("--checkpoint", help="the run or checkpoint they come from; by default random weights")
    parser.add_argument("--torch", action="store_true", help="ddpmx runs the checkpoint by torch, without an engine")
    parser.add_argument("--small", action="store_true", help="1.1 million parameters instead of the paper's CIFAR-10")
    parser.add_argument("--batch", type=batches, help="by default 1,64 on a GPU, 1,8 on a CPU")
    parser.add_argument("--steps", type=count, help="by default 1000 on a GPU, 10 on a CPU")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if a GPU is found")
    parser.add_argument("--threads", type=count, help="CPU threads of every run; by default all that there are")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"], help="of exports")
    parser.add_argument("--busy", type=count, default=0, metavar="N", help="N processes that compute without pause")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PEERS), help="these peers; by default all that fit the device"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each time included")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if gpus().devices else "cpu")
    on_gpu = options.device == "cuda"
    if options.torch and (not options.checkpoint or options.engine or not on_gpu):
        parser.error("--torch takes a --checkpoint, no --engine, and a GPU")
    options.steps = options.steps or (1000 if on_gpu else 10)
    options.batch = options.batch or ([1, 64] if on_gpu else [1, 8])
    options.threads = options.threads or os.cpu_count() or 1
    options.only = options.only or [kind for kind in PEERS if not (on_gpu and kind in ON_CPU)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            report = Bench(options, Path(folder), stack).run()
        except Different as error:
            print(f"No table, since these runs do not compute the same.\n{error}", file=sys.stderr)
            if options.engine:
                print("Hint: --checkpoint names the run that the files were exported from", file=sys.stderr)
            return 1
        except (NotRun, DdpmxError) as error:
            print(f"Nothing was measured. {error}", file=sys.stderr)
            return 2
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
