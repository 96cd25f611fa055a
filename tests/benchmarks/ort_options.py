"""What ONNX Runtime's options cost on the CPU: time ÷ the default's, and whether the bits stay, idle and beside others.

    python tests/benchmarks/ort_options.py garments model.onnx [--busy 0,1,2] [--batch 1,4] [--rounds 15]

Each option is set alone, for one thread and for all of them, in a session of its own. ddpmx sets "spins
1000 µs", or "not spinning" beside others. The sessions take turns, and each ratio is taken round by round, since the
machine's speed may drift. ``--busy`` is the load generator: so many processes compute beside. A round in which processes of
others compute is repeated. Bits are compared at five t over 0…T−1 and at every batch size, with the default's.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ddpmx.backends.base import VARIANCE, Buffers
from ddpmx.formats import onnx_file
from ddpmx.formats.spec import ModelSpec
from ddpmx.models import shipped
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example
from ddpmx.system import machine

PAUSE = 0.1
"""Seconds between two sessions: the threads of the last one may still spin, and would slow down the next one."""

OTHERS = 0.06
"""A round counts if processes that are not this benchmark's use at most this share of the CPU."""

LEVELS = onnxruntime.GraphOptimizationLevel


def _entry(name: str, value: str) -> Callable[[Any], None]:
    return lambda options: options.add_session_config_entry(f"session.{name}", value)


OPTIONS: dict[str, Callable[[Any], None]] = {
    "default": lambda options: None,
    "not spinning": _entry("intra_op.allow_spinning", "0"),
    "spins 20 µs": _entry("intra_op.spin_duration_us", "20"),
    "spins 100 µs": _entry("intra_op.spin_duration_us", "100"),
    "spins 1000 µs": _entry("intra_op.spin_duration_us", "1000"),
    "spinning ends with a call": _entry("force_spinning_stop", "1"),
    "dynamic blocks": _entry("dynamic_block_base", "4"),
    "no arena": lambda options: setattr(options, "enable_cpu_mem_arena", False),
    "no memory pattern": lambda options: setattr(options, "enable_mem_pattern", False),
    "no prepacking": _entry("disable_prepacking", "1"),
    "no layout (extended)": lambda options: setattr(options, "graph_optimization_level", LEVELS.ORT_ENABLE_EXTENDED),
    "basic graph": lambda options: setattr(options, "graph_optimization_level", LEVELS.ORT_ENABLE_BASIC),
    "denormals are zero": _entry("set_denormal_as_zero", "1"),
}

WAITING = ("not spinning", "spinning ends with a call", "spins 20 µs", "spins 100 µs", "spins 1000 µs")
"""Options that do nothing where there is one thread."""

Way = tuple[int, str]


class Runs:
    """A file in one session, on random images: :meth:`call` runs the network once."""

    def __init__(self, path: Path, spec: ModelSpec, way: Way) -> None:
        options = onnxruntime.SessionOptions()  # ddpmx's own would set a duration already
        options.log_severity_level = 3
        options.intra_op_num_threads = way[0]
        OPTIONS[way[1]](options)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._spec = spec

    def bind(self, batch: int) -> None:
        """New inputs of a batch size."""
        spec, images = self._spec, np.arange(batch)
        var = spec.variance == "learned_range"
        self.buffers = Buffers.of(batch, spec.shape, var=var, conditioning_shapes=spec.conditioning_shapes)
        inputs = self.buffers.inputs()
        inputs["x"][...] = chain.initial(0, images, spec.shape)
        for name, array in example(spec, images).items():
            inputs[name][...] = array
        self._binding = self._session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.buffers.outputs().items():
            name = VARIANCE if name == "var" else spec.prediction
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def call(self) -> None:
        """Run the network once."""
        self._session.run_with_iobinding(self._binding)

    def answers(self, batches: list[int]) -> list[bytes]:
        """The outputs' bytes at five t and at every batch size."""
        found = []
        for batch in batches:
            self.bind(batch)
            for t in np.linspace(0, self._spec.timesteps - 1, 5).astype(int):
                self.buffers.t[...] = t
                self.call()
                found += [array.tobytes() for array in self.buffers.outputs().values()]
        return found


class Load:
    """The load generator: processes that compute beside, without a pause."""

    def __init__(self, count: int) -> None:
        endless = "x = 1.5\nwhile True: x = x * 1.0000001 % 3"
        self._processes = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(count)]
        time.sleep(0.5 * bool(count))

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def others(self) -> float:
        """Seconds of CPU that all other processes have used since the machine was started; 0 where nothing says so."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            mine = [Path(f"/proc/{process.pid}/stat").read_text().split()[13:15] for process in self._processes]
        except OSError:
            return 0.0
        ticks = user + nice + system + irq + softirq + steal - sum(int(each) for times in mine for each in times)
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(
    runs: dict[Way, Runs], batch: int, rounds: int, seconds: float, beside: Load
) -> tuple[dict[Way, list[float]], float]:
    """(seconds per call of every way, round by round; the largest share of the CPU that others had in these rounds).

    In each round every way makes as many calls as fit into ``seconds``, at least two. Up to four times as many rounds run
    until so many were without others; then the quietest count.
    """
    for each in runs.values():
        each.bind(batch)
        each.call()
    order, cores = random.Random(0), machine.cpu().threads
    found: list[tuple[float, dict[Way, float]]] = []
    for _ in range(4 * rounds):
        ways = list(runs)
        order.shuffle(ways)
        started, used, one = time.perf_counter(), beside.others(), {}
        for way in ways:
            time.sleep(PAUSE)
            runs[way].call()
            begun, calls = time.perf_counter(), 0
            while calls < 2 or time.perf_counter() - begun < seconds:
                runs[way].call()
                calls += 1
            one[way] = (time.perf_counter() - begun) / calls
        found.append(((beside.others() - used) / (time.perf_counter() - started) / cores, one))
        if sum(share <= OTHERS for share, _ in found) >= rounds:
            break
    quiet = sorted(found, key=lambda each: each[0])[:rounds]
    return {way: [one[way] for _, one in quiet] for way in runs}, quiet[-1][0]


def main() -> None:
    """Measure every file, and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="ONNX files that describe themselves, or names of shipped models")
    parser.add_argument("--busy", default="0,2", help="processes that compute beside, one column each")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.4, help="of calls per option and round")
    parser.add_argument("--only", default="", help="options, comma-separated; all by default")
    arguments = parser.parse_args()
    batches, loads = ([int(each) for each in text.split(",")] for text in (arguments.batch, arguments.busy))
    names = ["default", *(name for name in OPTIONS if name in arguments.only.split(",") or not arguments.only)]
    cores = machine.cpu().threads
    print(f"onnxruntime {onnxruntime.__version__}; {machine.cpu().model}, {cores} threads")
    for file in arguments.files:
        path = shipped.find(file)
        info = onnx_file.read_onnx(path)
        spec = onnx_file.onnx_spec(path, info, None)
        ways = [(cores, name) for name in dict.fromkeys(names)]
        ways += [(1, name) for name in dict.fromkeys(names) if cores > 1 and name not in WAITING]
        runs = {way: Runs(path, spec, way) for way in ways}
        first = runs[ways[0]].answers(batches)
        equal = {way: each.answers(batches) == first for way, each in runs.items()}
        for batch in batches:
            table: dict[int, dict[Way, list[float]]] = {}
            shares: dict[int, float] = {}
            for count in loads:
                with Load(count) as beside:
                    table[count], shares[count] = measure(runs, batch, arguments.rounds, arguments.seconds, beside)
            print(f"\n{path.name}, batch {batch}: time ÷ the default's with {cores} threads (P25…P75), ms")
            print(f"{'':34}{'bits':>8}" + "".join(f"{f'beside {n} busy' if n else 'idle':>30}" for n in loads))
            for way in ways:
                line = f"{way[0]} thread{'s' if way[0] > 1 else ' '} {way[1]:25}{'equal' if equal[way] else 'OTHER':>8}"
                for count in loads:
                    ratios = [a / b for a, b in zip(table[count][way], table[count][ways[0]], strict=True)]
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    ms = 1e3 * statistics.median(table[count][way])
                    line += f"{middle:12.3f} ({low:.2f}…{high:.2f}){ms:6.1f}"
                print(line, flush=True)
            print(f"{'others had at most':42}" + "".join(f"{shares[n]:29.0%} " for n in loads))


if __name__ == "__main__":
    main()
