"""`ddpmx.load(plan).generate(…)` on a GPU, without one: a fake TensorRT on a fake driver, whose kernels are the real ones.

The oracle for every image is the chain in NumPy.
"""

from __future__ import annotations

import gc
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import ddpmx
from ddpmx.backends.base import EXECUTORS
from ddpmx.cuda import executors
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, Cancelled, InputError, NumericError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles import fake_cuda
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
    return to_nhwc(step.x0)


@pytest.fixture
def module(fake_tensorrt):
    return fake_tensorrt


class OnDevice:
    """Another library's array on the GPU."""

    def __init__(self, driver, array, *, ordinal=0, stream=None):
        with driver.current():
            self.handle = driver.allocate(array.nbytes, "another library's array")
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
    """A network whose output for an image depends on the image's place in the batch."""

    def enqueue(self):
        super().enqueue()
        self.buffers.out[1:] += np.float32(0.5)


def test_where_neighbours_matter_images_run_one_by_one(plan, module):
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
        with pytest.raises(InputError, match="9 images cannot be streamed together"):
            next(pipeline.stream(9, steps=STEPS))


def test_a_chain_is_kept_for_the_next_job_of_its_kind(plan, module):
    with ddpmx.load(plan) as pipeline:
        pipeline.generate(8, seed=0, steps=STEPS)
        alive, made = module.cuda.alive(), len(module.contexts)
        for seed in range(3):
            pipeline.generate(8, seed=seed, steps=STEPS)
        assert (module.cuda.alive(), len(module.contexts)) == (alive, made)
        pipeline.generate(8, steps=STEPS, eta=0.5, sampler="ddim")  # another table
        assert module.cuda.alive() == alive


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_out_may_belong_to_any_library(plan, module):
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


def test_x_may_belong_to_any_library(plan, module):
    x = np.random.default_rng(0).standard_normal((5, *SPEC.shape)).astype(np.float32)
    wanted = expected(range(5), x=x)
    with ddpmx.load(plan) as pipeline:
        assert pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=x).tobytes() == wanted.tobytes()
        driver = pipeline._runner._device.driver
        with driver.current(), driver.stream() as stream:
            theirs = OnDevice(driver, np.zeros_like(x), stream=stream.value)
            driver.copy_in(theirs.handle.value, x, stream.value)  # not done yet
            got = pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=theirs)
            assert got.tobytes() == wanted.tobytes()
            theirs = [theirs, OnDevice(driver, np.zeros_like(x))]
            driver.copy_in(theirs[1].handle.value, x, stream.value)
            torch_like = SimpleNamespace(cuda_stream=stream.value)
            got = pipeline.generate(5, seed=5, steps=STEPS, batch=2, x=theirs[1], stream=torch_like)
            assert got.tobytes() == wanted.tobytes()
            driver.wait_for_stream(stream.value)
        for array in theirs:
            array.handle.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
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
def test_arrays_that_do_not_fit(plan, module, wrong, message):
    with ddpmx.load(plan) as pipeline:
        with pytest.raises(InputError, match=message):
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
        pytest.raises(InputError, match="x is in GPU memory, but the chain runs on the"),
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


# --- how chains end --------------------------------------------------------------------------------------------------


def test_an_output_that_is_not_finite(plan, module):
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
def test_a_refusal_of_tensorrt_is_reported_and_leaves_nothing(plan, module, refused):
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
def test_options_that_do_not_apply_to_plans_are_refused(plan, module, wrong):
    with pytest.raises(InputError):
        ddpmx.load(plan, **wrong)


def test_an_executor_is_for_a_gpu(gaussian_onnx):
    with pytest.raises(InputError, match="runs a chain on a GPU"):
        ddpmx.load(gaussian_onnx, executor="graph")


# --- one chain at a time ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpu", "cpu"])
def open_it(request, plan, fake_tensorrt, gaussian_onnx):
    """A pipeline on the fake GPU, and one on the CPU."""
    return lambda: ddpmx.load(plan if request.param == "gpu" else gaussian_onnx, executor="auto")


def test_a_new_chain_ends_a_watched_one(open_it):
    with open_it() as pipeline:
        first, second = pipeline.stream(1, steps=STEPS), pipeline.stream(1, seed=1, steps=STEPS)
        next(first), next(second)
        with pytest.raises(InputError, match="another chain was started"):
            next(first)
        assert len(list(second)) == STEPS - 1
        third = pipeline.stream(1, steps=STEPS)
        next(third)
        pipeline.generate(1, steps=STEPS)
        with pytest.raises(InputError, match="another chain was started"):
            next(third)


def test_closing_ends_a_watched_chain(open_it):
    with open_it() as pipeline:
        steps = pipeline.stream(1, steps=STEPS)
        next(steps)
    with pytest.raises(InputError, match="the pipeline is closed"):
        next(steps)


@pytest.mark.parametrize("name", ["progress", "cancel", "preview"])
def test_callbacks_cannot_begin_another_chain_or_close(open_it, name):
    refused = []

    def again(*_):
        for attempt in (lambda: pipeline.generate(1, steps=STEPS), lambda: next(pipeline.stream(1)), pipeline.close):
            try:
                attempt()
            except InputError as error:
                refused.append(error.fact)

    with open_it() as pipeline:
        wanted = pipeline.generate(2, seed=5, steps=STEPS)
        assert pipeline.generate(2, seed=5, steps=STEPS, **{name: again}).tobytes() == wanted.tobytes()
    assert refused
    assert set(refused) == {"the pipeline is already running a chain", "the pipeline is running a chain"}


def test_a_preview_s_arrays_belong_to_the_callback(open_it):
    with open_it() as pipeline:
        wanted = pipeline.generate(2, seed=5, steps=STEPS)
        kept = []

        def spoil(at, preview):
            kept.append(preview.x0)
            preview.x[...] = 0
            preview.x0.__imul__(127.5)

        assert pipeline.generate(2, seed=5, steps=STEPS, preview=spoil).tobytes() == wanted.tobytes()
        assert len({array.ctypes.data for array in kept}) == STEPS


def test_numpy_s_integers_are_accepted(open_it):
    with open_it() as pipeline:
        seen = []
        wanted = pipeline.generate(4, seed=3, first=100, batch=2, steps=STEPS)
        got = pipeline.generate(
            np.uint8(4),
            seed=np.uint64(3),
            first=np.int8(100),
            batch=np.uint16(2),
            steps=STEPS,
            progress=lambda *now: seen.append(now),
        )
        assert got.tobytes() == wanted.tobytes()
        assert seen[-1] == (2 * STEPS, 2 * STEPS)


def test_x_and_out_may_not_share_memory(open_it):
    with open_it() as pipeline:
        channels, height, width = pipeline.spec.shape
        size = channels * height * width
        room = np.zeros(4 * 4 * size, np.uint8)
        x = room.view(np.float32).reshape(4, channels, height, width)
        out = room[4 * size : 8 * size].reshape(4, height, width, channels)
        with pytest.raises(InputError, match="share memory"):
            pipeline.generate(4, x=x, out=out, batch=1, steps=STEPS)


def test_a_state_that_is_not_finite_is_the_caller_s_fault(open_it):
    with open_it() as pipeline:
        x = np.zeros((1, *pipeline.spec.shape), np.float32)
        x[0, 0, 0, 0] = np.nan
        with pytest.raises(InputError, match="x holds NaN"):
            pipeline.generate(1, x=x, steps=STEPS)


def test_a_state_on_the_device_that_is_not_finite_is_named(plan, module):
    with ddpmx.load(plan) as pipeline:
        theirs = OnDevice(pipeline._runner.driver, np.full((1, *SPEC.shape), np.nan, np.float32))
        with pytest.raises(NumericError, match="not finite") as caught:
            pipeline.generate(1, x=theirs, steps=STEPS)
        assert "x that was passed" in caught.value.hint
        theirs.handle.close()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_sharing_again_and_again_takes_nothing(plan, module):
    with ddpmx.load(plan) as pipeline:
        pipeline.generate(1, steps=STEPS)
        alive = module.cuda.alive()
        for _ in range(3):
            with pipeline.share() as other:
                other.generate(1, steps=STEPS)
        assert module.cuda.alive() == alive


def test_a_pipeline_that_was_not_closed_frees_its_memory(plan, module):
    pipeline = ddpmx.load(plan)
    pipeline.generate(1, steps=STEPS)
    del pipeline
    gc.collect()
    module.cuda.live.pop("function", None)
    assert (module.cuda.alive(), module.cuda.retained) == ({}, 0)


class Unsteady(Toy):
    """A network that gives other bits every time."""

    def __init__(self, shape, runs):
        super().__init__(shape)
        self.runs = runs

    def enqueue(self):
        super().enqueue()
        self.buffers.out[...] += np.float32(1e-6) * next(self.runs)


def test_an_unsteady_network_does_not_run_images_one_by_one(plan, module):
    runs = itertools.count()
    module.make = lambda: Unsteady(SPEC.shape, runs)
    with ddpmx.load(plan, executor="plain") as pipeline:
        pipeline.generate(4, steps=STEPS, batch=4)
        assert "one image at a time" not in pipeline.backend
        assert pipeline._runner._chain._batch == 4


def test_the_description_says_that_images_run_one_by_one(plan, module):
    module.make = lambda: Jealous(SPEC.shape)
    with ddpmx.load(plan) as pipeline:
        pipeline.generate(3, steps=STEPS, batch=4)
        assert "one image at a time" in pipeline.backend


def test_a_step_that_hangs_is_abandoned_and_nothing_waits_for_it(plan, module, monkeypatch):
    """The probe ends, the engine's own captured step does not: nothing of it can be freed any more."""
    prepare = DeviceChain.prepare
    monkeypatch.setattr(
        DeviceChain, "prepare", lambda self, enqueue, executor: prepare(self, enqueue, executor, timeout=0.05)
    )
    call = fake_cuda.While.__call__
    monkeypatch.setattr(executors, "why_no_while", lambda driver, kernels: None)
    monkeypatch.setattr(fake_cuda.While, "__call__", lambda self: iter(lambda: None, 1))
    pipeline = ddpmx.load(plan)
    with pytest.raises(BackendError, match="did not finish in time"):
        pipeline.generate(1, steps=STEPS)
    pipeline.close()
    monkeypatch.setattr(fake_cuda.While, "__call__", call)
    for handles in module.cuda.live.values():
        handles.clear()
    module.cuda.faults.clear()  # the fake assumes that kernels of the lost stream may use any memory
