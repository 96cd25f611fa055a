"""Start-up, memory and time per step of libddpmx, against Python with the same ONNX Runtime and Python with torch.

    python tests/benchmarks/native.py [--rounds 9] [--build build/native] [--json FILE]

Start-up is the time from the start of the process to one image of one step (torch: to one output of the network, from
weights in a file), memory the process's peak. Everything runs on one thread, and in turn, round by round, since the
machine's speed may drift. The two models: a closed form, whose network costs nothing, and the demo's U-Net.
"""

# This process has to stay small, and imports nothing heavy: child processes inherit its peak memory.
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = Path(__file__).with_name("native_torch.py")
ONE_IMAGE = "import ddpmx; p = ddpmx.load({!r}, threads=1); p.generate(1, steps=1)"
CHAINS = """
import sys, time, ddpmx
with ddpmx.load({!r}, threads=1) as p:
    for line in sys.stdin:
        begun = time.perf_counter()
        n, steps = map(int, line.split())
        p.generate(n, steps=steps, batch=1)
        print(time.perf_counter() - begun, flush=True)
"""
NAMES = {
    "native": "libddpmx, ONNX Runtime",
    "python": "Python, ddpmx, ONNX Runtime",
    "torch": "Python, torch (one output)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native", help="where libddpmx is built")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    capi = Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi"
    library = next(capi.glob("libonnxruntime.so.*"))
    program = build(arguments.build)
    found = {
        "bytes": stripped_size(arguments.build / "libddpmx.so"),
        "onnxruntime_bytes": library.stat().st_size,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        models = {"closed form, 3×8×8": (ROOT / "tests" / "data" / "gaussian.onnx", None)}
        if importlib.util.find_spec("torch") is not None:
            subprocess.run([sys.executable, TORCH, "make", folder], check=True, stdout=subprocess.DEVNULL)
            models["the demo's U-Net, 1×16×16"] = (Path(folder) / "unet.onnx", Path(folder) / "unet.pt")
        for name, (model, weights) in models.items():
            native = [program, model, "threads=1", f"ort={library}"]
            ways = {
                "native": (native, "n=1 steps=1\n"),
                "python": ([sys.executable, "-c", ONE_IMAGE.format(str(model))], ""),
            }
            if weights is not None:
                ways["torch"] = ([sys.executable, TORCH, "run", weights], "")
            python = [sys.executable, "-c", CHAINS.format(str(model))]
            images, steps = (20, 1000) if weights is None else (1, 50)
            found["models"][name] = {
                **start(ways, arguments.rounds),
                **per_step(native, python, images, steps, arguments.rounds),
            }
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def build(folder: Path) -> Path:
    """Build run_model, or bring it up to date. Returns its path."""
    source = ROOT / "runtime" / "native"
    for words in (["-S", source, "-B", folder], ["--build", folder, "--target", "run_model"]):
        subprocess.run(["cmake", *words], check=True, stdout=subprocess.DEVNULL)
    return folder / "tests" / "run_model"


def stripped_size(library: Path) -> int:
    """Bytes of a shared library without debug symbols."""
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / "stripped"
        shutil.copy(library, stripped)
        subprocess.run(["strip", stripped], check=True)
        return stripped.stat().st_size


def start(ways: dict[str, tuple[list[object], str]], rounds: int) -> dict[str, object]:
    """Start-up time and memory of each command."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (command, text) in ways.items():
            begun = time.perf_counter()
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - begun)
                memory[way].append(usage.ru_maxrss / 1024)
    return {
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "times": {way: ratio(values, seconds["native"]) for way, values in seconds.items()},
        "megabytes": {way: statistics.median(values) for way, values in memory.items()},
    }


def per_step(native: list[object], python: list[object], images: int, steps: int, rounds: int) -> dict[str, object]:
    """Milliseconds per step of a chain, each in one warm process."""
    found: dict[str, list[float]] = {"native": [], "python": []}
    running = {
        way: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way, command in (("native", native), ("python", python))
    }
    request = {"native": f"n={images} batch=1 steps={steps}\n", "python": f"{images} {steps}\n"}
    running["native"].stdout.readline()  # the line about the opened model
    for number in range(rounds + 1):
        for way, process in running.items():
            process.stdin.write(request[way])
            process.stdin.flush()
            milliseconds = 1e3 * float(process.stdout.readline()) / (images * steps)
            if number:
                found[way].append(milliseconds)
    for process in running.values():
        process.communicate()
    return {
        "ms_per_step": {way: statistics.median(values) for way, values in found.items()},
        "python_over_native": ratio(found["python"], found["native"]),
    }


def ratio(values: list[float], base: list[float]) -> float:
    """The median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def report(found: dict) -> None:
    print(
        f"libddpmx.so, stripped: {found['bytes'] / 1e3:.0f} KB; ONNX Runtime: {found['onnxruntime_bytes'] / 1e6:.1f} MB"
    )
    for name, model in found["models"].items():
        print(f"\n{name:<34}{'start':>9}{'':>8}{'memory':>12}{'':>8}{'per step':>12}")
        for way, title in NAMES.items():
            if way not in model["seconds"]:
                continue
            row = f"  {title:<32}{model['seconds'][way]:>7.3f} s{model['times'][way]:>7.1f}×"
            row += f"{model['megabytes'][way]:>9.0f} MB{model['megabytes'][way] / model['megabytes']['native']:>7.1f}×"
            if way in model["ms_per_step"]:
                times = model["python_over_native"] if way == "python" else 1
                row += f"{model['ms_per_step'][way]:>9.4f} ms{times:>7.2f}×"
            print(row)
    if len(found["models"]) == 1:
        print("\nno U-Net and no row for torch, which is not installed here")


if __name__ == "__main__":
    main()
