"""The ladder for a chain on the GPU, with a fake TensorRT and a fake driver."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.backends import trt
from ddpmx.backends.base import CopyingBackend
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.parity.check import BOUNDS, BOUNDS_ON_GPU
from ddpmx.parity.ladder import run_ladder
from ddpmx.sampling.runner import fitting_batch
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.plans import SPEC


@pytest.fixture
def backend(plan, plan_driver):
    module = FakeTrt(plan_driver)

    def open_with(*profiles):
        module.profiles = profiles or ((1, 4, 8),)
        opened = CopyingBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
        opened.module = module
        return opened

    return open_with


@pytest.mark.parametrize("profiles", [((1, 4, 8),), ((1, 1, 1),), ((4, 4, 4),), ((32, 32, 64),)], ids=str)
def test_every_executor_is_compared_with_numpy(backend, profiles):
    opened = backend(*profiles)
    result = run_ladder(opened, SPEC, None)
    opened.close()
    executors = [check for check in result.checks if check.name.startswith("executor")]
    assert [check.name.split()[1] for check in executors] == ["plain", "graph", "while"]
    assert all(check.passed and check.skipped is None and check.value == 0 for check in executors)
    assert result.passed
    rows = {check.name: check.skipped for check in result.checks if not check.name.startswith("executor")}
    single = profiles == ((1, 1, 1),)
    assert ("a batch of one" in rows.values()) == single
    assert any("takes only batches of" in (why or "") for why in rows.values()) == (profiles[0][0] > 1)


def test_an_executor_with_other_pixels_fails(backend, monkeypatch):
    run = DeviceChain.run

    def spoilt(self, **arguments):
        got = run(self, **arguments)
        if self.choice.executor == "graph" and got is not None:
            got[0, 0, 0, 0] ^= 1
        return got

    monkeypatch.setattr(DeviceChain, "run", spoilt)
    opened = backend()
    result = run_ladder(opened, SPEC, None)
    opened.close()
    assert [check.name.split()[1] for check in result.checks if not check.passed] == ["graph"]
    assert not result.passed


def test_an_executor_that_does_not_work_is_skipped(backend):
    opened = backend()
    opened.module.cuda.fail["cuGraphConditionalHandleCreate"] = (0, 801)
    result = run_ladder(opened, SPEC, None)
    opened.close()
    (skipped,) = [check for check in result.checks if check.skipped]
    assert "while" in skipped.name
    assert "CUDA_ERROR_NOT_SUPPORTED" in skipped.skipped
    assert result.passed


@pytest.mark.parametrize(
    ("profiles", "most", "fits"),
    [([(1, 64)], 16, 16), ([(1, 8)], 16, 8), ([(32, 64)], 16, 32), ([(1, 1), (20, 24)], 16, 1), ([(4, 4)], 1, 4)],
)
def test_the_largest_batch_that_the_network_takes(profiles, most, fits):
    assert fitting_batch(tuple(profiles), most) == fits


def test_bounds_on_a_gpu_are_no_tighter_and_only_float32_s_differ():
    """fp32 on a GPU: ε within a relative 1e-4 of PyTorch, and 99 % of the chain's pixels within one level."""
    assert BOUNDS_ON_GPU["fp32"].eps == 1e-4
    assert BOUNDS_ON_GPU["fp32"].pixels == 0.99
    assert {name for name in BOUNDS if BOUNDS[name] != BOUNDS_ON_GPU[name]} == {"fp32"}
    for name in ("eps", "eps_pixel"):
        assert np.all(getattr(BOUNDS["fp32"], name) <= getattr(BOUNDS_ON_GPU["fp32"], name))
