"""Chains at different steps share a batch, and every image is what ``generate`` draws."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest

from ddpmx import Pipeline, Sampling
from ddpmx.errors import BackendError, Cancelled, InputError, NumericError, QueueFull
from ddpmx.formats.spec import ModelSpec
from ddpmx.serve.batcher import Batcher
from oracles import conditioning, gaussian
from oracles.toy_backend import ToyBackend

SPEC = gaussian.SPEC
QUICK = Sampling(steps=9)


def until(condition) -> None:
    """Wait, for ten seconds at most."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


class Slow(ToyBackend):
    """Waits for a word before each call, once it was asked to."""

    def __init__(self, **kind) -> None:
        super().__init__(**kind)
        self.gate = threading.Event()
        self.gate.set()
        self.rows: list[list[int]] = []
        self.waits = False

    def enqueue(self) -> None:
        self.waits = True
        self.gate.wait(5)
        self.waits = False
        super().enqueue()
        self.rows.append(self.buffers.t.tolist())


@pytest.mark.parametrize("kind", [{}, {"sways": "size"}, {"sways": "place"}], ids=["plain", "by size", "by place"])
def test_images_are_those_of_generate_whoever_else_is_there(kind):
    asked = [
        (1, 0, 0, Sampling(steps=9)),
        (5, 7, 3, Sampling(steps=12, sampler="ddim", eta=0.5)),
        (2, 7, 100, Sampling(steps=8, sampler="unipc", spacing="trailing")),
        (11, 2**63, 0, Sampling(steps=5)),
        (3, 1, 2**32 - 3, Sampling(steps=7, sampler="dpmpp_2m")),
    ]
    with Pipeline(SPEC, ToyBackend(**kind)) as pipeline:
        wanted = [pipeline.generate(n, seed=s, first=f, batch=6, sampling=how) for n, s, f, how in asked]
    with Batcher(SPEC, ToyBackend(**kind), batch=6) as batcher:
        tickets = [batcher.submit(n, seed=s, first=f, sampling=how) for n, s, f, how in asked]
        for ticket, images in zip(tickets, wanted, strict=True):
            np.testing.assert_array_equal(ticket.result(60), images)
    assert batcher.calls < sum(-(-n // 6) * len(how.table(SPEC)) for n, _, _, how in asked)  # calls were shared


def test_a_request_joins_at_the_next_call():
    backend = Slow()
    with Batcher(SPEC, backend, batch=4) as batcher:
        for n in (1, 2):  # the sizes of the batch are tried once
            batcher.submit(n, sampling=QUICK).result(60)
        backend.rows.clear()
        backend.gate.clear()
        first = batcher.submit(1, sampling=Sampling(steps=50))
        until(lambda: batcher.active == 1 and backend.waits)  # its first call waits
        second = batcher.submit(1, seed=1, sampling=Sampling(steps=50))
        backend.gate.set()
        first.result(60), second.result(60)
    times = Sampling(steps=50).table(SPEC).timesteps.tolist()
    assert (
        backend.rows
        == [
            times[:1],
            *([mine, theirs] for mine, theirs in zip(times[1:], times, strict=False)),  # a step apart, to the end
            times[-1:],
        ]
    )


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_classes_guidance_and_what_conditions_on_itself(guidance):
    spec = conditioning.spec_of("itself", classes=5, null_class=True)
    labels = [3, 0, 4, 1, 1]

    class Toy(ToyBackend):
        def enqueue(self) -> None:
            each = self.buffers
            each.out[...] = 0.5 * each.x + conditioning.effect(each.inputs())

    with Pipeline(spec, Toy()) as pipeline:
        wanted = pipeline.generate(5, seed=3, batch=3, labels=labels, guidance=guidance)
        nobody = pipeline.generate(2, seed=4, batch=6)
    with Batcher(spec, Toy(), batch=6) as batcher:
        asked = batcher.submit(5, seed=3, labels=labels, guidance=guidance), batcher.submit(2, seed=4)
        np.testing.assert_array_equal(asked[0].result(60), wanted)
        np.testing.assert_array_equal(asked[1].result(60), nobody)


def test_conditions_and_chains_that_begin_elsewhere():
    spec = conditioning.spec_of("all", null_class=True)
    rng = np.random.default_rng(0)
    conditions = conditioning.conditioning_of(spec, 7)
    x = rng.standard_normal((7, *spec.shape)).astype(np.float32)
    half = Sampling(steps=10, start=spec.timesteps // 2)

    class Toy(ToyBackend):
        def enqueue(self) -> None:
            each = self.buffers
            each.out[...] = 0.5 * each.x + conditioning.effect(each.inputs())

    def asked(rows: slice, guidance: float) -> dict[str, Any]:
        return {"cond": conditions["cond"][rows], "labels": conditions["y"][rows], "guidance": guidance}

    with warnings.catch_warnings(), Pipeline(spec, Toy()) as pipeline:
        warnings.simplefilter("ignore")  # start is not visited, and the nearest is taken
        t = int(half.table(spec).timesteps[0])
        wanted = [
            pipeline.generate(7, seed=3, batch=2, **asked(slice(0, 7), 2.0)),
            pipeline.generate(4, seed=5, batch=4, x=x[:4], sampling=half, **asked(slice(3, 7), 1.0)),
        ]
        with Batcher(spec, Toy(), batch=4) as batcher:
            begun = Sampling(steps=10, start=t)
            tickets = [
                batcher.submit(7, seed=3, **asked(slice(0, 7), 2.0)),
                batcher.submit(4, seed=5, x=x[:4], sampling=begun, **asked(slice(3, 7), 1.0)),
            ]
            for ticket, images in zip(tickets, wanted, strict=True):
                np.testing.assert_array_equal(ticket.result(60), images)
            with pytest.raises(InputError, match="missing model input 'cond'"):
                batcher.submit(1, labels=0)


@pytest.mark.parametrize("largest", [4, 64])
def test_a_guided_image_takes_two_parts_even_where_the_batch_is_one(largest):
    spec = conditioning.spec_of("classes", null_class=True)

    class Parts(ToyBackend):
        largest_part = largest

        def use_part(self, part: int) -> None:
            self.part = part

        def enqueue(self) -> None:
            each = self.buffers
            each.out[...] = 0.5 * each.x + conditioning.effect(each.inputs())
            each.out[...] += 0.01 * (np.arange(len(each.x), dtype=np.float32) % self.part)[:, None, None, None]

    asked: list[dict[str, Any]] = [{"n": 5, "labels": [1, 3, 0, 4, 2], "guidance": 2.5}, {"n": 2}, {"n": 3, "first": 2}]
    with Pipeline(spec, Parts()) as pipeline:
        wanted = [pipeline.generate(**each, batch=8) for each in asked]
    with Batcher(spec, Parts(), batch=8) as batcher:
        for ticket, images in zip([batcher.submit(**each) for each in asked], wanted, strict=True):
            try:
                np.testing.assert_array_equal(ticket.result(10), images)
            finally:
                ticket.cancel()  # one that finds no place would hold up the end


def test_a_learned_variance():
    spec = ModelSpec((3, 8, 8), timesteps=20, variance="learned_range")

    class Toy(ToyBackend):
        def enqueue(self) -> None:
            self.buffers.out[...] = 0.3 * self.buffers.x
            if self.buffers.var is not None:
                self.buffers.var[...] = 0.1 * self.buffers.x

    hows = Sampling(), Sampling(variance="fixed_large"), Sampling(sampler="ddim", steps=5)
    with Pipeline(spec, Toy()) as pipeline:
        wanted = [pipeline.generate(2, seed=5, batch=4, sampling=how) for how in hows]
    with Batcher(spec, Toy(), batch=4) as batcher:
        tickets = [batcher.submit(2, seed=5, sampling=how) for how in hows]
        for ticket, images in zip(tickets, wanted, strict=True):
            np.testing.assert_array_equal(ticket.result(60), images)


def test_32_clients_come_and_go_and_cancel():
    with Pipeline(SPEC, ToyBackend()) as pipeline:
        wanted = {seed: pipeline.generate(2, seed=seed, batch=8, sampling=QUICK) for seed in range(8)}
    wrong, drawn, gone = [], [], []

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(3):
            seed = int(rng.integers(8))
            ticket = batcher.submit(2, seed=seed, sampling=QUICK)
            time.sleep(rng.uniform(0, 0.005))
            if rng.random() < 0.3:
                ticket.cancel()
            try:
                (drawn if np.array_equal(ticket.result(60), wanted[seed]) else wrong).append(seed)
            except Cancelled:
                gone.append(seed)

    with Batcher(SPEC, ToyBackend(), batch=8) as batcher:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(32)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        assert batcher.waiting == 0
    assert not wrong
    assert len(drawn) + len(gone) == 96
    assert len(drawn) >= 60


def test_watching_and_a_watcher_that_fails():
    seen = []
    with Pipeline(SPEC, ToyBackend()) as pipeline:
        wanted = [step.x0 for step in pipeline.stream(2, batch=4, sampling=QUICK)]
        images = pipeline.generate(2, batch=4, sampling=QUICK)
    with Batcher(SPEC, ToyBackend(), batch=4) as batcher:
        good = batcher.submit(2, sampling=QUICK, watch=lambda at, step: seen.append((at, step.t, step.x0)))
        bad = batcher.submit(1, sampling=QUICK, watch=lambda at, step: 1 / 0)
        np.testing.assert_array_equal(good.result(60), images)
        with pytest.raises(ZeroDivisionError):
            bad.result(60)
    assert [at for at, _, _ in seen] == [0] * 9
    np.testing.assert_array_equal(np.stack([x0 for _, _, x0 in seen]), np.stack(wanted))


def test_what_goes_wrong_is_the_one_s_who_asked():
    with Batcher(SPEC, ToyBackend(poison=(500, np.nan)), batch=4) as batcher:
        bad = batcher.submit(1, sampling=Sampling(steps=1000))
        good = batcher.submit(1, sampling=Sampling(steps=4))  # does not visit 500
        assert good.result(60).shape == (1, *SPEC.shape[1:], SPEC.shape[0])
        with pytest.raises(NumericError, match="at t = 500 is not finite"):
            bad.result(60)

    class Broken(ToyBackend):
        broken = False

        def enqueue(self) -> None:
            if self.broken:
                raise BackendError("the cable is out")
            super().enqueue()

    backend = Broken()
    batcher = Batcher(SPEC, backend, batch=4)
    Broken.broken = True
    ticket = batcher.submit(13, sampling=QUICK)
    with pytest.raises(BackendError, match="the cable is out"):
        ticket.result(60)
    with pytest.raises(BackendError, match="the cable is out"):
        batcher.submit(1)
    batcher.close()
    assert backend.closed == 1
    assert (batcher.active, batcher.waiting) == (0, 0)  # nobody is on the way any more


def test_limits_and_the_end():
    backend = Slow()
    batcher = Batcher(SPEC, backend, batch=4, waiting=10)
    backend.gate.clear()
    running = batcher.submit(4, sampling=QUICK)
    until(lambda: batcher.active == 4)
    waiting = batcher.submit(10, sampling=QUICK)
    assert batcher.waiting == 10
    with pytest.raises(QueueFull, match="10 images are waiting already"):
        batcher.submit(1)
    for arguments, fact in (
        ({"n": 0}, "n must be"),
        ({"n": 1, "seed": -1}, "seed"),
        ({"n": 1, "sampling": Sampling(start=5)}, "missing x"),
        ({"n": 1, "labels": 3}, "no classes"),
        ({"n": 2, "x": np.zeros((1, *SPEC.shape), np.float32)}, "x must be float32"),
        ({"n": 1, "x": np.full((1, *SPEC.shape), np.nan, np.float32)}, "x holds NaN"),
        ({"n": 1, "cond": np.zeros((1, *SPEC.shape), np.float32)}, "no input 'cond'"),
    ):
        with pytest.raises(InputError, match=fact):
            batcher.submit(**arguments)
    waiting.cancel()
    backend.gate.set()
    assert running.result(60).shape[0] == 4
    with pytest.raises(Cancelled):
        waiting.result(60)
    with pytest.raises(TimeoutError):
        batcher.submit(1, sampling=Sampling(steps=1000)).result(0.0001)
    batcher.close(drain=False)
    with pytest.raises(BackendError, match="closed"):
        batcher.submit(1)
    assert backend.closed == 1
