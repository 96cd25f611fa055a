"""Fixtures of all tests: measured figures with their bounds, a closed-form toy model, and one small trained network."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ddpmx
from ddpmx.backends import trt
from ddpmx.device.driver import Driver
from ddpmx.trt import library as trt_library
from oracles import cuda_on_host
from oracles.fake_cuda import FakeCuda
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.plans import RECORD, make_plan
from quick import Quick
from tracing import trace_once

# The networks here are tiny. Threads that spin while they wait for each other need minutes for what one thread does in
# seconds, as soon as anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
FASHION = TESTS.parent / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"
GAUSSIAN_ONNX = TESTS / "data" / "gaussian.onnx"


HEAVIEST = (
    "cli/test_train_export.py",
    "native/test_package.py",
    "ddpm_export/importers/test_lucidrains.py",
    "native/test_ctest.py",
    "ddpm_export/importers/test_openai.py",
    "ddpmx/cuda/test_kernels.py",
    "native/test_aarch64.py",
    "ddpm_export/any_module/test_export.py",
    "ddpm_export/importers/test_diffusers.py",
    "ddpm_export/graph/test_onnx_export.py",
    "examples/test_fashion_mnist.py",
    "ddpm_export/proof/test_record.py",
    "benchmarks/test_peers.py",
    "ddpm_export/graph/test_unet_export.py",
)
"""The files that take longest, with --durations=0. Of those that first need what others wait for (the trained network, a
build of libddpmx) no two follow each other: both processes would have nothing to do but one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what took longer than 0.1 s the last times")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Quick(config, TESTS.parent), "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the trained network is slow; and with several processes the longest files come first.

    A long file that began last would run on alone. It takes --no-loadscope-reorder, since pytest-xdist begins with the
    files that hold most tests.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {name: number for number, name in enumerate(HEAVIEST)}
        items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(place)))
    for item in items:
        if "trained" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported and collected stays. Looked through at each gc.collect(), it would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``figure("what", value, at_most=bound)`` asserts the bound; the run prints all figures at its end."""

    def check(what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        assert (at_most is None) != (at_least is None), "one bound"
        bound = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}"
        # in the test's report, since the test may run in another process than the one that prints
        request.node.user_properties.append(("measured", (what, float(value), bound)))
        holds = value <= at_most if at_most is not None else value >= at_least
        assert holds, f"{what}: {value:g}, and it should be {bound}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    measured = [value for report in reports for name, value in report.user_properties if name == "measured"]
    if measured:
        terminalreporter.section("measured")
        for what, value, bound in measured:
            terminalreporter.write_line(f"{value:<12.4g} {bound:<12} {what}")


@pytest.fixture(scope="session")
def gaussian_onnx() -> Path:
    """A model whose optimal ε is known in closed form, see ``oracles/gaussian.py``. Needs no torch."""
    return GAUSSIAN_ONNX


@pytest.fixture(autouse=True, scope="module")
def _traced_once(request, tmp_path_factory):
    """For the modules that need torch, graphs that were traced before in this run. Yields what traces anew."""
    if request.node.get_closest_marker("torch") is None or importlib.util.find_spec("torch") is None:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        yield trace_once(tmp_path_factory, patch)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A small U-Net trained on Fashion-MNIST at 16×16 for half a minute, and its exports."""

    run: Path
    fp32: Path
    fp16: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained network, since only that can be judged by its chain: with random weights the chain saturates.

    Where several processes run the tests, the first that needs it trains for all.
    """
    pytest.importorskip("torch", reason="not verified here: whatever needs a trained network (no torch)")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    made = Trained(folder / "run", folder / "fp32.onnx", folder / "fp16.onnx")
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / ".done").exists():
            return made
        _train(folder)
        (folder / ".done").touch()
    return made


def _train(folder: Path) -> None:
    from ddpm_export.graph.onnx_export import export
    from ddpm_export.networks.unet import UNetConfig
    from ddpm_export.training.data import load_dataset
    from ddpm_export.training.train import Trainer, TrainSettings
    from ddpmx.formats.spec import ModelSpec

    dataset = load_dataset(FASHION)
    network = UNetConfig(1, 1, (16, 16), 16, (1, 2, 2), 1, (8,), 0.0, 8)
    settings = TrainSettings(batch=32, lr=2e-3, warmup=50, ema=0.99, ema_ramp=True, hflip=False)
    trainer = Trainer(folder / "run", dataset, ModelSpec(dataset.shape), network, settings, device="cpu")
    trainer.train(400)
    for precision in ("fp32", "fp16"):
        export(folder / "run", folder / f"{precision}.onnx", precision=precision)


# --- a chain on a fake driver ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    try:
        return cuda_on_host.build(tmp_path_factory.mktemp("kernels"), Path(ddpmx.__file__).parent / "cuda")
    except cuda_on_host.Unavailable as why:
        pytest.skip(f"not verified here: the executors' control flow ({why})")


@pytest.fixture
def fake(kernels):
    """A fake driver. Afterwards nothing may have leaked or been misused."""
    cuda = FakeCuda(kernels)
    yield cuda
    cuda.live.pop("function", None)  # freed with its module
    assert (cuda.alive(), cuda.retained, cuda.faults) == ({}, 0, [])


# --- plans on a fake TensorRT and a fake driver ----------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(trt_library, "host_platform", lambda: RECORD.platform)
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan())
    return path


@pytest.fixture
def plan_driver(fake, monkeypatch):
    """A fake driver that the engine makes and closes itself."""
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    return fake


@pytest.fixture
def fake_tensorrt(plan_driver, monkeypatch):
    """A fake TensorRT that runs ``plan`` as a toy network, wherever ddpmx loads TensorRT."""
    module = FakeTrt(plan_driver)
    monkeypatch.setattr(trt_library, "load", lambda flavour=None: module.library())
    monkeypatch.setattr(trt, "gpus", lambda: ADA)
    return module
