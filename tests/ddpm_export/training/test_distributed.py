"""Several processes train as one does: the same weights, one log, and a process that is killed comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: training in several processes (no torch)")

import torch
from safetensors.torch import load_file

from ddpm_export.training.distributed import ALONE, Processes, joined
from ddpm_export.training.log import read_log
from ddpmx.errors import InputError

pytestmark = [pytest.mark.torch]

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
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


def command(processes: int, data: Path, out: Path, steps: int, *more: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ours = ["-m", "ddpmx_cli.main", "train", str(data), "--out", str(out), "--steps", str(steps), *FLAGS]
    if processes == 1:
        return [sys.executable, *ours, *more]
    return [sys.executable, *torchrun, *more, *ours]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / f"{name}.safetensors")


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path, data):
    done = [
        subprocess.run(
            command(n, data, tmp_path / str(n), 6), env=environment(), capture_output=True, text=True, timeout=120
        )
        for n in (1, 2)
    ]
    assert [result.returncode for result in done] == [0, 0], done
    for name in ("weights", "ema", "training"):
        one, two = (tensors(tmp_path / n, 6, name) for n in ("1", "2"))
        apart = max((one[key] - two[key]).abs().max().item() for key in one)
        assert apart < 2e-6, name
    logs = [read_log(tmp_path / n / "log.csv") for n in ("1", "2")]
    for mine, theirs in zip(*logs, strict=True):
        for column in ("step", "loss", "grad_norm", "t0-1", "t18-19"):
            assert mine[column] == pytest.approx(theirs[column], rel=1e-4, nan_ok=True)
    assert done[1].stdout.count("saved ") == 1, "one of them speaks"
    control = subprocess.run(
        command(1, data, tmp_path / "other", 6, "--seed", "1"), env=environment(), capture_output=True, text=True
    )
    assert control.returncode == 0, control
    one, other = tensors(tmp_path / "1", 6, "weights"), tensors(tmp_path / "other", 6, "weights")
    assert max((one[key] - other[key]).abs().max().item() for key in one) > 1e-3


@pytest.mark.slow
def test_a_process_that_is_killed_comes_back_and_nothing_is_lost(tmp_path, data):
    """Three processes; one is killed once there is a checkpoint. torchrun starts all again, and they resume exactly."""
    steps, out = 60, tmp_path / "run"
    more = ["--max-restarts", "2"]
    with subprocess.Popen(
        [*command(3, data, out, steps, *more), "--save-minutes", "0.01"],
        env=environment(),
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
    state = json.loads((out / "checkpoints" / f"{steps:08d}" / "training.json").read_text())
    assert state["step"] == steps
    rows = read_log(out / "log.csv")
    assert [row["step"] for row in rows] == list(range(2, steps + 1, 2)), "one row for every step"
    # it began again in the middle: the log's clock did
    assert min(np.diff([row["seconds"] for row in rows])) < 0


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
