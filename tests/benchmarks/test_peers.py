"""The benchmark against other libraries: what it refuses to compare, its arithmetic, and one small run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the benchmark against peers (no torch)")
pytest.importorskip("onnxruntime", reason="not verified here: the benchmark against peers (no onnxruntime)")

from benchmarks import peers, peers_measure, peers_runs
from benchmarks.peers_measure import Different, check_eps, check_steps, ratios, step_probe, table_of
from ddpmx.formats.spec import ModelSpec

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SPEC = ModelSpec((3, 8, 8))
QUICK = ["--device", "cpu", "--small", "--threads", "1", "--batch", "1", "--steps", "2", "--rounds", "2"]


def run_peers(*arguments: str, blocked: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [*([str(blocked)] if blocked else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, peers.__file__, *QUICK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


# --- the same network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "passes", "fails"), [("fp32", 5e-5, 3e-4), ("fp16", 3e-3, 8e-3)])
def test_epsilon_may_be_off_by_its_precision_and_no_more(precision, passes, fails):
    rng = np.random.default_rng(0)
    reference, noise = rng.standard_normal((2, 4, 1, 3, 8, 8)).astype(np.float32)
    noise *= np.abs(reference).max() / np.abs(noise).max()
    check_eps("peer", precision, reference + passes * noise, reference)
    with pytest.raises(Different, match="another network"):
        check_eps("peer", precision, reference + fails * noise, reference)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_output_that_is_not_finite_is_no_match(precision):
    reference = np.ones((1, 1, 3, 8, 8), np.float32)
    output = reference.copy()
    output[0, 0, 1, 2, 3] = np.nan
    with pytest.raises(Different):
        check_eps("peer", precision, output, reference)


def test_a_network_whose_output_is_zero_proves_nothing():
    zero = np.zeros((1, 1, 3, 8, 8), np.float32)
    with pytest.raises(Different, match="nothing but 0"):
        check_eps("peer", "fp32", zero, zero)


# --- the same chain --------------------------------------------------------------------------------------------------


def walked(kind: str, spec: ModelSpec, steps: int) -> dict[str, np.ndarray]:
    """A peer's steps at the probes of SPEC."""
    timesteps = table_of(SPEC, steps).timesteps
    job = {"spec": spec.to_json(), "threads": 1, "device": "cpu"}
    x_next, z = peers_runs.KINDS[kind](job).walk(timesteps.tolist(), *step_probe(SPEC, timesteps))
    return {"x_next": x_next, "z": z}


def needs(kind: str) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers", reason="not verified here: the chain of diffusers (not installed)")


@pytest.mark.parametrize("steps", [2, 10, 1000])
@pytest.mark.parametrize("kind", ["diffusers", "ort"])
def test_the_peers_walk_the_same_chain(kind, steps, figure):
    needs(kind)
    error = check_steps(kind, SPEC, steps, walked(kind, SPEC, steps))
    figure(f"{kind}, {steps} steps: x_(t−1) against ddpmx's table", error, at_most=peers_measure.STEP_BOUND)


@pytest.mark.parametrize(
    "other",
    [
        {"clip": None},
        {"clip": 1.5},
        {"variance": "fixed_small"},
        {"schedule": "quad"},
        {"schedule_params": {"beta_end": 0.021}},
    ],
    ids=lambda other: next(iter(other)),
)
@pytest.mark.parametrize("kind", ["diffusers", "ort"])
def test_another_chain_is_refused(kind, other):
    needs(kind)
    for steps in (10, 1000):
        with pytest.raises(Different, match=r"at t = \d+"):
            check_steps(kind, SPEC, steps, walked(kind, SPEC.replace(**other), steps))


# --- the arithmetic --------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_times():
    theirs, ours = [2.0, 30.0, 4.0], [1.0, 10.0, 4.0]
    assert ratios(theirs, ours) == (2.0, 1.0, 3.0)  # 4.0 ÷ 4.0 is the ratio of the medians


class Stub(peers_measure.Worker):
    """A run without a process."""

    def __post_init__(self) -> None:
        self.image, self.before, self.seeds = (8, 8, 3), {"chain": {}}, []

    def ask(self, do, **request):
        self.seeds.append(request["seed"])
        return {
            "seconds": self.job["seconds"].pop(0),
            "rss": 1000 * request["seed"],
            "shape": [request["batch"], 8, 8, 3],
        }


def stub(kind, precision, *seconds):
    return Stub(kind, precision, kind, {"seconds": list(seconds)}, Path())


def test_a_run_is_compared_with_ddpmx_in_the_same_precision_and_round():
    workers = [
        stub("ddpmx", "fp32", 1.0, 2.0, 4.0),
        stub("ddpmx", "fp16", 0.5, 0.5, 0.5),
        stub("diffusers", "fp16", 4.0, 3.0, 2.5),
    ]
    seconds = peers_measure.measure(workers, 4, 10, 3)
    fp32, fp16, peer = peers_measure.rows(workers, seconds, 4, 10, "cuda")
    assert fp32["ratio"] is None
    assert fp16["ratio"] is None
    assert (peer["ratio"], peer["ratio_range"]) == (6.0, [5.0, 8.0])
    assert (peer["ms_per_step"], peer["images_per_s"]) == (300.0, 4 / 3)
    assert peer["seconds"] == [4.0, 3.0, 2.5]
    assert peer["peak_rss"] == 102_000  # the largest of the rounds


@pytest.mark.parametrize(
    ("device", "batch", "goal"), [("cuda", 1, 5.0), ("cuda", 64, 2.0), ("cuda", 8, None), ("cpu", 1, None)]
)
def test_goals_are_for_a_gpu(device, batch, goal):
    workers = [stub("ddpmx", "fp16", 1.0), stub("diffusers", "fp16", 2.0)]
    found = peers_measure.rows(workers, peers_measure.measure(workers, batch, 1, 1), batch, 1, device)
    assert [row["goal"] for row in found] == [None, goal]


@pytest.mark.parametrize(("steps", "chains"), [(1, 3), (2, 2), (3, 1), (1000, 1)])
def test_the_warm_up_runs_the_network_three_times_at_least(steps, chains):
    worker = stub("ddpmx", "fp32", 9.0, 1.0, 1.0)
    peers_measure.warm(worker, 4, steps, peers_measure.GpuMemory("cpu"))
    assert len(worker.seeds) == chains
    assert worker.before["chain"] == {4: 9.0}  # the first one alone


def test_a_run_s_memory_is_the_gpu_s_growth_while_it_works():
    gpu, used = peers_measure.GpuMemory("cpu"), [100]
    gpu.used = lambda: used[0]
    first, second = stub("ddpmx", "fp32"), stub("ort", "fp32")
    for worker, loaded, ran in ((first, 150, 170), (second, 370, 400)):
        with gpu.watch(worker):
            used[0] = loaded
        with gpu.watch(worker, 8):
            used[0] = ran
    assert (first.gpu, second.gpu) == ({8: 70}, {8: 230})


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file that the command would export by itself."""
    from ddpm_export.graph.onnx_export import export_network
    from ddpm_export.networks.unet import UNet
    from oracles.random_weights import rerandomise

    network, file = UNet(peers_runs.small_network()), tmp_path_factory.mktemp("peers") / "small.onnx"
    rerandomise(network)
    export_network(network, ModelSpec((3, 16, 16)), file)
    return file


@pytest.mark.long
def test_the_whole_command_on_a_small_network(exported, tmp_path):
    pytest.importorskip("diffusers", reason="not verified here: the benchmark against diffusers (not installed)")
    output = tmp_path / "peers.json"
    done = run_peers("--engine", str(exported), "--only", "diffusers", "ort", "--json", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    ours, *peers_rows = report["rows"]
    assert [row["kind"] for row in report["rows"]] == ["ddpmx", "diffusers", "ort"]
    assert ours["ratio"] is None
    for row in peers_rows:
        assert row["ratio"] == ratios(row["seconds"], ours["seconds"])[0]
        assert f"**{row['ratio']:.2f}**" in done.stdout
    for row in report["rows"]:
        assert len(row["seconds"]) == report["rounds"] == 2
        assert row["peak_rss"] > 10_000_000
        assert row["run"] in done.stdout
    assert report["not_run"] == []
    assert {"torch", "diffusers", "onnxruntime", "ddpmx"} <= set(report["versions"])


@pytest.mark.long
def test_a_file_of_other_weights_gets_no_table(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    model, file = onnx.load(exported), tmp_path / "other.onnx"
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "conv_out.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(1.001 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, file)
    done = run_peers("--engine", str(file), "--only", "ort", "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 1
    assert "another network" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "peers.json").exists()


@pytest.mark.long
def test_without_torch_the_rest_still_runs(exported, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = run_peers("--engine", str(exported), blocked=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| session.run in a loop | fp32 |" in done.stdout
    assert "no torch here" in done.stdout
    assert done.stdout.count("without torch there are no weights for it") == 2


def test_with_nothing_to_run_the_error_names_the_reason(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = run_peers(blocked=tmp_path)
    assert done.returncode == 2
    assert "Nothing was measured" in done.stderr
    assert "no torch here" in done.stderr


def test_a_missing_compiler_is_reported_before_compiling(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        peers_runs.Compiled({"device": "cpu", "threads": 1})
