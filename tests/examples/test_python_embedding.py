"""The worker of examples/python-embedding: every job answered once, bounded queues, and an end at any moment.

A GPU is stood in for by a fake TensorRT on a fake driver. What is not verified here: TorchMemory, which needs CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ddpmx
from conftest import GAUSSIAN_ONNX, TESTS
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import Cancelled, FileFormatError, InputError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at
from oracles.plans import SPEC

EXAMPLE = TESTS.parent / "examples" / "python-embedding"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
WAIT = 60  # seconds; far more than anything here takes
MANY = 2048  # images, of which a chain of 1000 steps takes seconds: time enough to end it in the middle


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import app
        import worker
    finally:
        sys.path.remove(str(EXAMPLE))
    return SimpleNamespace(app=app, worker=worker)


@pytest.fixture
def worker(modules):
    """The module; whatever a test does, no thread of it may be left."""
    yield modules.worker
    deadline = time.monotonic() + WAIT
    while (left := [t for t in threading.enumerate() if t.name == "ddpmx"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


@pytest.fixture(scope="module")
def expected():
    def draw(n, seed, **sampling):
        with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
            return pipeline.generate(n, seed=seed, **sampling)

    return draw


def answer_of(working, kinds):
    """The next one that is no preview."""
    while True:
        item = working.outbox.get(WAIT)
        if isinstance(item, kinds):
            return item


# --- the worker ------------------------------------------------------------------------------------------------------


def test_images_are_those_of_generate_and_come_in_order_without_a_copy(worker, expected):
    with worker.Worker(GAUSSIAN_ONNX, n=3) as working:
        jobs = [working.submit(seed, steps=20) for seed in range(5)]
        places = set()
        for job in jobs:
            with working.outbox.get(WAIT) as frame:
                assert frame.job is job
                taken = np.from_dlpack(frame.array)
                assert np.shares_memory(taken, frame.array)
                np.testing.assert_array_equal(taken, expected(3, job.seed, steps=20))
                places.add(frame.array.ctypes.data)
    assert len(places) == 2, "the buffers are used again"
    assert list(working) == []


@pytest.mark.torch
def test_torch_takes_a_frame_without_a_copy(worker, expected):
    torch = pytest.importorskip("torch", reason="not verified here: that PyTorch takes the worker's arrays (no torch)")

    class TorchOnTheHost:
        stream = None

        def empty(self, shape):
            return torch.empty(shape, dtype=torch.uint8)

    with worker.Worker(GAUSSIAN_ONNX, memory=TorchOnTheHost()) as working:
        working.submit(3, steps=20, every=7)
        working.submit(4, steps=20)
        seen = []
        while not (seen and isinstance(seen[-1], worker.Frame) and seen[-1].job.seed == 4):
            seen.append(working.outbox.get(WAIT))
        assert all(torch.from_dlpack(item.x0).numpy() is not None for item in seen if isinstance(item, worker.Preview))
        tensor = torch.from_dlpack(seen[-1].array)
        assert tensor.data_ptr() == seen[-1].array.data_ptr()
        np.testing.assert_array_equal(tensor.numpy(), expected(1, 4, steps=20))


def test_previews_are_the_stream_s_and_end_with_the_answer(worker, expected):
    with worker.Worker(GAUSSIAN_ONNX, n=2, room=100) as working:
        job, after = working.submit(7, steps=40, every=10), working.submit(8, steps=5)
        seen = []
        while not (seen and seen[-1].job is after):
            seen.append(working.outbox.get(WAIT))
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        stream = {step.t: step.x0 for step in pipeline.stream(2, seed=7, steps=40)}
    previews = [item for item in seen if isinstance(item, worker.Preview)]
    assert [item.job for item in seen[len(previews) :]] == [job, after], "no preview comes after the answer"
    assert [preview.t for preview in previews] == sorted({p.t for p in previews}, reverse=True)
    assert len(previews) + working.outbox.dropped == 3, "of steps 10, 20, 30; the 40th is the image"
    for preview in previews:
        np.testing.assert_array_equal(np.from_dlpack(preview.x0), stream[preview.t])
        assert preview.first == 0
    np.testing.assert_array_equal(seen[len(previews)].array, expected(2, 7, steps=40))


def test_a_consumer_that_sleeps_misses_previews_and_no_frame(worker):
    with worker.Worker(GAUSSIAN_ONNX, room=2, buffers=1) as working:
        first, second, _ = (working.submit(seed, steps=50, every=1) for seed in (1, 2, 3))
        deadline = time.monotonic() + WAIT
        while working.outbox.dropped < 49 and time.monotonic() < deadline:
            time.sleep(0.01)
        frame = working.outbox.get(WAIT)
        assert frame.job is first, "its previews were dropped when it was done"
        assert working.outbox.dropped == 49
        with pytest.raises(TimeoutError):
            working.outbox.get(0.3)  # the second waits for the only buffer
        frame.release()
        frame.release()  # is harmless: there still is one buffer, and not two
        assert answer_of(working, worker.Frame).job is second
        with pytest.raises(TimeoutError):
            working.outbox.get(0.3)


def test_the_outbox_drops_the_oldest_preview_first(worker):
    outbox, job, other = worker.Outbox(2), object(), object()
    outbox.answer(worker.Ended(job, Cancelled("")))
    for t in (9, 8, 7):
        outbox.show(worker.Preview(other, t, 0, None))
    assert [getattr(outbox.get(), "t", "answer") for _ in range(3)] == ["answer", 8, 7]
    assert outbox.dropped == 1
    outbox.show(worker.Preview(other, 6, 0, None))
    outbox.answer(worker.Ended(other, Cancelled("")))
    assert outbox.dropped == 2
    assert outbox.get().job is other
    with pytest.raises(TimeoutError):
        outbox.get(0.01)
    outbox.close()
    assert outbox.get() is None


def test_cancel_in_the_middle_and_the_next_one_is_whole(worker, expected):
    with worker.Worker(GAUSSIAN_ONNX, n=MANY) as working:
        job, after = working.submit(1, every=1), working.submit(5, steps=3)
        assert answer_of(working, worker.Preview).job is job
        began = time.monotonic()
        job.cancel()
        ended = answer_of(working, (worker.Ended, worker.Frame))
        assert time.monotonic() - began < WAIT / 4
        assert ended.job is job
        assert isinstance(ended.error, Cancelled)
        frame = answer_of(working, (worker.Ended, worker.Frame))
        assert frame.job is after
        np.testing.assert_array_equal(frame.array, expected(MANY, 5, steps=3))


def test_a_job_that_waits_can_be_cancelled(worker):
    with worker.Worker(GAUSSIAN_ONNX, buffers=1) as working:
        jobs = [working.submit(seed, steps=3) for seed in range(3)]
        frame = working.outbox.get(WAIT)
        for job in jobs[1:]:  # one waits for the buffer, one behind it
            job.cancel()
        ended = [working.outbox.get(WAIT), working.outbox.get(WAIT)]
        assert [(item.job, type(item.error)) for item in ended] == [(job, Cancelled) for job in jobs[1:]]
        frame.release()


@pytest.mark.parametrize("when", ["in a chain", "waiting for a buffer", "idle"])
def test_close_answers_everything(worker, when):
    with worker.Worker(GAUSSIAN_ONNX, n=MANY if when == "in a chain" else 1, buffers=1) as working:
        jobs, answered = [], []
        if when == "in a chain":
            jobs = [working.submit(seed, every=1) for seed in range(3)]
            answer_of(working, worker.Preview)
        elif when == "waiting for a buffer":
            jobs = [working.submit(seed, steps=3) for seed in range(3)]
            answered = [working.outbox.get(WAIT)]
        began = time.monotonic()
        working.close()
        assert time.monotonic() - began < WAIT / 4
        answered += [item for item in working if not isinstance(item, worker.Preview)]
        assert [item.job for item in answered] == jobs
        assert all(isinstance(item.error, Cancelled) for item in answered[when == "waiting for a buffer" :])
        with pytest.raises(RuntimeError, match="closed"):
            working.submit(0)
    assert working.outbox.get(0) is None


def test_what_goes_wrong_in_a_job_is_its_answer(worker, expected):
    with worker.Worker(GAUSSIAN_ONNX, buffers=1) as working:
        for wrong in ({"steps": 0}, {"sampler": "none"}, {"labels": 3}, {"nonsense": 1}, {"steps": 0}):
            working.submit(1, **wrong)
            assert isinstance(working.outbox.get(WAIT).error, TypeError if "nonsense" in wrong else InputError)
        working.submit(1, steps=4)
        with working.outbox.get(WAIT) as frame:
            np.testing.assert_array_equal(frame.array, expected(1, 1, steps=4))


def test_a_model_that_cannot_be_loaded_is_the_caller_s_error(worker, tmp_path):
    with pytest.raises(FileFormatError):
        worker.Worker(tmp_path / "missing.onnx")


# --- a GPU, on the fake driver ---------------------------------------------------------------------------------------


class OnDevice:
    """An array on the GPU, as another library has it."""

    def __init__(self, driver, shape):
        self.shape, self.handle = shape, driver.allocate(int(np.prod(shape)), "a frame")
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (self.handle.value, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def numpy(self):
        return array_at(self.handle.value, self.shape, np.ctypeslib.as_ctypes_type(np.uint8)).copy()


class DeviceMemory:
    def __init__(self, driver, stream):
        self.driver, self.stream, self.made = driver, SimpleNamespace(cuda_stream=stream), []

    def empty(self, shape):
        with self.driver.current():
            self.made.append(OnDevice(self.driver, shape))
        return self.made[-1]


def on_the_gpu(n, seed, steps):
    table, drawn = make_table(SPEC.make_schedule(), SPEC.prediction, SPEC.variance, steps=steps), np.arange(n)
    *_, step = chain.run(
        Toy(SPEC.shape), table, chain.initial(seed, drawn, SPEC.shape), seed=seed, images=np.array(drawn)
    )
    return to_nhwc(step.x0)


def test_a_plan_writes_into_the_program_s_memory_behind_the_program_s_stream(worker, plan, fake_tensorrt, fake):
    driver = Driver(library=fake)
    with driver.current(), driver.stream() as stream:
        memory = DeviceMemory(driver, stream.value)
        with worker.Worker(plan, n=2, memory=memory, buffers=1) as working:
            for seed in (5, 6):
                working.submit(seed, steps=4)
            with working.outbox.get(WAIT) as frame:
                np.testing.assert_array_equal(frame.array.numpy(), on_the_gpu(2, 5, 4))
                # still under way when the buffer is given back: what is too late here would spoil the second frame
                used = np.full(frame.array.shape, 77, np.uint8)
                driver.copy_in(frame.array.handle.value, used, stream.value)
            with working.outbox.get(WAIT) as frame:
                driver.wait_for_stream(stream.value)
                np.testing.assert_array_equal(frame.array.numpy(), on_the_gpu(2, 6, 4))
            working.submit(7, steps=4, every=1)
            watched = answer_of(working, (worker.Frame, worker.Ended))
            np.testing.assert_array_equal(watched.array, on_the_gpu(2, 7, 4))
            assert isinstance(watched.array, np.ndarray), "the host looks on, and has the images"
        assert len(memory.made) == 1
        memory.made[0].handle.close()
    driver.close()


# --- the program -----------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE / "app.py"), str(GAUSSIAN_ONNX), *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # what was started in the background may have Ctrl-C switched off, and its children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


@pytest.mark.slow
def test_the_readme_s_commands(tmp_path, expected):
    (block,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block.count("python app.py ") == len(block.splitlines()) == 3
    for name in ("app.py", "worker.py"):
        shutil.copy(EXAMPLE / name, tmp_path)
    shutil.copy(GAUSSIAN_ONNX, tmp_path / "model.onnx")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-eu", "-c", block], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    for seed in range(4):
        image = expected(1, seed)[0]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "frames" / f"{seed:05d}.png")), image)
        large = np.asarray(Image.open(tmp_path / "watched" / f"{seed:05d}.png"))
        np.testing.assert_array_equal(large, image.repeat(8, 0).repeat(8, 1))
    drawn = {path.name for path in (tmp_path / "watched").iterdir()}
    previews = {f"{seed:05d}-t{t:04d}.png" for seed in range(4) for t in range(100, 1000, 100)}
    assert drawn - previews == {f"{seed:05d}.png" for seed in range(4)}
    missed = int(re.findall(r"^(\d+) previews came too late", done.stdout, re.MULTILINE)[1])
    assert len(drawn & previews) + missed == len(previews)


def test_an_image_that_takes_too_long_is_given_up(tmp_path):
    out, err = start(tmp_path, "out", "--patience", "0", "--count", "3").communicate(timeout=WAIT)
    assert "Traceback" not in err
    assert len(re.findall(r"^seed \d: given up after [\d.]+ s$", out, re.MULTILINE)) >= 1
    assert len(re.findall(r"^seed \d: ", out, re.MULTILINE)) == 3


@pytest.mark.slow
def test_ctrl_c_ends_it_in_the_middle(tmp_path):
    process = start(tmp_path, "out", "--count", "100000")
    try:
        assert process.stdout.readline().startswith("seed 0: ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "says"), [("missing.onnx", "missing.onnx"), ("model.plan", "model.plan")])
def test_a_model_that_cannot_be_run_is_exit_code_2(tmp_path, model, says):
    (tmp_path / "model.plan").write_bytes(b"no plan")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "app.py"), model, "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_readme_names_exists(modules):
    for name in ("submit", "outbox", "close", "spec"):
        assert name in README or name == "spec"
    for name in re.findall(r"`(Frame|Ended|TorchMemory|Preview|HostMemory)", README):
        assert hasattr(modules.worker, name)
