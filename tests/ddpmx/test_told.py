"""Networks that are told more than x and t: a class, x̂_0 of the step before, a condition. On the host and on a device."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddpmx import pipeline
from ddpmx.backends import trt
from ddpmx.backends.base import EXECUTORS, Buffers, CopyingBackend
from ddpmx.bench.figures import Settings
from ddpmx.bench.host import measure_host
from ddpmx.cuda.executors import choose_executor
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import FileFormatError, InputError
from ddpmx.parity import on_device
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.trt import library as trt_library
from oracles import gaussian, told
from oracles.cuda_on_host import Toy
from oracles.device_chain import IMAGES, SHAPE, Setup, array_at, expected
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.plans import make_plan
from oracles.told import CHANNELS, CLASSES, KINDS, asked, given, spec_of
from oracles.toy_backend import ToyBackend

TOY = {kind: gaussian.SPEC.replace(**fields) for kind, fields in KINDS.items()}
"""What ToyBackend is."""
TABLE = make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_small", steps=9)


def generate(spec, n=4, *, backend=None, **options):
    options = {"seed": 3, "steps": 7, **options}
    with Pipeline(spec, backend or ToyBackend()) as p:
        return p.generate(n, **options)


# --- the chain in NumPy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_algorithm_2_with_what_the_network_is_told(kind, clip, tmp_path, figure):
    """An ONNX file by hand in ONNX Runtime, against the paper's formulas in float64."""
    pytest.importorskip("onnxruntime", reason="not verified here: chains of files (no ONNX Runtime)")
    spec = spec_of(kind, clip=clip)
    path = tmp_path / "model.onnx"
    path.write_bytes(told.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    wanted = told.chain_by_hand(spec, given(spec), seed=11, n=3, clip=clip)
    with pipeline.load(path) as p:
        steps = list(p.stream(3, seed=11, **asked(given(spec))))
        levels = p.generate(3, seed=11, **asked(given(spec)))
    worst = max(np.abs(step.x0 - x0).max() for step, x0 in zip(steps, wanted, strict=True))
    figure(f"x̂_0 of a network told {kind}, clip {clip}, against float64", worst, at_most=2e-5)
    assert levels.tobytes() == to_nhwc(steps[-1].x0).tobytes()


def test_what_is_fed_back_is_what_the_chain_keeps():
    """x̂_0 of the step before after its clip, 0 at first, and of each image its own."""
    seen = []

    class Watched(ToyBackend):
        def enqueue(self):
            seen.append(self.buffers.x0_prev.copy())
            super().enqueue()

    indices, spec = np.arange(3), TOY["itself"]
    start = chain.initial(0, indices, spec.shape)
    steps = chain.run(
        Watched(), TABLE, start, seed=0, images=indices, clip=0.1, conditioning_shapes=spec.conditioning_shapes
    )
    kept = [np.zeros_like(start), *(step.x0.copy() for step in steps)]
    assert len(seen) == len(TABLE)
    assert max(np.abs(x0).max() for x0 in kept) == np.float32(0.1)
    for fed, x0 in zip(seen, kept, strict=False):
        np.testing.assert_array_equal(fed, x0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_an_image_depends_on_its_own_label_and_condition_alone(kind, sways):
    spec = TOY[kind]
    mine = given(spec, 5)
    all_of_them = generate(spec, 5, backend=ToyBackend(sways=sways), batch=4, **asked(mine))
    for first, n in ((0, 1), (3, 2), (4, 1)):
        part = {name: array[first : first + n] for name, array in asked(mine).items()}
        alone = generate(spec, n, backend=ToyBackend(sways=sways), batch=4, first=first, **part)
        assert alone.tobytes() == all_of_them[first : first + n].tobytes()
    for name, other in given(spec, 5, seed=9).items():
        changed = {**mine, name: mine[name].copy()}
        changed[name][2] = (mine["y"][2] + 1) % CLASSES if name == "y" else other[2]
        got = generate(spec, 5, backend=ToyBackend(sways=sways), batch=4, **asked(changed))
        assert [not np.array_equal(a, b) for a, b in zip(got, all_of_them, strict=True)] == [
            False,
            False,
            True,
            False,
            False,
        ]


def test_one_label_is_that_of_all_images():
    spec = TOY["classes"]
    wanted = generate(spec, 3, labels=[2, 2, 2]).tobytes()
    for labels in (2, np.int64(2), np.array(2), np.full(3, 2, np.uint8), (2, 2, 2)):
        assert generate(spec, 3, labels=labels).tobytes() == wanted
    assert generate(spec, 3, labels=1).tobytes() != wanted


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classes", {}, f"images of {CLASSES} classes, and none is named"),
        ("classes", {"labels": CLASSES}, f"there is no class {CLASSES}"),
        ("classes", {"labels": [0, -1]}, "there is no class -1"),
        ("classes", {"labels": [0, 10**30]}, "one whole number, or 2"),
        ("classes", {"labels": [0, 1, 2]}, "one whole number, or 2"),
        ("classes", {"labels": [[0, 1]]}, "one whole number, or 2"),
        ("classes", {"labels": [[0], [1, 2]]}, "one whole number, or 2"),
        ("classes", {"labels": []}, "one whole number, or 2"),
        ("classes", {"labels": 0.5}, "one whole number, or 2"),
        ("classes", {"labels": True}, "one whole number, or 2"),
        ("classes", {"labels": "zero"}, "str is no array"),
        ("classes", {"labels": np.array([0.0, 1.0])}, "one whole number, or 2"),
        ("classes", {"labels": 0, "cond": np.zeros((2, 1, 8, 8), np.float32)}, "takes no condition"),
        ("condition", {}, "images by a condition, and there is none"),
        ("condition", {"labels": 0, "cond": None}, "no classes"),
        ("condition", {"cond": np.zeros((2, CHANNELS + 1, 8, 8), np.float32)}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": np.zeros((1, CHANNELS, 8, 8), np.float32)}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": np.zeros((2, CHANNELS, 8, 8))}, r"cond must be float32 \[2, 2, 8, 8\]"),
        ("condition", {"cond": [[1.0]]}, "list is no array"),
        ("itself", {"labels": 0}, "no classes"),
        ("itself", {"cond": np.zeros((2, 1, 8, 8), np.float32)}, "takes no condition"),
    ],
)
def test_what_cannot_be_told_is_refused(kind, options, message):
    for run in (
        lambda p: p.generate(2, steps=2, **options),
        lambda p: list(p.stream(2, steps=2, **options)),
    ):
        backend = ToyBackend()
        with Pipeline(TOY[kind], backend) as p, pytest.raises(InputError, match=message):
            run(p)
        assert backend.asked == []


def test_labels_are_looked_at_before_anything_is_prepared():
    with Pipeline(TOY["classes"], ToyBackend()) as p:
        p.check_request(2, labels=[0, 4])
        with pytest.raises(InputError, match="no class 5"):
            p.check_request(2, labels=[0, 5])


def test_the_executed_batch_is_measured_with_labels_that_there_are():
    """Whatever the network is told, it is told something legal: a class is an index into its tables."""
    seen = []

    class Watched(ToyBackend):
        def enqueue(self):
            seen.append({name: array.copy() for name, array in self.buffers.inputs().items()})
            super().enqueue()

    spec = TOY["all"].replace(classes=2)
    assert chain.executed_batch(Watched(), spec, 3, 5) == 3
    assert len(seen) == 4
    for inputs in seen:
        assert set(inputs) == {"x", "t", "y", "x0_prev", "cond"}
        assert set(inputs["y"]) == {0, 1}
        assert all(len(np.unique(array)) > 1 for array in inputs.values())


def test_a_network_that_sways_by_what_it_is_told_is_found_out():
    class Sways(ToyBackend):
        def enqueue(self):
            super().enqueue()
            out = self.buffers.out
            out += self.buffers.y[0] * np.float32(0.01)  # the first image's label, for all

    assert chain.executed_batch(Sways(), TOY["classes"], 4, 4) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_runs_what_is_told_more(kind):
    cell = measure_host(ToyBackend(), TOY[kind], 2, Settings(1e-3, steps=3))
    assert cell.failed is None


# --- the chain on a device -------------------------------------------------------------------------------------------


def small(kind):
    return gaussian.SPEC.replace(shape=SHAPE, **KINDS[kind])


@pytest.mark.parametrize("clip", [1.0, 0.25, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_gives_numpy_s_bits(fake, executor, kind, clip):
    spec = small(kind)
    others, mine = given(spec, seed=5), given(spec)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, clip=clip, table=TABLE) as s:
        assert choose_executor(s.chain, s.engine, executor).executor == executor
        alive = fake.alive()
        for now in (mine, others, mine):  # nothing stays of the chain before
            step = expected(clip=clip, table=TABLE, conditioning_shapes=spec.conditioning_shapes, conditioning=now)
            got = s.chain.run(seed=5, images=IMAGES, conditioning=now)
            assert got.tobytes() == to_nhwc(step.x0).tobytes()
            assert array_at(s.chain.x, step.x_next.shape, ctypes.c_float).tobytes() == step.x_next.tobytes()
        assert fake.alive() == alive


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_on_the_device_can_be_watched(fake, kind):
    spec = small(kind)
    drawn, mine = np.array(IMAGES), given(spec)
    wanted = chain.run(
        Toy(SHAPE),
        TABLE,
        chain.initial(5, drawn, SHAPE),
        seed=5,
        images=drawn,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=mine,
    )
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE, with_x0=True) as s:
        s.chain.prepare(s.engine, "graph")
        for ours, theirs in zip(s.chain.steps(seed=5, images=IMAGES, conditioning=mine), wanted, strict=True):
            assert ours.x0.tobytes() == theirs.x0.tobytes()


def test_what_a_batch_has_left_is_filled_up_and_may_come_from_the_device(fake):
    spec = small("all")
    mine = given(spec, 2)
    step = expected(IMAGES[:2], table=TABLE, conditioning_shapes=spec.conditioning_shapes, conditioning=mine)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s, s.driver.current():
        s.chain.prepare(s.engine, "plain")
        memory = {name: s.driver.allocate(array.nbytes, name) for name, array in mine.items()}
        for name, array in mine.items():
            s.driver.copy_in(memory[name].value, array, s.chain.stream)
        for now in (mine, {name: at.value for name, at in memory.items()}):
            got = s.chain.run(seed=5, images=IMAGES[:2], conditioning=now)
            assert got.tobytes() == to_nhwc(step.x0).tobytes()
            assert list(array_at(s.chain.conditioning["y"], (3,), ctypes.c_int32)) == [*mine["y"], mine["y"][-1]]
        for at in memory.values():
            at.close()


def test_what_the_device_is_told_before_anybody_says_is_0(fake):
    """The engine's first runs come before any chain, and a class is an index into its tables."""
    spec, seen = small("all"), []
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s:
        enqueue = s.engine.toy.enqueue
        s.engine.toy.enqueue = lambda: (
            seen.append({name: array.copy() for name, array in s.engine.toy.buffers.inputs().items()}),
            enqueue(),
        )
        s.chain.prepare(s.engine, "while")
    assert len(seen) >= 3
    assert not any(inputs[name].any() for inputs in seen for name in ("y", "x0_prev", "cond"))


@pytest.mark.parametrize(
    ("told_now", "message"),
    [
        ({}, "is told (y|cond) as well"),
        (
            {"y": np.zeros(3, np.int64), "cond": np.zeros((3, CHANNELS, *SHAPE[1:]), np.float32)},
            r"y must be int32 \[3\]",
        ),
        (
            {"y": np.zeros(2, np.int32), "cond": np.zeros((3, CHANNELS, *SHAPE[1:]), np.float32)},
            r"y must be int32 \[3\]",
        ),
        ({"y": 1 << 20, "cond": 1 << 20, "x0_prev": 1 << 20}, "is told no x0_prev"),
    ],
)
def test_a_chain_is_told_what_it_asks_for(fake, told_now, message):
    spec = small("all")
    drawn = np.array(IMAGES)
    with Setup(fake, conditioning_shapes=spec.conditioning_shapes, table=TABLE) as s:
        s.chain.prepare(s.engine, "plain")
        with pytest.raises(InputError, match=message):
            s.chain.run(seed=5, images=IMAGES, conditioning=told_now)
    if not any(isinstance(array, int) for array in told_now.values()):
        with pytest.raises(InputError, match=message):
            next(
                chain.run(
                    Toy(SHAPE),
                    TABLE,
                    chain.initial(5, drawn, SHAPE),
                    seed=5,
                    images=drawn,
                    conditioning_shapes=spec.conditioning_shapes,
                    conditioning=told_now,
                )
            )


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path, monkeypatch, fake):
    """``opened(spec)``: a plan of this model on a TensorRT and a driver that are fakes."""
    monkeypatch.setattr(trt_library, "host_platform", lambda: "linux x86_64")
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    monkeypatch.setattr(trt, "gpus", lambda: ADA)

    def make(spec, **options):
        path = tmp_path / "model.plan"
        path.write_bytes(make_plan(spec=spec))
        module = FakeTrt(fake, spec=spec, **options)
        module.make = lambda: Toy(spec.shape)
        monkeypatch.setattr(trt_library, "load", lambda flavour=None: module.library())
        return path

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_plan_gives_the_images_of_the_chain_in_numpy(opened, kind, executor):
    spec = spec_of(kind, timesteps=6)
    mine = given(spec, 5)
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(5, seed=3, **asked(mine))
    with pipeline.load(opened(spec), executor=executor) as p:
        for batch in (5, 3):
            assert p.generate(5, seed=3, batch=batch, **asked(mine)).tobytes() == wanted.tobytes()
        *_, last = p.stream(5, seed=3, **asked(mine))
        assert to_nhwc(last.x0).tobytes() == wanted.tobytes()


def test_a_plan_where_each_image_runs_alone_tells_each_its_own(opened, monkeypatch):
    """Conditions as addresses, too."""
    spec = spec_of("all", timesteps=4)
    mine = given(spec, 3)
    monkeypatch.setattr(chain, "executed_batch", lambda *_: 1)
    with Pipeline(spec, Toy(spec.shape)) as p:
        wanted = p.generate(3, seed=3, **asked(mine))
    with pipeline.load(opened(spec)) as p:
        driver = p._runner.driver
        assert p.generate(3, seed=3, **asked(mine)).tobytes() == wanted.tobytes()
        with driver.current(), driver.allocate(mine["cond"].nbytes, "somebody's") as memory:
            array_at(memory.value, mine["cond"].shape, ctypes.c_float)[...] = mine["cond"]
            there = OnGpu(memory.value, mine["cond"].shape, "<f4")
            for batch in (3, 2):
                got = p.generate(3, seed=3, batch=batch, labels=mine["y"], cond=there)
                assert got.tobytes() == wanted.tobytes()
            with pytest.raises(InputError, match="labels lie on a GPU"):
                p.generate(3, labels=OnGpu(memory.value, (3,), "<i4"), cond=there)


class OnGpu:
    """Somebody's array in device memory."""

    def __init__(self, address, shape, typestr):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}


def test_a_condition_on_a_gpu_is_refused_where_the_chain_is_not():
    spec = TOY["condition"]
    with pytest.raises(InputError, match="cond lies on a GPU"):
        generate(spec, 1, cond=OnGpu(1 << 20, (1, CHANNELS, 8, 8), "<f4"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_on_the_device_is_a_rung(opened, kind):
    spec = spec_of(kind)
    with pipeline.load(opened(spec)) as p:
        checks = on_device.checks(p._runner._backend, spec)
    assert [(check.value, check.skipped) for check in checks] == [(0.0, None)] * 3


@pytest.mark.parametrize("missing", ["y", "x0_prev", "cond"])
def test_a_plan_without_what_its_spec_names_is_refused(opened, missing):
    spec = spec_of("all")
    tensors = {**{n: ("INPUT", "INT32" if n in ("t", "y") else "FLOAT", (-1, *d)) for n, d in spec.inputs.items()}}
    tensors["eps"] = ("OUTPUT", "FLOAT", (-1, *spec.shape))
    del tensors[missing]
    with pytest.raises(FileFormatError, match="other inputs and outputs") as caught:
        pipeline.load(opened(spec, tensors=tensors))
    assert f"no {missing}" in str(caught.value)


def test_buffers_of_one_image_are_views_of_its_own_row():
    spec = TOY["all"]
    buffers = Buffers.of(3, spec.shape, var=True, conditioning_shapes=spec.conditioning_shapes)
    for number, array in enumerate({**buffers.inputs(), **buffers.answers()}.values()):
        array[...] = (number + 10 * np.arange(3)).reshape(3, *(1,) * (array.ndim - 1))
    row = {**buffers.row(2).inputs(), **buffers.row(2).answers()}
    assert list(row) == ["x", "t", "y", "x0_prev", "cond", "out", "var"]
    for number, array in enumerate(row.values()):
        assert len(array) == 1
        assert np.all(array == number + 20)


def test_a_copying_backend_takes_other_buffers_of_the_same_batch(opened):
    spec = spec_of("all")
    path = opened(spec)
    with pipeline.load(path) as p:
        backend = p._runner._backend
        assert isinstance(backend, CopyingBackend)
        first, second = (Buffers.of(2, spec.shape, conditioning_shapes=spec.conditioning_shapes) for _ in range(2))
        second.y[...] = [1, 3]
        answers = []
        for buffers in (first, second):
            backend.bind(buffers)
            backend.enqueue()
            answers.append(buffers.out.copy())
        np.testing.assert_allclose(
            answers[1] - answers[0], np.broadcast_to([[[[0.1]]], [[[0.3]]]], answers[0].shape), atol=1e-6
        )
