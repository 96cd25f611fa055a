"""The report of `make gpu-check`, from canned results: its content, its claims, and the names that it leaves out."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest

from ddpmx.formats.sidecar import write_plan
from gpu import check, found, report, steps
from gpu.fakes.canned import BENCH, CELL, DOCTOR, GPU, JUNIT, PARITY, PEERS, SERVING, SPEED
from gpu.steps import Result
from oracles.plans import RECORD, SPEC, make_plan


@pytest.fixture
def place(tmp_path):
    out = tmp_path / "gpu-report"
    (out / "engines").mkdir(parents=True)
    return check.Place(out, out / "engines", out)


@pytest.fixture
def filled(place):
    """``filled(results)``: what is gathered from a folder as the steps leave it."""
    out = place.out
    (out / "tests-kernels.xml").write_text(JUNIT.format(host=socket.gethostname()), encoding="utf-8")
    (out / "tests-chains.xml").write_text("<testsuites><tests", encoding="utf-8")
    (out / "parity-fp16").mkdir()
    for name, values in {
        "bench-fp16.json": BENCH,
        "peers.json": PEERS,
        "speed.json": SPEED,
        "serving.json": SERVING,
        "parity-fp16/report.json": PARITY,
        "engines/model-fp16.plan.json": {"build": {"seconds": 3.5, "layers": 700, "precision": "fp16"}},
    }.items():
        (out / name).write_text(json.dumps(values))
    (out / "engines" / "model-fp16.plan").write_bytes(bytes(2_000_000))
    (out / "bench-fp32.json").write_text("{ broken")

    def gather(results=(), **facts):
        defaults = {
            "quick": False,
            "network": "n",
            "doctor": DOCTOR,
            "state": {},
            "cpu": {},
            "commit": "abc",
            "seconds": 90,
        }
        return found.gather(out, results, engines=place.engines, **{**defaults, **facts})

    return gather


def test_everything_that_was_found_is_in_the_report(filled, place):
    summary = filled([Result("tests of kernels", "always", "failed", 1, 3.0, "2 failed", "the tail of it")])
    text = report.write(place.out, summary, hidden={}).read_text()
    for needed in (
        "# ddpmx on NVIDIA H200: FAILED: tests of kernels",
        "commit abc",
        "| kernels | 1 | 2 | 1 |",
        "| chains | ? | ? | ? | its report is damaged |",
        "test_b: assert 1 == 2",
        "test_d: fixture broke",
        "| ε, RMS | 1.5e-07 | ≤ 0.0001 |",
        "a chain in one launch (CUDA_ERROR_NOT_SUPPORTED) (1)",
        "| model-fp16.plan | 2.0 MB | 3.5 | 700 | fp16 |",
        "## Parity, fp32\n\nNot judged.",
        "| free | — | ≥ 0.99 | not judged | random |",
        "parity fp16: free: random",
        "## Bench, fp32\n\nNot measured.",
        "| 1 | while | — | — | 0.51 | 0.5 | 1.013 |",
        "batch 1, graph: does not work here: out of | memory",
        "6.20 (6.00 … 6.40)",
        "not run: compiled: no compiler",
        "256 images of 1000 steps, batch 256",
        "0 of 55 images at different steps differ",
        "2.75 ms (X, executor graph), the chain 2.5 ms (X, executor while)",
        "The kernels alone: 4 and 3.5 µs.",
        "the tail of it",
        "TensorRT-RTX 1.7.1.116 (libtensorrt_rtx.so.1)",
    ):
        assert needed in text, needed


def test_goals_are_reached_or_not_and_nothing_else_is_claimed(filled):
    states = [(goal["what"][:24], goal["state"]) for goal in filled()["goals"]]
    assert states == [
        ("chain ÷ bare engine, whi", "not measured"),
        ("chain ÷ bare engine, whi", "reached"),
        ("diffusers eager ÷ ddpmx,", "reached"),
        ("diffusers eager ÷ ddpmx,", "not measured"),
        ("diffusers compiled, with", "not measured"),
        ("a step of each image's o", "reached"),
        ("the chain in fp16 ÷ in i", "not measured"),
        ("a step of training, the ", "not measured"),
        ("256 CIFAR images of 1000", "reached"),
    ]
    assert {goal["state"] for goal in filled(quick=True)["goals"]} == {"not judged", "not measured"}


def test_a_plan_s_sidecar_is_read_as_it_is_written(place):
    build = {"seconds": 3.5, "layers": 7, "precision": "fp16"}
    write_plan(place.plan("fp16"), memoryview(make_plan()), SPEC, RECORD, build)
    assert found.gather(place.out, [], engines=place.engines, doctor=None)["plans"] == {
        "model-fp16.plan": {"bytes": len(make_plan()), **build}
    }


@pytest.mark.parametrize(("ratio", "state"), [(1.02, "reached"), (1.021, "NOT")])
def test_a_goal_that_is_missed_is_reported(filled, place, ratio, state):
    (place.out / "bench-fp16.json").write_text(json.dumps({**BENCH, "cells": [{**CELL, "ratio": ratio}]}))
    assert filled()["goals"][1]["state"] == state


def test_an_rtx_card_is_not_judged_by_the_goal_for_an_h200(filled):
    other = {**DOCTOR, "machine": {**DOCTOR["machine"], "gpus": [{**GPU, "name": "NVIDIA RTX 4090"}]}}
    assert filled(doctor=other)["goals"][-1]["state"] == "not judged"


def test_tests_that_were_all_skipped_prove_nothing(filled, place):
    skipped = JUNIT[: JUNIT.index("<testcase")] + (
        '<testcase name="test_c"><skipped message="not verified here: engines"/></testcase></testsuite></testsuites>'
    )
    (place.out / "tests-engines.xml").write_text(skipped)
    summary = filled([Result("tests of engines", "always", "ok", 0)])
    assert summary["verdict"] == "INCOMPLETE: nothing failed, but not seen: tests of engines (all were skipped)"


def test_a_report_without_any_results(tmp_path):
    summary = found.gather(
        tmp_path,
        [Result("doctor", "always", "crashed", -9, 1.0, "by signal 9 (SIGKILL)", "")],
        engines=tmp_path,
        quick=False,
        network="n",
        doctor=None,
        state={"before": None, "after": None, "jetson": None},
        cpu=None,
        commit=None,
        seconds=1.0,
    )
    text = report.write(tmp_path, summary, hidden={}).read_text()
    assert "FAILED: doctor" in text
    assert "by signal 9 (SIGKILL)" in text


def test_the_report_fits_into_a_message(filled, place):
    results = [Result(f"step {n}", "", "failed", 1, 1.0, "ε" * 300, "y" * steps.TAIL) for n in range(80)]
    summary = filled(results, network="n" * 9)
    path = report.write(place.out, summary, hidden={})
    assert path.stat().st_size <= report.LARGEST == 60_000
    assert "cut: the whole of it" in path.read_text()
    assert len(json.loads((place.out / report.JSON).read_text())["steps"]) == 80


# --- what it must leave out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/srv/repo/tests/gpu/check.py", "REPO/tests/gpu/check.py"),
        ("/home/alice/x/model.plan: damaged", "~/x/model.plan: damaged"),
        ("'/Users/bob/Library' and /home/bob", "'~/Library' and ~"),
        ("C:\\Users\\carol\\ddpmx", "~\\ddpmx"),
        ("/root/.cache/ddpmx, /rootless", "~/.cache/ddpmx, /rootless"),
        ("/tmp/pytest-of-dave9/pytest-1", "/tmp/pytest-of-USER/pytest-1"),
        ("/mnt/data/dave9/x: dave9 says", "/mnt/data/USER/x: dave9 says"),
        ("dave9@box-77.local on box-77", "USER@HOST.local on HOST"),
        ("/usr/lib/libcuda.so.1", "/usr/lib/libcuda.so.1"),
        ("box-771 and my-box-77", "box-771 and my-box-77"),
    ],
)
def test_names_of_people_and_places_are_removed(monkeypatch, text, clean):
    monkeypatch.setattr(getpass, "getuser", lambda: "dave9")
    monkeypatch.setattr(socket, "gethostname", lambda: "box-77")
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert report.scrubbed(text, {"/srv/repo": "REPO", "/srv": "S"}) == clean


def test_names_are_removed_from_everything_that_is_written(filled, place, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    results = [Result("a", "always", "failed", 1, 1.0, f"{place.out}/x is bad", f"in /home/alice/y and {place.out}")]
    summary = filled(results, network=f"of {place.out}")
    report.write(place.out, summary, hidden={str(place.out): "OUT"})
    for name in (report.NAME, report.JSON):
        text = (place.out / name).read_text()
        assert "alice" not in text
        assert str(place.out) not in text
        assert "OUT/x is bad" in text


def test_a_common_user_name_is_not_removed(monkeypatch):
    """With the user name nvidia, as on a Jetson, the report stays readable."""
    monkeypatch.setattr(getpass, "getuser", lambda: "nvidia")
    assert report.scrubbed("/usr/local/nvidia/lib", {}) == "/usr/local/nvidia/lib"


def test_nan_becomes_null():
    assert report.scrubbed({"value": float("nan"), "list": (1.5, None)}, {}) == {"value": None, "list": [1.5, None]}
