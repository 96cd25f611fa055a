"""Chains on a GPU that fail, without one: a fake driver with faults on demand.

Each error reports what happened, nothing leaks, and unless the device is lost the next chain is right.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS
from ddpmx.cuda import executors
from ddpmx.cuda.device_chain import LOOK_AHEAD, DeviceChain
from ddpmx.cuda.executors import choose_executor
from ddpmx.cuda.kernels import Kernels
from ddpmx.cuda.layout import Done
from ddpmx.device.driver import Driver
from ddpmx.errors import BackendError, Cancelled, NumericError
from ddpmx.sampling.pixels import to_nhwc
from oracles import fake_cuda
from oracles.device_chain import IMAGES, SHAPE, STEPS, TABLE, Setup, expected
from oracles.fake_cuda import FakeCuda

# --- how chains end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("k", [0, 5, STEPS - 1])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_output_that_is_not_finite(fake, executor, k, value):
    t = int(TABLE.timesteps[k])
    with Setup(fake, poison=(t, [value])) as s:
        s.chain.prepare(s.engine, executor)
        with pytest.raises(NumericError, match=f"t = {t} is not finite") as caught:
            s.chain.run(seed=5, images=IMAGES)
        assert f"step {k + 1} of {STEPS}; toy; executor {executor}" in str(caught.value)
        s.engine.toy.poison = None
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


@pytest.mark.parametrize("executor", ["plain", "graph"])
def test_step_by_step_ends_where_it_is_not_finite(fake, executor):
    with Setup(fake, with_x0=True, poison=(int(TABLE.timesteps[4]), [np.nan])) as s:
        s.chain.prepare(s.engine, executor)
        steps = s.chain.steps(seed=5, images=IMAGES)
        for _ in range(4):
            next(steps)
        with pytest.raises(NumericError, match="not finite"):
            next(steps)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("k", [0, 1, 6, STEPS - 1])
def test_cancel(fake, executor, k):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        fake.launches.clear()
        with pytest.raises(Cancelled, match=f"of {STEPS} steps"):
            s.chain.run(seed=5, images=IMAGES, cancel=lambda: fake.launches.count("ddpmx_step") >= k)
        control = s.chain.control
        assert k <= control.step <= k + 1
        assert control.done == (Done.FINISHED if control.step == STEPS else Done.STOPPED)
        assert fake.launches.count("ddpmx_step") <= k + LOOK_AHEAD + 1
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_cancel_is_not_polled_after_the_last_step(fake, executor):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        finished = lambda: fake.launches.count("ddpmx_step") >= STEPS  # noqa: E731
        fake.launches.clear()
        assert s.chain.run(seed=5, images=IMAGES, cancel=finished) is not None


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_a_callback_ends_the_chain(fake, executor, error):
    def progress(done, total):
        if done >= 3:
            raise error

    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        with pytest.raises(error):
            s.chain.run(seed=5, images=IMAGES, progress=progress)
        assert s.chain.control.done == Done.STOPPED
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


def test_a_chain_that_does_not_end_is_abandoned(fake, monkeypatch):
    """On a platform that ignores the condition: nothing can wait for the chain, so nothing of it can be freed."""
    monkeypatch.setattr(executors, "_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(fake_cuda.While, "__call__", lambda self: iter(lambda: None, 1))
    with Setup(fake) as s:
        alive = fake.alive()
        choice = choose_executor(s.chain, s.engine)
        assert choice.executor == "graph"
        assert "did not finish in time" in dict(choice.rejected)["while"]
        left = {kind: count - alive.get(kind, 0) for kind, count in fake.alive().items()}
        assert left["stream"] == 1
    for handles in fake.live.values():
        handles.clear()
    fake.faults.clear()  # the fake assumes that kernels of the lost stream may use any memory


def test_an_end_without_a_reason_is_an_error(fake, monkeypatch):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        s.chain._chain.var = 16
        with pytest.raises(BackendError, match="refuse this chain"):
            s.chain.run(seed=0, images=[1])
        s.chain._chain.var = 0
        s.chain._chain.S = STEPS + 1
        with pytest.raises(BackendError, match="without giving a reason"):
            s.chain.run(seed=0, images=[1])


# --- engines that refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("refuse_at", [1, 2])
def test_an_engine_that_refuses(fake, executor, refuse_at):
    """At its first run, and while it is captured or, with ``plain``, in the chain."""
    with Setup(fake, refuse_at=refuse_at) as s:
        if executor == "plain" and refuse_at == 2:
            s.chain.prepare(s.engine, executor)
        with pytest.raises(BackendError, match="TensorRT refuses") as caught:
            s.chain.run(seed=0, images=IMAGES) if s.chain.choice else s.chain.prepare(s.engine, executor)
        assert "its last words" in str(caught.value)
        assert fake.alive().get("graph", 0) == fake.alive().get("executable", 0) == 0
        s.chain.prepare(s.engine, executor)  # and works again
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


def test_an_engine_that_always_refuses_is_an_error(fake):
    with Setup(fake) as s:

        def enqueue(stream):
            raise BackendError("TensorRT refuses to run the network")

        with pytest.raises(BackendError, match="refuses"):
            choose_executor(s.chain, enqueue)


def test_an_ended_capture_without_a_graph(fake, monkeypatch):
    monkeypatch.setattr(FakeCuda, "_cuStreamEndCapture", lambda self, h, out: setattr(self._stream(h), "capture", None))
    with Setup(fake) as s, pytest.raises(BackendError, match="gave no graph"):
        s.chain.prepare(s.engine, "graph")


# --- failures --------------------------------------------------------------------------------------------------------


def attempt(fake, executor):
    with Setup(fake, with_x0=True) as s:
        s.chain.prepare(s.engine, executor)
        s.chain.run(seed=5, images=IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_whichever_call_fails_nothing_leaks(kernels, executor):
    """Each call of a chain in turn, except those that free."""
    fine = FakeCuda(kernels)
    attempt(fine, executor)
    assert fine.counted > 50
    for at in range(1, fine.counted + 1):
        fake = FakeCuda(kernels)
        fake.fail_at = at
        with contextlib.suppress(BackendError):  # a failed query of running work may go unnoticed
            attempt(fake, executor)
        fake.live.pop("function", None)
        assert (fake.alive(), fake.retained, fake.faults) == ({}, 0, []), (at, fake.calls[-20:])


@pytest.mark.parametrize("at", range(1, 12))
def test_each_allocation_may_fail(fake, at):
    names = ("cuMemHostAlloc", at) if at == 1 else ("cuMemAlloc_v2", at - 1)
    fake.fail[names[0]] = (names[1], 2)
    if at == 11:  # the control
        with Setup(fake, with_x0=True):
            assert fake.count("cuMemAlloc_v2") == 9
            return
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY while allocating") as caught:
        Setup(fake, with_x0=True)
    assert "a smaller batch" in str(caught.value)


def test_a_chain_that_cannot_be_made_leaves_nothing_to_the_driver(fake):
    with Driver(library=fake) as gpu:
        loaded = Kernels(gpu)
        before, begun = fake.alive(), fake.counted
        DeviceChain(gpu, loaded, SHAPE, 3, TABLE, with_x0=True).close()
        needed = fake.counted - begun
        for at in range(1, needed):  # the last is the wait before closing
            fake.fail_at = fake.counted + at
            with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):
                DeviceChain(gpu, loaded, SHAPE, 3, TABLE, with_x0=True)
            assert fake.alive() == before


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_lost_device(fake, executor):
    def lose(name):
        if name == "ddpmx_step" and fake.launches.count(name) > 5:
            fake.broken = 700

    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        fake.launches.clear()
        fake.on_kernel = lose
        with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS while running the chain by") as caught:
            s.chain.run(seed=0, images=IMAGES)
        assert executor in str(caught.value)
        assert "end it and start again" in str(caught.value)
        for stream in fake.live["stream"].values():
            stream.queue.clear()  # so that freeing counts as no fault
