"""`ddpmx bench`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from ddpmx.backends import base
from ddpmx.bench.figures import Cell
from ddpmx.bench.measure import Report
from ddpmx.errors import InputError
from ddpmx_cli import bench
from oracles import gaussian
from oracles.plans import make_plan

QUICK = ("--seconds", "0.05", "--batch", "1,2")


@pytest.fixture
def model(tmp_path, gaussian_onnx):
    return shutil.copy(gaussian_onnx, tmp_path / "model.onnx")


def test_a_table_that_fits_into_100_columns(ddpmx, model):
    done = ddpmx("bench", model, *QUICK)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "model.onnx: 8×8, 3 channels; T = 1000; fp32; 9 KiB"
    assert re.search(r"runs on: +onnxruntime \S+, CPUExecutionProvider", done.out)
    assert re.search(r"CPU: +\S.*, \d+ thread", done.out)
    assert re.search(r"loading: +\d+\.\d\d s", done.out)
    rows = [line.split() for line in lines if re.match(r" +[12] +host ", line)]
    assert [row[0] for row in rows] == ["1", "2"]
    for needed in ("Warm-up before each line:", "PNG and loading are not included", "Chain ÷ net:", "Memory:"):
        assert needed in done.out
    assert "nan" not in done.out


def test_only_the_json_is_on_standard_output_and_it_equals_the_table(ddpmx, model, tmp_path):
    out = tmp_path / "bench.json"
    done = ddpmx("bench", model, *QUICK, "--json", "-o", out)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert json.loads(out.read_text()) == report
    assert [(cell["batch"], cell["executor"]) for cell in report["cells"]] == [(1, "host"), (2, "host")]
    table = "\n".join(bench.lines(report))
    for cell in report["cells"]:
        (row,) = (line.split() for line in table.splitlines() if line.split()[:2] == [str(cell["batch"]), "host"])
        star = "*" if cell["extrapolated"] else ""
        assert [float(text.rstrip("*")) for text in row[2:10]] == [
            pytest.approx(cell[name], rel=6e-3)
            for name in ("p50_ms", "p95_ms", "mean_ms", "bare_ms", "ratio", "host_us", "chain_s", "images_per_s")
        ]
        assert row[8].endswith(star)
        assert row[-1] == f"{cell['rounds']}×{cell['steps']}"
        assert cell["p50_ms"] <= cell["p95_ms"]
    assert report["file"]["spec"]["timesteps"] == 1000
    assert report["machine"]["gpu"] is None
    assert report["file"]["load_s"] > 0


def test_steps_are_shown_and_extrapolated_figures_are_marked(ddpmx, model):
    done = ddpmx("bench", model, "--steps", 4, "--seconds", 0.01, "--batch", 1)
    row = next(line for line in done.out.splitlines() if re.match(r" +1  host ", line))
    assert "*" in row
    assert re.search(r"×4$", row)
    assert "*: extrapolated" in done.out
    done = ddpmx("bench", model, "--steps", 1000, "--seconds", 0.01, "--batch", 1)
    assert "extrapolated" not in done.out


def test_batches_that_were_left_out_are_listed(ddpmx, model):
    done = ddpmx("bench", model, "--seconds", 0.01, "--steps", 3)
    assert "Left out: batches 16 and 64" in done.out
    assert len([line for line in done.out.splitlines() if re.match(r" +\d+  host ", line)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "--batch 1,4,16"),
        (("--batch", "1,-4"), "--batch 1,4,16"),
        (("--batch", "many"), "--batch 1,2,2"),
        (("--batch", ""), "--batch 1,4,16"),
        (("--batch", "1000000"), "do not fit into memory"),
        (("--executor", "warp"), "one of auto, all"),
        (("--executor", "graph"), "--executor host"),
        (("--steps", "2"), "--steps 3"),
        (("--steps", "1001"), "--steps 1000"),
        (("--seconds", "0"), "0 < seconds"),
        (("--seconds", "nan"), "0 < seconds"),
        (("-o", "nowhere/bench.json"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_refused_with_a_hint(refused, model, arguments, message):
    error = refused("bench", model, *arguments)
    assert message in error
    assert "Hint: " in error


def test_a_missing_file_is_refused(refused, tmp_path):
    assert "Hint: " in refused("bench", tmp_path / "model.onnx")


def test_a_file_of_another_kind_is_not_replaced(refused, model, tmp_path):
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    assert "Hint: " in refused("bench", model, "-o", other)
    assert other.read_text() == "years of work"


def test_a_plan_s_range_is_a_limit(refused, model, monkeypatch):
    class Plan:
        stream, executors, batches, description = 0, ("plain",), ((1, 4),), "a plan"

        def check_batch(self, batch):
            raise InputError(f"the plan takes no batch of {batch}", hint="--batch 4")

        def close(self):
            pass

    class Copying(base.CopyingBackend):
        def __init__(self, device):
            self.device = device

        def close(self):
            pass

    monkeypatch.setattr("ddpmx.bench.measure.open_model", lambda path, **options: (gaussian.SPEC, Copying(Plan())))
    assert "Hint: --batch 4" in refused("bench", model, "--batch", "1,5")


def test_a_plan_without_a_gpu_is_refused_with_a_hint(refused, tmp_path):
    (tmp_path / "model.plan").write_bytes(make_plan())
    assert "Hint: " in refused("bench", tmp_path / "model.plan")


def test_ctrl_c_exits_with_130_and_leaves_no_partial_file(ddpmx, model, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpmx.bench.measure.measure_host", interrupted)
    before = sorted(tmp_path.iterdir())
    done = ddpmx("bench", model, *QUICK, "-o", tmp_path / "bench.json", "--json")
    assert (done.code, done.out) == (130, "")
    assert sorted(tmp_path.iterdir()) == before


def test_bench_needs_neither_torch_nor_onnx(model):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'polygraphy']));"
        "sys.argv[0] = 'ddpmx'; from ddpmx_cli.main import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", str(model), "--seconds", "0.01", "--batch", "1", "--steps", "3"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "host" in done.stdout


# --- the table of a GPU, without one -------------------------------------------------------------------------------

STATE = {
    "driver": "580.65.06",
    "sm_clock": 1755,
    "sm_clock_max": 1980,
    "memory_clock": 2619,
    "memory_clock_max": 2619,
    "temperature": 61,
    "power": 645.5,
    "power_limit": 700.0,
    "slowed_by": ["power cap"],
}
REPORT = Report(
    file={
        "name": "model.plan",
        "kind": "plan",
        "bytes": 72_000_000,
        "spec": gaussian.SPEC.to_json(),
        "runs_on": "TensorRT 10.16.0 on a GPU with a long name, SM 9.0",
        "load_s": 1.5,
        "build_s": 42.25,
        "engine": None,
    },
    machine={
        "cpu": {"model": "a CPU", "threads": 16, "load": None, "asked_threads": 0},
        "gpu": {
            "name": "a GPU with a long name",
            "sm": "9.0",
            "memory": 1 << 37,
            "driver_cuda": "13.0",
            "before": STATE | {"sm_clock": 345, "slowed_by": []},
            "after": STATE,
        },
        "jetson": {"mode": "MAXN_SUPER", "clocks_fixed": False},
    },
    settings={"executor": "all", "seconds": 5.0, "steps": None},
    cells=[
        Cell(64, "plain", None, 1020, 1000, 3, 123.4, 234.5, 125.6, 987.6, 120.1, 1.046, 125.7, False, 0.509, 3 << 30),
        Cell(64, "while", None, 1020, 1000, 3, None, None, 121.6, 0.004, 120.1, 1.012, 121.7, False, 0.526, 5 << 20),
        Cell(64, "graph", failed="the capture of a step gave no graph"),
    ],
    left_out=["batch 1: the file takes 64"],
    method=["What it is."],
).to_json()


def test_the_table_of_a_gpu():
    lines = bench.lines(REPORT)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for needed in (
        "GPU:      a GPU with a long name, SM 9.0, driver 580.65.06 for CUDA 13.0",
        "before:   SM 345 of 1980 MHz, memory 2619 of 2619 MHz, 61 °C, 646 of 700 W",
        "after:    SM 1755 of 1980 MHz, memory 2619 of 2619 MHz, 61 °C, 646 of 700 W, slowed by power cap",
        "power mode MAXN_SUPER; clocks not fixed: sudo jetson_clocks fixes them",
        "building: 42.2 s",
        "batch 64, graph: does not work here: the capture of a step gave no graph",
        "Left out: batch 1: the file takes 64",
        "Warm-up before each line: 1020 steps.",
    ):
        assert needed in text
    rows = [line.split() for line in lines if line.split()[:1] == ["64"]]
    assert [row[1] for row in rows] == ["plain", "while"]
    assert rows[0][2:] == ["123", "234", "126", "120", "1.046", "988", "126", "0.509", "3.00", "GiB", "3×1000"]
    assert rows[1][2:] == ["–", "–", "122", "120", "1.012", "0.00400", "122", "0.526", "5.00", "MiB", "3×1000"]


def test_columns_are_aligned_with_their_headings():
    heading, *rows = bench._table(REPORT["cells"])[1:]
    for row in rows:
        assert len(row) == len(heading)
    assert heading.index("mean") + len("mean") == rows[0].index("126") + len("126")


@pytest.mark.parametrize(("load", "noted"), [(None, False), (4.9, False), (5.1, True)])
def test_a_remark_says_that_other_processes_use_the_cpu(load, noted):
    values = json.loads(json.dumps(REPORT))
    values["machine"]["cpu"] |= {"threads": 4, "load": load}
    assert ("Other processes run here" in "\n".join(bench.lines(values))) is noted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12346"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.5, "0.500"),
        (0.01234, "0.0123"),
        (0, "0"),
    ],
)
def test_figures_have_three_significant_digits(value, text):
    assert bench.figure(value) == text


def test_control_characters_in_a_file_s_name_are_escaped():
    values = json.loads(json.dumps(REPORT))
    values["file"]["name"] = "a\x1b[2J.plan"
    assert "\x1b" not in "\n".join(bench.lines(values))
