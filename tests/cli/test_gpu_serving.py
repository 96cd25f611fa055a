"""What `make gpu-check` measures of serving, on the fakes: nothing of a GPU, but that it runs and notices a difference."""

from __future__ import annotations

import json

import pytest

from ddpmx.serve.batcher import Batcher
from gpu import serving


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(serving, "LAUNCHES", 3)
    monkeypatch.setattr(serving, "ROUNDS", 1)


def test_it_finds_no_difference(plan, fake_tensorrt):
    serving.main(str(plan), str(plan.with_suffix(".json")), "4", "6")
    found = json.loads(plan.with_suffix(".json").read_text())
    assert (found["differing"], found["images"], found["batch"]) == (0, 19, 4)
    assert found["batcher_runs_on"].endswith("executor graph")
    assert found["each_us"] == found["uniform_us"] > 0  # the fake's clock stands still
    assert found["kernels_ratio"] == 1
    assert fake_tensorrt.cuda.launches.count("ddpmx_step_each") >= 6


def test_it_notices_another_image(plan, fake_tensorrt, monkeypatch):
    """The control: another seed."""
    submit = Batcher.submit

    def another(self, n, **how):
        return submit(self, n, **{**how, "seed": how["seed"] + (n == 3)})

    monkeypatch.setattr(Batcher, "submit", another)
    with pytest.raises(SystemExit, match="Error: 3 of 19 images differ"):
        serving.main(str(plan), str(plan.with_suffix(".json")), "4", "6")
