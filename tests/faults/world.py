"""A folder with everything that the commands take, and older outputs that they replace."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

GAUSSIAN_ONNX = Path(__file__).parents[1] / "data" / "gaussian.onnx"
TINY = (
    "-T 20 --width 32 --groups 32 --mult 1 --blocks 1 --attention= --batch 2 --sample-every 1 --device cpu --lr 0.1 "
    "--warmup 1 --ema 0.5"
)

LEFT = re.compile(r"\.part\b|ddpmx-|/\.old|/\.new")
"""What a command may have in a folder while it runs, and not afterwards."""

COMMANDS: Mapping[str, tuple[str, ...]] = {
    name: tuple(shlex.split(line))
    for name, line in {
        "generate": "generate --engine gaussian.onnx -n 3 --seed 1 --steps 2 --out samples --grid --animate --overwrite",
        "train": f"train --data data.npz --out trained --steps 2 {TINY}",
        "resume": "train --out runs/resumed --resume --steps 3 --sample-every 1",
        "export": "export runs/new -o model.onnx --no-plan",
        "build": "build gaussian.onnx -o gaussian.plan --level 2 --batch 1,2,4",
        "import": "import theirs -o imported",
        "to diffusers": "convert runs/old --to diffusers -o converted",
        "to pesser": "convert runs/old --to pesser -o converted",
        "parity": "parity model.onnx --report report",
    }.items()
}
"""Each takes about a second. What it writes is there already in an older state, where the command allows that."""

WHOLE = ("samples/", "converted/", "imported/", "report/", "trained/checkpoints/", "runs/resumed/checkpoints/")
"""Folders whose files are of one run: all old or all new. Of the checkpoints, each of its folders."""


WITHOUT_TORCH = ("generate", "build")


def prepare(cache: Path, names: Collection[str], plant: bool = False) -> None:
    """Import what the commands import, and replace what takes long or is not here: torch's tracer, and TensorRT.

    cache: a folder for graphs that were traced before.
    names: the commands that will run.
    plant: replace a plan and its sidecar one after the other, as a control.
    """
    from ddpmx.formats import plan_file
    from ddpmx.trt import build as trt_build
    from ddpmx.trt import library as trt_library
    from oracles.engines import fake
    from oracles.plans import make_plan

    for name in ("bench", "build", "convert", "export", "generate", "import_", "info", "parity", "train", "main"):
        __import__(f"ddpmx_cli.{name}")
    for name in ("onnxruntime", "PIL.Image", "rich.progress"):
        __import__(name)

    def built(path, name, spec, record, library, options, *_):
        data = make_plan(spec=spec, record=record, tail=bytes([options.level or 0]) * 3_000_000)
        return memoryview(data), 7

    trt_library.load = lambda *_, **__: fake("1.7.1.116", "TensorRT-RTX")  # type: ignore[assignment]
    trt_build.run_builder = built  # type: ignore[attr-defined]
    trt_build.assert_precision = lambda *_, **__: "not verified"  # type: ignore[attr-defined]

    def one_after_the_other(output, plan, spec, record, about):
        output.write_bytes(plan)
        values = plan_file.sidecar_json(plan.nbytes, spec, record, about)
        plan_file.sidecar_path(output).write_text(json.dumps(values))

    if plant:
        plan_file.write_plan = one_after_the_other  # type: ignore[attr-defined]
    if not set(names) <= set(WITHOUT_TORCH):
        _prepare_torch(cache)


def _prepare_torch(cache: Path) -> None:
    import onnx

    from ddpm_export.graph import onnx_export

    for name in ("importers.registry", "training.train", "proof.proof", "importers.diffusers"):
        __import__(f"ddpm_export.{name}")
    for name in ("matplotlib.figure", "ddpmx.parity.plots"):
        __import__(name)
    trace = onnx_export._trace

    def trace_once(network, spec):
        file = cache / f"{spec.weights}.onnx"
        if not file.exists():
            file.write_bytes(trace(network, spec).SerializeToString())
        return onnx.load_model_from_string(file.read_bytes())

    onnx_export._trace = trace_once  # type: ignore[assignment]


def make(folder: Path, call, names: Collection[str]) -> None:
    """Fill ``folder`` with what the commands ``names`` need. ``call(command)`` runs a command there."""

    def run(line: str) -> None:
        call(shlex.split(line))

    shutil.copy(GAUSSIAN_ONNX, folder / "gaussian.onnx")
    run("generate --engine gaussian.onnx -n 4 --seed 0 --steps 2 --out samples --grid")
    run("build gaussian.onnx -o gaussian.plan --level 1 --batch 1,2,4")
    if set(names) <= set(WITHOUT_TORCH):
        return
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", rng.integers(0, 256, (4, 8, 8), np.uint8))
    for seed, name in enumerate(("old", "new")):
        run(f"train --data data.npz --out runs/{name} --steps 2 {TINY} --seed {seed}")
    shutil.copytree(folder / "runs" / "old", folder / "runs" / "resumed")
    run("export runs/old -o model.onnx --no-plan")
    run("convert runs/old --to diffusers -o theirs")
    run("parity model.onnx --report report")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, and every empty folder as "NAME/"."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = re.sub(rb'"seconds": [0-9.]+', b'"seconds": 0', path.read_bytes())
        elif path.is_dir() and not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def run_here(command, folder: Path) -> int:
    """Run a command in ``folder``, in this process; its exit code."""
    import os

    from ddpmx_cli import main

    os.chdir(folder)
    sys.argv = ["ddpmx", *command]
    try:
        main.run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0
