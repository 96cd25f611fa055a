"""The chain on a GPU, without one: whole chains through a fake driver, whose kernels are the real ones on the host.

Control flow is what is tested: order, waits, captures, ends, and that nothing leaks. What only a GPU can show is that its
driver does what NVIDIA says it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ddpmx
from ddpmx import chain, engine, images, planfile, tensorrt_library
from ddpmx.backends import Buffers, trt
from ddpmx.cuda import Done, driver, executors
from ddpmx.cuda.driver import ENUMS, FUNCTIONS, ConditionalNodeParams, Driver, GraphNodeParams
from ddpmx.cuda.executors import EXECUTORS, LOOK_AHEAD, DeviceChain, Kernels, choose_executor
from ddpmx.device import Device, Gpus
from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError, NumericError
from ddpmx.samplers import make_table
from oracles import cuda_on_host, fake_cuda, gaussian, tensorrt_bindings
from oracles.cuda_on_host import Toy
from oracles.fake_cuda import FakeCuda
from oracles.plans import RECORD, SPEC, make_plan, name_of

SHAPE = (3, 5, 7)
STEPS = 12
CACHE = Path(__file__).parents[2] / ".cache" / "tensorrt-bindings"
TABLE = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=STEPS)
IMAGES = [7, 0, 2]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    try:
        return cuda_on_host.build(tmp_path_factory.mktemp("kernels"), Path(ddpmx.__file__).parent / "cuda")
    except cuda_on_host.Unavailable as why:
        pytest.skip(f"not verified here: the executors' control flow ({why})")


@pytest.fixture
def fake(kernels):
    """A driver that is asked afterwards whether anything leaked or was abused."""
    cuda = FakeCuda(kernels)
    yield cuda
    cuda.live.pop("function", None)  # a module's, and gone with it
    assert (cuda.alive(), cuda.retained, cuda.faults) == ({}, 0, [])


class Engine:
    """The toy network in device memory: what TensorRT's execution context is for a DeviceChain.

    Args:
        refuse_at: which enqueue, from 1, is refused.
    """

    def __init__(self, cuda, device_chain, batch, shape=SHAPE, *, poison=None, refuse_at=0):
        self.cuda, self.refuse_at, self.enqueued = cuda, refuse_at, 0
        self.toy = Toy(shape, poison=poison)
        floats = [_array(at, (batch, *shape), ctypes.c_float) for at in (device_chain.x, device_chain.out)]
        self.toy.bind(Buffers(floats[0], _array(device_chain.t, (batch,), ctypes.c_int32), floats[1]))

    def __call__(self, stream):
        self.enqueued += 1
        if self.enqueued == self.refuse_at:
            raise BackendError("TensorRT refuses to run the network", note="its last words")
        self.cuda.enqueue(stream, self.toy.enqueue)


def _array(address, shape, kind):
    return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(address)).reshape(shape)


class Setup:
    """Driver, kernels, chain and engine; close them all with ``with``."""

    def __init__(self, cuda, *, batch=3, table=TABLE, clip=1.0, with_x0=False, **faults):
        self.driver = Driver(library=cuda)
        try:
            self.chain = DeviceChain(
                self.driver, Kernels(self.driver), SHAPE, batch, table, clip=clip, with_x0=with_x0, description="toy"
            )
            self.engine = Engine(cuda, self.chain, batch, **faults)
        except BaseException:
            self.driver.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.chain.close()
        self.driver.close()


def expected(indices=IMAGES, *, seed=5, clip=1.0, table=TABLE, x=None):
    drawn = np.array(indices, np.int64)
    start = chain.initial(seed, drawn, SHAPE) if x is None else x
    *_, step = chain.run(Toy(SHAPE), table, start, seed=seed, images=drawn, clip=clip)
    return step


# --- whole chains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"indices": [2**32 - 1], "seed": 2**64 - 1},
        {"clip": None},
        {"clip": 0.25},
        {"table": make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=1)},
        {"table": make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", sampler="ddim", steps=5)},
        {"x": np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)},
    ],
    ids=["plain case", "one far image", "no clip", "tight clip", "one step", "ddim", "x given"],
)
def test_every_executor_gives_numpy_s_bits(fake, executor, case):
    table, clip = case.get("table", TABLE), case.get("clip", 1.0)
    indices, seed, x = case.get("indices", IMAGES), case.get("seed", 5), case.get("x")
    step = expected(indices, seed=seed, clip=clip, table=table, x=x)
    with Setup(fake, batch=len(indices), table=table, clip=clip) as s:
        assert choose_executor(s.chain, s.engine, executor).executor == executor
        seen = []
        got = s.chain.run(seed=seed, images=indices, x=x, progress=lambda *now: seen.append(now))
        assert got.tobytes() == images.to_nhwc(step.x0).tobytes()
        assert _array(s.chain.x, step.x_next.shape, ctypes.c_float).tobytes() == step.x_next.tobytes()
        assert seen == sorted(set(seen))
        assert seen[-1] == (len(table), len(table))
        assert fake.launches.count("ddpmx_step") >= len(table)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_chain_is_used_again_without_allocating(fake, executor):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        alive, enqueued = fake.alive(), s.engine.enqueued
        own = np.zeros((1, *SHAPE), np.float32)
        for seed in (0, 1, 0):
            s.chain.run(seed=seed, images=[1], x=own)  # leaves no trace
            for indices in ([4], [4, 5, 6], [0, 1]):
                got = s.chain.run(seed=seed, images=indices)
                assert got.tobytes() == images.to_nhwc(expected(indices, seed=seed).x0).tobytes()
        assert fake.alive() == alive
        # of a captured engine the host says nothing more
        assert s.engine.enqueued - enqueued == (12 * STEPS if executor == "plain" else 0)


def test_what_a_batch_has_left_is_filled_up(fake):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        for indices, filled in (([4, 5, 6], [4, 5, 6]), ([8, 9], [8, 9, 9]), ([7], [7, 7, 7])):
            s.chain.run(seed=0, images=indices)
            assert list(_array(s.chain._chain.images, (3,), ctypes.c_uint32)) == filled


@pytest.mark.parametrize("executor", EXECUTORS)
def test_progress_ends_with_the_last_step_however_fast_the_device_is(fake, executor):
    seen = []
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        fake.burst = 1 << 20
        s.chain.run(seed=0, images=IMAGES, progress=lambda *now: seen.append(now))
    assert seen[-1] == (STEPS, STEPS)
    assert seen == sorted(set(seen))


def test_the_engine_s_first_run_is_of_a_state(fake):
    """t is an index into its tables, and what was in the memory before is none."""
    with Setup(fake) as s:
        seen = []
        enqueue = s.engine.toy.enqueue
        s.engine.toy.enqueue = lambda: (
            seen.append((s.engine.toy.buffers.t.copy(), s.engine.toy.buffers.x.copy())),
            enqueue(),
        )
        s.chain.prepare(s.engine, "plain")
        ((t, x),) = seen
        assert list(t) == [TABLE.timesteps[0]] * 3
        assert x.tobytes() == chain.initial(0, np.array([0, 0, 0]), SHAPE).tobytes()


def test_while_is_one_launch(fake):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "while")
        # run once before it was captured, since its first run may do what no other does
        assert (s.engine.enqueued, fake.launches.count("engine")) == (2, 1)
        before = fake.count("cuGraphLaunch"), fake.count("cuLaunchKernel")
        s.chain.run(seed=0, images=IMAGES)
        assert (fake.count("cuGraphLaunch"), fake.count("cuLaunchKernel")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("executor", ["plain", "graph"])
def test_the_host_stays_ahead_of_the_device(fake, executor):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        begun = len(fake.calls)
        s.chain.run(seed=0, images=IMAGES)
        calls = fake.calls[begun:]
        assert calls[: calls.index("cuEventSynchronize")].count("cuEventRecord") == LOOK_AHEAD
        waits = [index for index, name in enumerate(calls) if name == "cuStreamSynchronize"]
        assert len(waits) == 2  # at the end, and for the images
        assert min(waits) > max(index for index, name in enumerate(calls) if name == "cuEventRecord")


def test_images_may_stay_on_the_device(fake):
    with Setup(fake) as s, s.driver.current():
        s.chain.prepare(s.engine, "graph")
        with s.driver.allocate(3 * 105, "somebody's images") as memory:
            assert s.chain.run(seed=5, images=IMAGES, levels=memory.value) is None
            there = _array(memory.value, (3, 5, 7, 3), ctypes.c_uint8)
            assert there.tobytes() == images.to_nhwc(expected().x0).tobytes()
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


@pytest.mark.parametrize("executor", ["plain", "graph"])
def test_step_by_step(fake, executor):
    drawn = np.array(IMAGES)
    with Setup(fake, with_x0=True) as s:
        s.chain.prepare(s.engine, executor)
        theirs = chain.run(Toy(SHAPE), TABLE, chain.initial(5, drawn, SHAPE), seed=5, images=drawn)
        for mine, step in zip(s.chain.steps(seed=5, images=IMAGES), theirs, strict=True):
            assert mine.t == step.t
            for name in ("x", "x0", "x_next"):
                assert getattr(mine, name).tobytes() == getattr(step, name).tobytes(), (name, mine.t)
        next(s.chain.steps(seed=1, images=[1]))  # broken off
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


def test_step_by_step_needs_x0_and_no_while(fake):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        with pytest.raises(InputError, match="step by step"):
            next(s.chain.steps(seed=0, images=[1]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": []},
        {"images": [0, 1, 2, 3]},
        {"images": [-1]},
        {"images": [2**32]},
        {"images": [0.5]},
        {"seed": -1},
        {"x": np.zeros((1, 2), np.float32)},
    ],
    ids=str,
)
def test_numbers_out_of_range(fake, wrong):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        with pytest.raises(InputError):
            s.chain.run(**({"seed": 0, "images": [1]} | wrong))


def test_a_chain_without_an_engine(fake):
    with Setup(fake) as s, pytest.raises(BackendError, match="no engine"):
        s.chain.run(seed=0, images=[1])
    with Setup(fake) as s, pytest.raises(InputError, match="no executor 'fast'"):
        s.chain.prepare(s.engine, "fast")
    with pytest.raises(InputError, match="make no chain"):
        Setup(fake, batch=0)


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("k", [0, 5, STEPS - 1])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_answer_that_is_not_finite(fake, executor, k, value):
    t = int(TABLE.timesteps[k])
    with Setup(fake, poison=(t, [value])) as s:
        s.chain.prepare(s.engine, executor)
        with pytest.raises(NumericError, match=f"t = {t} is not finite") as caught:
            s.chain.run(seed=5, images=IMAGES)
        assert f"step {k + 1} of {STEPS}; toy; executor {executor}" in str(caught.value)
        s.engine.toy.poison = None
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


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
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_who_is_through_is_not_asked_whether_to_stop(fake, executor):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        through = lambda: fake.launches.count("ddpmx_step") >= STEPS  # noqa: E731
        fake.launches.clear()
        assert s.chain.run(seed=5, images=IMAGES, cancel=through) is not None


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
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


def test_a_chain_that_does_not_end_is_given_up(fake, monkeypatch):
    """A platform whose condition is never heard: nothing waits for it, so nothing of it can be freed."""
    monkeypatch.setattr(executors, "_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(fake_cuda.While, "__call__", lambda self: iter(lambda: None, 1))
    with Setup(fake) as s:
        alive = fake.alive()
        choice = choose_executor(s.chain, s.engine)
        assert choice.executor == "graph"
        assert "does not come to its end" in dict(choice.rejected)["while"]
        left = {kind: count - alive.get(kind, 0) for kind, count in fake.alive().items()}
        assert left["stream"] == 1
    for handles in fake.live.values():
        handles.clear()
    fake.faults.clear()  # kernels of the lost stream, which the fake believes may use any memory


# --- which executor --------------------------------------------------------------------------------------------------


def test_while_is_preferred(fake):
    with Setup(fake) as s:
        choice = choose_executor(s.chain, s.engine)
        assert (choice.executor, choice.rejected, str(choice)) == ("while", (), "while")
        # before the engine was touched: the probe gets ready, runs three steps, and the chain gets ready
        warm, three = ["ddpmx_begin", "ddpmx_step"], ["ddpmx_begin", *["ddpmx_step", "ddpmx_condition"] * 3]
        assert fake.launches == [*warm, *three, *warm, "engine"]


def test_the_probe_runs_once_per_driver(fake):
    with Setup(fake) as s:
        choose_executor(s.chain, s.engine)
        probed = fake.launches.count("ddpmx_condition")
        choose_executor(s.chain, s.engine)
        assert probed == fake.launches.count("ddpmx_condition") == 3


@pytest.mark.parametrize(
    ("name", "which", "code", "reason"),
    [
        ("cuGraphConditionalHandleCreate", 0, 801, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuGraphAddNode_v2", 0, 801, "adding a WHILE node"),
        ("cuStreamBeginCaptureToGraph", 0, 801, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuModuleLoadDataEx", 2, 222, "while.ptx"),
        ("cuGraphInstantiateWithFlags", 1, 801, "instantiating the WHILE node's graph"),  # of the probe
        ("cuGraphInstantiateWithFlags", 2, 801, "instantiating the WHILE node's graph"),  # of the engine
        ("cuGraphLaunch", 1, 801, "launching the WHILE node's graph"),
    ],
)
def test_without_while_it_is_graph(fake, name, which, code, reason):
    fake.fail[name] = (which, code)
    with Setup(fake) as s:
        choice = choose_executor(s.chain, s.engine)
        assert choice.executor == "graph"
        assert [rejected for rejected, _ in choice.rejected] == ["while"]
        assert reason in choice.rejected[0][1]
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


def test_an_old_driver(fake):
    fake.lacking = fake_cuda.CONDITIONAL
    with Setup(fake) as s:
        choice = choose_executor(s.chain, s.engine)
        assert choice.executor == "graph"
        assert "cuGraphConditionalHandleCreate" in choice.rejected[0][1] or "Unresolved extern" in str(choice)
        assert not s.driver.has("cuGraphAddNode_v2")
        with pytest.raises(BackendError, match="WHILE nodes do not work here"):
            choose_executor(s.chain, s.engine, "while")
        assert s.chain.choice is None


def test_an_engine_that_cannot_be_captured_is_run_plainly(fake):
    with Setup(fake) as s:

        def enqueue(stream):
            s.driver.wait_for_stream(stream, "running a network that waits")
            s.engine(stream)

        choice = choose_executor(s.chain, enqueue)
        assert choice.executor == "plain"
        assert [name for name, _ in choice.rejected] == ["while", "graph"]
        for _, why in choice.rejected:
            assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in why
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()
        with pytest.raises(BackendError, match="STREAM_CAPTURE"):
            choose_executor(s.chain, enqueue, "graph")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("refuse_at", [1, 2])
def test_an_engine_that_refuses(fake, executor, refuse_at):
    """At its first run, and while it is captured or, plainly, in the chain."""
    with Setup(fake, refuse_at=refuse_at) as s:
        if executor == "plain" and refuse_at == 2:
            s.chain.prepare(s.engine, executor)
        with pytest.raises(BackendError, match="TensorRT refuses") as caught:
            s.chain.run(seed=0, images=IMAGES) if s.chain.choice else s.chain.prepare(s.engine, executor)
        assert "its last words" in str(caught.value)
        assert fake.alive().get("graph", 0) == fake.alive().get("executable", 0) == 0
        s.chain.prepare(s.engine, executor)  # and is tried again
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == images.to_nhwc(expected().x0).tobytes()


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


@pytest.mark.parametrize("executor", EXECUTORS)
def test_whichever_call_fails_nothing_leaks(kernels, executor):
    """All calls of a chain but those that free, one after the other."""
    fine = FakeCuda(kernels)
    attempt(fine, executor)
    assert fine.counted > 50
    for at in range(1, fine.counted + 1):
        fake = FakeCuda(kernels)
        fake.fail_at = at
        with contextlib.suppress(BackendError):  # a look at what is under way may go wrong unnoticed
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
            stream.queue.clear()  # so that freeing is no fault


def test_an_error_without_a_name(fake):
    fake.fail["cuInit"] = (1, 12345)
    with pytest.raises(BackendError, match="CUDA error 12345 while starting CUDA") as caught:
        Driver(library=fake)
    assert caught.value.note == "cuInit"


def test_the_compiler_s_words_are_in_the_error(fake, monkeypatch):
    def refuse(self, out, image, count, options, values):
        ctypes.memmove(values[0], b"ptxas: too old\0", 15)
        raise fake_cuda.Failure(222)

    monkeypatch.setattr(FakeCuda, "_cuModuleLoadDataEx", refuse)
    with Driver(library=fake) as gpu, pytest.raises(BackendError) as caught:
        Kernels(gpu)
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION while compiling step.ptx for this GPU" in str(caught.value)
    assert "ptxas: too old" in str(caught.value)
    assert caught.value.hint == "update the NVIDIA driver"


def test_closing_twice_is_harmless(fake):
    s = Setup(fake)
    s.chain.prepare(s.engine, "graph")
    stream = s.chain._stream
    for _ in range(2):
        s.chain.close()
    with pytest.raises(BackendError, match="a stream was freed already"):
        _ = stream.value
    s.driver.close()
    for thing in (s.driver, s.chain, stream):
        thing.close()
    with pytest.raises(BackendError, match="let go"), s.driver.current():
        pass


def test_the_driver_frees_what_was_forgotten(fake):
    s = Setup(fake)
    s.chain.prepare(s.engine, "while")
    s.driver.close()
    s.chain.close()


def test_the_rest_of_the_driver(fake):
    with Driver(library=fake) as gpu, gpu.current():
        assert (gpu.cuda, gpu.multiprocessors) == ("12.6", 1)
        with gpu.stream() as stream, gpu.event(timing=True) as begin, gpu.event(timing=True) as end:
            gpu.record(begin, stream.value)
            gpu.record(end, stream.value)
            gpu.wait_for(end)
            assert gpu.milliseconds(begin, end) == 1.5


def test_lazy_loading_is_asked_for_unless_the_user_has(monkeypatch):
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    driver.ask_for_lazy_loading()
    assert driver.os.environ["CUDA_MODULE_LOADING"] == "LAZY"
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    driver.ask_for_lazy_loading()
    assert driver.os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_an_unrefused_end_is_an_error(fake, monkeypatch):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        s.chain._chain.var = 16
        with pytest.raises(BackendError, match="refuse this chain"):
            s.chain.run(seed=0, images=[1])
        s.chain._chain.var = 0
        s.chain._chain.S = STEPS + 1
        with pytest.raises(BackendError, match="does not say why"):
            s.chain.run(seed=0, images=[1])


# --- cuda.h ----------------------------------------------------------------------------------------------------------

HEADERS = [Path("/usr/local/cuda/include"), Path("/usr/include")]


def compile_c(folder, source, *flags):
    """What a C program that includes cuda.h prints."""
    include = next((path for path in HEADERS if (path / "cuda.h").is_file()), None)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if include is None or compiler is None:
        pytest.skip(
            "not verified here: that the structs, enums and functions are cuda.h's (no cuda.h, or no C compiler)"
        )
    (folder / "a.c").write_text(f"#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\n{source}")
    target = [] if "-E" in flags else ["-o", str(folder / "a")]
    command = [compiler, *flags, f"-I{include}", str(folder / "a.c"), *target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "-E" in flags:
        return done.stdout
    return subprocess.run([str(folder / "a")], capture_output=True, text=True, check=True).stdout


def test_structs_and_enums_are_cuda_h_s(tmp_path):
    structs = {
        "CUDA_CONDITIONAL_NODE_PARAMS": (
            ConditionalNodeParams,
            {name: getattr(ConditionalNodeParams, name).offset for name, *_ in ConditionalNodeParams._fields_},
        ),
        "CUgraphNodeParams": (
            GraphNodeParams,
            {
                "type": 0,
                "reserved0": 4,
                "reserved1": 16,
                "conditional": 16,
                "reserved2": GraphNodeParams.reserved2.offset,
            },
        ),
    }
    assert GraphNodeParams.conditional.offset == 16
    lines, wanted = [], []
    for c, (python, fields) in structs.items():
        lines.append(f'printf("%zu\\n", sizeof({c}));')
        wanted.append(ctypes.sizeof(python))
        for field, offset in fields.items():
            lines.append(f'printf("%zu\\n", offsetof({c}, {field}));')
            wanted.append(offset)
    for name, value in ENUMS.items():
        lines.append(f'printf("%d\\n", (int){name});')
        wanted.append(value)
    told = compile_c(tmp_path, f"int main(void) {{ {' '.join(lines)} return 0; }}\n")
    assert [int(line) for line in told.split()] == wanted


def test_functions_take_what_cuda_h_says(tmp_path):
    """Size of each parameter, and whether it is a pointer; names as the preprocessor leaves them."""
    text = compile_c(tmp_path, "", "-E")
    declared = dict(re.findall(r"CUresult\s+(cu\w+)\(([^)]*)\)\s*;", text))
    # cuda.h 13 knows another one by this name; the driver exports this one as well
    declared.setdefault("cuEventElapsedTime", "float *pMilliseconds, CUevent hStart, CUevent hEnd")
    assert [name for name in FUNCTIONS if name not in declared] == []
    parameters = [(name, p.strip()) for name in FUNCTIONS for p in declared[name].split(",")]
    structs = "".join(f"struct p{i} {{ {p.replace('const', '')}; }} s{i};\n" for i, (_, p) in enumerate(parameters))
    # a struct of one member; whether that is a pointer tells the compiler's own classification
    members = [re.search(r"(\w+)(\[\])?$", p)[1] for _, p in parameters]
    prints = "".join(
        f'printf("%zu %d\\n", sizeof(s{i}), __builtin_classify_type(s{i}.{member}) == 5);\n'
        for i, member in enumerate(members)
    )
    told = compile_c(tmp_path, f"{structs}int main(void) {{ {prints} return 0; }}\n")
    mine = [
        (ctypes.sizeof(kind), int(kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents")))
        for name in FUNCTIONS
        for kind in FUNCTIONS[name]
    ]
    assert [tuple(map(int, line.split())) for line in told.splitlines()] == mine


def test_the_driver_is_asked_only_for_what_is_declared():
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in (Path(driver.__file__), Path(executors.__file__), Path(trt.__file__))
    )
    named = set(re.findall(r'"(cu[A-Z]\w+)"', sources))
    assert named == set(FUNCTIONS)


# --- TensorRT --------------------------------------------------------------------------------------------------------


PARAMETERS = {
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
}


@pytest.mark.parametrize("label", list(tensorrt_bindings.WHEELS))
def test_every_name_of_tensorrt_s_exists(label):
    try:
        found = tensorrt_bindings.describe(label, CACHE)
    except tensorrt_bindings.Unavailable as why:
        pytest.skip(f"not verified here: that TensorRT {label} has what ddpmx uses of it ({why})")
    names = found["names"]
    missing = [
        f"{kind}.{name}" for kind, wanted in trt.USED.items() for name in wanted if name not in names.get(kind, ())
    ]
    assert missing == []
    assert "Runtime.engine_host_code_allowed" in found["writable"]
    for name, wanted in PARAMETERS.items():
        assert wanted in tensorrt_bindings.parameters(found["signatures"][name]), name


def test_every_name_of_tensorrt_rtx_s_exists():
    module = pytest.importorskip("tensorrt_rtx", reason="not verified here: TensorRT-RTX's names (it is not installed)")
    for used in (trt.USED, trt.USED_RTX):
        for kind, wanted in used.items():
            assert [name for name in wanted if not hasattr(getattr(module, kind), name)] == [], kind
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert getattr(module.IRuntimeConfig, name).fset is not None


def test_the_list_is_what_the_source_touches():
    text = Path(trt.__file__).read_text(encoding="utf-8")
    code = text[text.index("class TrtEngine") :]
    for kind, wanted in (*trt.USED.items(), *trt.USED_RTX.items()):
        for name in wanted:
            assert f".{name}" in code, (kind, name)
    assert set(re.findall(r"\btrt\.([A-Z]\w+)", code)) <= set(trt.USED) | set(trt.USED_RTX)


class FakeTrt:
    """A TensorRT whose engines are the toy network, for control flow."""

    class DataType:
        FLOAT, INT32, HALF = "FLOAT", "INT32", "HALF"

    class TensorIOMode:
        INPUT, OUTPUT = "INPUT", "OUTPUT"

    class TensorLocation:
        DEVICE, HOST = "DEVICE", "HOST"

    class CudaGraphStrategy:
        DISABLED = "DISABLED"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "EAGER"

    class ILogger:
        class Severity:
            ERROR = 1

    def __init__(self, cuda, profiles=((1, 4, 8),), *, name=None, tensors=None):
        self.cuda, self.profiles = cuda, profiles
        self.name = name_of().decode() if name is None else name
        self.tensors = tensors or {
            "x": ("INPUT", "FLOAT", (-1, *SPEC.shape)),
            "t": ("INPUT", "INT32", (-1,)),
            "eps": ("OUTPUT", "FLOAT", (-1, *SPEC.shape)),
        }
        self.refuse: set[str] = set()
        self.contexts, self.loaded = [], []
        self.logger = SimpleNamespace(lines=[])

    def library(self):
        return tensorrt_library.Library(self, "TensorRT-RTX", "1.7.1.116", self.logger)

    def says(self, name):
        if name in self.refuse:
            self.logger.lines.append((1, f"[{name}] refused"))
        return name not in self.refuse

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine() if self.says("deserialize") else None)

    def engine(self):
        names = list(self.tensors)
        return SimpleNamespace(
            name=self.name,
            num_io_tensors=len(names),
            num_optimization_profiles=len(self.profiles),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.tensors[name][0],
            get_tensor_dtype=lambda name: self.tensors[name][1],
            get_tensor_shape=lambda name: self.tensors[name][2],
            get_tensor_location=lambda name: "DEVICE",
            get_tensor_profile_shape=lambda name, index: [
                (n, *SPEC.shape)[: 4 if name == "x" else 1] for n in self.profiles[index]
            ],
            create_runtime_config=lambda: FakeConfig(self),
            create_execution_context=lambda config: FakeContext(self, config) if self.says("context") else None,
        )


class FakeConfig:
    def __init__(self, fake):
        self.fake = fake

    def create_runtime_cache(self):
        return SimpleNamespace(deserialize=self.fake.loaded.append, serialize=lambda: b"compiled")

    def set_runtime_cache(self, cache):
        return self.fake.says("cache")


class FakeContext:
    def __init__(self, fake, config):
        self.fake, self.config, self.profile = fake, config, 0
        self.shapes, self.addresses = {}, {}
        fake.contexts.append(self)

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return self.fake.says("profile")

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.fake.says("shape")

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.fake.says("address")

    def infer_shapes(self):
        return [] if self.fake.says("infer") else ["eps"]

    def execute_async_v3(self, stream):
        if not self.fake.says("execute"):
            return False
        shape = self.shapes["x"]
        toy = Toy(SPEC.shape)
        toy.bind(
            Buffers(
                _array(self.addresses["x"], shape, ctypes.c_float),
                _array(self.addresses["t"], self.shapes["t"], ctypes.c_int32),
                _array(self.addresses["eps"], shape, ctypes.c_float),
            )
        )
        self.fake.cuda.enqueue(stream, toy.enqueue)
        return True


ADA = Gpus((Device("NVIDIA RTX 4090", "8.9", 24 << 30),), "13.0")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "host_platform", lambda: RECORD.platform)
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan())
    return path


@pytest.fixture
def plan_driver(fake, monkeypatch):
    """A driver that the engine makes and closes itself."""
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    return fake


def test_a_plan_runs_a_whole_chain(plan, plan_driver):
    module = FakeTrt(plan_driver)
    table = make_table(SPEC.make_schedule(), "eps", "fixed_small", steps=4)
    drawn = np.array([1, 2])
    *_, step = chain.run(Toy(SPEC.shape), table, chain.initial(5, drawn, SPEC.shape), seed=5, images=drawn)
    with trt.TrtEngine(plan, library=module.library(), devices=ADA) as opened_plan:
        assert opened_plan.description == "TensorRT-RTX 1.7.1.116 on NVIDIA RTX 4090, SM 8.9"
        loaded = Kernels(opened_plan.driver)
        with DeviceChain(opened_plan.driver, loaded, SPEC.shape, 2, table) as device_chain:
            at = {"x": device_chain.x, "t": device_chain.t, "out": device_chain.out}
            with opened_plan.context(2, **at, stream=device_chain.stream) as context:
                assert choose_executor(device_chain, context.enqueue).executor == "while"
                got = device_chain.run(seed=5, images=drawn)
    assert got.tobytes() == images.to_nhwc(step.x0).tobytes()
    config = module.contexts[0].config
    assert config.cuda_graph_strategy == "DISABLED"
    assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"


def test_a_plan_is_a_backend(plan, plan_driver):
    module = FakeTrt(plan_driver)
    backend = trt.TrtBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
    table = make_table(SPEC.make_schedule(), "eps", "fixed_small", steps=4)
    for batch in (2, 3):
        drawn = np.arange(batch)
        start = chain.initial(5, drawn, SPEC.shape)
        *_, mine = chain.run(backend, table, start, seed=5, images=drawn)
        *_, theirs = chain.run(Toy(SPEC.shape), table, start, seed=5, images=drawn)
        assert mine.x0.tobytes() == theirs.x0.tobytes()
    assert chain.executed_batch(backend, SPEC.shape, 20, 1, 4) == 1
    made = len(module.contexts)
    for _ in range(2):
        backend.bind(Buffers.of(1, SPEC.shape))
    assert len(module.contexts) == made
    with pytest.raises(InputError, match="takes batches of 1…8, not 9"):
        backend.bind(Buffers.of(9, SPEC.shape))
    with pytest.raises(BackendError, match="nothing is bound"):
        backend.enqueue()
    for _ in range(2):
        backend.close()
    opened_plan = backend.engine
    assert (opened_plan._engine, opened_plan._runtime, opened_plan._config) == (None, None, None)


def test_a_backend_that_fails_leaves_nothing(plan, plan_driver):
    module = FakeTrt(plan_driver)
    backend = trt.TrtBackend(trt.TrtEngine(plan, library=module.library(), devices=ADA))
    backend.bind(Buffers.of(2, SPEC.shape))
    module.refuse = {"execute"}
    with pytest.raises(BackendError, match="refuses to run the network") as caught:
        backend.enqueue()
    assert caught.value.note == "[execute] refused"
    module.refuse = {"shape"}
    module.logger.lines.append((1, "of something else, long ago"))
    with pytest.raises(BackendError, match="does not take x of shape") as caught:
        backend.bind(Buffers.of(3, SPEC.shape))
    assert caught.value.note == "[shape] refused"
    assert "memory" not in plan_driver.alive()
    backend.close()


def test_the_profile_is_chosen_by_the_batch(plan, plan_driver):
    module = FakeTrt(plan_driver, ((1, 8, 16), (1, 1, 1), (32, 32, 64)))
    with trt.TrtEngine(plan, library=module.library(), devices=ADA) as opened_plan:
        assert [opened_plan.check_batch(n) for n in (1, 2, 16, 32, 64)] == [1, 0, 0, 2, 2]
        assert opened_plan.largest_batch == 64
        for batch in (17, 65):
            with pytest.raises(InputError, match="takes batches of 1…16, 1…1, 32…64"):
                opened_plan.check_batch(batch)
        with opened_plan.driver.current(), opened_plan.driver.stream() as stream:
            opened_plan.context(1, x=1, t=2, out=3, stream=stream.value).close()
    context = module.contexts[0]
    assert (context.profile, context.shapes) == (1, {"x": (1, *SPEC.shape), "t": (1,)})
    assert context.addresses == {"x": 1, "t": 2, "eps": 3}


@pytest.mark.parametrize("what", ["deserialize", "context", "shape", "address", "infer", "profile"])
def test_what_tensorrt_refuses_is_said_in_its_words(plan, plan_driver, what):
    module = FakeTrt(plan_driver, ((2, 2, 2), (1, 1, 1)))
    module.refuse = {what}
    with pytest.raises(BackendError) as caught:  # noqa: PT012, SIM117
        with trt.TrtEngine(plan, library=module.library(), devices=ADA) as opened_plan:
            with opened_plan.driver.current(), opened_plan.driver.stream() as stream:
                opened_plan.context(1, x=1, t=2, out=3, stream=stream.value)
    assert caught.value.note == f"[{what}] refused"


def test_another_name_is_refused(plan, plan_driver):
    with pytest.raises(FileFormatError, match="another name"):
        trt.TrtEngine(plan, library=FakeTrt(plan_driver, name="Unnamed").library(), devices=ADA)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("x", ("INPUT", "HALF", (-1, 3, 8, 8))),
        ("x", ("INPUT", "FLOAT", (-1, 3, 8, 9))),
        ("t", ("INPUT", "INT32", (-1, 1))),
        ("eps", ("INPUT", "FLOAT", (-1, 3, 8, 8))),
        ("more", ("INPUT", "FLOAT", (1,))),
    ],
)
def test_other_inputs_and_outputs_are_refused(plan, plan_driver, name, tensor):
    module = FakeTrt(plan_driver)
    module.tensors |= {name: tensor}
    with pytest.raises(FileFormatError, match="other inputs and outputs") as caught:
        trt.TrtEngine(plan, library=module.library(), devices=ADA)
    assert caught.value.note.startswith(f"{name}: ")
    module.tensors.pop(name)
    if name != "more":
        with pytest.raises(FileFormatError, match="other inputs and outputs"):
            trt.TrtEngine(plan, library=module.library(), devices=ADA)


def test_what_was_compiled_is_kept(plan, plan_driver, tmp_path):
    folder = tmp_path / "cache"
    for loaded in ([], [b"compiled"]):
        module = FakeTrt(plan_driver)
        trt.TrtEngine(plan, library=module.library(), devices=ADA, cache=folder).close()
        assert module.loaded == loaded
    (file,) = folder.iterdir()
    assert file.name == "tensorrt-rtx-1.7.1.116-nvidia-rtx-4090-bbbbbbbbbbbbbbbb.runtime"
    (tmp_path / "file").write_text("")
    with trt.TrtEngine(plan, library=FakeTrt(plan_driver).library(), devices=ADA, cache=tmp_path / "file"):
        pass


def test_a_stripped_plan_is_refused(plan):
    plan.write_bytes(make_plan(record=dataclasses.replace(RECORD, options={**RECORD.options, "strip": True})))
    with pytest.raises(BackendError, match="without weights"):
        trt.TrtEngine(plan, library=FakeTrt(None).library(), devices=ADA)


# --- without a driver ------------------------------------------------------------------------------------------------


def test_importing_touches_nothing():
    code = """
import sys
import ddpmx.cuda.driver, ddpmx.cuda.executors, ddpmx.backends.trt
heavy = ["torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def no_driver():
    try:
        ctypes.CDLL(driver.LIBRARY)
    except OSError:
        return
    pytest.skip("not verified here: what is said where there is no NVIDIA driver (there is one)")


def test_without_a_driver_that_is_said():
    no_driver()
    with pytest.raises(BackendError, match="there is no NVIDIA driver here") as caught:
        Driver()
    assert "libcuda" in str(caught.value) or "nvcuda" in str(caught.value)


def test_a_real_plan_without_a_gpu(tmp_path, gaussian_onnx):
    """Built by TensorRT-RTX here; then, with a GPU that is not there, as far as its own runtime goes."""
    no_driver()
    pytest.importorskip("tensorrt_rtx", reason="not verified here: a real plan (TensorRT-RTX is not installed)")
    model = Path(shutil.copy(gaussian_onnx, tmp_path / "model.onnx"))
    options = engine.BuildOptions(batch=(1, 2, 4))
    built = engine.build(model, tmp_path / "model.plan", options, devices=Gpus(trouble="none"))
    with pytest.raises(BackendError, match="runs on an NVIDIA GPU, and there is none here") as caught:
        trt.TrtEngine(tmp_path / "model.plan")
    assert "there is no NVIDIA driver" in str(caught.value)
    with pytest.raises(BackendError, match="there is no NVIDIA driver here"):
        trt.TrtEngine(tmp_path / "model.plan", devices=ADA)
    assert planfile.read_plan(tmp_path / "model.plan") == built.info


@pytest.mark.slow
def test_a_real_plan_as_far_as_tensorrt_goes_without_a_gpu(tmp_path, gaussian_onnx, fake):
    """The driver is a fake, so TensorRT-RTX itself says what it lacks."""
    no_driver()
    pytest.importorskip("tensorrt_rtx", reason="not verified here: a real plan (TensorRT-RTX is not installed)")
    model = Path(shutil.copy(gaussian_onnx, tmp_path / "model.onnx"))
    engine.build(model, tmp_path / "model.plan", engine.BuildOptions(batch=(1, 2, 4)), devices=Gpus(trouble="none"))
    with Driver(library=fake) as gpu, pytest.raises(BackendError, match="cannot make the engine") as caught:
        trt.TrtEngine(tmp_path / "model.plan", driver=gpu, devices=ADA)
    assert "cuda" in caught.value.note.lower()
