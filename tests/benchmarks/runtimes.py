"""How other runtimes take a model file: do they load it, how far is ε from ONNX Runtime's, how long does a call take?

    python tests/benchmarks/runtimes.py model.onnx                  # what is installed here
    python tests/benchmarks/runtimes.py model.onnx --batch 1,16 -o runtimes.json

Each runtime is measured in a process of its own, since several bring their own OpenMP, with one thread. Those that take
another format convert the file themselves (MNN, ncnn). The figures of docs/runtimes.md come from here; a runtime that is
not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.formats.onnx_file import onnx_spec, read_onnx
from ddpmx.sampling import chain

Array = NDArray[Any]
Run = Callable[[Array, Array], Array]


def onnxruntime(path: str, output: str, threads: int = 1) -> tuple[str, Run]:
    """The reference."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return ort.__version__, lambda x, t: np.asarray(session.run([output], {"x": x, "t": t})[0])


def openvino(path: str, output: str, threads: int = 1) -> tuple[str, Run]:
    """As it is; with f32 as the inference precision, since some CPUs would take bf16."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = ov.Core().compile_model(path, "CPU", settings)
    return ov.__version__, lambda x, t: np.array(model({"x": x, "t": t})[output])


def opencv(path: str, output: str, threads: int = 1) -> tuple[str, Run]:
    """As it is, by the engine that OpenCV chooses."""
    import cv2

    cv2.setNumThreads(threads)
    net = cv2.dnn.readNetFromONNX(path)

    def run(x: Array, t: Array) -> Array:
        net.setInput(x, "x")
        net.setInput(t, "t")
        return np.array(net.forward(output))

    return cv2.__version__, run


def mnn(path: str, output: str, threads: int = 1) -> tuple[str, Run]:
    """Converted by the extension module: the package's own script calls pip and logs usage."""
    import MNN
    import MNN.expr as expr
    import MNN.nn as nn

    target = os.path.join(tempfile.mkdtemp(), "model.mnn")
    script = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
    command = ["-f", "ONNX", "--modelFile", path, "--MNNModel", target, "--bizCode", "x"]
    subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True)
    net = nn.load_module_from_file(target, ["x", "t"], [output], backend=expr.Backend.CPU, thread_num=threads)

    def run(x: Array, t: Array) -> Array:
        inputs = [expr.const(x, list(x.shape), expr.NCHW), expr.const(t, list(t.shape), expr.NCHW, expr.int)]
        return np.array(expr.convert(net.forward(inputs)[0], expr.NCHW).read(), np.float32).reshape(x.shape)

    return MNN.version(), run


def ncnn(path: str, output: str, threads: int = 1) -> tuple[str, Run]:
    """Converted by pnnx, in float32 and for one image at a time; t is passed as float32."""
    import ncnn as engine

    package = importlib.util.find_spec("pnnx")  # importing it would import torch
    if package is None or package.origin is None:
        raise RuntimeError("pnnx, which converts the file, is not installed")
    spec = onnx_spec(Path(path), read_onnx(Path(path)))
    net = engine.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder, "model.onnx"))
        shape = ",".join(map(str, (1, *spec.shape)))
        command = [str(Path(package.origin).with_name("pnnx")), "model.onnx", f"inputshape=[{shape}],[1]i32", "fp16=0"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        layers = Path(folder, "model.ncnn.param")
        layers.write_text(without_casts(layers.read_text()))
        if net.load_param(str(layers)) or net.load_model(str(Path(folder, "model.ncnn.bin"))):
            raise RuntimeError("ncnn does not load the file that pnnx made")

    def one(x: Array, t: float) -> Array:
        extractor = net.create_extractor()
        # an ncnn.Mat of an array does not keep that array alive
        extractor.input("in0", engine.Mat(np.ascontiguousarray(x)).clone())
        extractor.input("in1", engine.Mat(np.array([t], np.float32)).clone())
        failed, eps = extractor.extract("out0")
        if failed:
            raise RuntimeError("ncnn failed to run the network")
        return np.array(eps)

    return engine.__version__, lambda x, t: np.stack([one(*pair) for pair in zip(x, t, strict=True)])


def without_casts(layers: str) -> str:
    """A .param file without casts, for which ncnn has no layer."""
    return re.sub(r"^Tensor\.to ", "Noop      ", layers, flags=re.MULTILINE)


RUNTIMES: dict[str, tuple[str, Callable[..., tuple[str, Run]]]] = {
    "onnxruntime": ("onnxruntime", onnxruntime),
    "openvino": ("openvino", openvino),
    "opencv": ("cv2", opencv),
    "mnn": ("MNN", mnn),
    "ncnn": ("ncnn", ncnn),
}
"""The module that has to be there, and how the file is opened: ``(path, output, threads)`` → (version, call)."""


def inputs_of(path: Path, batch: int) -> tuple[str, Array, Array]:
    """(name of the output, noise x, t = 0, T/4, T/2, T−1 in turns)."""
    spec = onnx_spec(path, read_onnx(path))
    times = np.array([0, spec.timesteps // 4, spec.timesteps // 2, spec.timesteps - 1], np.int32)
    return spec.prediction, chain.initial(0, np.arange(batch), spec.shape), np.resize(times, batch)


def measure(name: str, path: Path, batches: list[int], seconds: float) -> dict[str, Any]:
    """Outputs for four t, and the median time of a call for each batch size, in this process."""
    output, x, t = inputs_of(path, 4)
    version, run = RUNTIMES[name][1](str(path), output)
    found: dict[str, Any] = {"version": version, "outputs": run(x, t).tolist(), "ms": {}}
    for batch in batches:
        _, x, t = inputs_of(path, batch)
        run(x, t)
        took, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until or len(took) < 3:
            begun = time.perf_counter()
            run(x, t)
            took.append(time.perf_counter() - begun)
        found["ms"][str(batch)] = 1e3 * float(np.median(took))
    return found


def compared(path: Path, batches: list[int], seconds: float) -> dict[str, Any]:
    """Every runtime in a process of its own, and its largest relative RMS against ONNX Runtime."""
    results: dict[str, Any] = {}
    for name, (module, _) in RUNTIMES.items():
        if importlib.util.find_spec(module) is None:
            results[name] = {"error": "not installed"}
            continue
        command = [sys.executable, __file__, str(path), "--only", name, "--batch", ",".join(map(str, batches))]
        done = subprocess.run(
            [*command, "--seconds", str(seconds)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        try:
            results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            results[name] = {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    reference = np.array(results["onnxruntime"]["outputs"])
    for result in results.values():
        if "outputs" in result:
            out, axes = np.array(result.pop("outputs")), (1, 2, 3)
            error = np.sqrt(((out - reference) ** 2).mean(axes) / (reference**2).mean(axes))
            result["error_of_eps"] = float(error.max())
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--seconds", type=float, default=1.0, help="per runtime and batch size")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    given = parser.parse_args()
    batches = [int(n) for n in given.batch.split(",")]
    if given.only:
        print(json.dumps(measure(given.only, given.model, batches, given.seconds)))
        return
    results = compared(given.model, batches, given.seconds)
    for name, result in results.items():
        times = "  ".join(f"batch {n}: {ms:.2f} ms" for n, ms in result.get("ms", {}).items())
        said = result.get("error") or f"{result['version']:<24} ε within {result['error_of_eps']:.1e}  {times}"
        print(f"{name:<12} {said}")
    if given.output:
        given.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
