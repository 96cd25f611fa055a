"""A plan and its sidecar are replaced as one: whenever a build is stopped, the plan that is there can be read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from ddpmx.errors import OutputError, SpecError
from ddpmx.formats import atomic
from ddpmx.formats.plan_file import read_plan
from ddpmx.formats.sidecar import plan_stamp, sidecar_json, sidecar_path, write_plan
from ddpmx.formats.spec import BETAS, ModelSpec
from oracles.plans import RECORD, make_plan

SHAPE = (3, 8, 8)
OLD = ModelSpec(SHAPE, 4, BETAS, betas=np.linspace(0.1, 0.2, 4), ddpmx="0.1.0")
NEW = ModelSpec(SHAPE, 4, BETAS, betas=np.linspace(0.3, 0.4, 4), ddpmx="0.1.0")


def put(path, spec, tail=b""):
    record = dataclasses.replace(RECORD, key=hashlib.sha256(spec.to_text().encode()).hexdigest())
    write_plan(path, memoryview(make_plan(spec=spec, record=record, tail=tail)), spec, record, {"layers": 1})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "model.plan"
    put(path, OLD)
    return path


def test_a_plan_and_its_sidecar(plan):
    assert read_plan(plan).spec == OLD
    assert sorted(files(plan.parent)) == ["model.plan", "model.plan.json"]
    put(plan, NEW)
    assert read_plan(plan).spec == NEW
    assert sorted(files(plan.parent)) == ["model.plan", "model.plan.json"]
    assert "before" not in json.loads(sidecar_path(plan).read_text())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_sidecar as test
count, deadly, real = 0, int(sys.argv[2]), os.replace
def replace(*args):
    global count
    count += 1
    if count == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
test.put(Path(sys.argv[1]), test.NEW)
"""


@pytest.mark.parametrize("started_with", ["a pair", "a pair without a stamp", "a plan alone"])
@pytest.mark.parametrize("deadly", [1, 2, 3])
def test_a_build_that_is_killed_leaves_a_plan_that_can_be_read(plan, started_with, deadly):
    old = OLD
    if started_with == "a pair without a stamp":
        values = json.loads(sidecar_path(plan).read_text())
        del values["stamp"]
        sidecar_path(plan).write_text(json.dumps(values))
    elif started_with == "a plan alone":
        old = ModelSpec(SHAPE, 4, ddpmx="0.1.0")  # β that follow from a formula need no sidecar
        plan.write_bytes(make_plan(spec=old))
        sidecar_path(plan).unlink()
    arguments = [sys.executable, "-c", KILLED, str(plan), str(deadly), os.path.dirname(__file__)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert read_plan(plan).spec == (NEW if deadly == 3 else old)
    last = ModelSpec(SHAPE, 4, BETAS, betas=np.linspace(0.5, 0.6, 4), ddpmx="0.1.0")
    atomic._tidied.clear()
    put(plan, last)
    assert read_plan(plan).spec == last
    assert sorted(files(plan.parent)) == ["model.plan", "model.plan.json"], "and the next one tidies up"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_build_that_fails_changes_nothing(plan, monkeypatch, error, call):
    before, real = files(plan.parent), getattr(os, call)
    for deadly in range(1, 5 if call == "fsync" else 3):
        count = 0

        def fail(*args, deadly=deadly):
            nonlocal count
            count += 1
            if count == deadly:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
                put(plan, NEW)
        assert files(plan.parent) == before


def test_a_sidecar_of_another_build_of_the_same_network_is_refused(plan, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "model.plan"
    put(other, OLD, tail=b"tactic 1")
    put(plan, OLD, tail=b"tactic 2")
    other.replace(plan)
    with pytest.raises(SpecError, match="the sidecar contradicts its plan") as caught:
        read_plan(plan)
    assert "Note: stamp: " in str(caught.value)
    assert "Hint: ddpmx build model.onnx -o " in str(caught.value)


def test_a_stamp_does_not_read_all_of_a_large_plan(tmp_path):
    path, mib = tmp_path / "a", 1 << 20
    stamps = set()
    for change in (None, 0, mib - 1, mib, 5 * mib - 1, 4 * mib, 4 * mib - 1):
        data = bytearray(5 * mib)
        if change is not None:
            data[change] = 1
        path.write_bytes(data)
        with path.open("rb") as stream:
            stamps.add(plan_stamp(stream, len(data)))
    assert len(stamps) == 5, "of seven: two changes are in the middle"


@pytest.mark.parametrize("before", [5, [], "x", {}, {"engine": None}])
def test_a_damaged_before_is_refused_as_any_contradiction(plan, before):
    values = json.loads(sidecar_path(plan).read_text())
    sidecar_path(plan).write_text(json.dumps(values | {"bytes": 1, "before": before}))
    with pytest.raises(SpecError, match="contradicts its plan"):
        read_plan(plan)


def test_a_sidecar_fits_into_its_limit_with_both_arrays(tmp_path):
    betas = [np.full(1 << 14, value) for value in (1e-4, 2e-4)]
    specs = [ModelSpec(SHAPE, 1 << 14, BETAS, betas=array, ddpmx="0.1.0") for array in betas]
    sizes = [len(json.dumps(sidecar_json(1, spec, RECORD, {}), indent=2)) for spec in specs]
    assert sum(sizes) + 1000 < 1 << 20


def build_often(path, number):
    spec = ModelSpec(SHAPE, 4, BETAS, betas=np.linspace(0.1, 0.2 + number / 10, 4), ddpmx="0.1.0")
    for _ in range(20):
        put(path, spec)


def test_two_builds_at_once_and_a_reader(plan):
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=build_often, args=(plan, number)) for number in (1, 2)]
    for builder in builders:
        builder.start()
    reads = 0
    while any(builder.is_alive() for builder in builders):
        read_plan(plan)
        reads += 1
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert reads > 5
    read_plan(plan)
    assert sorted(files(plan.parent)) == ["model.plan", "model.plan.json"]
