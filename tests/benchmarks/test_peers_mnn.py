"""MNN, OpenVINO and ncnn in the benchmark against other libraries: the goals' arithmetic, the load, a small run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="not verified here: the benchmark of MNN (no onnxruntime)")

from benchmarks import peers, peers_goals, peers_measure, peers_runs, runtimes
from benchmarks.peers_measure import NotRun, busy, check_eps, check_steps, step_probe, table_of
from ddpmx.errors import BackendError
from ddpmx.formats.spec import ModelSpec
from ddpmx.mnn import library
from ddpmx.models import shipped
from oracles import gaussian

PAPER, SMALL = peers_goals.PAPER, peers_goals.SMALL
SCHEDULE = gaussian.SPEC.make_schedule()
LOOPS = {"ort": "onnxruntime", "openvino": "openvino", "ncnn": "ncnn"}


def needs(kind: str) -> None:
    module = LOOPS.get(kind)
    if module is not None:
        pytest.importorskip(module, reason=f"not verified here: {module} (not installed)")
        return
    try:
        library.load()
    except BackendError as why:
        pytest.skip(f"not verified here: MNN in the benchmark ({why.fact})")


# --- the goals -------------------------------------------------------------------------------------------------------


def row(kind, *seconds, precision="fp32", batch=16, rss=100):
    return {
        "run": kind,
        "kind": kind,
        "precision": precision,
        "batch": batch,
        "seconds": list(seconds),
        "peak_rss": rss,
    }


def test_mnn_is_compared_with_the_others_round_by_round():
    rows = [row("ddpmx", 4.0, 9.0, 9.0), row("diffusers", 8.0, 8.0, 1.0, rss=400), row("mnn", 2.0, 3.0, 9.0, rss=90)]
    ddpmx, diffusers = peers_goals.beside(rows, PAPER, 1, 0)
    assert (ddpmx["beside"], ddpmx["times"], ddpmx["times_range"]) == ("ddpmx", 2.0, [1.0, 3.0])
    assert (ddpmx["memory"], ddpmx["memory_goal"]) == (0.9, 1.0)
    assert (diffusers["beside"], diffusers["times"]) == ("diffusers", 8 / 3)
    assert (diffusers["memory"], diffusers["memory_goal"]) == (0.225, None)


def test_mnn_is_compared_in_its_precision_and_batch_alone():
    rows = [row("ddpmx", 1.0, precision=p, batch=n) for p in ("fp32", "fp16") for n in (1, 16)]
    rows += [row("mnn", 1.0, precision="fp16", batch=1), row("mnn-low", 1.0, precision="fp16", batch=1)]
    found = [(each["run"], each["beside"]) for each in peers_goals.beside(rows, PAPER, 1, 0)]
    assert found == [("mnn", "ddpmx"), ("mnn-low", "ddpmx"), ("mnn-low", "mnn")]


@pytest.mark.parametrize(
    ("network", "threads", "batch", "other", "goal"),
    [
        (PAPER, 1, 1, "ddpmx", 1.5),
        (PAPER, 1, 16, "ddpmx", 1.65),
        (PAPER, 2, 1, "ddpmx", 1.0),
        (PAPER, 2, 16, "ddpmx", 1.9),
        (PAPER, 1, 1, "diffusers", 2.5),
        (PAPER, 1, 16, "diffusers", 1.95),
        (SMALL, 1, 16, "ddpmx", 1.25),
        (SMALL, 2, 16, "ddpmx", 1.25),
        (PAPER, 2, 16, "diffusers", None),
        (PAPER, 4, 16, "ddpmx", None),
        (PAPER, 1, 8, "ddpmx", None),
        (SMALL, 1, 1, "ddpmx", None),
        (PAPER, 1, 16, "ort", None),
        ("", 1, 16, "ddpmx", None),
    ],
)
def test_a_goal_is_for_a_network_its_threads_and_its_batch(network, threads, batch, other, goal):
    mine, theirs = row("mnn", 1.0, batch=batch), row(other, 1.0, batch=batch)
    assert peers_goals.speed_goal(mine, theirs, network, threads, 0) == goal
    assert peers_goals.speed_goal(mine, theirs, network, threads, 2) is None, "a goal of an idle machine"
    half = {**mine, "precision": "fp16"}
    assert peers_goals.speed_goal(half, theirs, network, threads, 0) is None, "a goal of float32"


@pytest.mark.parametrize(("processes", "goal"), [(0, None), (1, None), (2, 1.0), (3, 1.0)])
def test_beside_busy_processes_more_threads_are_not_to_be_slower_than_one(processes, goal):
    mine, one = row("mnn", 1.0), row("mnn1", 1.0)
    assert peers_goals.speed_goal(mine, one, PAPER, 2, processes) == goal
    assert peers_goals.speed_goal(row("mnn-low", 1.0), one, PAPER, 2, processes) is None


def test_a_goal_is_met_or_missed(capsys):
    rows = [row("ddpmx", 3.0), row("mnn", 2.0, rss=101)]
    peers_goals.show(peers_goals.beside(rows, PAPER, 1, 0))
    assert "| **1.50** (1.50 … 1.50) | ≥ 1.65, missed | 1.01 | ≤ 1, missed |" in capsys.readouterr().out
    rows = [row("ddpmx", 3.3), row("mnn", 2.0)]
    peers_goals.show(peers_goals.beside(rows, PAPER, 1, 0))
    assert "≥ 1.65, met | 1.00 | ≤ 1, met |" in capsys.readouterr().out
    peers_goals.show([])
    assert capsys.readouterr().out == ""


@pytest.mark.torch
@pytest.mark.slow
def test_networks_are_recognised_by_their_size():
    torch = pytest.importorskip("torch", reason="not verified here: sizes of networks (no torch)")
    from ddpm_export.networks.unet import UNet, cifar10, lsun256

    with torch.device("meta"):
        configs = [cifar10(), peers_runs.small_network(), lsun256()]
        sizes = [sum(parameter.numel() for parameter in UNet(config).parameters()) for config in configs]
    assert [peers_goals.network_of(size) for size in sizes] == [PAPER, SMALL, ""]


# --- the load --------------------------------------------------------------------------------------------------------


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_busy_processes_compute_until_the_end():
    if not Path("/proc/self/stat").is_file():
        pytest.skip("not verified here: that busy processes compute (no /proc)")
    with busy(2) as processes:
        begun, until = [cpu_seconds(process) for process in processes], time.monotonic() + 60
        while min(cpu_seconds(process) - b for process, b in zip(processes, begun, strict=True)) < 0.1:
            assert time.monotonic() < until, "they wait"
            time.sleep(0.01)
    assert [process.poll() is None for process in processes] == [False, False]


def test_a_load_that_ended_early_is_no_load():
    load = busy(1)
    (process,) = load.__enter__()
    process.kill()
    process.wait()
    with pytest.raises(NotRun, match="before the last round"):
        load.__exit__(None, None, None)


def test_no_load_is_no_process():
    with busy(0) as processes:
        assert processes == []


# --- the runs, in this process ---------------------------------------------------------------------------------------


def test_a_cast_is_taken_out_and_nothing_else():
    layers = "Input                    in1       0 1 in1\nTensor.to                Tensor.to_8  1 1 in1 2\n"
    assert runtimes.without_casts(layers) == layers.replace("Tensor.to   ", "Noop        ", 1)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_walks_the_chain_and_gives_the_network_s_output(gaussian_onnx, kind):
    needs(kind)
    job = {"spec": gaussian.SPEC.to_json(), "file": str(gaussian_onnx), "threads": 1, "device": "cpu"}
    loop, spec, steps = peers_runs.KINDS[kind](job), gaussian.SPEC, 5
    timesteps = table_of(spec, steps).timesteps
    x_next, z = loop.walk(timesteps.tolist(), *step_probe(spec, timesteps))
    check_steps(kind, spec, steps, {"x_next": x_next, "z": z})
    if kind == "ncnn":
        return  # it has no layer for this network's Gather: the next test
    loop.load()
    x = np.random.default_rng(0).standard_normal((3, *spec.shape), np.float32)
    for t in (0, spec.timesteps - 1):
        check_eps(kind, "fp32", loop.eps(x, t), gaussian.optimal_eps(x, SCHEDULE, t))
    assert loop.draw(2, steps, 0).shape == (2, *spec.shape[1:], spec.shape[0])


@pytest.mark.torch
@pytest.mark.slow
def test_ncnn_gives_torch_s_output(tmp_path):
    needs("ncnn")
    torch = pytest.importorskip("torch", reason="not verified here: ncnn in the benchmark (no torch)")
    spec = ModelSpec((3, 16, 16))
    job = {"checkpoint": None, "small": True, "weights": str(tmp_path / "w.safetensors"), "threads": 1}
    source = peers_runs.KINDS["source"]({**job, "onnx": {"fp32": str(tmp_path / "fp32.onnx")}})
    threads = torch.get_num_threads()
    try:
        source.load()
    finally:
        torch.set_num_threads(threads)
    loop = peers_runs.KINDS["ncnn"]({"spec": spec.to_json(), "file": str(tmp_path / "fp32.onnx"), "threads": 1})
    loop.load()
    x = np.random.default_rng(0).standard_normal((2, *spec.shape), np.float32)
    for t in (0, 100, 999):
        check_eps("ncnn", "fp32", loop.eps(x, t), source.eps(x, t))
    assert loop.draw(2, 2, 0).shape == (2, 16, 16, 3)


def test_mnn_s_run_is_ddpmx_on_a_model_built_here(gaussian_onnx, tmp_path):
    needs("mnn")
    file, spec = tmp_path / "fp32.mnn", gaussian.SPEC
    for low in (False, True):
        made = peers_runs.KINDS["mnn model"]({"onnx": str(gaussian_onnx), "file": str(file), "low_memory": low}).load()
        assert f"memory {'low' if low else 'normal'}" in made
    run = peers_runs.KINDS["mnn"]({"file": str(file), "threads": 2, "device": "cpu"})
    assert "2 at most" in run.load()
    assert run.versions["MNN"] == library.load().version()
    x = np.random.default_rng(0).standard_normal((3, *spec.shape), np.float32)
    check_eps("mnn", "fp32", run.eps(x, 3), gaussian.optimal_eps(x, SCHEDULE, 3))
    run.backend.close()
    assert run.draw(2, 5, 0).shape == (2, *spec.shape[1:], spec.shape[0])
    run.pipeline.close()


@pytest.mark.slow
def test_a_restarted_run_is_a_new_process_with_the_times_of_the_first(gaussian_onnx, tmp_path):
    job = {"file": str(gaussian_onnx), "threads": 1, "device": "cpu"}
    worker = peers_measure.Worker("ddpmx", "fp32", "ddpmx", job, tmp_path / "log").prepare()
    try:
        first, worker.before["imports"] = worker.process, 123.0
        worker.restart()
        assert first.poll() == 0
        assert worker.process.pid != first.pid
        assert worker.before["imports"] == 123.0
        assert worker.ask("draw", batch=2, steps=2, seed=0)["shape"] == [2, 8, 8, 3]
    finally:
        worker.close()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_runs_mnn_beside_busy_processes(tmp_path):
    needs("mnn")
    output = tmp_path / "peers.json"
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    options = ["--device", "cpu", "--threads", "2", "--batch", "16", "--steps", "2", "--rounds", "2", "--busy", "2"]
    options += ["--engine", str(shipped.find("garments")), "--only", "mnn", "mnn-low", "openvino", "ncnn"]
    done = subprocess.run(
        [sys.executable, peers.__file__, *options, "--json", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    by_kind = {each["kind"]: each for each in report["rows"]}
    here = {kind for kind in ("openvino",) if importlib.util.find_spec(kind)}
    assert set(by_kind) == {"ddpmx", "mnn", "mnn-low", "mnn1"} | here
    assert by_kind["mnn"]["ratio"] == peers_measure.ratios(by_kind["mnn"]["seconds"], by_kind["ddpmx"]["seconds"])[0]
    for each in report["mnn"]:
        mine, other = (next(r for r in report["rows"] if r["run"] == each[name]) for name in ("run", "beside"))
        assert each["times"] == peers_measure.ratios(other["seconds"], mine["seconds"])[0]
    (one,) = (each for each in report["mnn"] if each["beside"] == "ddpmx on MNN, one thread")
    assert one["goal"] == 1.0
    assert {"imports", "load", "first answer", "chain"} <= set(report["before"][0])
    assert report["busy"] == 2
    assert "Beside 2 processes that computed without pause" in done.stdout
    assert "not run: ncnn in a loop: none of the files is an ONNX file that it takes" in done.stdout
    assert ("not run: OpenVINO in a loop: ModuleNotFoundError: No module named 'openvino'" in done.stdout) != bool(here)
