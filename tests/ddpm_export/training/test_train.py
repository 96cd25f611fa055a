"""The training loop: resuming is exact to the bit, and rate, clipping and average are the paper's."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: training (no torch)")

import torch

from conftest import FASHION
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training import checkpoint, learner, session
from ddpm_export.training.checkpoint import checkpoints, load_network, load_training
from ddpm_export.training.data import Dataset, Source, load_dataset
from ddpm_export.training.objective import Objective
from ddpm_export.training.session import Housekeeping
from ddpm_export.training.train import Trainer, TrainSettings, recorded_source
from ddpmx.errors import DdpmxError, FileFormatError, InputError, NumericError, OutputError, SpecError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

# Everything that draws random numbers is on, and 10 images in batches of 4 make epochs that end inside a batch.
NETWORK = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.2, 4)
SETTINGS = TrainSettings(batch=4, lr=1e-3, warmup=10, ema=0.9, hflip=True)
SPEC = ModelSpec((1, 8, 8), timesteps=20)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)


def trainer(run: Path, settings: TrainSettings = SETTINGS, *, images: np.ndarray = IMAGES, **changes) -> Trainer:
    return Trainer(
        run, Dataset(images, Source(run)), SPEC, NETWORK, dataclasses.replace(settings, **changes), device="cpu"
    )


def resume(run: Path, images: np.ndarray = IMAGES) -> Trainer:
    return Trainer.resume(run, Dataset(images, Source(run)), device="cpu")


def content(path: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint: raw weights, averaged weights, Adam's moments."""
    files = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    assert len(files) == 3
    return files


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


# --- taking up a run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[20], [1, 7, 33]], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stops):
    whole = trainer(tmp_path / "whole").train(40)
    run = tmp_path / "parts"
    trainer(run).train(stops[0])
    for steps in (*stops[1:], 40):
        parts = resume(run).train(steps)
    assert content(parts) == content(whole)
    assert load_training(parts).step == load_training(whole).step == 40
    assert (parts / "spec.json").read_bytes() == (whole / "spec.json").read_bytes()


def test_what_happened_to_the_random_numbers_before_does_not_matter(tmp_path):
    once = content(trainer(tmp_path / "a").train(3))
    torch.manual_seed(123)
    torch.rand(10)
    assert content(trainer(tmp_path / "b").train(3)) == once


def test_resuming_depends_on_adams_moments(tmp_path):
    """Otherwise the test above would pass without them."""
    whole = content(trainer(tmp_path / "whole").train(12))
    trainer(tmp_path / "parts").train(6)
    again = resume(tmp_path / "parts")
    for state in again.optimizer.state.values():
        state["exp_avg"].zero_()
    assert content(again.train(12))["weights.safetensors"] != whole["weights.safetensors"]


def test_moments_lie_in_memory_as_the_weights_do(tmp_path, monkeypatch):
    """A GPU trains in channels_last, and torch's fused Adam takes weights and moments number by number."""
    make = learner.make_network
    monkeypatch.setattr(learner, "make_network", lambda config: make(config).to(memory_format=torch.channels_last))
    whole = content(trainer(tmp_path / "whole").train(6))
    trainer(tmp_path / "parts").train(3)
    again = resume(tmp_path / "parts")
    for parameter, state in again.optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
    assert content(again.train(6)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"hflip": False}, {"batch": 5}, {"lr": 2e-3}, {"grad_clip": 0.01}, {"bf16": True}],
    ids=str,
)
def test_every_setting_has_an_effect(tmp_path, change):
    once = trainer(tmp_path / "a", warmup=0).train(3)
    other = trainer(tmp_path / "b", warmup=0, **change).train(3)
    assert content(other)["weights.safetensors"] != content(once)["weights.safetensors"]


def test_a_resumed_run_keeps_its_settings_and_knows_its_images(tmp_path):
    run = tmp_path / "run"
    trainer(run, seed=5, ema_ramp=True).train(2)
    again = resume(run)
    assert again.settings == dataclasses.replace(SETTINGS, seed=5, ema_ramp=True)
    assert again.step == 2
    assert recorded_source(run) == Source(run.resolve())


def test_other_images_are_refused(tmp_path):
    run = tmp_path / "run"
    trainer(run).train(1)
    other = IMAGES.copy()
    other[0, 0, 0, 0] ^= 1
    with pytest.raises(FileFormatError, match="other images"):
        resume(run, other)
    resume(run)


def test_nothing_to_resume(tmp_path):
    for path in ("missing", "."):
        with pytest.raises(FileFormatError, match="no checkpoint"):
            resume(tmp_path / path)


@pytest.mark.parametrize("part", ["settings", "moments"])
def test_a_checkpoint_that_cannot_be_resumed(tmp_path, monkeypatch, part):
    trainer(tmp_path / "run").train(1)
    state = load_training(tmp_path / "run")
    if part == "settings":
        state = dataclasses.replace(state, settings={"train": {"momentum": 0.9}})
    else:
        state.moments.pop("exp_avg.conv_in.weight")
    monkeypatch.setattr(checkpoint, "load_training", lambda _: state)
    with pytest.raises(DdpmxError):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("spec", "network", "images"),
    [
        (ModelSpec((1, 16, 16)), NETWORK, IMAGES),
        (SPEC, dataclasses.replace(NETWORK, in_channels=3), IMAGES),
        (SPEC, NETWORK, IMAGES.repeat(3, axis=3)),
    ],
    ids=["spec", "network", "images"],
)
def test_spec_network_and_images_have_to_fit(tmp_path, spec, network, images):
    with pytest.raises(SpecError, match="disagree about the shape"):
        Trainer(tmp_path, Dataset(images, Source(tmp_path)), spec, network, SETTINGS, device="cpu")


# --- as in the paper -------------------------------------------------------------------------------------------------


def test_the_rate_rises_from_zero_to_its_value_and_stays(tmp_path):
    run = trainer(tmp_path / "run", lr=0.01, warmup=4)
    weights, rates = [flat(run.network)], []

    def look(_) -> None:
        rates.extend(group["lr"] for group in run.optimizer.param_groups)
        weights.append(flat(run.network))

    run.train(7, progress=look)
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert torch.equal(weights[0], weights[1]), "a rate of 0 in the very first step"
    assert not torch.equal(weights[1], weights[2])


def test_without_warmup_the_rate_is_there_at_once(tmp_path):
    run = trainer(tmp_path / "run", lr=0.01, warmup=0)
    run.train(1)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.01]


@pytest.mark.parametrize("ramp", [False, True], ids=["constant", "ramp"])
def test_the_average_is_the_geometric_one(tmp_path, ramp, figure):
    """avg_n = Σ w_i·(1−d_i)·Π_{j>i} d_j, beginning with the initial weights; float64 from the weights of every step."""
    run = trainer(tmp_path / "run", warmup=0, lr=0.01, ema=0.9, ema_ramp=ramp)
    weights = [flat(run.network)]
    assert torch.equal(flat(run.average), weights[0])
    run.train(30, progress=lambda _: weights.append(flat(run.network)))
    decays = [min(0.9, (1 + s) / (10 + s)) if ramp else 0.9 for s in range(30)]
    shares = [math.prod(decays)]
    shares += [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    wanted = sum(share * w for share, w in zip(shares, weights, strict=True))
    error = (flat(run.average) - wanted).abs().max().item()
    figure(f"averaged weights against the closed form ({'ramp' if ramp else 'constant'}): max |Δ|", error, at_most=1e-6)
    assert (wanted - weights[-1]).abs().max() > 1e-3, "the average is not just the weights"


@pytest.mark.parametrize("limit", [0.05, 1e9])
def test_the_gradients_norm_is_bounded(tmp_path, limit):
    run = trainer(tmp_path / "run", grad_clip=limit)
    norms = []

    def norm(*_) -> None:
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in run.network.parameters())))

    run.optimizer.register_step_pre_hook(norm)
    run.train(5)
    assert len(norms) == 5
    if limit == 0.05:
        assert norms == pytest.approx([limit] * 5, rel=1e-4)
    else:
        assert min(norms) > 0.05


def test_each_epoch_shows_every_image_once(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", hflip=False)
    seen = []
    q_sample = run.objective.diffusion.q_sample
    monkeypatch.setattr(
        run.objective.diffusion, "q_sample", lambda x0, t, eps: seen.extend(x0.numpy()) or q_sample(x0, t, eps)
    )
    run.train(10)  # forty images: four epochs of ten
    levels = np.round((np.stack(seen)[:, 0] + 1) * 127.5).astype(np.uint8)
    order = [next(i for i in range(10) if np.array_equal(IMAGES[i, ..., 0], image)) for image in levels]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each in its own order"


def test_half_of_the_images_are_mirrored(tmp_path):
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[:, :, 0] = 255
    run = trainer(tmp_path / "run", images=images, batch=1000)
    torch.manual_seed(0)
    batch = run.batches.draw(0).x0[:, 0]
    left, right = batch[:, :, 0].mean(1) == 1, batch[:, :, 7].mean(1) == 1
    assert torch.all(left ^ right)
    assert 400 < left.sum() < 600
    assert batch[:, :, 1:7].max() == -1


def test_bfloat16_is_for_computing_only(tmp_path):
    path = trainer(tmp_path / "run", bf16=True).train(3)
    for which in ("raw", "ema"):
        state = load_network(path, which)[0].state_dict()
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


# --- beginning, stopping, going wrong --------------------------------------------------------------------------------


def test_stop_saves(tmp_path):
    run = trainer(tmp_path / "run")
    seen = []
    path = run.train(40, progress=lambda state: seen.append(state.step), stop=lambda: len(seen) == 3)
    assert load_training(path).step == 3
    assert content(resume(tmp_path / "run").train(5)) == content(trainer(tmp_path / "other").train(5))


def test_a_checkpoint_every_so_many_seconds(tmp_path):
    run = trainer(tmp_path / "run")
    seen = []
    run.train(
        4,
        housekeeping=Housekeeping(save_minutes=1e-9),
        progress=lambda _: seen.append([load_training(p).step for p in checkpoints(run.run)]),
    )
    assert seen == [[], [1], [1, 2], [2, 3]]
    assert [load_training(path).step for path in checkpoints(run.run)] == [3, 4]


def test_what_came_after_the_last_timed_checkpoint_is_saved_at_the_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run, seen = trainer(tmp_path / "run"), []

    def tick(_) -> None:
        seen.append([load_training(path).step for path in checkpoints(run.run)])
        clock[0] = 61.0  # a minute has passed when the first step is done, and none after that

    path = run.train(3, housekeeping=Housekeeping(save_minutes=1), progress=tick)
    assert seen == [[], [1], [1]]
    assert load_training(path).step == 3
    assert content(path) == content(trainer(tmp_path / "other").train(3))


def test_divergence_is_an_error_and_leaves_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path / "run")
    run.train(5)
    before = content(checkpoints(run.run)[-1])
    with torch.no_grad():
        run.network.conv_out.bias.fill_(math.nan)
    with pytest.raises(NumericError, match="not finite at step 5"):
        run.train(10)
    (path,) = checkpoints(run.run)
    assert content(path) == before
    assert resume(run.run).step == 5


@pytest.mark.parametrize("steps", [0, -1, 1 << 40, 2.0, True])
def test_counts_of_steps_that_make_no_sense(tmp_path, steps):
    with pytest.raises(InputError, match="steps"):
        trainer(tmp_path / "run").train(steps)
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_have_been_made(tmp_path):
    run = trainer(tmp_path / "run")
    run.train(2)
    with pytest.raises(InputError, match="has made 2 steps"):
        run.train(1)


def test_a_file_where_the_run_should_be(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(OutputError):
        trainer(tmp_path / "run").train(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 2.0}, "batch"),
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": 1.5}, "lr"),
        ({"lr": "1"}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"grad_clip": math.nan}, "grad_clip"),
        ({"ema": 1.1}, "ema"),
        ({"ema": -0.1}, "ema"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"timestep_sampling": "all"}, "timestep_sampling must be one of"),
        ({"label_dropout": 1.1}, "label_dropout"),
        ({"crop": (8,)}, "crop"),
        ({"accumulate": 3}, "not divisible by 3"),
        ({"warmup": 100, "lr_decay": 100}, "longer than the warm-up"),
        ({"holdout": -1}, "holdout"),
    ],
    ids=str,
)
def test_settings_out_of_range(change, says):
    with pytest.raises(InputError, match=says):
        TrainSettings(**change)


# --- pictures while training -----------------------------------------------------------------------------------------


def test_a_grid_is_a_picture_and_leaves_no_trace_in_the_weights(tmp_path):
    without = trainer(tmp_path / "a").train(3)
    with_grids = trainer(tmp_path / "b").train(3, housekeeping=Housekeeping(sample_every=1))
    assert content(with_grids) == content(without)
    grids = sorted((tmp_path / "b" / "samples").iterdir())
    assert [path.name for path in grids] == [f"grid-{step:08d}.png" for step in (1, 2, 3)]
    for path in grids:
        with Image.open(path) as image:
            assert image.mode == "L"
            assert image.width == image.height >= 4 * 8
            assert np.asarray(image).std() > 0
    assert not (tmp_path / "a" / "samples").exists()


def test_grids_come_every_so_many_steps(tmp_path):
    trainer(tmp_path / "run").train(5, housekeeping=Housekeeping(sample_every=2))
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "grid-00000002.png",
        "grid-00000004.png",
    ]


# --- it learns -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_on_images(network: UNet, spec: ModelSpec) -> float:
    dataset = load_dataset(FASHION)
    x0 = torch.from_numpy(dataset.images[:512]).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(spec.timesteps, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        return Objective(spec.make_schedule(), spec.prediction)(network.eval(), x0, t, eps).loss.mean().item()


def test_training_reduces_the_loss(trained, figure):
    network, spec = load_network(trained.run)
    fresh = loss_on_images(UNet(network.config), spec)
    assert fresh == pytest.approx(1, rel=0.05), "an untrained network's output is zero, and ε has variance 1"
    figure("loss after half a minute of training, as a share of the untrained", loss_on_images(network, spec) / fresh,
           at_most=0.2)  # fmt: skip


@pytest.mark.parametrize(
    ("network", "spec", "settings", "says"),
    [
        ({"classes": 4}, {"classes": 4}, {}, "the network has classes, and the images have none"),
        ({"out_channels": 2}, {"variance": "learned_range"}, {}, "does not train the variance"),
        ({"condition": 1}, {"condition": 1}, {}, "disagree about the condition"),
        ({}, {}, {"loss": "hybrid"}, "is for a learned variance"),
        ({}, {}, {"loss": "vlb", "min_snr": 5.0}, "min_snr has no effect"),
        ({}, {}, {"label_dropout": 0.1}, "label_dropout needs"),
        ({}, {}, {"holdout": 10}, "holdout must leave images"),
        ({}, {}, {"crop": (16, 8)}, "crop 16×8 is larger"),
    ],
    ids=["classes", "learned variance", "a condition", "hybrid", "min_snr", "label_dropout", "holdout", "crop"],
)
def test_a_loss_and_a_network_that_do_not_go_together(tmp_path, network, spec, settings, says):
    images = Dataset(IMAGES, Source(tmp_path))
    spec, network = SPEC.replace(**spec), dataclasses.replace(NETWORK, **network)
    with pytest.raises((SpecError, InputError), match=says):
        Trainer(tmp_path, images, spec, network, dataclasses.replace(SETTINGS, **settings), device="cpu")


def test_the_time_left_does_not_count_sample_grids(monkeypatch):
    now = 0.0
    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    rate = session._Rate()
    for step in range(1, 11):
        now += 2.0
        rate.tick()
        assert rate.per_second == pytest.approx(0.5)
        if step % 5 == 0:
            with rate.paused():
                now += 600.0  # a grid of samples
    now += 2.0
    rate.tick()
    assert rate.per_second == pytest.approx(0.5)
