"""`ddpmx.load(plan).generate(…)` on a GPU, without one: a fake TensorRT on a fake driver, whose kernels are the real ones.

Oracle for every image is the chain in NumPy.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import ddpmx
from ddpmx import chain, images
from ddpmx.cuda import EXECUTORS
from ddpmx.errors import BackendError, Cancelled, InputError, NumericError
from ddpmx.samplers import make_table
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at
from oracles.plans import SPEC

STEPS = 4
N = int(np.prod(SPEC.shape))
CHANNELS, HEIGHT, WIDTH = SPEC.shape


def expected(indices, *, seed=5, x=None):
    table = make_table(SPEC.make_schedule(), SPEC.prediction, SPEC.variance, steps=STEPS)
    drawn = np.array(indices)
    start = chain.initial(seed, drawn, SPEC.shape) if x is None else x
    *_, step = chain.run(Toy(SPEC.shape), table, start, seed=seed, images=drawn)
    return images.to_nhwc(step.x0)


@pytest.fixture
def module(fake_tensorrt):
    return fake_tensorrt


class OnDevice:
    """Somebody's array on the GPU."""

    def __init__(self, driver, array, *, ordinal=0, stream=None):
        with driver.current():
            self.handle = driver.allocate(array.nbytes, "somebody's array")
            array_at(self.handle.value, array.shape, np.ctypeslib.as_ctypes_type(array.dtype))[...] = array
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.handle.value, False),
            "version": 3,
            "strides": None,
            "stream": stream,
        }

    def numpy(self):
        return array_at(self.handle.value, self.shape, np.ctypeslib.as_ctypes_type(self.dtype)).copy()


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
def test_a_plan_gives_numpy_s_images(plan, module, executor):
    with ddpmx.load(plan, executor=executor) as pipeline:
        seen = []
        got = pipeline.generate(11, seed=5, steps=STEPS, batch=4, progress=lambda *now: seen.append(now))
        assert got.tobytes() == expected(range(11)).tobytes()
        assert seen == sorted(set(seen))
        assert seen[-1] == (3 * STEPS, 3 * STEPS)
        name = "while" if executor == "auto" else executor
        assert pipeline.backend == f"TensorRT-RTX 1.7.1.116 on NVIDIA RTX 4090, SM 8.9, executor {name}"


def test_any_n_split_or_shard_gives_the_same_images(plan, module):
    whole = expected(range(13))
    with ddpmx.load(plan) as pipeline:
        for n, first, batch in ((1, 0, 8), (13, 0, 8), (5, 8, 8), (13, 0, 3), (2, 11, None), (1, 12, 1)):
            got = pipeline.generate(n, first=first, seed=5, steps=STEPS, batch=batch)
            assert got.tobytes() == whole[first : first + n].tobytes(), (n, first, batch)


class Jealous(Toy):
    """A network whose answer to an image depends on the image's place."""

    def enqueue(self):
        super().enqueue()
        self.buffers.out[1:] += np.float32(0.5)


def test_where_neighbours_matter_images_run_alone(plan, module):
    module.make = lambda: Jealous(SPEC.shape)
    with ddpmx.load(plan) as pipeline:
        seen = []
        got = pipeline.generate(3, seed=5, steps=STEPS, batch=4, progress=lambda *now: seen.append(now))
        assert got.tobytes() == expected(range(3)).tobytes()
        assert seen == sorted(seen)
        assert seen[-1] == (STEPS, STEPS)
        with pytest.raises(InputError, match="only one can be watched"):
            next(pipeline.stream(2, steps=STEPS))


def test_where_neighbours_matter_and_the_plan_takes_no_single_image(plan, module):
    module.make, module.profiles = (lambda: Jealous(SPEC.shape)), ((2, 4, 8),)
    with ddpmx.load(plan) as pipeline:
        got = pipeline.generate(3, seed=5, steps=STEPS, batch=4)
        assert got.tobytes() == expected(range(3)).tobytes()


@pytest.mark.parametrize(
    ("profiles", "default"), [(((1, 4, 8),), 8), (((32, 32, 64),), 32), (((1, 1, 1), (20, 20, 24)), 1)], ids=str
)
def test_the_default_batch_is_one_that_the_plan_takes(plan, module, profiles, default):
    module.profiles = profiles
    with ddpmx.load(plan) as pipeline:
        assert pipeline.default_batch == default
        assert pipeline.generate(1, seed=5, steps=STEPS).tobytes() == expected([0]).tobytes()


def test_a_batch_larger_than_the_plan_s_is_split(plan, module):
    with ddpmx.load(plan) as pipeline:
        assert pipeline.check_request(20, batch=20) == 8
        assert pipeline.generate(20, seed=5, steps=STEPS, batch=20).tobytes() == expected(range(20)).tobytes()
        with pytest.raises(InputError, match="9 images cannot be watched together"):
            next(pipeline.stream(9, steps=STEPS))


def test_a_chain_is_kept_for_the_next_one_like_it(plan, module):
    with ddpmx.load(plan) as pipeline:
        pipeline.generate(8, seed=0, steps=STEPS)
        alive, made = module.cuda.alive(), len(module.contexts)
        for seed in range(3):
            pipeline.generate(8, seed=seed, steps=STEPS)
        assert (module.cuda.alive(), len(module.contexts)) == (alive, made)
        pipeline.generate(8, steps=STEPS, eta=0.5, sampler="ddim")  # another table
        assert module.cuda.alive() == alive


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_out_may_be_anyone_s(plan, module):
    with ddpmx.load(plan) as pipeline:
        wanted = expected(range(5))
        mine = np.zeros_like(wanted)
        assert pipeline.generate(5, seed=5, steps=STEPS, batch=2, out=mine) is mine
        assert mine.tobytes() == wanted.tobytes()
        theirs = OnDevice(pipeline._runner._device.driver, np.zeros_like(wanted))
        assert pipeline.generate(5, seed=5, steps=STEPS, batch=2, out=theirs) is theirs
        assert theirs.numpy().tobytes() == wanted.tobytes()
        theirs.handle.close()


def test_images_may_stay_on_the_device_and_outlive_the_pipeline(plan, module):
    with ddpmx.load(plan) as pipeline:
        kept = pipeline.generate(5, seed=5, steps=STEPS, batch=2, on_device=True)
        assert kept.shape == (5, HEIGHT, WIDTH, CHANNELS)
    assert kept.numpy().tobytes() == expected(range(5)).tobytes()
    assert kept.__cuda_array_interface__["typestr"] == "|u1"
    kept.close()


def test_x_may_be_anyone_s(plan, module):
    x = np.random.default_rng(0).standard_normal((5, *SPEC.shape)).astype(np.float32)
    wanted = expected(range(5), x=x)
    with ddpmx.load(plan) as pipeline:
        assert pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=x).tobytes() == wanted.tobytes()
        driver = pipeline._runner._device.driver
        with driver.current(), driver.stream() as stream:
            theirs = OnDevice(driver, np.zeros_like(x), stream=stream.value)
            driver.copy_in(theirs.handle.value, x, stream.value)  # under way
            got = pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=theirs)
            assert got.tobytes() == wanted.tobytes()
            theirs = [theirs, OnDevice(driver, np.zeros_like(x))]
            driver.copy_in(theirs[1].handle.value, x, stream.value)
            told = SimpleNamespace(cuda_stream=stream.value)
            got = pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=theirs[1], stream=told)
            assert got.tobytes() == wanted.tobytes()
            driver.wait_for_stream(stream.value)
        for array in theirs:
            array.handle.close()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"x": np.zeros((2, *SPEC.shape), np.float64)}, "float32"),
        ({"x": np.zeros((3, *SPEC.shape), np.float32)}, "x"),
        ({"out": np.zeros((2, CHANNELS, HEIGHT, WIDTH + 1), np.uint8)}, "out"),
        ({"out": [1, 2]}, "out|array"),
        ({"out": np.zeros((2, HEIGHT, WIDTH, CHANNELS), np.uint8), "on_device": True}, "on_device"),
        ({"stream": "the default one"}, "stream"),
        ({"on_device": True, "preview": print}, "preview"),
    ],
    ids=["float64", "too many", "wrong shape", "a list", "two places", "no stream", "watched"],
)
def test_arrays_that_do_not_fit(plan, module, wrong, says):
    with ddpmx.load(plan) as pipeline:
        with pytest.raises(InputError, match=says):
            pipeline.generate(2, steps=STEPS, **wrong)
        assert pipeline.generate(2, seed=5, steps=STEPS).tobytes() == expected(range(2)).tobytes()


class Elsewhere:
    """A tensor on GPU 3."""

    def __dlpack_device__(self):
        return 2, 3

    def __dlpack__(self, **_):
        raise BufferError("it is not of this GPU")


def test_an_array_on_another_gpu(plan, module, gaussian_onnx):
    with ddpmx.load(plan) as pipeline, pytest.raises(InputError, match="not of this GPU"):
        pipeline.generate(2, out=Elsewhere(), steps=STEPS)
    shape = (2, *ddpmx.load(gaussian_onnx).spec.shape)
    interface = {"shape": shape, "typestr": "<f4", "data": (256, False), "version": 3, "strides": None}
    theirs = SimpleNamespace(__cuda_array_interface__=interface)
    with (
        ddpmx.load(gaussian_onnx) as pipeline,
        pytest.raises(InputError, match="x lies on a GPU, and the chain runs on the"),
    ):
        pipeline.generate(2, x=theirs, steps=STEPS)


# --- watching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
def test_watched_step_by_step(plan, module, executor):
    table = make_table(SPEC.make_schedule(), SPEC.prediction, SPEC.variance, steps=STEPS)
    drawn = np.arange(3)
    theirs = [
        (step.t, step.x.copy(), step.x0.copy())
        for step in chain.run(Toy(SPEC.shape), table, chain.initial(5, drawn, SPEC.shape), seed=5, images=drawn)
    ]
    with ddpmx.load(plan, executor=executor) as pipeline:
        seen = list(pipeline.stream(3, seed=5, steps=STEPS))
        shown = []
        got = pipeline.generate(
            3, seed=5, steps=STEPS, preview=lambda at, p: shown.append((at, p.t, p.x.copy(), p.x0.copy()))
        )
    for (t, x, x0), mine, (at, *other) in zip(theirs, seen, shown, strict=True):
        assert (mine.t, mine.x.tobytes(), mine.x0.tobytes()) == (t, x.tobytes(), x0.tobytes())
        assert (at, other[0], other[1].tobytes(), other[2].tobytes()) == (0, t, x.tobytes(), x0.tobytes())
    assert got.tobytes() == expected(range(3)).tobytes()


# --- threads ---------------------------------------------------------------------------------------------------------


def test_another_thread_gets_a_pipeline_of_its_own(plan, module):
    with ddpmx.load(plan, executor="plain") as pipeline:
        first = pipeline.generate(4, seed=5, steps=STEPS)
        other = pipeline.share()
    got = []
    with other:  # the file is still open
        thread = threading.Thread(target=lambda: got.append(other.generate(4, seed=5, steps=STEPS)))
        thread.start()
        thread.join()
    assert got[0].tobytes() == first.tobytes() == expected(range(4)).tobytes()
    with pytest.raises(InputError, match="closed"):
        pipeline.share()


# --- ends ------------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_not_finite(plan, module):
    module.make = lambda: Toy(SPEC.shape, poison=(0, [np.nan]))
    with ddpmx.load(plan) as pipeline, pytest.raises(NumericError, match="t = 0 is not finite") as caught:
        pipeline.generate(1, steps=STEPS, batch=1)
    assert "step 4 of 4" in caught.value.note
    assert "executor while" in caught.value.note


def test_cancel(plan, module):
    with ddpmx.load(plan) as pipeline:
        with pytest.raises(Cancelled):
            pipeline.generate(1, steps=STEPS, cancel=lambda: True)
        with pytest.raises(Cancelled):
            pipeline.generate(1, steps=STEPS, cancel=lambda: True, preview=lambda *_: None)


@pytest.mark.parametrize("refused", ["context", "shape", "address", "execute"])
def test_what_tensorrt_refuses_is_said_and_leaves_nothing(plan, module, refused):
    with ddpmx.load(plan) as pipeline:
        module.refuse = {refused}
        with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.7\.1\.116"):
            pipeline.generate(2, steps=STEPS)
        module.refuse = set()
        assert pipeline.generate(2, seed=5, steps=STEPS).tobytes() == expected(range(2)).tobytes()


def test_out_of_memory(plan, module):
    with ddpmx.load(plan) as pipeline:
        module.cuda.fail["cuMemAlloc_v2"] = (module.cuda.calls.count("cuMemAlloc_v2") + 4, 2)
        with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
            pipeline.generate(2, seed=5, steps=STEPS)
        assert pipeline.generate(2, seed=5, steps=STEPS).tobytes() == expected(range(2)).tobytes()


@pytest.mark.parametrize("wrong", [{"executor": "fast"}, {"providers": ("cuda",)}, {"spec": SPEC}], ids=str)
def test_what_makes_no_sense_for_a_plan(plan, module, wrong):
    with pytest.raises(InputError):
        ddpmx.load(plan, **wrong)


def test_an_executor_is_for_a_gpu(gaussian_onnx):
    with pytest.raises(InputError, match="runs a chain on a GPU"):
        ddpmx.load(gaussian_onnx, executor="graph")
