"""Training from Python: the same choices, images and refusals as the command's, and callbacks that may stop it."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: training (no torch)")

import torch

from ddpm_export.training.api import needs_size, train
from ddpm_export.training.config import read_config, resolve
from ddpm_export.training.data import Dataset, Source
from ddpm_export.training.estimate import COPIES, estimate, seconds_per_step
from ddpm_export.training.session import Housekeeping
from ddpm_export.training.train import Trainer
from ddpmx.errors import InputError

pytestmark = pytest.mark.torch

SMALL = {"width": 8, "groups": 4, "mult": (1, 2), "blocks": 1, "attention": (4,), "batch": 4, "timesteps": 20}
RNG = np.random.default_rng(0)


@pytest.fixture
def noise(tmp_path):
    np.savez(tmp_path / "noise.npz", images=RNG.integers(0, 256, (10, 8, 8), np.uint8))
    return tmp_path / "noise.npz"


def test_a_run_is_trained_stopped_by_a_callback_and_resumed(noise, tmp_path):
    seen = []
    run = train(
        noise, tmp_path / "run", preset="tiny", steps=6, device="cpu", **SMALL,
        callbacks=[lambda state: seen.append(state.step), lambda state: state.step == 4],
        housekeeping=Housekeeping(log_every=2),
    )  # fmt: skip
    assert seen == [1, 2, 3, 4]
    assert (run.step, run.path) == (4, tmp_path / "run")
    assert run.checkpoint == tmp_path / "run" / "checkpoints" / "00000004"
    assert run.pipeline().generate(2, seed=1, steps=3).shape == (2, 8, 8, 1)
    again = train(noise, tmp_path / "run", resume=True, device="cpu", lr=1e-4)
    assert again.step == 6, "as many as it was begun for"
    whole = train(noise, tmp_path / "whole", preset="tiny", steps=4, device="cpu", **SMALL)
    names = ("weights.safetensors", "training.safetensors")
    assert all((whole.checkpoint / n).read_bytes() == (run.checkpoint / n).read_bytes() for n in names)


def test_a_run_s_configuration_begins_the_same_training_again(noise, tmp_path):
    first = train(noise, tmp_path / "a", preset="tiny", steps=3, device="cpu", **SMALL)
    values = read_config(tmp_path / "a" / "config.toml")
    assert values.pop("data") == str(noise.resolve())
    again = train(noise, tmp_path / "b", preset="256", config=tmp_path / "a" / "config.toml", device="cpu")
    assert (again.checkpoint / "ema.safetensors").read_bytes() == (first.checkpoint / "ema.safetensors").read_bytes()


def test_what_the_command_refuses_is_refused_here(noise, tmp_path):
    with pytest.raises(InputError, match="there is no option 'speed'"):
        train(noise, tmp_path / "run", speed=3)
    with pytest.raises(InputError, match="there is no preset"):
        train(noise, tmp_path / "run", preset="huge")
    train(noise, tmp_path / "run", steps=1, device="cpu", **SMALL)
    with pytest.raises(InputError, match="already holds a run"):
        train(noise, tmp_path / "run", steps=1, device="cpu", **SMALL)
    with pytest.raises(InputError, match="batch cannot be changed"):
        train(noise, tmp_path / "run", resume=True, batch=2, device="cpu")


def test_a_run_begins_with_another_s_weights(noise, tmp_path):
    first = train(noise, tmp_path / "a", preset="tiny", steps=2, device="cpu", **SMALL)
    tuned = train(noise, tmp_path / "b", begin_from=first.path, steps=1, batch=2, lr=1e-4, warmup=0, device="cpu")
    state = json.loads((tuned.checkpoint / "training.json").read_text())["settings"]
    assert state["from"]["path"] == str(first.checkpoint.resolve())
    assert (state["train"]["batch"], state["train"]["lr"]) == (2, 1e-4)
    assert train(noise, tmp_path / "b", resume=True, device="cpu").step == 1, "as many as it was begun for"
    with pytest.raises(InputError, match="width and mult cannot be set with begin_from"):
        train(noise, tmp_path / "c", begin_from=first.path, width=8, mult=(1,), device="cpu")
    with pytest.raises(InputError, match="weights must be ema or raw"):
        train(noise, tmp_path / "c", begin_from=first.path, weights="best", device="cpu")
    with pytest.raises(InputError, match="a model file cannot be trained"):
        train(noise, tmp_path / "c", begin_from="model.onnx", device="cpu")
    assert not (tmp_path / "c").exists()


def test_a_folder_s_images_keep_their_size_where_they_can(tmp_path):
    def images(name: str, *sizes: tuple[int, int], turned: bool = False):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            exif = Image.Exif()
            exif[0x0112] = 6 if turned and number else 1
            Image.new("RGB", size[::-1] if turned and number else size).save(
                tmp_path / name / f"{number:02d}.jpg", exif=exif
            )
        return tmp_path / name

    assert not needs_size(images("small", (28, 28), (28, 28)), 32, 3)
    assert needs_size(images("mixed", (28, 28), (32, 32)), 32, 3)
    assert needs_size(images("last", *[(8, 8)] * 59, (8, 16)), 32, 3), "not the first ones alone are looked at"
    assert needs_size(images("large", (64, 64), (64, 64)), 32, 3)
    assert needs_size(images("odd", (30, 30)), 32, 3)
    assert not needs_size(images("turned", (16, 24), (16, 24), turned=True), 32, 3)


def test_pillow_s_warning_of_large_images_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("1", (20, 20)).save(tmp_path / "0.png")
    with pytest.warns(Image.DecompressionBombWarning):  # control
        Image.open(tmp_path / "0.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not needs_size(tmp_path, 32, 3)


# --- what it costs ---------------------------------------------------------------------------------------------------


def a_trainer(tmp_path, **choices):
    config = resolve("tiny", {**SMALL, "attention": (), **choices})
    dataset = Dataset(RNG.integers(0, 256, (10, 8, 8, 1), np.uint8), Source(tmp_path))
    spec = config.spec((1, 8, 8), None, None)
    return Trainer(tmp_path / "run", dataset, spec, config.network(spec), config.settings(), device="cpu")


def test_the_arithmetic_is_counted(tmp_path):
    """Convolutions, dense layers and attention of one image, forwards; training is three times as much."""
    trainer = a_trainer(tmp_path)
    total = 0
    sizes: list[int] = []

    def count(module, args, out):
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            k = module.kernel_size[0] * module.kernel_size[1] * module.in_channels
            total += 2 * k * out.shape[1] * out.shape[2] * out.shape[3]
            sizes.append(out.numel())
        elif isinstance(module, torch.nn.Linear):
            total += 2 * module.in_features * module.out_features

    for module in trainer.network.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        trainer.network.eval()(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    middle = 4 * 4  # the middle's attention has 4×4 positions of 16 channels: two products
    total += 2 * 2 * middle * middle * 16
    found = estimate(a_trainer(tmp_path))
    assert found.flops == 3 * total
    assert found.parameters == sum(p.numel() for p in trainer.network.parameters())


def test_memory_is_that_of_weights_and_of_what_the_backward_pass_needs(tmp_path):
    small, large = (estimate(a_trainer(tmp_path, batch=batch)) for batch in (4, 8))
    weights = COPIES * 4 * small.parameters
    assert large.memory - weights == 2 * (small.memory - weights)
    assert estimate(a_trainer(tmp_path, batch=8, accumulate=2)).memory == small.memory
    trainer, kept = a_trainer(tmp_path), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in trainer.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.network.train()(torch.zeros(4, 1, 8, 8), torch.zeros(4))
    activations = sum(size for pointer, size in kept.items() if pointer not in own)
    assert small.memory - weights == pytest.approx(activations, rel=0.15)


def test_no_more_images_at_once_are_measured_than_training_takes(tmp_path, monkeypatch):
    """A batch that only fits in parts would not fit into the measurement."""
    trainer, seen = a_trainer(tmp_path, batch=12, accumulate=4), []
    forward = trainer.objective.forward
    monkeypatch.setattr(
        trainer.objective, "forward", lambda net, x0, *rest: seen.append(len(x0)) or forward(net, x0, *rest)
    )
    seconds_per_step(trainer)
    assert max(seen) == 3


def test_time_is_measured_and_the_trainer_is_left_as_it_was(tmp_path):
    trainer = a_trainer(tmp_path)
    before = [p.clone() for p in trainer.network.parameters()]
    assert 0 < seconds_per_step(trainer) < math.inf
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.network.parameters())
    assert trainer.step == 0
