"""What the settings of a training do: parts of a batch, crops, classes, conditions, self-conditioning, decay, losses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: training (no torch)")

import torch

from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training.batches import Batches
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

NETWORK = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)
SETTINGS = TrainSettings(batch=4, lr=1e-3, warmup=0, ema=0.9)
SPEC = ModelSpec((1, 8, 8), timesteps=20)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)


def trainer(run: Path, spec=SPEC, network=NETWORK, *, how=None, images=IMAGES, labels=None, conditions=None, **changes):
    dataset = Dataset(images, Source(run), labels=labels, classes=("a", "b", "c") if labels is not None else None,
                      conditions=conditions)  # fmt: skip
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(run, dataset, spec, network, settings, device="cpu", **(how or {}))


def weights_after(trained: Trainer, steps: int) -> torch.Tensor:
    trained.network.train()
    for _ in range(steps):
        trained.train_step()
    return torch.cat([p.detach().flatten() for p in trained.network.parameters()])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_same_gradient(tmp_path, parts):
    once = weights_after(trainer(tmp_path), 3)
    apart = weights_after(trainer(tmp_path, accumulate=parts), 3)
    assert torch.allclose(apart, once, atol=2e-6)
    assert not torch.allclose(weights_after(trainer(tmp_path, batch=2), 3), once, atol=2e-6), "control"


def test_activations_computed_twice_change_nothing(tmp_path):
    network = dataclasses.replace(NETWORK, dropout=0.3)
    once = weights_after(trainer(tmp_path, network=network), 3)
    kept = trainer(tmp_path, network=network, how={"checkpoint_activations": True})
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x)
    with hooks:
        twice = weights_after(kept, 3)
    assert torch.equal(twice, once), "with the same dropout in the second pass"
    less, saved = sum(saved), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        weights_after(trainer(tmp_path, network=network), 3)
    assert less < 0.5 * sum(saved)


# --- images ----------------------------------------------------------------------------------------------------------


def test_crops_are_parts_of_the_images_and_all_of_them_occur(tmp_path):
    rows, columns = np.mgrid[0:8, 0:8]
    images = (rows * 16 + columns)[None, :, :, None].astype(np.uint8)
    settings = dataclasses.replace(SETTINGS, batch=200, crop=(6, 4))
    batches = Batches(Dataset(images, Source(tmp_path)), settings)
    assert batches.shape == (1, 6, 4)
    torch.manual_seed(0)
    levels = ((batches.draw(0).x0 + 1) * 127.5).round().long()[:, 0]
    first = levels[:, :1, :1]
    wanted = torch.from_numpy(rows[:6, :4] * 16 + columns[:6, :4])
    assert torch.equal(levels - first, wanted.expand(200, 6, 4))
    corners = {(int(v) // 16, int(v) % 16) for v in first.flatten()}
    assert corners == {(i, j) for i in range(3) for j in range(5)}
    middle = ((batches.whole(np.array([0])).x0 + 1) * 127.5).round().long()
    assert middle[0, 0, 0, 0] == 1 * 16 + 2


def test_images_held_out_are_never_trained_on(tmp_path):
    batches = Batches(Dataset(IMAGES, Source(tmp_path)), dataclasses.replace(SETTINGS, holdout=3, batch=5))
    seen = np.concatenate([batches.indices(step) for step in range(20)])
    assert len(batches.held_out) == 3
    assert set(seen) == set(range(10)) - set(batches.held_out)
    assert np.bincount(seen).max() <= 100 // 7 + 1, "an epoch has every image once"


def test_a_condition_is_flipped_and_cropped_with_its_image(tmp_path):
    settings = dataclasses.replace(SETTINGS, batch=32, crop=(4, 4), hflip=True)
    batch = Batches(Dataset(IMAGES, Source(tmp_path), conditions=255 - IMAGES), settings).draw(0)
    assert torch.allclose(batch.cond, -batch.x0, atol=1e-6)
    assert len({tuple(image.flatten().tolist()) for image in batch.x0}) > 20


# --- conditioning ----------------------------------------------------------------------------------------------------

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], np.int32)


def calls_of(trained: Trainer, steps: int) -> list[dict[str, torch.Tensor]]:
    """What the network is given by name in these steps."""
    seen = []
    hook = trained.network.register_forward_pre_hook(lambda _, args, named: seen.append(dict(named)), with_kwargs=True)
    weights_after(trained, steps)
    hook.remove()
    return seen


def test_every_image_is_trained_with_its_class(tmp_path):
    spec, network = SPEC.replace(classes=3), dataclasses.replace(NETWORK, classes=3)
    trained = trainer(tmp_path, spec, network, labels=LABELS)
    for step, call in enumerate(calls_of(trained, 4)):
        assert call["y"].tolist() == LABELS[trained.batches.indices(step)].tolist()


def test_labels_are_dropped_as_often_as_asked_for(tmp_path):
    spec = SPEC.replace(classes=3, null_class=True)
    network = dataclasses.replace(NETWORK, classes=3, null_class=True)
    trained = trainer(tmp_path, spec, network, labels=LABELS, label_dropout=0.25, batch=100)
    y = torch.cat([call["y"] for call in calls_of(trained, 10)])
    assert 190 < int((y == 3).sum()) < 310
    known = np.concatenate([LABELS[trained.batches.indices(step)] for step in range(10)])
    assert torch.all((y == 3) | (y == torch.from_numpy(known)))


def test_a_step_takes_nothing_from_the_host_that_a_gpu_is_waited_for(tmp_path, monkeypatch):
    """Images, classes, which of them are dropped, t and its weights go by pinned memory."""
    spec = SPEC.replace(classes=3, null_class=True)
    network, moved = dataclasses.replace(NETWORK, classes=3, null_class=True), []
    trained = trainer(tmp_path, spec, network, labels=LABELS, label_dropout=0.25)
    move = trained._moved
    monkeypatch.setattr(trained, "_moved", lambda values: moved.append((values.dtype, values.ndim)) or move(values))
    trained.train_step()
    whole, floats, flags = (torch.int64, 1), (torch.float32, 1), (torch.bool, 1)
    assert sorted(moved, key=str) == sorted([(torch.float32, 4), whole, whole, floats, flags], key=str)


def test_half_of_the_batches_get_an_estimate_of_the_image(tmp_path):
    spec, network = SPEC.replace(self_condition=True), dataclasses.replace(NETWORK, self_condition=True)
    trained = trainer(tmp_path, spec, network)
    calls = calls_of(trained, 60)
    graded = [
        call
        for call, later in zip(calls, [*calls[1:], None], strict=True)
        if later is None or not later["x0_prev"].any()
    ]
    first = [call for call in calls if not call["x0_prev"].any()]
    assert 18 < len(calls) - len(first) < 42, "each estimate is a call of its own, with zeros"
    assert all(call["x0_prev"].abs().max() <= 1 for call in calls), "clipped, as the chain's is"
    assert graded


def test_the_condition_is_given_to_the_network(tmp_path):
    spec, network = SPEC.replace(condition=1), dataclasses.replace(NETWORK, condition=1)
    trained = trainer(tmp_path, spec, network, conditions=255 - IMAGES)
    (call,) = calls_of(trained, 1)
    assert torch.allclose(call["cond"], -trained.batches.draw(0).x0, atol=1e-6)


def test_conditioning_inputs_are_further_channels_in_the_order_x_x0_prev_cond():
    network = UNet(dataclasses.replace(NETWORK, self_condition=True, condition=2))
    seen = []
    network.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, before, cond = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), torch.rand(1, 2, 8, 8)
    network(x, torch.zeros(1), x0_prev=before, cond=cond)
    network(x, torch.zeros(1), cond=cond)
    assert torch.equal(seen[0], torch.cat([x, before, cond], 1))
    assert torch.equal(seen[1], torch.cat([x, torch.zeros_like(x), cond], 1))


# --- loss and rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ({"prediction": "x0"}, {}),
        ({"prediction": "v"}, {"min_snr": 5.0}),
        ({"prediction": "mu"}, {"loss": "vlb"}),
        ({"variance": "learned"}, {"loss": "vlb"}),
        ({"variance": "learned_range"}, {"loss": "hybrid", "timestep_sampling": "importance"}),
        ({"prediction": "x0", "variance": "fixed_small"}, {"loss": "vlb", "timestep_sampling": "importance"}),
    ],
    ids=str,
)
def test_every_objective_learns(tmp_path, spec, settings):
    """On one image: the loss falls, measured from what a perfect network has (a fixed σ and the levels cost bits)."""
    spec = SPEC.replace(**spec)
    network = dataclasses.replace(NETWORK, out_channels=len(spec.outputs))
    trained = trainer(tmp_path, spec, network, images=IMAGES[:1], batch=16, **settings)
    diffusion = trained.objective.diffusion
    t = torch.arange(20).repeat(4)
    eps = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x0 = trained.batches.whole(np.zeros(80, np.int64)).x0

    def perfect(x, t):
        out = diffusion.target(x0, t, eps, x)
        smallest = diffusion.log_posterior_variance[t].view(-1, 1, 1, 1).expand_as(out)
        return {"learned": (out, smallest), "learned_range": (out, -torch.ones_like(out))}.get(spec.variance, out)

    def loss(network) -> float:
        with torch.no_grad():
            return trained.objective(network, x0, t, eps).loss.mean().item()

    least, before = loss(perfect), loss(trained.network.eval())
    weights_after(trained, 60)
    assert least < loss(trained.network.eval()) < least + 0.6 * (before - least)


def test_the_rate_falls_by_a_half_cosine():
    settings = TrainSettings(lr=1.0, warmup=10, lr_decay=110)
    assert settings.lr_at(0) == 0
    assert settings.lr_at(10) == 1
    assert settings.lr_at(60) == pytest.approx(0.5)
    assert settings.lr_at(35) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert settings.lr_at(110) == settings.lr_at(1000) == pytest.approx(0, abs=1e-12)
