"""What happens beside training: the log, checkpoints that are kept, full disks, divergence, and changes on resuming."""

from __future__ import annotations

import dataclasses
import errno
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: training (no torch)")

import torch

from ddpm_export.networks.unet import UNetConfig
from ddpm_export.training import session
from ddpm_export.training.advice import introduce
from ddpm_export.training.checkpoint import checkpoints, load_network, load_training
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.likelihood import bits_per_dim
from ddpm_export.training.log import CsvLog, bucket_edges, bucket_names, read_log
from ddpm_export.training.plot import plot_run
from ddpm_export.training.session import Housekeeping
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer, recorded_steps
from ddpm_export.training.watch import TensorBoard, WeightsAndBiases
from ddpmx.errors import BackendError, FileFormatError, InputError, NumericError, OutputError
from ddpmx.formats.atomic import write_error
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

NETWORK = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)
SETTINGS = TrainSettings(batch=4, lr=1e-3, warmup=10, ema=0.9)
SPEC = ModelSpec((1, 8, 8), timesteps=20)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)


def trainer(run: Path, *, spec=SPEC, **changes) -> Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(run, Dataset(IMAGES, Source(run)), spec, NETWORK, settings, device="cpu")


def resume(run: Path, images=IMAGES, **how) -> Trainer:
    return Trainer.resume(run, Dataset(images, Source(run)), device="cpu", **how)


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [1, 7, 10, 20, 1000, 4000])
def test_buckets_cover_every_t_once(timesteps):
    covered = [t for low, high in bucket_edges(timesteps) for t in range(low, high + 1)]
    assert covered == list(range(timesteps))
    assert len(bucket_names(timesteps)) == min(10, timesteps)


def test_the_log_has_the_means_since_the_row_before(tmp_path):
    run = trainer(tmp_path / "run", holdout=2)
    sums = []
    add = run._sums.add
    run._sums.add = lambda t, simple, loss, norm: (
        sums.append((t, simple, loss.mean(), norm)) or add(t, simple, loss, norm)
    )
    run.train(6, housekeeping=Housekeeping(log_every=3, sample_every=6))
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [row["step"] for row in rows] == [3, 6]
    for row, steps in zip(rows, (sums[:3], sums[3:]), strict=True):
        assert row["loss"] == pytest.approx(np.mean([loss for _, _, loss, _ in steps]), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(np.mean([norm for *_, norm in steps]), rel=1e-4)
        t, simple = (torch.cat([step[i] for step in steps]).numpy() for i in (0, 1))
        for number, name in enumerate(bucket_names(20)):
            mine = simple[t // 2 == number]
            assert math.isnan(row[name]) if not len(mine) else row[name] == pytest.approx(mine.mean(), rel=1e-4)
    assert rows[1]["lr"] == pytest.approx(1e-3 * 5 / 10)
    assert math.isnan(rows[0]["bits_per_dim"])
    assert rows[1]["bits_per_dim"] > 1
    with Image.open(tmp_path / "run" / "data.png") as picture:
        assert picture.size[0] >= 8


def test_a_resumed_run_has_one_row_for_every_step(tmp_path):
    run = tmp_path / "run"
    trainer(run).train(4, housekeeping=Housekeeping(log_every=2))
    with (run / "log.csv").open("a") as stream:
        stream.write("6,1,0.5,1,0.001,10,100,,,,,,,,,,,\n8,1,0.")  # a session that was killed before it saved
    resume(run).train(8, housekeeping=Housekeeping(log_every=2))
    rows = read_log(run / "log.csv")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[2]["images_per_second"] != 10
    # nothing to do, nothing changed
    before = (run / "log.csv").stat().st_mtime_ns
    resume(run).train(8)
    assert (run / "log.csv").stat().st_mtime_ns == before


def test_a_row_that_could_not_be_written_leaves_no_part_of_itself(tmp_path, monkeypatch):
    """A part, and the whole behind it when it is tried again, would be one row that nobody can read."""
    log = CsvLog(tmp_path, 20, 0)
    log.row({"step": 1, "loss": 0.5})
    whole = log.path.read_bytes()
    text = CsvLog._text

    def cut(rows):
        with log.path.open("ab") as stream:
            stream.write(text(rows)[:4])  # what fitted
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CsvLog, "_text", staticmethod(cut))
        with pytest.raises(OutputError, match="cannot be written"):
            log.row({"step": 2, "loss": 0.4})
    assert log.path.read_bytes() == whole
    log.row({"step": 2, "loss": 0.4})
    assert [row["step"] for row in read_log(log.path)] == [1, 2]


def test_a_log_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "log.csv").write_text("my,own,table\n1,2,3\n")
    with pytest.raises(FileFormatError, match="not the log of a training"):
        CsvLog(tmp_path, 20, 0)
    assert (tmp_path / "log.csv").read_text() == "my,own,table\n1,2,3\n"


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="not verified here: the curves of a run (no matplotlib)")
    run = trainer(tmp_path / "run", holdout=2)
    run.train(4, housekeeping=Housekeeping(log_every=1, sample_every=2))
    with Image.open(plot_run(tmp_path / "run", tmp_path / "curves.png")) as picture:
        assert picture.size[0] > 4 * picture.size[1], "five panels"
    with pytest.raises(FileFormatError, match="no log"):
        plot_run(tmp_path, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_bits_per_dim_of_a_network_that_knows_the_image(tmp_path):
    """The bound of a perfect network has no divergence but L_0's: noise of σ = √β̃_1 around the right level."""
    run = trainer(tmp_path, holdout=4)
    x0 = run.batches.whole(run.batches.held_out).x0

    class Oracle(torch.nn.Module):
        def forward(self, x, t):
            table = run.objective.diffusion
            signal, noise = (getattr(table, name)[t].view(-1, 1, 1, 1) for name in ("signal", "noise"))
            return (x - signal * x0[: len(x)]) / noise

    device = torch.device("cpu")
    found = bits_per_dim(run.objective, Oracle(), run.batches, device, seed=0)
    log_variance = run.objective.diffusion.log_fixed_variance[0].item()
    from statistics import NormalDist

    half = 1 / 255 / math.exp(0.5 * log_variance)
    first = -math.log2(NormalDist().cdf(half) - NormalDist().cdf(-half))
    posterior, fixed = (getattr(run.objective.diffusion, n) for n in ("log_posterior_variance", "log_fixed_variance"))
    rest = 0.5 * (torch.exp(posterior - fixed) - 1 - posterior + fixed)[1:] / math.log(2)
    prior = run.objective.prior_term(x0).mean().item()
    # the t of four images stand for the nineteen terms
    chosen = (np.floor((np.arange(4) + 0.5) * 19 / 4)).astype(int)
    assert found == pytest.approx(first + 19 * rest[chosen].mean().item() + prior, rel=2e-2)
    assert found < bits_per_dim(run.objective, run.average, run.batches, device, seed=0)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_newest_and_every_so_many_are_kept(tmp_path):
    house = Housekeeping(save_minutes=1e-9, keep=1, keep_every=3)
    trainer(tmp_path / "run").train(8, housekeeping=house)
    assert [load_training(path).step for path in checkpoints(tmp_path / "run")] == [3, 6, 8]


@pytest.mark.parametrize("what", ["keep", "keep_every", "log_every", "sample_every", "save_minutes"])
def test_housekeeping_out_of_range(what):
    with pytest.raises(InputError, match=what):
        Housekeeping(**{what: -1})


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "FULL_DISK_SECONDS", 0.0)
    run, said, tries = trainer(tmp_path / "run"), [], []
    save = run.save

    def full(**how):
        tries.append(1)
        if len(tries) < 4:
            raise write_error(tmp_path / "ema.safetensors", OSError(errno.ENOSPC, "No space left on device"))
        return save(**how)

    monkeypatch.setattr(run, "save", full)
    path = run.train(2, message=said.append)
    assert load_training(path).step == 2
    assert len(tries) == 4
    assert [("no space left" in said[0], "goes on" in said[1])] == [(True, True)]
    assert len(said) == 2, "once, and not at every try"


def test_who_stops_on_a_full_disk_gets_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "FULL_DISK_SECONDS", 0.0)
    run = trainer(tmp_path / "run")

    def full(**how):
        raise write_error(tmp_path / "ema.safetensors", OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(run, "save", full)
    with pytest.raises(OutputError, match="cannot be written"):
        run.train(2, stop=lambda: run.step >= 1)


def test_another_error_of_writing_is_not_waited_for(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")

    def closed(**how):
        raise write_error(tmp_path / "x", OSError(errno.EACCES, "Permission denied"))

    monkeypatch.setattr(run, "save", closed)
    with pytest.raises(OutputError, match="cannot be written"):
        run.train(2)


# --- going wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True], ids=["asked at every step", "asked now and then"])
def test_a_gradient_that_is_not_finite_leaves_the_last_good_state(tmp_path, monkeypatch, gpu):
    """As on a GPU the host asks later, and the steps in between must change nothing."""
    run = trainer(tmp_path / "run")
    if gpu:
        run.check_steps = 4
    objective, calls = run.objective.vlb_term, []
    target = run.objective.diffusion.target

    def poisoned(x0, t, eps, x_t):
        calls.append(t)
        found = target(x0, t, eps, x_t)
        return found * math.nan if len(calls) == 6 else found

    monkeypatch.setattr(run.objective.diffusion, "target", poisoned)
    with pytest.raises(NumericError, match="not finite at step 5") as caught:
        run.train(40, housekeeping=Housekeeping(log_every=100))
    assert objective is not None
    lowest = int(calls[5].min())
    assert f"t = {lowest}, of t = " in caught.value.note
    assert load_training(run.run).step == 5
    good = trainer(tmp_path / "good")
    good.train(5)
    for which in ("raw",):
        bad, wanted = (load_network(path, which)[0].state_dict() for path in (run.run, good.run))
        assert all(torch.equal(bad[name], wanted[name]) for name in wanted)
    assert resume(run.run).train(7).name == "00000007"


def test_a_loss_that_runs_away_stops_before_it_is_saved(tmp_path):
    run = trainer(tmp_path / "run", lr=1e-3)
    run.train(2)
    run.step, run.loss, run._lowest = 600, 0.04, 0.03
    run.objective.weights.mul_(1000.0)  # what the optimiser sees has become a thousand times as large
    with pytest.raises(NumericError, match="run away"):
        run.train(640)
    assert [load_training(path).step for path in checkpoints(run.run)] == [2]


def test_a_run_knows_how_long_it_is_to_be(tmp_path):
    run = tmp_path / "run"
    trainer(run).train(6, stop=lambda: True)
    assert recorded_steps(run) == 6
    again = resume(run)
    assert (again.step, again.steps) == (1, 6)
    again.train(9, stop=lambda: True)
    assert recorded_steps(run) == 9


def test_a_rate_that_has_fallen_to_nothing_is_said(tmp_path):
    run = trainer(tmp_path / "run", lr_decay=20)
    assert not [line for line in introduce(run, 20, cached=False) if "rate is 0" in line]
    (line,) = (line for line in introduce(run, 40, cached=False) if "rate is 0" in line)
    assert "from step 20 on" in line


# --- trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_rows_and_pictures(tmp_path, monkeypatch):
    """By a stand-in for its writer: names, steps and shapes. The real one is not among the tests' packages."""
    seen: list[tuple] = []
    writer = SimpleNamespace(
        add_scalar=lambda *args: seen.append(args),
        add_image=lambda name, pixels, step, dataformats: seen.append((name, pixels.shape, step, dataformats)),
        close=lambda: seen.append(("closed",)),
    )
    module = SimpleNamespace(SummaryWriter=lambda folder: seen.append((folder,)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = trainer(tmp_path / "run", holdout=2)
    run.train(2, housekeeping=Housekeeping(log_every=2, sample_every=2, trackers=[TensorBoard(tmp_path / "run")]))
    assert seen[0] == (str(tmp_path / "run" / "tensorboard"),)
    assert seen[-1] == ("closed",)
    assert [entry[:1] + entry[2:] for entry in seen if entry[-1] == "HWC"] == [
        ("data", 0, "HWC"),
        ("samples", 2, "HWC"),
    ]
    scalars = {name: (value, step) for name, value, step in (entry for entry in seen if len(entry) == 3)}
    (row,) = read_log(tmp_path / "run" / "log.csv")
    assert scalars["loss"] == (pytest.approx(row["loss"], rel=1e-5), 2)
    assert "bits_per_dim" in scalars
    assert {name for name in scalars if name.startswith("loss/t")} == {
        f"loss/{name}" for name in bucket_names(20) if not math.isnan(row[name])
    }


def test_weights_and_biases_gets_rows_and_pictures(tmp_path, monkeypatch):
    seen: list[tuple] = []
    run_of = SimpleNamespace(
        log=lambda values, step: seen.append((set(values), step)), finish=lambda: seen.append(("finished",))
    )
    module = SimpleNamespace(
        init=lambda **how: seen.append(("init", how["name"])) or run_of, Image=lambda pixels: pixels
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = trainer(tmp_path / "run")
    run.train(2, housekeeping=Housekeeping(log_every=2, trackers=[WeightsAndBiases(tmp_path / "run", {})]))
    assert seen[0] == ("init", "run")
    assert ({"data"}, 0) in seen
    assert any("loss" in names and step == 2 for names, step in seen[1:-1])
    assert seen[-1] == ("finished",)

    def refuses(**how):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuses))
    with pytest.raises(BackendError, match="does not begin") as caught:
        WeightsAndBiases(tmp_path / "run", {})
    assert caught.value.note == "api_key not configured"


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_may_change_its_rate_and_its_images_with_a_word(tmp_path):
    run = tmp_path / "run"
    trainer(run).train(2)
    again = resume(run, changes={"lr": 5e-4})
    assert again.settings == dataclasses.replace(SETTINGS, lr=5e-4)
    again.train(2)
    assert resume(run).settings.lr == 5e-4, "the change is saved though no step was made"
    with pytest.raises(InputError, match="batch cannot be changed"):
        resume(run, changes={"batch": 2})
    with pytest.raises(FileFormatError, match="other images") as caught:
        resume(run, IMAGES[:6])
    assert "--other-images" in caught.value.hint
    resume(run, IMAGES[:6], other_images=True).train(3)
    resume(run, IMAGES[:6])


def test_a_rate_that_falls_ends_with_the_run_that_is_resumed(tmp_path):
    from ddpm_export.training import api

    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8))
    small = {"width": 8, "groups": 4, "mult": (1, 2), "blocks": 1, "attention": (4,), "batch": 2, "warmup": 0}
    api.train(tmp_path / "noise.npz", tmp_path / "run", preset="tiny", steps=2, lr_decay=True, device="cpu", **small)
    longer, steps = api.resumed(tmp_path / "run", None, {"steps": 4, "lr_decay": True}, device="cpu")
    assert (steps, longer.settings.lr_decay) == (4, 4)
    assert longer.settings.lr_at(2) == pytest.approx(5e-4), "the middle of a half cosine from 1e-3"
    constant, steps = api.resumed(tmp_path / "run", None, {"lr_decay": False}, device="cpu")
    assert (steps, constant.settings.lr_decay) == (2, 0)
    kept, _ = api.resumed(tmp_path / "run", None, {"steps": 4}, device="cpu")
    assert kept.settings.lr_decay == 2
