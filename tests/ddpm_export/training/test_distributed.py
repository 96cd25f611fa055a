"""Several processes train as one does: the same weights, one log, and a process that is killed comes back."""

from __future__ import annotations

import faulthandler
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: training in several processes (no torch)")

import torch
from safetensors.torch import load_file

import children
from ddpm_export.training import api, distributed
from ddpm_export.training.batches import Batches
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.distributed import ALONE, Processes, joined
from ddpm_export.training.learner import Learner
from ddpm_export.training.log import read_log
from ddpm_export.training.session import Housekeeping
from ddpm_export.training.settings import TrainSettings
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.model_file import checkpoints

pytestmark = pytest.mark.torch

torch_init = torch.distributed.init_process_group

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
CHOICES = {"width": 8, "groups": 4, "mult": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0, "batch": 6}
CHOICES |= {"warmup": 0, "lr": 1e-3, "ema": 0.9, "timesteps": 20, "holdout": 2, "flip": True}
FLAGS = [
    *("--width", "8", "--groups", "4", "--mult", "1,2", "--blocks", "1", "--attention", "4", "--dropout", "0"),
    *("--batch", "6", "--warmup", "0", "--lr", "1e-3", "--ema", "0.9", "-T", "20", "--sample-every", "0"),
    *("--log-every", "2", "--holdout", "2", "--flip", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    np.savez(path, images=IMAGES)
    return path


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / f"{name}.safetensors")


def train_as(rank: int, size: int, port: int, restart: int, data: Path, out: Path, steps: int, changes: dict) -> None:
    """One process of a training."""
    faulthandler.dump_traceback_later(50, exit=True)  # before the tests give it up: then its stacks say where it waits
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        | {"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(restart)}
    )
    house = Housekeeping(log_every=2, save_minutes=1e-3)
    try:
        if checkpoints(out):
            api.train(data, out, resume=True, device="cpu", steps=steps, housekeeping=house)
        else:
            api.train(data, out, preset="tiny", device="cpu", steps=steps, housekeeping=house, **{**CHOICES, **changes})
    except BackendError as error:
        os._exit(2 if "another process" in error.fact else 3)
    os._exit(0)


def start(size: int, data: Path, out: Path, steps: int, *, restart: int = 0, **changes) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (size, port, restart, data, out, steps, changes)
    running = [children.server().Process(target=train_as, args=(rank, *arguments)) for rank in range(size)]
    for process in running:
        process.start()
    return running


def codes(running: list) -> list[int | None]:
    for process in running:
        process.join(60)
    return [process.exitcode for process in running]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_make_the_steps_of_one(tmp_path, data, size):
    for n in (1, size):
        assert codes(start(n, data, tmp_path / str(n), 6)) == [0] * n
    for name in ("weights", "ema", "training"):
        one, several = (tensors(tmp_path / str(n), 6, name) for n in (1, size))
        apart = max((one[key] - several[key]).abs().max().item() for key in one)
        assert apart < 2e-6, name
    logs = [read_log(tmp_path / str(n) / "log.csv") for n in (1, size)]
    for mine, theirs in zip(*logs, strict=True):
        for column in ("step", "loss", "grad_norm", "t0-1", "t18-19"):
            assert mine[column] == pytest.approx(theirs[column], rel=1e-4, nan_ok=True)
    assert codes(start(1, data, tmp_path / "control", 6, seed=1)) == [0]
    one, other = tensors(tmp_path / "1", 6, "weights"), tensors(tmp_path / "control", 6, "weights")
    assert max((one[key] - other[key]).abs().max().item() for key in one) > 1e-3


def test_a_process_that_is_killed_ends_the_others_and_all_resume_exactly(tmp_path, data):
    steps, out = 30, tmp_path / "run"
    running = start(3, data, out, steps)
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/0*/spec.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running[2].kill()
    assert codes(running) == [2, 2, -signal.SIGKILL]
    assert codes(start(3, data, out, steps, restart=1)) == [0, 0, 0]
    assert [row["step"] for row in read_log(out / "log.csv")] == list(range(2, steps + 1, 2)), "a row for every step"
    assert codes(start(3, data, tmp_path / "whole", steps)) == [0, 0, 0]
    for name in ("weights", "ema", "training"):
        one, other = tensors(out, steps, name), tensors(tmp_path / "whole", steps, name)
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.long
def test_torchrun_starts_a_killed_process_again(tmp_path, data):
    """The real torchrun, with its own store: three processes, one of which is killed once there is a checkpoint."""
    steps, out = 60, tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += ["--max-restarts", "2", "-m", "ddpmx_cli.main", "train", str(data), "--out", str(out)]
    command += ["--steps", str(steps), "--save-minutes", "0.01", *FLAGS]
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/0*/spec.json")) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(last_child(running.pid), signal.SIGKILL)
        output, _ = running.communicate(timeout=240)
    assert running.returncode == 0, output
    rows = read_log(out / "log.csv")
    assert [row["step"] for row in rows] == list(range(2, steps + 1, 2)), "one row for every step"
    assert min(np.diff([row["seconds"] for row in rows])) < 0, "it began again in the middle: the log's clock did"
    assert output.count("saved ") == 1, "one of them speaks"


def part_often(rank: int, port: int, times: int) -> None:
    """Train and part again and again: DDP is freed after its process group was left, as at the end of ``api.train``."""
    faulthandler.dump_traceback_later(50, exit=True)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    distributed.rendezvous = lambda _: iter([(store, rank, 2)])

    def once() -> None:
        with joined("cpu") as (processes, _):
            network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4), find_unused_parameters=True)
            network(torch.ones(2, 4)).sum().backward()
            assert processes.sum(torch.tensor(1.0)).item() == 2

    for number in range(times):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        once()
    os._exit(0)


@pytest.mark.long
def test_processes_part_without_waiting_for_ever():
    """Without what keeps the group they do within some fifty times."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [children.server().Process(target=part_often, args=(rank, port, 200)) for rank in range(2)]
    for process in running:
        process.start()
    assert codes(running) == [0, 0]


@pytest.mark.slow
def test_the_process_group_is_freed_before_the_interpreter_ends():
    """After that torch aborts one process in twenty."""
    code = (
        "import sys\nfrom ddpm_export.training import distributed\n"
        "class Group:\n    def __del__(self): print('too late' if sys.is_finalizing() else 'in time')\n"
        "(distributed if sys.argv[1] == 'kept' else sys)._kept = [Group()]\n"
    )
    for where, wanted in (("kept", "in time"), ("elsewhere", "too late")):  # the second is a control
        done = subprocess.run([sys.executable, "-c", code, where], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, f"{wanted}\n"), done.stderr


def last_child(pid: int) -> int:
    """The youngest of torchrun's processes."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return max(map(int, children))


# --- without processes -----------------------------------------------------------------------------------------------


def test_shares_cover_the_batch_once():
    for size in (1, 2, 3, 4):
        covered = [i for rank in range(size) for i in range(12)[Processes(rank, size).share(12)]]
        assert covered == list(range(12))
    with pytest.raises(InputError, match="cannot be divided among 5 processes"):
        Processes(0, 5).share(12)


def test_alone_there_is_nothing_to_wait_for():
    values = torch.arange(3.0)
    ALONE.wait()
    assert ALONE.sum(values) is values
    assert ALONE.gather(values) is values
    with joined("cpu") as (processes, device):
        assert (processes, device) == (ALONE, "cpu")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="a GPU of its own"), joined("cuda:0"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no GPU for process 1"), joined(None):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def refuse(device):
        raise RuntimeError("The NVIDIA driver on your system is too old\nUpdate it")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(InputError, match="'cuda:1' cannot be used") as caught, joined(None):
        pass
    assert caught.value.note == "The NVIDIA driver on your system is too old"


@pytest.mark.parametrize(("device", "backend", "gpu"), [("cpu", "gloo", None), (None, "nccl", "cuda:1")])
def test_a_process_joins_with_its_gpu_and_parts_at_the_end(monkeypatch, device, backend, gpu):
    """Torch's barriers by NCCL warn, and guess, where a process has joined without one."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    chosen, calls = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **how: calls.append(how))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("parted"))
    with joined(device) as (processes, own):
        assert (processes, own) == (Processes(1, 2, 1), gpu or "cpu")
    assert chosen == ([gpu] if gpu else [])
    how, parted = calls
    assert (how["backend"], how.get("device_id")) == (backend, None if gpu is None else torch.device(gpu))
    assert inspect.signature(torch_init).bind(**how)
    assert parted == "parted"


def test_torch_s_warning_that_means_nothing_is_not_shown(monkeypatch):
    learner = object.__new__(Learner)
    learner.processes, learner.step, said = ALONE, 0, "Grad strides do not match bucket view strides. This may"
    monkeypatch.setattr(Learner, "_train_step", lambda _: warnings.warn(said, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.train_step()
        assert learner.step == 1
        said = "Gradients are lost"  # control
        with pytest.raises(UserWarning, match=said):
            learner.train_step()


def test_a_share_that_cannot_be_accumulated_is_refused(tmp_path):
    settings = TrainSettings(batch=12, accumulate=4)
    dataset = Dataset(IMAGES, Source(tmp_path))
    for size in (1, 3):
        Batches(dataset, settings, Processes(0, size))
    with pytest.raises(InputError, match="share of the batch, which is 6") as caught:
        Batches(dataset, settings, Processes(0, 2))
    assert caught.value.note == "a batch of 12 among 2 processes, in 4 parts"
