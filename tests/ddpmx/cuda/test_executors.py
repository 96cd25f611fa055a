"""The chain on a GPU, without one: whole chains through a fake driver, whose kernels are the real ones on the host.

These tests cover control flow: order, waits, captures, and the choice of an executor. Only a GPU can show that its driver
does what NVIDIA documents.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS
from ddpmx.cuda.device_chain import LOOK_AHEAD
from ddpmx.cuda.executors import choose_executor
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, InputError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles import fake_cuda, gaussian
from oracles.cuda_on_host import Toy
from oracles.device_chain import IMAGES, SHAPE, STEPS, TABLE, Setup, array_at, expected

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
        {"table": make_table(gaussian.SPEC.make_schedule(), "eps", "learned_range", steps=5)},
        {"table": make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", sampler="dpmpp_2m", steps=5)},
        {"table": make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", sampler="unipc", steps=5)},
        {"x": np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)},
    ],
    ids=[
        "plain case",
        "one far image",
        "no clip",
        "tight clip",
        "one step",
        "ddim",
        "learned variance",
        "2m",
        "unipc",
        "own x",
    ],
)
def test_every_executor_gives_numpy_s_bits(fake, executor, case):
    table, clip = case.get("table", TABLE), case.get("clip", 1.0)
    indices, seed, x = case.get("indices", IMAGES), case.get("seed", 5), case.get("x")
    step = expected(indices, seed=seed, clip=clip, table=table, x=x)
    with Setup(fake, batch=len(indices), table=table, clip=clip) as s:
        assert choose_executor(s.chain, s.engine, executor).executor == executor
        seen = []
        got = s.chain.run(seed=seed, images=indices, x=x, progress=lambda *now: seen.append(now))
        assert got.tobytes() == to_nhwc(step.x0).tobytes()
        assert array_at(s.chain.x, step.x_next.shape, ctypes.c_float).tobytes() == step.x_next.tobytes()
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
                assert got.tobytes() == to_nhwc(expected(indices, seed=seed).x0).tobytes()
        assert fake.alive() == alive
        # a captured engine is not enqueued by the host again
        assert s.engine.enqueued - enqueued == (12 * STEPS if executor == "plain" else 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_chain_that_is_used_again_remembers_nothing_of_the_last_run(fake, executor):
    table = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", sampler="unipc", steps=6)
    with Setup(fake, table=table) as s:
        s.chain.prepare(s.engine, executor)
        for seed in (0, 1, 0):
            got = s.chain.run(seed=seed, images=[4, 5, 6])
            assert got.tobytes() == to_nhwc(expected([4, 5, 6], seed=seed, table=table).x0).tobytes()


def test_a_batch_is_padded_with_its_last_image(fake):
    with Setup(fake) as s:
        s.chain.prepare(s.engine, "plain")
        for indices, filled in (([4, 5, 6], [4, 5, 6]), ([8, 9], [8, 9, 9]), ([7], [7, 7, 7])):
            s.chain.run(seed=0, images=indices)
            assert list(array_at(s.chain._chain.images, (3,), ctypes.c_uint32)) == filled


@pytest.mark.parametrize("executor", EXECUTORS)
def test_progress_ends_with_the_last_step_however_fast_the_device_is(fake, executor):
    seen = []
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        fake.burst = 1 << 20
        s.chain.run(seed=0, images=IMAGES, progress=lambda *now: seen.append(now))
    assert seen[-1] == (STEPS, STEPS)
    assert seen == sorted(set(seen))


def test_the_engine_s_first_run_gets_a_real_state(fake):
    """t is an index into its tables, and uninitialised memory may be no legal index."""
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
        # run once before the capture, since a first run may do extra work; then plainly and as captured
        assert (s.engine.enqueued, fake.launches.count("engine")) == (3, 3)
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
        with s.driver.allocate(3 * 105, "the caller's images") as memory:
            assert s.chain.run(seed=5, images=IMAGES, pixels=memory.value) is None
            there = array_at(memory.value, (3, 5, 7, 3), ctypes.c_uint8)
            assert there.tobytes() == to_nhwc(expected().x0).tobytes()
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


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
        next(s.chain.steps(seed=1, images=[1]))  # not run to its end
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


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
    with pytest.raises(InputError, match="cannot run as a chain"):
        Setup(fake, batch=0)


# --- the choice of an executor ---------------------------------------------------------------------------------------


def test_while_is_preferred(fake):
    with Setup(fake) as s:
        choice = choose_executor(s.chain, s.engine)
        assert (choice.executor, choice.rejected, str(choice)) == ("while", (), "while")
        # before the engine is used: the probe is prepared, and runs three steps
        warm, once = ["ddpmx_begin", "ddpmx_step"], ["ddpmx_begin", "ddpmx_step", "ddpmx_condition"]
        three = ["ddpmx_begin", *["ddpmx_step", "ddpmx_condition"] * 3]
        plain, captured = ["ddpmx_begin", "engine", "ddpmx_step"], ["ddpmx_begin", "engine", *once[1:]]
        assert fake.launches == [*warm, *warm, *once, *three, *warm, "engine", *plain, *captured]


def test_the_probe_runs_once_per_driver(fake):
    with Setup(fake) as s:
        choose_executor(s.chain, s.engine)
        probed = fake.launches.count("ddpmx_condition")
        choose_executor(s.chain, s.engine)
        assert probed == 1 + 3 + 1  # the check of the probe's capture, the probe, the check of the chain's capture
        assert fake.launches.count("ddpmx_condition") == probed + 1


@pytest.mark.parametrize(
    ("name", "which", "code", "reason"),
    [
        ("cuGraphConditionalHandleCreate", 0, 801, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuGraphAddNode_v2", 0, 801, "adding a WHILE node"),
        ("cuStreamBeginCaptureToGraph", 0, 801, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuModuleLoadDataEx", 2, 222, "while.ptx"),
        ("cuGraphInstantiateWithFlags", 1, 801, "instantiating the WHILE node's graph"),  # of the probe
        ("cuGraphInstantiateWithFlags", 2, 801, "instantiating the WHILE node's graph"),  # of the engine
        ("cuGraphLaunch", 1, 801, "launching the captured step"),
    ],
)
def test_without_while_it_is_graph(fake, name, which, code, reason):
    fake.fail[name] = (which, code)
    with Setup(fake) as s:
        choice = choose_executor(s.chain, s.engine)
        assert choice.executor == "graph"
        assert [rejected for rejected, _ in choice.rejected] == ["while"]
        assert reason in choice.rejected[0][1]
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


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
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()
        with pytest.raises(BackendError, match="STREAM_CAPTURE"):
            choose_executor(s.chain, enqueue, "graph")


@pytest.mark.parametrize("executor", ["graph", "while"])
def test_a_capture_that_repeats_old_outputs_is_found(fake, executor):
    """A library that computes while it enqueues leaves nothing to be captured."""
    with Setup(fake) as s:

        def enqueue(stream):
            if fake.live["stream"][stream].capture is None:
                s.engine(stream)

        with pytest.raises(BackendError, match="gives another output than the plain one"):
            s.chain.prepare(enqueue, executor)
        assert s.chain.choice is None
        choice = choose_executor(s.chain, enqueue)
        assert choice.executor == "plain"
        assert [why[:17] for _, why in choice.rejected] == ["the captured step"] * 2
        assert s.chain.run(seed=5, images=IMAGES).tobytes() == to_nhwc(expected().x0).tobytes()


@pytest.mark.parametrize("executor", ["graph", "while"])
def test_a_capture_of_an_output_computed_on_the_host_is_found(fake, executor):
    """Such a capture repeats the output that is right for the x of its recording, and for no other x."""
    with Setup(fake) as s:
        toy = s.engine.toy

        def enqueue(stream):
            if fake.live["stream"][stream].capture is None:
                s.engine(stream)
                return
            toy.enqueue()
            output = toy.buffers.out.copy()
            fake.enqueue(stream, lambda: np.copyto(toy.buffers.out, output))

        with pytest.raises(BackendError, match="gives another output than the plain one"):
            s.chain.prepare(enqueue, executor)


def test_an_unsteady_network_is_not_compared_with_itself(fake):
    with Setup(fake) as s:
        enqueue, noise = s.engine.toy.enqueue, iter(range(100))

        def unsteady():
            enqueue()
            s.engine.toy.buffers.out[...] += next(noise)

        s.engine.toy.enqueue = unsteady
        s.chain.prepare(s.engine, "graph")
        assert s.chain.choice.executor == "graph"


def test_a_chain_waits_for_other_streams(fake):
    """The chain begins with a state that the caller's kernels have yet to write."""
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    with Setup(fake) as s, s.driver.current(), s.driver.stream() as theirs:
        s.chain.prepare(s.engine, "plain")
        with s.driver.allocate(x.nbytes, "the caller's x") as memory:
            s.driver.copy_in(memory.value, x, theirs.value)  # not yet
            got = s.chain.run(seed=5, images=IMAGES, x=memory.value, after=[theirs.value])
            assert got.tobytes() == to_nhwc(expected(x=x).x0).tobytes()
            got = s.chain.run(seed=5, images=IMAGES[:2], x=memory.value)  # padded with the last image
            assert got.tobytes() == to_nhwc(expected(IMAGES[:2], x=x[:2]).x0).tobytes()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_marks_stand_between_the_steps(fake, executor):
    with Setup(fake) as s, s.driver.current():
        s.chain.prepare(s.engine, executor)
        marks = [s.driver.event(timing=True) for _ in range(STEPS + 1)]
        s.chain.run(seed=5, images=IMAGES, marks=marks)
        came = [fake.live["event"][mark.value][0] is not None for mark in marks]
        assert came == ([True, *[False] * (STEPS - 1), True] if executor == "while" else [True] * (STEPS + 1))
        assert s.driver.milliseconds(marks[0], marks[-1]) > 0
        for mark in marks:
            mark.close()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_callbacks_run_in_the_context_of_the_caller(fake, executor):
    """They may use another GPU, and our context must not be current in them."""
    contexts = []
    with Setup(fake) as s:
        s.chain.prepare(s.engine, executor)
        look = lambda *_: contexts.append(list(fake._stack()))  # noqa: E731
        s.chain.run(seed=5, images=IMAGES, progress=look, cancel=look)
    assert contexts
    assert set(map(tuple, contexts)) == {()}
