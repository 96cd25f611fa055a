"""The ladder for a chain on the GPU, with a fake TensorRT and a fake driver."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.backends import trt
from ddpmx.backends.base import CopyingBackend
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.parity.check import BOUNDS, BOUNDS_ON_GPU
from ddpmx.parity.evaluator import Evaluator
from ddpmx.parity.ladder import run_ladder
from ddpmx.parity.reference import Reference, chain_table, diffuse
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import from_uint8, to_nhwc
from ddpmx.sampling.runner import fitting_batch
from oracles.cuda_on_host import Toy
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


def a_record() -> Reference:
    """What the toy network computes, as if it were trained."""
    toy, images, x0 = (
        Toy(SPEC.shape),
        np.arange(4),
        np.random.default_rng(0).integers(0, 256, (2, *SPEC.shape), np.uint8),
    )
    evaluate = Evaluator(toy, SPEC, 4, None, 0)
    parts = {"spec": SPEC, "made_with": "NumPy", "seed": 0, "real": True, "loss": 0.1, "x0": x0, "steps": 20}
    t, at = np.arange(20, dtype=np.int32), np.array([0, 19])
    x_t = [diffuse(SPEC.make_schedule(), from_uint8(x0), int(now), 0) for now in t]
    out = [evaluate(x, np.full(2, now, np.int32)).out.reshape(2, -1) for x, now in zip(x_t, t, strict=True)]
    start = chain.initial(0, images, SPEC.shape)
    steps = [(s.x[0].copy(), s.x0.copy()) for s in chain.run(toy, chain_table(SPEC, 20), start, seed=0, images=images)]
    state = np.stack([steps[i][0] for i in at])
    state_out = evaluate(state, t[::-1][at]).out.reshape(2, -1)
    final = to_nhwc(steps[-1][1]).transpose(0, 3, 1, 2).copy()
    return Reference(**parts, t=t, out=np.array(out), at=at, state=state, state_out=state_out, final=final)


@pytest.mark.parametrize("profiles", [((1, 4, 8),), ((1, 1, 1),), ((2, 2, 2),), ((3, 3, 3),), ((32, 32, 64),)], ids=str)
def test_the_recorded_chain_runs_in_batches_that_the_plan_takes(backend, profiles):
    """The record has four images, and a plan may be for one alone, or for no fewer than 32."""
    opened, calls = backend(*profiles), []
    result = run_ladder(opened, SPEC, a_record(), progress=lambda *now: calls.append(now))
    opened.close()
    assert {check.name: check.value for check in result.checks}["free chain of 20 steps, pixels within one level"] == 1
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]


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
