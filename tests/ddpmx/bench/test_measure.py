"""What `ddpmx bench` measures: known durations in, known figures out, on clocks that only the tests advance.

Chains on a GPU run on the fake driver, where each kernel advances the clock by a fixed cost.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS, Buffers, CopyingBackend
from ddpmx.backends.ort import OrtBackend
from ddpmx.bench import figures
from ddpmx.bench import measure as package
from ddpmx.bench.figures import Cell, Durations, Settings, beginning
from ddpmx.bench.gpu import DeviceBench
from ddpmx.bench.host import measure_host, peak_memory
from ddpmx.bench.measure import bench
from ddpmx.device.driver import Driver
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, InputError, NumericError
from ddpmx.sampling import chain, request
from oracles import gaussian
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at
from oracles.fake_cuda import FakeCuda
from oracles.toy_backend import ToyBackend

SPEC = gaussian.SPEC
T = SPEC.timesteps
QUICK = Settings(seconds=1e-3, steps=5)
MS = 1e-3


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_figures_of_known_durations():
    measured = Durations(
        rounds=2,
        steps=[n * MS for n in range(1, 101)],
        bare=[10 * MS, 20 * MS],
        ratios=[1.5, 1.1, 9.0],
        host=0.02,
        around=0.25,
    )
    cell = figures.cell(4, "graph", measured, steps=50, timesteps=1000, warm_up=7, memory=12)
    assert cell.p50_ms == pytest.approx(50.5)
    assert cell.p95_ms == pytest.approx(95.05)
    assert cell.mean_ms == pytest.approx(50.5)
    assert cell.bare_ms == pytest.approx(15)
    assert cell.ratio == 1.5
    assert cell.host_us == pytest.approx(200)  # 0.02 s over 2 chains of 50 steps
    assert cell.chain_s == pytest.approx(0.25 + 50.5)
    assert cell.images_per_s == pytest.approx(4 / 50.75)
    assert cell.extrapolated
    assert not figures.cell(4, "graph", measured, steps=1000, timesteps=1000, warm_up=0).extrapolated


@pytest.mark.parametrize(
    ("settings", "step", "planned"),
    [
        (Settings(5.0), 0.05, (16, 3)),  # 48 steps in three chains, and as often the network alone
        (Settings(5.0), 2.0, (3, 3)),  # slower than the time allows
        (Settings(5.0), 0.0005, (1000, 5)),
        (Settings(5.0), 1e-6, (1000, 25)),
        (Settings(5.0), 0.0, (1000, 25)),
        (Settings(5.0, steps=10), 0.05, (10, 5)),
        (Settings(0.1, steps=1000), 0.05, (1000, 3)),
    ],
)
def test_as_many_steps_are_planned_as_the_time_allows(settings, step, planned):
    assert settings.plan(step, 1000) == planned


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_beginning_of_a_chain_is_that_of_the_full_chain(variance):
    table = make_table(SPEC.make_schedule(), "eps", variance)
    part = beginning(table, 5)
    assert list(part.timesteps) == [999, 998, 997, 996, 995]
    assert np.array_equal(part.coefficients, table.coefficients[:5])
    assert (part.rows[:, 4] != 0).all()  # noise in every step, as in 999 of 1000


def test_the_beginning_of_a_chain_with_memory_has_its_memory():
    table = make_table(SPEC.make_schedule(), "eps", "fixed_small", sampler="unipc", steps=9)
    assert np.array_equal(beginning(table, 5).memory, table.memory[:5])


# --- on the host ------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only the tests advance."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Slow(ToyBackend):
    """Each run takes the next of ``durations``, in milliseconds."""

    def __init__(self, clock, durations, **faults):
        super().__init__(**faults)
        self.clock, self.durations = clock, iter(durations)

    def enqueue(self):
        super().enqueue()
        self.clock.now += next(self.durations) * MS


@pytest.fixture
def clock(monkeypatch):
    """An update takes 0.5 ms, drawing x_T 0.25 ms, and everything else but the network no time."""
    clock = Clock()

    def slowed(function, seconds):
        def call(*arguments, **named):
            clock.now += seconds
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(chain, "update", slowed(chain.update, 0.5 * MS))
    monkeypatch.setattr(chain, "initial", slowed(chain.initial, 0.25 * MS))
    return clock


def test_the_host_s_chain_is_measured_step_by_step_beside_the_network(clock):
    # two steps to warm up; then each step of the chains, and the network alone after it
    chains = [(step, alone) for alone in (2, 1, 4) for step in (1, 2, 3, 4, 5)]
    backend = Slow(clock, [9, 9, *itertools.chain(*chains)])
    cell = measure_host(backend, SPEC, 1, QUICK, clock=clock)
    assert (cell.executor, cell.batch, cell.steps, cell.rounds, cell.warm_up) == ("host", 1, 5, 3, 2)
    assert cell.p50_ms == pytest.approx(3.5)
    assert cell.p95_ms == pytest.approx(5.5)
    assert cell.mean_ms == pytest.approx(3.5)
    assert cell.bare_ms == pytest.approx(7 / 3)
    assert cell.ratio == pytest.approx(3.5 / 2)  # of 3.5 / 2, 3.5 / 1 and 3.5 / 4
    assert cell.host_us == pytest.approx(500)
    assert cell.chain_s == pytest.approx(0.25 * MS + T * 3.5 * MS)  # x_T is drawn once
    assert cell.images_per_s == pytest.approx(1 / cell.chain_s)
    assert cell.extrapolated


def test_the_network_alone_runs_at_the_chain_s_timesteps_and_does_not_change_the_chain(clock):
    backend = Slow(clock, itertools.repeat(1))
    cell = measure_host(backend, SPEC, 2, QUICK, clock=clock)
    measured = backend.calls[-2 * cell.steps :]
    assert measured == [(t, 2) for t in (999, 998, 997, 996, 995) for _ in range(2)]
    with pytest.raises(NumericError):  # the measured chain is a real one, which checks the outputs
        measure_host(Slow(clock, itertools.repeat(1), poison=(997, np.nan)), SPEC, 1, QUICK, clock=clock)


def test_whole_chains_are_not_extrapolated(clock):
    cell = measure_host(Slow(clock, itertools.repeat(1)), SPEC, 1, Settings(1e-3, steps=T), clock=clock)
    assert not cell.extrapolated
    assert cell.chain_s == pytest.approx((0.25 + T * 1.5) * MS)


def test_a_network_that_has_to_run_row_by_row_is_measured_that_way(clock):
    backend = Slow(clock, itertools.repeat(1), sways="place")
    cell = measure_host(backend, SPEC, 3, QUICK, clock=clock)
    assert cell.bare_ms == pytest.approx(3)
    assert cell.mean_ms == pytest.approx(3.5)
    assert "each image alone" in cell.notes[0]


def test_warm_up_is_ten_steps_of_a_fast_network(clock):
    assert measure_host(Slow(clock, itertools.repeat(1)), SPEC, 1, Settings(1.0, steps=3), clock=clock).warm_up == 10


def test_a_real_network_is_measured(gaussian_onnx):
    backend = OrtBackend(gaussian_onnx, "eps")
    cell = measure_host(backend, SPEC, 2, Settings(0.05))
    backend.close()
    assert 0 < cell.p50_ms <= cell.p95_ms
    assert cell.bare_ms > 0
    assert 0 < cell.host_us <= 1e3 * cell.mean_ms
    assert cell.images_per_s * cell.chain_s == pytest.approx(2)
    assert cell.memory is None or cell.memory > 1 << 20


def test_peak_memory_is_read_from_the_kernel(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmHWM:\t   81920 kB\nVmRSS:\t 100 kB\n")
    assert peak_memory(tmp_path) == 80 << 20


# --- on a device ------------------------------------------------------------------------------------------------------


class TimedCuda(FakeCuda):
    """A fake driver with a clock for its events: each kernel takes ``cost`` milliseconds."""

    cost = {"engine": 2.0, "ddpmx_step": 0.5, "ddpmx_begin": 0.75, "ddpmx_condition": 0.25}

    def __init__(self, kernels):
        super().__init__(kernels)
        self.now, self.came = 0.0, {}
        self.on_kernel = self._tick

    def _tick(self, name):
        self.now += self.cost[name]

    def _cuEventRecord(self, event, stream):
        def run():
            self.came[event] = self.now
            return
            yield

        self._put(stream, run)  # before the driver's own, at which a wait may end
        super()._cuEventRecord(event, stream)

    def _cuEventElapsedTime(self, out, begin, end):
        super()._cuEventElapsedTime(out, begin, end)
        out._obj.value = self.came[end] - self.came[begin]


class ToyNetwork:
    def __init__(self, device, batch, x, t, out):
        self.device, self.toy = device, Toy(SPEC.shape)
        floats = [array_at(at, (batch, *SPEC.shape), ctypes.c_float) for at in (x, out)]
        self.toy.bind(Buffers(floats[0], array_at(t, (batch,), ctypes.c_int32), floats[1]))
        device.open += 1

    def enqueue(self, stream):
        if self.device.stubborn and self.device.cuda._stream(stream).capture is not None:
            raise BackendError("cannot be captured")
        self.device.cuda.enqueue(stream, self._compute)

    def _compute(self):
        self.toy.enqueue()
        out = self.toy.buffers.out
        out += self.device.sways * np.arange(len(out), dtype=np.float32)[:, None, None, None]

    def close(self):
        if any(stream.queue for stream in self.device.cuda.live["stream"].values()):
            self.device.cuda.faults.append("a network is closed while it may run")
        self.device.open -= 1


class ToyDevice:
    """A DeviceBackend around the toy network."""

    description, stream = "a toy", 0

    def __init__(self, cuda, *, executors=EXECUTORS, batches=((1, 4),), stubborn=False, sways=0.0):
        self.sways = np.float32(sways)  # with an image's place in the batch
        self.cuda, self.executors, self.batches, self.stubborn = cuda, executors, batches, stubborn
        self.driver = Driver(library=cuda)
        self.open = 0

    def check_batch(self, batch):
        for index, (low, high) in enumerate(self.batches):
            if low <= batch <= high:
                return index
        raise InputError(f"the toy takes no batch of {batch}", hint="--batch 4")

    def network(self, batch, *, x, t, out, var=0, conditioning=(), stream):
        self.check_batch(batch)
        return ToyNetwork(self, batch, x, t, out)

    def close(self):
        self.driver.close()


@pytest.fixture
def cuda(kernels):
    cuda = TimedCuda(kernels)
    yield cuda
    cuda.live.pop("function", None)
    assert (cuda.alive(), cuda.retained, cuda.faults) == ({}, 0, [])


@pytest.fixture
def device(cuda):
    device = ToyDevice(cuda)
    yield device
    assert device.open == 0
    assert set(cuda.alive()) <= {"module", "function"}  # the kernels, which are the driver's
    device.close()


SIX = Settings(1e-3, steps=6)


def measured(device, batch, executor, *, settings=SIX, **clocks):
    cuda = device.cuda
    ticks = itertools.count()
    clocks = {"clock": lambda: cuda.now * MS, "thread_clock": lambda: next(ticks) * 3 * MS} | clocks
    return DeviceBench(device, SPEC, settings, **clocks).measure(batch, executor)


@pytest.mark.parametrize("executor", ["plain", "graph"])
def test_a_chain_on_a_device_is_timed_by_its_events(device, executor):
    cell = measured(device, 2, executor)
    assert cell.failed is None
    assert (cell.executor, cell.batch, cell.steps, cell.rounds) == (executor, 2, 6, 3)
    assert (cell.p50_ms, cell.p95_ms, cell.mean_ms) == pytest.approx((2.5, 2.5, 2.5))
    assert cell.bare_ms == pytest.approx(2)
    assert cell.ratio == pytest.approx(1.25)
    assert cell.host_us == pytest.approx(500)  # 3 ms from one glance at the clock to the next, for 6 steps
    assert cell.chain_s == pytest.approx((0.75 + T * 2.5) * MS)
    assert cell.images_per_s == pytest.approx(2 / cell.chain_s)
    assert cell.notes == ()
    assert cell.warm_up == 26  # two chains of ten steps to see how fast it is, and one of six


def test_of_a_while_node_only_the_mean_is_known(device):
    cell = measured(device, 1, "while")
    assert cell.failed is None
    assert (cell.p50_ms, cell.p95_ms) == (None, None)
    assert cell.mean_ms == pytest.approx(2.75)
    assert cell.ratio == pytest.approx(2.75 / 2)


def test_percentiles_are_of_single_steps(device):
    """Every sixth step is ten times slower: P50 does not see it, P95 and the mean do."""
    steps = itertools.count()
    cuda = device.cuda
    tick = cuda.on_kernel

    def uneven(name):
        tick(name)
        if name == "ddpmx_step" and next(steps) % 6 == 0:
            cuda.now += 22.5

    cuda.on_kernel = uneven
    cell = measured(device, 1, "plain", settings=Settings(1e-3, steps=12))
    assert cell.p50_ms == pytest.approx(2.5)
    assert cell.p95_ms == pytest.approx(25)
    assert cell.mean_ms == pytest.approx(2.5 + 22.5 / 6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_network_alone_runs_as_often_as_the_chain_has_steps_after_each_chain(device, executor):
    cuda = device.cuda
    cell = measured(device, 1, executor)
    runs = [(name, len(list(group))) for name, group in itertools.groupby(cuda.launches)]
    alone = [count for name, count in runs if name == "engine" and count >= cell.steps]
    assert alone == [1 + cell.steps, *[cell.steps] * cell.rounds]  # its first run, its warm-up, and the measured ones
    assert cuda.count("cuGraphLaunch") >= (cell.rounds + 1) * cell.steps


def test_a_network_that_cannot_be_captured_is_enqueued_step_by_step(cuda):
    for device in (ToyDevice(cuda, executors=("plain",)), ToyDevice(cuda, stubborn=True)):
        cell = measured(device, 1, "plain")
        assert cell.ratio == pytest.approx(1.25)
        assert "not by a graph" in cell.notes[0]
        assert device.open == 0
        device.close()


def test_an_executor_that_the_library_does_not_support_is_not_tried(cuda):
    device = ToyDevice(cuda, executors=("plain",))
    for name in ("graph", "while"):
        assert "does not support it" in measured(device, 1, name).failed
    assert cuda.count("cuStreamBeginCapture_v2", "cuStreamBeginCaptureToGraph") == 0
    assert measured(device, 1, "auto").executor == "plain"
    device.close()


@pytest.mark.parametrize(("sways", "noted"), [(0.0, False), (0.01, True)])
def test_a_note_says_that_generate_would_run_each_image_alone(cuda, sways, noted):
    device = ToyDevice(cuda, sways=sways)
    backend = CopyingBackend(device)
    cell = measured(device, 3, "plain", backend=backend)
    assert any("runs each one alone" in note for note in cell.notes) is noted
    assert cell.mean_ms == pytest.approx(2.5)
    assert device.open == 0
    backend.close()


def test_a_line_says_why_its_executor_does_not_work(cuda):
    cuda.lacking = ("cuGraphConditionalHandleCreate", "cuGraphAddNode_v2", "cuStreamBeginCaptureToGraph")
    device = ToyDevice(cuda)
    cell = measured(device, 1, "while")
    assert cell.failed is not None
    assert "WHILE nodes do not work here" in cell.failed
    assert (cell.mean_ms, cell.ratio) == (None, None)
    auto = measured(device, 1, "auto")
    assert auto.executor == "graph"
    assert any("not while" in note for note in auto.notes)
    assert device.open == 0
    device.close()


def test_memory_is_that_of_the_chain_and_its_network(device):
    with device.driver.current():
        free = device.driver.free_memory()[0]
    cell = measured(device, 4, "plain", free_before=free + 1000)
    # x, out (float32) and levels (uint8) are the least that a chain has
    assert cell.memory >= 1000 + 9 * 4 * np.prod(SPEC.shape)
    assert measured(device, 4, "plain").memory is None


def test_out_of_memory_fails_one_line_only(device):
    cuda = device.cuda
    cuda.fail["cuMemAlloc_v2"] = (0, 2)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in measured(device, 4, "plain").failed
    del cuda.fail["cuMemAlloc_v2"]
    assert measured(device, 1, "plain").failed is None


@pytest.mark.parametrize("at", range(4, 100, 6))  # kernels: in the warm-up, in a chain, in the network alone
@pytest.mark.parametrize("executor", EXECUTORS)
def test_ctrl_c_leaves_nothing_on_the_device(device, executor, at):
    cuda = device.cuda
    tick, left = cuda.on_kernel, itertools.count(at, -1)

    def interrupted(name):
        tick(name)
        if next(left) == 0:
            raise KeyboardInterrupt

    cuda.on_kernel = interrupted
    with pytest.raises(KeyboardInterrupt):
        measured(device, 1, executor)
    assert device.open == 0


# --- a whole file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(cuda, monkeypatch, gaussian_onnx):
    """``bench`` of a file whose network runs on the fake device."""

    def call(*, batches=None, executor="auto", ranges=((1, 4),), executors=EXECUTORS):
        device = ToyDevice(cuda, batches=ranges, executors=executors)
        monkeypatch.setattr("ddpmx.bench.measure.open_model", lambda path, **options: (SPEC, CopyingBackend(device)))
        try:
            return bench(gaussian_onnx, batches=batches, executor=executor, steps=3, seconds=1e-3)
        finally:
            assert device.open == 0

    return call


def test_all_executors_are_lines_of_the_table(on_gpu):
    report = on_gpu(executor="all", batches=[2, 1])
    assert [(cell.batch, cell.executor) for cell in report.cells] == [
        (batch, executor) for batch in (1, 2) for executor in ("plain", "graph", "while")
    ]
    assert not any(cell.failed for cell in report.cells)
    assert any("their mean is known" in line for line in report.method)


def test_nothing_of_the_first_step_stays_on_the_device_during_the_measurement(on_gpu, cuda, monkeypatch):
    measure, seen = DeviceBench.measure, []

    def watched(*arguments):
        seen.append(cuda.alive().get("memory", 0))
        return measure(*arguments)

    monkeypatch.setattr(DeviceBench, "measure", watched)
    on_gpu(batches=[1, 2])
    assert seen == [0, 0]


def test_progress_is_reported_before_each_line(gaussian_onnx):
    seen = []
    bench(gaussian_onnx, batches=[1, 2], steps=3, seconds=1e-3, progress=lambda *now: seen.append(now))
    assert seen == [("batch 1, host", 0, 2), ("batch 2, host", 1, 2)]


@pytest.mark.parametrize(("provider", "opened"), [("openvino", 0), ("WebGpuExecutionProvider", 0), ("cuda", 1)])
def test_a_context_is_opened_only_for_what_runs_in_cuda(gaussian_onnx, monkeypatch, provider, opened):
    contexts: list[None] = []
    monkeypatch.setattr(package, "_context", lambda: contexts.append(None) or contextlib.nullcontext())
    with contextlib.suppress(BackendError):  # where there is no such provider
        bench(gaussian_onnx, providers=[provider], batches=[1], steps=3, seconds=1e-3)
    assert len(contexts) == opened


def test_an_executor_that_does_not_work_is_a_line_of_the_table_too(on_gpu, cuda):
    cuda.lacking = ("cuGraphConditionalHandleCreate", "cuGraphAddNode_v2", "cuStreamBeginCaptureToGraph")
    report = on_gpu(executor="all", batches=[1])
    assert [bool(cell.failed) for cell in report.cells] == [False, False, True]
    assert not any("their mean is known" in line for line in report.method)


def test_it_is_an_error_if_nothing_can_be_measured(on_gpu, cuda):
    cuda.lacking = ("cuGraphConditionalHandleCreate", "cuGraphAddNode_v2", "cuStreamBeginCaptureToGraph")
    with pytest.raises(BackendError, match="nothing could be measured") as caught:
        on_gpu(executor="while", batches=[1])
    assert "WHILE" in caught.value.note


@pytest.mark.parametrize(
    ("ranges", "measured_ones", "left_out"),
    [
        (((1, 4),), [1, 4], ["batch 16: the file takes 1…4", "batch 64: the file takes 1…4"]),
        (((2, 3),), [3], [f"batch {n}: the file takes 2…3" for n in (1, 4, 16, 64)]),
        (((1, 1), (4, 5)), [1, 4], [f"batch {n}: the file takes 1, 4…5" for n in (16, 64)]),
    ],
)
def test_default_batches_are_cut_to_what_the_file_takes(on_gpu, ranges, measured_ones, left_out):
    report = on_gpu(executor="plain", ranges=ranges)
    assert [cell.batch for cell in report.cells] == measured_ones
    assert report.left_out == left_out


def test_batches_that_do_not_fit_into_memory_are_left_out(monkeypatch):
    monkeypatch.setattr(request, "MAX_BATCH_ELEMENTS", 4 * 3 * 8 * 8)
    taken, left_out = package._choose(None, SPEC, SimpleNamespace(batches=((1, 1 << 16),)))
    assert (taken, left_out[0]) == ([1, 4], "batch 16: it does not fit into memory")
    with pytest.raises(InputError, match="do not fit into memory"):
        package._choose([5], SPEC, None)


def test_a_batch_outside_the_file_s_range_is_refused_before_anything_runs(on_gpu, cuda):
    with pytest.raises(InputError, match="no batch of 5"):
        on_gpu(batches=[1, 5])
    assert "engine" not in cuda.launches


def test_an_executor_that_is_not_the_library_s_is_refused(on_gpu, cuda):
    with pytest.raises(InputError, match="does not support executor 'while'"):
        on_gpu(executor="while", executors=("plain",))
    report = on_gpu(executor="all", batches=[1], executors=("plain",))
    assert [bool(cell.failed) for cell in report.cells] == [False, True, True]


def test_the_host_s_executor_is_not_for_a_device(on_gpu):
    with pytest.raises(InputError, match="files that run on the CPU"):
        on_gpu(executor="host")


def test_a_failed_line_has_no_figures_in_json():
    values = Cell(4, "while", failed="no").to_json()
    assert values["mean_ms"] is values["ratio"] is values["chain_s"] is None
