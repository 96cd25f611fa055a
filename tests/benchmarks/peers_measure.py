"""The measurements of ``peers.py``: worker processes, checks that they compute the same, times, memory and ratios."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table, make_table
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain

RUNS = Path(__file__).with_name("peers_runs.py")

OURS = ("ddpmx", "mnn", "mnn-low", "mnn1")
"""The kinds that are ddpmx itself: on a file as it was passed or built, and on MNN, also in little memory or one thread."""

EPS_BOUND = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""fp32: largest error ÷ largest ε. Others: RMS of the error ÷ RMS of ε."""

STEP_BOUND = 5e-4
"""Largest error of x_{t−1} where x is around 1. diffusers' table is float32: 2e-4 is usual."""

GOALS = {("diffusers", "fp16", 1): 5.0, ("diffusers", "fp16", 64): 2.0, ("compile", "fp16", 1): 1.3}
"""(peer, precision, batch) → its time ÷ ddpmx's, on a GPU. A missed goal is no failure."""

WARM_STEPS = 3
"""Networks to run before the first round, at least: CUDA graphs are captured in the second."""


class Different(Exception):  # noqa: N818 - a finding
    """Runs that do not compute the same."""


class NotRun(Exception):  # noqa: N818 - a finding
    """A run that is not possible here, and why."""


@dataclass
class Worker:
    """One run in a process of its own.

    Attributes:
        kind: one of ``peers_runs.KINDS``.
        precision: of the numbers inside its network.
        label: its name in the table.
        description: what really computes, in its own words.
        about: the ModelSpec of a file, or the UNetConfig of the source, as JSON.
        versions: of the libraries that it uses.
        before: times before the first round, seconds by name; "chain" is by batch.
        rss: batch → bytes, the largest resident memory in any call of that batch.
        gpu: batch → bytes, the same of the GPU's memory.
        image: (H, W, C) of the images it has to draw.
        held: bytes of the GPU's memory that it holds now.
        script: what its process runs.
    """

    kind: str
    precision: str
    label: str
    job: dict[str, Any]
    log: Path
    description: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    rss: dict[int, int] = field(default_factory=dict)
    gpu: dict[int, int] = field(default_factory=dict)
    image: tuple[int, ...] = ()
    held: int = 0
    script: Path = RUNS

    def __post_init__(self) -> None:
        threads = str(self.job["threads"])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "NVIDIA_TF32_OVERRIDE": "0",  # else float32 would have 10 bits of mantissa in some runs, and 23 in others
            "TORCHINDUCTOR_CACHE_DIR": str(
                self.log.parent / "inductor"
            ),  # an earlier run's code would hide the cost of compiling
            "PYTHONWARNINGS": "ignore",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(self.script),
                    json.dumps({**self.job, "kind": self.kind, "precision": self.precision}),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request, and return the reply.

        Raises:
            NotRun: the request failed, or the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise NotRun(f"its process ended with {self.process.wait()}: {''.join(last)[-300:]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise NotRun(" ".join(reply["error"].split())[:300])
        return reply

    def prepare(self) -> Worker:
        """Import its libraries and load its network."""
        started = self.ask("start")
        self.versions = started["versions"]
        loaded = self.ask("load")
        self.description = loaded["description"]
        self.before = {"imports": started["seconds"], "load": loaded["seconds"], "chain": {}}
        self.about = loaded["about"]
        self.precision = self.about.get("precision", self.precision)
        return self

    def restart(self) -> None:
        """Begin again in a new process, whose memory holds nothing but what a chain needs. The times stay."""
        before = self.before
        self.close()
        self.__post_init__()
        self.prepare()
        self.before = before

    def close(self) -> None:
        """End its process."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


# --- the same network, the same chain --------------------------------------------------------------------------------


def table_of(spec: ModelSpec, steps: int) -> Table:
    """The chain of all runs, over the timesteps that diffusers takes by default."""
    return make_table(spec.make_schedule(), spec.prediction, spec.variance, steps=steps, spacing="leading")


def eps_error(precision: str, output: NDArray[Any], reference: NDArray[Any]) -> float:
    """The error of ε against the reference, as :data:`EPS_BOUND` defines it. NaN if something is not finite."""
    apart = output.astype(np.float64) - reference
    if precision == "fp32":
        return float(np.abs(apart).max() / np.abs(reference).max())
    return float(np.sqrt((apart**2).mean() / (reference.astype(np.float64) ** 2).mean()))


def check_eps(label: str, precision: str, output: NDArray[Any], reference: NDArray[Any]) -> float:
    """The error of ε.

    Raises:
        Different: it is above the bound, or there is nothing to compare.
    """
    if output.shape != reference.shape:
        raise Different(f"{label}: ε has the shape {output.shape}, the reference {reference.shape}")
    if not np.abs(reference).max() > 0:
        raise Different("the network's output is nothing but 0, and another network would look the same")
    error = eps_error(precision, output, reference)
    if not error <= EPS_BOUND[precision]:
        raise Different(f"{label}: ε is off by {error:.2g}, more than {EPS_BOUND[precision]:g}: another network")
    return error


def step_probe(spec: ModelSpec, timesteps: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(x_t, ε), each float32 [S, 2, C, 4, 4]: a noised image that the clip does not change, and one that it does."""
    rng = np.random.default_rng(1)
    x, eps = rng.standard_normal((2, len(timesteps), 2, spec.shape[0], 4, 4)).astype(np.float32)
    alpha_bar = spec.make_schedule().alpha_bar[timesteps][:, None, None, None]
    x[:, 0] = np.sqrt(alpha_bar) * rng.uniform(-1, 1, x[:, 0].shape) + np.sqrt(1 - alpha_bar) * eps[:, 0]
    return x, eps


def check_steps(label: str, spec: ModelSpec, steps: int, walked: Mapping[str, NDArray[Any]]) -> float:
    """The largest error of a peer's x_{t−1} at any of its timesteps, against ddpmx's table with the peer's noise.

    Raises:
        Different: it is above the bound.
    """
    table = table_of(spec, steps)
    worst = 0.0
    x, eps = step_probe(spec, table.timesteps)
    for index, row in enumerate(table.rows.astype(np.float32)):
        x0, ours = np.empty_like(x[index]), np.empty_like(x[index])
        z = walked["z"][index] if row[4] else None
        chain.update(row, spec.clip or np.inf, x[index], eps[index], z, x0=x0, x_next=ours)
        error = float(np.abs(walked["x_next"][index] - ours).max())
        if not error <= STEP_BOUND:
            t = table.timesteps[index]
            raise Different(f"{label}: x_{{t−1}} is off by {error:.2g} at t = {t}, more than {STEP_BOUND:g}")
        worst = max(worst, error)
    return worst


# --- the load --------------------------------------------------------------------------------------------------------

_COMPUTE = """
import os, sys
import numpy
parent, a = int(sys.argv[1]), numpy.ones((256, 256), numpy.float32)
a @ a
print(flush=True)
while os.getppid() == parent:
    a @ a
"""


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many processes compute without pause meanwhile, in one thread each, pinned to no core.

    Raises:
        NotRun: one of them did not start, or ended early.
    """
    one = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    command = [sys.executable, "-c", _COMPUTE, str(os.getpid())]
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=one)
            stack.enter_context(process)  # waits for its end
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            if process.stdout is None or not process.stdout.readline():
                raise NotRun("a busy process did not start")
        yield running
        if any(process.poll() is not None for process in running):
            raise NotRun("a busy process ended before the last round")


# --- the measurement -------------------------------------------------------------------------------------------------


def ratios(times: Sequence[float], ddpmx: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of a run's time ÷ ddpmx's, round by round."""
    each = [theirs / ours for theirs, ours in zip(times, ddpmx, strict=True)]
    return statistics.median(each), min(each), max(each)


class GpuMemory:
    """The used memory of the first GPU, by NVML. What it grows by while only one run works belongs to that run."""

    def __init__(self, device: str) -> None:
        self._nvml: ctypes.CDLL | None = None
        if device != "cuda":
            return
        with contextlib.suppress(OSError):
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._device = ctypes.c_void_p()
            index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            number = int(index) if index.isdigit() else 0
            if not nvml.nvmlInit_v2() and not nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(self._device)):
                self._nvml = nvml

    def used(self) -> int | None:
        """Bytes, of all processes."""
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        if self._nvml is None or self._nvml.nvmlDeviceGetMemoryInfo(self._device, memory):
            return None
        return int(memory[2])

    @contextlib.contextmanager
    def watch(self, worker: Worker, batch: int = 0) -> Iterator[None]:
        """Count the memory of a run while it works, context included: its peak for this batch, and what it keeps."""
        if (before := self.used()) is None:
            yield
            return
        highest, done = before, threading.Event()

        def poll() -> None:
            nonlocal highest
            while not done.wait(0.01):
                highest = max(highest, self.used() or 0)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            after = self.used() or before
            if batch:
                worker.gpu[batch] = max(worker.gpu.get(batch, 0), worker.held + max(highest, after) - before)
            worker.held += after - before


def draw(worker: Worker, batch: int, steps: int, seed: int) -> float:
    """Seconds of one whole chain."""
    drawn = worker.ask("draw", batch=batch, steps=steps, seed=seed)
    worker.rss[batch] = max(worker.rss.get(batch, 0), drawn["rss"])
    if drawn["shape"] != [batch, *worker.image]:
        raise Different(f"{worker.label} drew images of another shape: {drawn['shape']}")
    return float(drawn["seconds"])


def warm(worker: Worker, batch: int, steps: int, gpu: GpuMemory) -> None:
    """Run the chains before the first round."""
    with gpu.watch(worker, batch):
        worker.before["chain"][batch] = draw(worker, batch, steps, 0)
        for seed in range(1, -(-WARM_STEPS // steps)):
            draw(worker, batch, steps, seed)


def measure(workers: Sequence[Worker], batch: int, steps: int, rounds: int) -> dict[int, list[float]]:
    """Seconds of a whole chain, by the worker's place: ``rounds`` each, in turns, with another worker first each time."""
    seconds: dict[int, list[float]] = {place: [] for place in range(len(workers))}
    for number in range(rounds):
        first = number % len(workers)
        for place in [*range(first, len(workers)), *range(first)]:
            seconds[place].append(draw(workers[place], batch, steps, 100 + number))
    return seconds


def rows(
    workers: Sequence[Worker], seconds: Mapping[int, Sequence[float]], batch: int, steps: int, device: str
) -> list[dict[str, Any]]:
    """One row per run, compared with the first ddpmx of its precision."""
    found = []
    for place, worker in enumerate(workers):
        base = next(i for i, w in enumerate(workers) if w.kind == "ddpmx" and w.precision == worker.precision)
        median, low, high = ratios(seconds[place], seconds[base])
        chain_seconds = statistics.median(seconds[place])
        found.append(
            {
                "run": worker.label,
                "kind": worker.kind,
                "precision": worker.precision,
                "batch": batch,
                "seconds": list(seconds[place]),
                "ms_per_step": 1000 * chain_seconds / steps,
                "images_per_s": batch / chain_seconds,
                "ratio": None if place == base else median,
                "ratio_range": None if place == base else [low, high],
                "goal": GOALS.get((worker.kind, worker.precision, batch)) if device == "cuda" else None,
                "peak_rss": worker.rss[batch],
                "peak_gpu": worker.gpu.get(batch),
            }
        )
    return found
