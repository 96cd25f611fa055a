"""A training that is killed at any moment and resumed, again and again, ends in the bits of one that was left alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: training (no torch)")
import torch

import children
from ddpm_export.networks.unet import UNetConfig
from ddpm_export.training.checkpoint import FILES, TRAINING_JSON, TRAINING_TENSORS, checkpoints, read_tensors, resolve
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.log import read_log
from ddpm_export.training.session import Housekeeping
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer
from ddpmx.formats.spec import ModelSpec

if not children.AVAILABLE:
    pytest.skip("not verified here: a training that is killed (this system has no fork)", allow_module_level=True)
pytestmark = pytest.mark.torch

NETWORK = UNetConfig(1, 1, (8, 8), 8, (1,), 1, (), 0.2, 4)
SETTINGS = TrainSettings(
    batch=4, lr=1e-3, warmup=10, ema=0.9, hflip=True, timestep_sampling="importance", holdout=2, seed=3
)
SPEC = ModelSpec((1, 8, 8), timesteps=20)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
SESSION = 2
"""Steps that a session makes at most before it is killed."""


def new(run: Path) -> Trainer:
    return Trainer(run, Dataset(IMAGES, Source(Path("images"))), SPEC, NETWORK, SETTINGS, device="cpu")


def resumed(run: Path) -> Trainer:
    return Trainer.resume(run, Dataset(IMAGES, Source(Path("images"))), device="cpu")


def session(run: Path, steps: int, made: ctypes.c_long, last: bool) -> None:
    """What a child does: begin or resume, and train. One that is to be killed waits for that after a few steps."""
    torch.set_num_threads(1)
    trainer = resumed(run) if checkpoints(run) else new(run)
    begun = trainer.step

    def stop() -> bool:
        made.value = trainer.step - begun
        while not last and trainer.step - begun > SESSION:
            time.sleep(0.01)
        return False

    trainer.train(steps, stop=stop, housekeeping=Housekeeping(save_minutes=1e-9, log_every=1))


def train(run: Path, steps: int, kill_after: float | None = None, in_save: int | None = None) -> set[str]:
    """One session. Returns what it had begun to write when it was killed.

    Args:
        run: the run's folder.
        steps: in all.
        kill_after: seconds from the start to SIGKILL.
        in_save: SIGKILL in the save that follows after so many steps, ``kill_after`` seconds from its beginning.
    """
    before = unfinished(run)  # by sessions that were killed
    made = children.server().Value("l", 0, lock=False)
    child = children.server().Process(target=session, args=(run, steps, made, kill_after is None), daemon=True)
    child.start()
    if kill_after is None:
        child.join(120)
        assert child.exitcode == 0
        return set()
    give_up = time.monotonic() + 60
    while in_save is not None and not (made.value >= in_save and unfinished(run) - before):
        assert child.is_alive()
        assert time.monotonic() < give_up
        time.sleep(0.0005)
    time.sleep(kill_after)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, "it was killed, and had not ended by itself"
    return unfinished(run) - before


def unfinished(run: Path) -> set[str]:
    """Temporary files and folders of the run and its checkpoints."""
    folders = [folder for folder in (run, run / "checkpoints") if folder.is_dir()]
    return {name for folder in folders for name in os.listdir(folder) if ".part" in name or name.startswith(".old-")}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All of the newest checkpoint."""
    files = (*FILES.values(), TRAINING_TENSORS)
    return {f"{file}: {name}": value for file in files for name, value in read_tensors(resolve(run) / file).items()}


def test_a_run_that_is_killed_again_and_again_is_the_same_run(tmp_path, figure):
    """Every other kill comes at a random time, the others while a checkpoint is being written.

    Ten kills, or as many as the environment's ``DDPMX_KILLS`` says.
    """
    kills = int(os.environ.get("DDPMX_KILLS", "10"))
    steps = (SESSION + 1) * kills + 4
    begun = time.monotonic()
    train(tmp_path / "alone", steps)
    step_seconds = (time.monotonic() - begun) / steps
    rng = np.random.default_rng(kills)
    run, in_save = tmp_path / "killed", 0
    for number in range(kills):
        if number % 2:
            after = rng.uniform(0, 0.5 * step_seconds) * rng.integers(2)
            left = train(run, steps, after, in_save=int(rng.integers(1, SESSION + 1)))
        else:
            left = train(run, steps, rng.uniform(0, 2 * SESSION * step_seconds))
        in_save += bool(left)
    figure(f"kills while a file or a checkpoint was being written, of {kills}", in_save, at_least=1)
    train(run, steps)
    assert not unfinished(run), "the last session removed what the killed ones had left"
    wanted, found = tensors(tmp_path / "alone"), tensors(run)
    assert wanted.keys() == found.keys()
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []
    states = [json.loads((resolve(one) / TRAINING_JSON).read_text()) for one in (tmp_path / "alone", run)]
    assert states[0] == states[1]
    logs = [read_log(one / "log.csv") for one in (tmp_path / "alone", run)]
    assert [row["step"] for row in logs[1]] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in logs[0]] == [row[name] for row in logs[1]], name


def test_another_order_of_images_is_seen(tmp_path):
    """The control: a run that goes on from the same checkpoint with another seed ends in other bits."""
    for name, seed in (("a", 3), ("b", 4)):
        run = tmp_path / name
        new(run).train(2)
        trainer = resumed(run)
        trainer.settings = trainer.batches.settings = TrainSettings(**{**vars(SETTINGS), "seed": seed})
        trainer.train(4)
    wanted, found = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert any(not torch.equal(value, found[name]) for name, value in wanted.items())
