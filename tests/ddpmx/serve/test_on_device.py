"""Continuous batching with the chains on a GPU, without one: a fake driver, whose kernels are the real ones on the host.

The images are those of ``generate`` by NumPy, whoever else is there, by each executor.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from ddpmx import Pipeline, Sampling
from ddpmx.backends.base import CopyingBackend
from ddpmx.cuda.device_batch import DeviceBatch
from ddpmx.cuda.group import Group
from ddpmx.errors import BackendError, Cancelled, InputError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.serve.batcher import Batcher
from oracles import conditioning
from oracles.toy_device import Sharp, ToyDevice

SPEC = ModelSpec((3, 5, 7), timesteps=40, variance="learned_range", ddpmx="0.1.0")
FEW = SPEC.replace(variance="fixed_small")
EXECUTORS = ("graph", "plain")
ASKED = [
    {"n": 1, "sampling": Sampling(steps=7)},
    {"n": 5, "seed": 7, "first": 3, "sampling": Sampling(steps=6, sampler="ddim", eta=0.5)},
    {"n": 2, "seed": 7, "first": 100, "sampling": Sampling(steps=8, sampler="unipc", spacing="trailing")},
    {"n": 11, "seed": 2**63, "sampling": Sampling(steps=5)},
    {"n": 3, "seed": 1, "first": 2**32 - 3, "sampling": Sampling(steps=7, sampler="dpmpp_2m")},
    {"n": 2, "seed": 3, "sampling": Sampling(steps=4, variance="fixed_large")},
]


class OnHost:
    """The toy as a backend on the host."""

    description = "toy"

    def __init__(self, toy):
        self.bind, self.enqueue, self.close = toy.bind, toy.enqueue, toy.close


def wanted(spec, asked, *, batch=6, toy=None):
    """The images by NumPy on the host."""
    with Pipeline(spec, OnHost(toy or Sharp(spec.shape))) as pipeline:
        return [
            pipeline.generate(each["n"], batch=batch, **{k: v for k, v in each.items() if k != "n"}) for each in asked
        ]


def batcher_of(device, *, batch=6, **more):
    return Batcher(device.spec, CopyingBackend(device), batch=batch, **more)


def draw(device, asked, *, batch=6, **more):
    with batcher_of(device, batch=batch, **more) as batcher:
        tickets = [batcher.submit(**each) for each in asked]
        drawn = [ticket.result(60) for ticket in tickets]
    assert device.closed
    return drawn


def assert_same(drawn, images):
    for mine, theirs in zip(drawn, images, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_images_are_those_of_generate_whoever_else_is_there(fake, executor, sways):
    make = lambda: Sharp(SPEC.shape, sways=sways)  # noqa: E731
    device = ToyDevice(fake, SPEC, make=make)
    if sways == "place":
        backend = CopyingBackend(ToyDevice(fake, SPEC, make=make))
        with pytest.raises(InputError, match="does not support executor"):
            Batcher(SPEC, backend, batch=6, executor=executor)
        backend.close()
        drawn = draw(device, ASKED)  # one by one, from the host
        assert "ddpmx_step_each" not in fake.launches
    else:
        drawn = draw(device, ASKED, executor=executor)
        assert "ddpmx_step_each" in fake.launches
    assert_same(drawn, wanted(SPEC, ASKED, toy=make()))


@pytest.mark.parametrize("kind", ["classes", "itself", "all"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_guided_and_conditioned(fake, executor, kind):
    spec = conditioning.spec_of(kind, (3, 4, 4), **({"null_class": True} if kind != "itself" else {}))
    rows = conditioning.as_arguments(conditioning.conditioning_of(spec, 5))
    x = np.random.default_rng(0).standard_normal((5, *spec.shape)).astype(np.float32)
    asked = [
        {"n": 5, "seed": 3, **rows, **({"guidance": 2.5} if spec.null_class else {})},
        {"n": 3, "seed": 4, "sampling": Sampling(steps=5, sampler="unipc"), **{k: v[:3] for k, v in rows.items()}},
        {"n": 5, "seed": 5, "sampling": Sampling(steps=6), "x": x, **rows},
    ]
    if spec.null_class:
        asked.append({**asked[1], "guidance": 0.0, "seed": 9})
        asked.append({**asked[2], "guidance": -0.5})
    assert_same(draw(ToyDevice(fake, spec), asked, executor=executor), wanted(spec, asked, batch=3))


def test_they_are_those_of_generate_on_the_device_too(fake):
    with Pipeline(SPEC, CopyingBackend(ToyDevice(fake, SPEC))) as pipeline:
        images = [pipeline.generate(batch=6, **each) for each in ASKED[:3]]
    assert_same(draw(ToyDevice(fake, SPEC), ASKED[:3]), images)


def test_nothing_but_what_joins_and_leaves_is_copied(fake):
    """A call copies what each image does, once; images come out when they are drawn."""
    device = ToyDevice(fake, FEW)
    with batcher_of(device, executor="plain") as batcher:
        batcher.submit(4, sampling=Sampling(steps=3)).result(60)  # sizes are tried once
        before = {name: fake.count(name) for name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemAlloc_v2")}
        batcher.submit(4, sampling=Sampling(steps=20)).result(60)
        after = {name: fake.count(name) - count for name, count in before.items()}
    assert after == {"cuMemcpyHtoDAsync_v2": 20, "cuMemcpyDtoHAsync_v2": 1, "cuMemAlloc_v2": 0}


def test_a_request_joins_at_the_next_call_and_a_smaller_batch_goes_on(fake):
    device = ToyDevice(fake, FEW)
    asked = [
        {"n": 4, "sampling": Sampling(steps=4)},
        {"n": 1, "seed": 1, "sampling": Sampling(steps=19)},
        {"n": 1, "seed": 2, "sampling": Sampling(steps=20, sampler="unipc")},
    ]
    tickets = []
    with batcher_of(device, batch=8, executor="plain") as batcher:
        for n in (1, 2, 4):  # the sizes of the batch are tried once
            batcher.submit(n, sampling=Sampling(steps=1)).result(60)
        device.sizes.clear()
        device.hook = lambda run: tickets.extend(batcher.submit(**each) for each in asked[1:]) if run == 1 else None
        tickets.append(batcher.submit(**asked[0]))
        tickets[0].result(60)
        drawn = [ticket.result(60) for ticket in tickets]
    assert_same(drawn, wanted(FEW, asked, batch=8))
    assert device.sizes == [4] + [8] * 3 + [2] * 16 + [1]  # the last two take the places of those that have left


def test_a_smaller_batch_without_moving_is_noticed(fake, monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(DeviceBatch, "move", lambda batch, group, rows: setattr(group, "rows", rows))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        test_a_request_joins_at_the_next_call_and_a_smaller_batch_goes_on(fake)


def test_32_requests_come_and_go_and_cancel(fake):
    asked = [{"n": 2, "seed": seed, "sampling": Sampling(steps=9 - seed % 3)} for seed in range(6)]
    images, rng = wanted(FEW, asked, batch=8), np.random.default_rng(0)
    drawn = gone = 0
    with batcher_of(ToyDevice(fake, FEW), batch=8) as batcher:
        tickets = []
        for _ in range(32):
            number = int(rng.integers(len(asked)))
            tickets.append((number, batcher.submit(**asked[number])))
            if rng.random() < 0.4:
                time.sleep(0.002)
                tickets[int(rng.integers(len(tickets)))][1].cancel()
        for number, ticket in tickets:
            try:
                np.testing.assert_array_equal(ticket.result(60), images[number])
                drawn += 1
            except Cancelled:
                gone += 1
    assert drawn >= 10
    assert gone >= 1


def test_what_has_made_its_last_step_is_answered_if_all_others_are_cancelled(fake):
    """Its call is looked at after the next one, and there may be none."""
    device, tickets = ToyDevice(fake, FEW), []

    def hook(run):
        if run == 1:
            tickets.extend(batcher.submit(1, seed=steps, sampling=Sampling(steps=steps)) for steps in (40, 2))
        elif run == 3:  # in which the second makes its last step
            tickets[0].cancel()

    with batcher_of(device, executor="plain") as batcher:
        for n in (1, 2):  # the sizes of the batch are tried once
            batcher.submit(n, sampling=Sampling(steps=1)).result(60)
        device.hook = hook
        batcher.submit(1, sampling=Sampling(steps=1)).result(60)
        try:
            assert_same([tickets[1].result(5)], wanted(FEW, [{"n": 1, "seed": 2, "sampling": Sampling(steps=2)}]))
        finally:
            batcher.close(drain=False)
        with pytest.raises(Cancelled):
            tickets[0].result(5)
    assert device.runs == 3


def test_watching_and_a_watcher_that_fails(fake):
    seen = []
    how = Sampling(steps=9)
    with Pipeline(FEW, OnHost(Sharp(FEW.shape))) as pipeline:
        steps = [(step.t, step.x.copy(), step.x0.copy()) for step in pipeline.stream(2, batch=4, sampling=how)]
    asked = [{"n": 2, "sampling": how}]
    with batcher_of(ToyDevice(fake, FEW), batch=4) as batcher:
        good = batcher.submit(2, sampling=how, watch=lambda at, step: seen.append((at, step)))
        bad = batcher.submit(1, sampling=how, watch=lambda at, step: 1 / 0)
        assert_same([good.result(60)], wanted(FEW, asked, batch=4))
        with pytest.raises(ZeroDivisionError):
            bad.result(60)
    for (at, mine), (t, x, x0) in zip(seen, steps, strict=True):
        assert (at, mine.t) == (0, t)
        np.testing.assert_array_equal(mine.x, x)
        np.testing.assert_array_equal(mine.x0, x0)


def test_what_goes_wrong_is_the_one_s_who_asked(fake):
    times = Sampling(steps=40).table(FEW).timesteps.tolist()
    device = ToyDevice(fake, FEW, make=lambda: Sharp(FEW.shape, poisoned_t=times[-2]))
    asked = [{"n": 2, "seed": 5, "sampling": Sampling(steps=4)}]
    assert times[-2] not in Sampling(steps=4).table(FEW).timesteps
    with batcher_of(device, batch=4) as batcher:
        bad = batcher.submit(1, sampling=Sampling(steps=40))
        good = [batcher.submit(**asked[0]) for _ in range(3)]
        for ticket in good:
            assert_same([ticket.result(60)], wanted(FEW, asked, batch=4))
        with pytest.raises(NumericError, match=f"at t = {times[-2]} is not finite") as caught:
            bad.result(60)
        assert caught.value.note == "step 39 of 40; toy device, executor graph"
        assert_same([batcher.submit(**asked[0]).result(60)], wanted(FEW, asked, batch=4))  # in the same row
    device = ToyDevice(fake, FEW)
    batcher = batcher_of(device, executor="plain")
    device.refuse = True
    with pytest.raises(BackendError, match="the toy refuses"):
        batcher.submit(13, sampling=Sampling(steps=9)).result(60)
    with pytest.raises(BackendError, match="the toy refuses"):
        batcher.submit(1)
    batcher.close()
    assert device.closed


def test_a_driver_that_fails_ends_all_and_leaves_nothing(fake):
    device = ToyDevice(fake, FEW)
    batcher = batcher_of(device)
    fake.broken = 700
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        batcher.submit(3, sampling=Sampling(steps=9)).result(60)
    batcher.close()
    fake.broken = 0
    assert device.closed
    # of a lost device nothing runs any more
    assert set(fake.faults) == {"memory is freed while kernels may use it"}
    fake.faults.clear()


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_any_call_of_the_driver_that_fails_ends_all_and_leaves_nothing(fake, executor, at):
    device = ToyDevice(fake, FEW)
    batcher = batcher_of(device, batch=4, executor=executor)
    fake.fail_at = fake.counted + at
    ticket = batcher.submit(6, sampling=Sampling(steps=9), watch=lambda *_: None)  # some have no place yet
    with pytest.raises(BackendError):
        ticket.result(60)
    batcher.close()
    assert device.closed


def test_a_network_whose_graph_replays_old_outputs_runs_plain(fake):
    device = ToyDevice(fake, FEW)
    device.stale = True
    with batcher_of(device) as batcher:
        assert batcher.description.startswith("toy device, executor plain; not graph: the captured call gives another")
    device = ToyDevice(fake, FEW)
    device.stale = True
    backend = CopyingBackend(device)
    with pytest.raises(BackendError, match="the captured call gives another output"):
        Batcher(FEW, backend, batch=4, executor="graph")
    backend.close()


def test_a_network_that_cannot_be_captured_at_another_size_runs_plain_from_then_on(fake):
    device = ToyDevice(fake, FEW)
    with batcher_of(device) as batcher:
        assert batcher.description == "toy device, executor graph"
        device.stale = True
        assert_same([batcher.submit(**ASKED[0]).result(60)], wanted(FEW, ASKED[:1]))
        assert "executor plain; not graph" in batcher.description
        assert_same([batcher.submit(**ASKED[3]).result(60)], wanted(FEW, ASKED[3:4]))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_memory_for_all_sizes_one_at_a_time_is_kept(fake, executor):
    device = ToyDevice(fake, FEW)
    batcher = batcher_of(device, executor=executor)
    device.most = 1
    with batcher:
        tickets = [batcher.submit(**each) for each in ASKED[:3]]
        drawn = [ticket.result(60) for ticket in tickets]
        assert len(device.live) == 1
    assert_same(drawn, wanted(FEW, ASKED[:3]))


def test_a_network_that_cannot_be_captured_runs_plain_in_its_own_stream(fake):
    device = ToyDevice(fake, FEW, executors=("plain",), own_stream=True)
    assert_same(draw(device, ASKED[:2]), wanted(FEW, ASKED[:2]))
    assert fake.count("cuGraphLaunch") == 0
    device = ToyDevice(fake, FEW, executors=("plain",))
    for executor in ("graph", "while"):
        with pytest.raises(InputError, match=f"does not support executor '{executor}'"):
            DeviceBatch(device, FEW, 4, executor=executor)
    device.close()


def test_from_the_host_if_one_asks_for_it(fake):
    device = ToyDevice(fake, FEW)
    with batcher_of(device, executor="host") as batcher:
        assert batcher.description == "toy device, steps on the host"
        assert_same([batcher.submit(**ASKED[0]).result(60)], wanted(FEW, ASKED[:1]))
    assert "ddpmx_step_each" not in fake.launches


@pytest.mark.parametrize("at", range(1, 60, 7))
def test_every_failure_on_the_way_frees_everything(fake, at):
    device = ToyDevice(fake, FEW)
    fake.fail_at = fake.counted + at
    try:
        batch = DeviceBatch(device, FEW, 4, executor="graph")
    except BackendError:
        pass
    else:
        batch.close()
    fake.fail_at = 0
    device.close()


def test_too_many_calls_on_their_way_are_refused(fake):
    device = ToyDevice(fake, FEW)
    table = Sampling(steps=5).table(FEW)
    with DeviceBatch(device, FEW, 4) as batch:
        group = Group(table, 0, np.arange(2), np.arange(2))
        batch.call(4, [group])
        batch.call(4, [group])
        with pytest.raises(BackendError, match="too many calls"):
            batch.call(4, [group])
        assert [[arrived.index for arrived in each] for each in batch.landed()] == [[0], [1]]
    device.close()
