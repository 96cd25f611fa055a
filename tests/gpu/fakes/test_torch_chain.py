"""The chain with torch as its network, which torch_chain.py measures, on a fake driver: torch computes on the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS
from ddpmx.device import driver
from ddpmx.device.driver import Driver
from ddpmx.errors import DdpmxError
from gpu import found

pytest.importorskip("torch", reason="not verified here: the chain with torch as its network (no torch)")

from benchmarks import peers, peers_runs
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training import checkpoint
from ddpmx.formats.spec import ModelSpec
from gpu import torch_chain, torch_network
from gpu.fakes.conftest import HostTorchDevice
from gpu.torch_network import of_checkpoint
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

QUICK = ["--batch", "1,2", "--images", "3", "--steps", "4", "--seconds", "0.001"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    network = UNet(UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4))
    rerandomise(network)
    weights = network.state_dict()
    spec = ModelSpec((1, 8, 8), timesteps=20)
    checkpoint.save(path, spec, network.config, weights, weights, checkpoint.TrainingState(0, {}, {}))
    return path


def measured(fake, run, folder, make=HostTorchDevice):
    files = folder / "bench-torch.json", folder / "speed-torch.json"
    arguments = [str(path) for path in (run, *files)] + QUICK
    torch_chain.main(arguments, driver=Driver(library=fake), make=make, where="cpu")
    return [json.loads(path.read_text()) for path in files]


def test_a_checkpoint_s_chain_is_measured_by_every_executor(fake, run, tmp_path):
    bench, speed = measured(fake, run, tmp_path)
    assert [(cell["batch"], cell["executor"]) for cell in bench["cells"]] == [
        (batch, executor) for batch in (1, 2) for executor in EXECUTORS[::-1]
    ]
    assert [cell["failed"] for cell in bench["cells"]] == [None] * 6
    assert (speed["images"], speed["batch"], speed["steps"], len(speed["seconds"])) == (3, 3, 4, 1)
    assert "fp16" in bench["file"]["runs_on"]
    facts = found.gather(tmp_path, [], engines=tmp_path, quick=False, doctor=None)
    assert facts["bench"]["fp16 on torch"]["cells"] == bench["cells"]


class NotCaptured(HostTorchDevice):
    """torch refuses what cannot be captured by a RuntimeError of its own."""

    def put(self, stream, work):
        if self.driver.is_capturing(stream):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")
        super().put(stream, work)


def test_a_network_that_cannot_be_captured_is_measured_plainly(fake, run, tmp_path):
    bench, _ = measured(fake, run, tmp_path, NotCaptured)
    for cell in bench["cells"]:
        if cell["executor"] == "plain":
            assert cell["failed"] is None
        else:
            assert cell["failed"].endswith("CUDA error: operation not permitted when stream is capturing")


def test_the_network_is_that_of_an_export_in_fp16(run):
    import torch

    (spec, half), (_, full) = (of_checkpoint(str(run), precision, "cpu") for precision in ("fp16", "fp32"))
    assert spec.precision == "fp16"
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 19], dtype=torch.int32)
    with torch.no_grad():
        got, wanted = half(x, t).numpy(), full(x, t).numpy()
    error = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
    assert 1e-5 < error < 5e-3


class Another(HostTorchDevice):
    """Every network but the first, which is that of the chain in NumPy, is slightly another one."""

    def network(self, *arguments, **options):
        if hasattr(self, "first"):
            self.call = lambda x, t: 1.01 * self.first(x, t)
        else:
            self.first = self.call
        return super().network(*arguments, **options)


def test_images_that_are_not_numpy_s_are_an_error(fake, run, tmp_path):
    with pytest.raises(DdpmxError, match=r"executor \w+ against the chain in NumPy"):
        measured(fake, run, tmp_path, Another)
    assert list(tmp_path.iterdir()) == []


def test_other_libraries_are_compared_with_it(fake, run, monkeypatch):
    import torch

    job = {"kind": "ddpmx", "checkpoint": str(run), "precision": "fp16", "batches": [1, 2]}
    of_run = torch_network.of_checkpoint
    monkeypatch.setattr(torch_network, "of_checkpoint", lambda path, precision: of_run(path, precision, "cpu"))
    monkeypatch.setattr(torch_network, "TorchDevice", HostTorchDevice)
    monkeypatch.setattr(driver, "Driver", lambda: opened)
    opened = Driver(library=fake)
    worker = peers_runs.KINDS["ddpmx"](job)
    assert "torch" in worker.load()
    assert worker.about["precision"] == "fp16"
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    _, half = of_run(str(run), "fp16", "cpu")
    with torch.no_grad():
        wanted = half(torch.from_numpy(x), torch.full((2,), 7, dtype=torch.int32)).numpy()
    np.testing.assert_array_equal(worker.eps(x, 7), wanted)
    assert worker.draw(2, 5, 0).shape == (2, 8, 8, 1)
    for each in (worker.pipeline, worker.backend, opened):
        each.close()


@pytest.mark.parametrize(
    "arguments", [[], ["--checkpoint", "x", "--engine", "y"], ["--checkpoint", "x", "--device", "cpu"]]
)
def test_it_needs_a_checkpoint_and_a_gpu(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        peers.main(["--torch", *arguments])
    assert ended.value.code == 2
    assert "--torch takes a --checkpoint" in capsys.readouterr().err
