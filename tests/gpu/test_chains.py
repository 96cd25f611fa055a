"""Whole chains on the GPU by every executor: the same images, progress, stops, faults, streams, arrays and threads."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from ddpmx import Sampling
from ddpmx.backends.base import EXECUTORS, CopyingBackend
from ddpmx.cuda.device_batch import EXECUTORS as BATCH_EXECUTORS
from ddpmx.cuda.device_batch import DeviceBatch
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.executors import choose_executor, why_no_while
from ddpmx.cuda.group import Group
from ddpmx.errors import Cancelled, InputError, NumericError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.serve.batcher import Batcher
from gpu.stand_in import SEED, SPEC, STEPS, Copying, CopyingTwin, StandIn, drawn, table_of, walk

IMAGES = [7, 0, 2]


@contextlib.contextmanager
def prepared(device, kernels, executor, *, batch=3, table=None, with_x0=False):
    with DeviceChain(
        device.driver,
        kernels,
        device.spec.shape,
        batch,
        table or table_of(),
        clip=device.spec.clip,
        with_x0=with_x0,
        description="the stand-in",
    ) as made:
        network = device.network(batch, x=made.x, t=made.t, out=made.out, var=made.var, stream=made.stream)
        made.prepare(network.enqueue, executor)
        yield made


def test_while_nodes_work_here(driver, loaded):
    if why := why_no_while(driver, loaded):
        pytest.skip(f"not verified here: a chain in one launch (driver for CUDA {driver.cuda}: {why})")
    assert EXECUTORS[0] == "while"


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_images_are_numpy_s(open_pipeline, executor):
    with open_pipeline(executor) as pipeline:
        got = pipeline.generate(11, seed=SEED, steps=STEPS, batch=4)
        assert pipeline.backend == f"the stand-in, executor {executor}"
    assert got.tobytes() == drawn(range(11)).tobytes()


def test_any_n_split_or_shard_gives_the_same_images(open_pipeline, executor):
    whole = drawn(range(13))
    with open_pipeline(executor) as pipeline:
        for n, first, batch in ((1, 0, 8), (13, 0, 8), (5, 8, 8), (13, 0, 3), (2, 11, None), (1, 12, 1)):
            got = pipeline.generate(n, first=first, seed=SEED, steps=STEPS, batch=batch)
            assert got.tobytes() == whole[first : first + n].tobytes(), (n, first, batch)


def test_a_network_without_kernels_is_captured_as_well(driver, open_pipeline, executor):
    """A copy is a node of its own kind in a graph, and in a WHILE node's body."""
    with open_pipeline(executor, Copying(driver)) as pipeline:
        got = pipeline.generate(3, seed=SEED, steps=STEPS)
    indices = np.arange(3)
    start = chain.initial(SEED, indices, SPEC.shape)
    *_, last = chain.run(CopyingTwin(), table_of(), start, seed=SEED, images=indices, clip=SPEC.clip)
    assert got.tobytes() == to_nhwc(last.x0).tobytes()


def test_a_learned_variance(driver, open_pipeline, executor):
    spec = SPEC.replace(variance="learned_range")
    with open_pipeline(executor, StandIn(driver, spec)) as pipeline:
        got = pipeline.generate(3, seed=SEED, steps=STEPS)
    assert got.tobytes() == drawn(range(3), spec=spec, table=table_of(spec)).tobytes()


def test_a_whole_chain_of_1000_steps(open_pipeline, executor, many_steps):
    with open_pipeline(executor) as pipeline:
        got = pipeline.generate(2, seed=SEED, steps=many_steps)
    assert got.tobytes() == drawn(range(2), table=table_of(steps=many_steps)).tobytes()


def test_watched_step_by_step(open_pipeline):
    with open_pipeline() as pipeline:
        seen = list(pipeline.stream(3, seed=SEED, steps=STEPS))
        shown = []
        got = pipeline.generate(3, seed=SEED, steps=STEPS, preview=lambda at, p: shown.append((at, p.t)))
    assert to_nhwc(seen[-1].x0).tobytes() == got.tobytes() == drawn(range(3)).tobytes()
    assert shown == [(0, t) for t in table_of().timesteps.tolist()]


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_progress_rises_to_its_end(driver, loaded, executor, many_steps):
    device, seen = StandIn(driver), []
    with prepared(device, loaded, executor, table=table_of(steps=many_steps)) as made:
        made.run(seed=SEED, images=IMAGES, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen))
    assert seen[-1] == (many_steps, many_steps)
    device.close()


def test_cancel_in_mid_chain_and_then_a_whole_one(driver, loaded, executor, many_steps):
    device, table = StandIn(driver), table_of(steps=many_steps)
    with prepared(device, loaded, executor, table=table) as made:
        with pytest.raises(Cancelled, match=f"of {many_steps} steps"):
            made.run(seed=SEED, images=IMAGES, cancel=lambda: made.control.step >= 5)
        assert 5 <= made.control.step < many_steps
        got = made.run(seed=SEED, images=IMAGES)
    assert got.tobytes() == drawn(IMAGES, table=table).tobytes()
    device.close()


def test_cancel_before_it_begins(open_pipeline, executor, many_steps):
    with open_pipeline(executor) as pipeline:
        with pytest.raises(Cancelled):
            pipeline.generate(3, seed=SEED, steps=many_steps, cancel=lambda: True)
        assert pipeline.generate(3, seed=SEED, steps=STEPS).tobytes() == drawn(range(3)).tobytes()


@pytest.mark.parametrize("k", [0, 5, STEPS - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_found_at_its_step(driver, loaded, executor, k, value):
    device, t = StandIn(driver), int(table_of().timesteps[k])
    with prepared(device, loaded, executor) as made:
        device.poison(t, value)
        with pytest.raises(NumericError, match=f"t = {t} is not finite") as caught:
            made.run(seed=SEED, images=IMAGES)
        assert f"step {k + 1} of {STEPS}; the stand-in; executor {executor}" in str(caught.value)
        device.heal()
        got = made.run(seed=SEED, images=IMAGES)
    assert got.tobytes() == drawn(IMAGES).tobytes()
    device.close()


def test_an_exception_in_a_callback_ends_the_chain(driver, loaded, executor, many_steps):
    def progress(done, total):
        raise RuntimeError("a broken progress bar")

    device, table = StandIn(driver), table_of(steps=many_steps)
    with prepared(device, loaded, executor, table=table) as made:
        with pytest.raises(RuntimeError, match="a broken progress bar"):
            made.run(seed=SEED, images=IMAGES, progress=progress)
        got = made.run(seed=SEED, images=IMAGES)
    assert got.tobytes() == drawn(IMAGES, table=table).tobytes()
    device.close()


def test_events_measure_time(driver, loaded, executor):
    device = StandIn(driver)
    with prepared(device, loaded, executor) as made, contextlib.ExitStack() as stack, driver.current():
        marks = [stack.enter_context(driver.event(timing=True)) for _ in range(STEPS + 1)]
        made.run(seed=SEED, images=IMAGES, marks=marks)
        assert driver.milliseconds(marks[0], marks[-1]) > 0
    device.close()


# --- streams and arrays ----------------------------------------------------------------------------------------------


def test_a_chain_waits_for_what_another_stream_still_writes(driver, loaded, executor, noise):
    """x is written at the end of a long queue in another stream."""
    device, n = StandIn(driver), len(noise)
    wrong = np.full_like(noise, 0.25)
    with prepared(device, loaded, executor, batch=n) as made, driver.current(), driver.stream() as other:
        x, room, far = (driver.allocate(size, "memory") for size in (noise.nbytes, 1 << 25, 1 << 25))
        driver.copy_in(x.value, wrong, other.value)
        driver.wait_for_stream(other.value)
        for _ in range(50):
            driver.copy(far.value, room.value, 1 << 25, other.value)
        driver.copy_in(x.value, noise, other.value)
        got = made.run(seed=SEED, images=range(n), x=x.value, after=[other.value])
        driver.wait_for_stream(other.value)
    assert got.tobytes() == drawn(range(n), x=noise).tobytes()
    device.close()


def test_x_and_out_are_used_in_place(open_pipeline, arrays, executor, noise):
    n = len(noise)
    wanted = drawn(range(n), x=noise)
    with open_pipeline(executor) as pipeline:
        x, out = arrays.make(noise), arrays.make(np.zeros_like(wanted))
        assert pipeline.generate(n, seed=SEED, steps=STEPS, batch=2, x=x, out=out) is out
        assert arrays.read(out).tobytes() == wanted.tobytes()
        assert arrays.read(x).tobytes() == noise.tobytes(), "x was written"


def test_images_that_stay_on_the_gpu_reach_other_libraries(open_pipeline, arrays):
    with open_pipeline() as pipeline:
        kept = pipeline.generate(5, seed=SEED, steps=STEPS, batch=2, on_device=True)
        theirs = arrays.adopt(kept)
        assert arrays.read(theirs).tobytes() == drawn(range(5)).tobytes()
        assert kept.numpy().tobytes() == drawn(range(5)).tobytes()
        del theirs
        kept.close()


def test_an_array_of_another_type_is_refused(open_pipeline, arrays, noise):
    with open_pipeline() as pipeline:
        with pytest.raises(InputError, match="float32"):
            pipeline.generate(5, steps=STEPS, x=arrays.make(noise.astype(np.float16)))
        assert pipeline.generate(3, seed=SEED, steps=STEPS).tobytes() == drawn(range(3)).tobytes()


# --- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_run_at_once(open_pipeline, at_once, executor):
    rounds, got = 5, {}
    with open_pipeline(executor) as pipeline, pipeline.share() as other:

        def draw(name, mine, first):
            got[name] = [mine.generate(4, seed=SEED, first=first, steps=STEPS).tobytes() for _ in range(rounds)]

        at_once([lambda: draw("one", pipeline, 0), lambda: draw("other", other, 4)])
    assert got["one"] == rounds * [drawn(range(4)).tobytes()]
    assert got["other"] == rounds * [drawn(range(4, 8)).tobytes()]


# --- images at different steps in one batch --------------------------------------------------------------------------

MIXED = [
    {"n": 3, "sampling": {"steps": 6}},
    {"n": 1, "first": 2**32 - 1, "sampling": {"steps": 9, "sampler": "unipc"}},
    {"n": 9, "sampling": {"steps": 5, "sampler": "dpmpp_2m"}},
    {"n": 2, "first": 7, "sampling": {"steps": 12, "sampler": "ddim", "eta": 0.5}},
]


@pytest.mark.parametrize("executor", BATCH_EXECUTORS)
def test_the_images_of_a_batcher_are_numpy_s(driver, executor):
    """They join where there is room, and go on in a smaller batch."""
    with Batcher(SPEC, CopyingBackend(StandIn(driver)), batch=6, executor=executor) as batcher:
        assert batcher.description == f"the stand-in, executor {executor}"
        tickets = [batcher.submit(**{**each, "seed": SEED, "sampling": Sampling(**each["sampling"])}) for each in MIXED]
        got = [ticket.result(120) for ticket in tickets]
    for each, images in zip(MIXED, got, strict=True):
        first = each.get("first", 0)
        wanted = drawn(range(first, first + each["n"]), table=table_of(**each["sampling"]))
        assert images.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("executor", BATCH_EXECUTORS)
@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
def test_every_step_of_every_image_in_a_batch_has_numpy_s_bits(driver, executor, learns):
    spec = SPEC.replace(variance="learned_range") if learns else SPEC
    device = StandIn(driver, spec)
    how = {"steps": 5}, {"steps": 4, "sampler": "ddim", "eta": 0.7}, {"steps": 6, "sampler": "unipc"}
    tables = [table_of(spec, **each) for each in how]
    groups = [
        Group(table, seed, np.array(images), np.array(rows))
        for table, seed, images, rows in zip(
            tables, (SEED, 2**64 - 1, 0), ([2**32 - 1, 0], [5], [3, 4]), ([0, 4], [2], [5, 1]), strict=True
        )
    ]
    wanted = [walk(group.images, spec=spec, table=group.table, seed=group.seed) for group in groups]
    with DeviceBatch(device, spec, 6, executor=executor) as batch:
        for call in range(8):
            # each joins one call after the one before
            now = [group for number, group in enumerate(groups) if number <= call and group.done < len(group)]
            if not now:
                break
            batch.call(6, now, watched=[True] * len(now))
            (arrived,) = batch.landed()
            for group, each in zip(now, arrived, strict=True):
                expected = wanted[groups.index(group)][each.index]
                assert not each.bad
                assert each.x.tobytes() == expected.x.tobytes(), (call, each.index)
                assert each.x0.tobytes() == expected.x0.tobytes(), (call, each.index)
                if each.index + 1 == len(group):
                    assert each.pixels.tobytes() == to_nhwc(expected.x0).tobytes()
    assert all(group.done == len(group) for group in groups)
    device.close()


# --- last, since a driver may crash here -----------------------------------------------------------------------------


def test_a_network_that_waits_runs_plainly(driver, loaded):
    """It makes each capture invalid. A graph whose WHILE node's body was captured so must not be freed."""
    device = StandIn(driver)
    with DeviceChain(driver, loaded, SPEC.shape, len(IMAGES), table_of(), description="the stand-in") as made:
        network = device.network(len(IMAGES), **made.at, stream=made.stream)

        def enqueue(stream):
            driver.wait_for_stream(stream)
            network.enqueue(stream)

        choice = choose_executor(made, enqueue)
        assert [name for name, _ in choice.rejected] == ["while", "graph"]
        assert choice.executor == "plain"
        got = made.run(seed=SEED, images=IMAGES)
    assert got.tobytes() == drawn(IMAGES).tobytes()
    device.close()
