"""A run that begins with another's weights: the same network and schedule, a new optimiser, exact resume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: training (no torch)")

import torch

from ddpm_export.importers.registry import Imported, save_run
from ddpm_export.networks.lucidrains_config import LucidrainsConfig
from ddpm_export.networks.registry import make_network
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training import advice
from ddpm_export.training.checkpoint import load_network, load_training
from ddpm_export.training.data import Dataset, Source, load_dataset
from ddpm_export.training.settings import TrainSettings
from ddpm_export.training.train import Trainer, recorded_source
from ddpmx.errors import FileFormatError, InputError, SpecError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

UNET = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)
LUCIDRAINS = LucidrainsConfig(
    1, 1, (8, 8), 8, multipliers=(1, 2), full_attention=(False, True), heads=(1, 1), head_channels=(4, 4), groups=4
)
SETTINGS = TrainSettings(batch=4, lr=1e-3, warmup=0, ema=0.9)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
BETAS = np.linspace(0.01, 0.3, 20)


def dataset(path, images=IMAGES) -> Dataset:
    return Dataset(images, Source(path))


@pytest.fixture(params=[UNET, LUCIDRAINS], ids=["unet", "lucidrains"])
def imported(request, tmp_path):
    """A run as `ddpmx import` writes it, with a free array of β."""
    torch.manual_seed(1)
    network = make_network(request.param)
    spec = ModelSpec((1, 8, 8), 20, "betas", betas=BETAS, prediction="v", clip=None)
    save_run(Imported("test", request.param, spec, dict(network.state_dict())), tmp_path / "imported")
    return tmp_path / "imported"


def test_it_begins_with_the_imported_network(imported, tmp_path):
    run = Trainer.fine_tune(tmp_path / "new", dataset(tmp_path), imported, SETTINGS, device="cpu")
    first, spec = load_network(imported)
    for network in (run.network, run.average):
        for name, tensor in first.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor)
    assert run.step == 0
    path = run.train(3)
    _, tuned = load_network(path)
    same = {"shape", "timesteps", "schedule", "prediction", "variance", "clip"}
    assert all(getattr(tuned, name) == getattr(spec, name) for name in same)
    assert np.array_equal(tuned.betas, BETAS)
    raw = load_network(path, "raw")[0].state_dict()
    assert any(not torch.equal(tensor, raw[name]) for name, tensor in first.state_dict().items())


def test_it_resumes_exactly_and_remembers_where_it_began(imported, tmp_path):
    whole = Trainer.fine_tune(tmp_path / "whole", dataset(tmp_path), imported, SETTINGS, device="cpu").train(6)
    Trainer.fine_tune(tmp_path / "parts", dataset(tmp_path), imported, SETTINGS, device="cpu").train(2)
    parts = Trainer.resume(tmp_path / "parts", dataset(tmp_path), device="cpu").train(6)
    for name in ("ema.safetensors", "weights.safetensors", "training.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    begun = load_training(parts).settings["from"]
    assert begun["path"].startswith(str(imported))
    assert begun["sha256"] == load_network(imported)[1].weights
    again = Trainer.resume(tmp_path / "parts", dataset(tmp_path), device="cpu")
    assert any(begun["path"] in line for line in advice.introduce(again, 10, cached=False))


def test_dropout_is_the_one_number_that_may_change(tmp_path):
    source = Trainer(tmp_path / "a", dataset(tmp_path), ModelSpec((1, 8, 8), 20), UNET, SETTINGS, device="cpu")
    source.train(1)
    run = Trainer.fine_tune(tmp_path / "b", dataset(tmp_path), tmp_path / "a", SETTINGS, dropout=0.5, device="cpu")
    assert run.network.config == dataclasses.replace(UNET, dropout=0.5)
    with pytest.raises(InputError, match="dropout"):
        Trainer.fine_tune(tmp_path / "c", dataset(tmp_path), tmp_path / "a", SETTINGS, dropout=1.5, device="cpu")


def test_a_record_s_images_are_read_as_the_run_s_were(tmp_path):
    """The images of `export --data`: on the same background, with the same white."""
    from ddpm_export.proof.proof import images_for

    (tmp_path / "data").mkdir()
    rgba = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "data" / "a.png")
    images = load_dataset(tmp_path / "data", channels=1, background=(40, 40, 40))
    Trainer(tmp_path / "run", images, ModelSpec((1, 8, 8), 20), UNET, SETTINGS, device="cpu").train(1)
    assert np.unique(images_for(tmp_path / "data", tmp_path / "run")).tolist() == [40]
    np.savez(tmp_path / "other.npz", images=IMAGES)
    assert np.array_equal(images_for(tmp_path / "other.npz", tmp_path / "run"), IMAGES)


def test_what_cannot_be_trained_is_said(tmp_path):
    config = dataclasses.replace(UNET, classes=3)
    tensors = dict(make_network(config).state_dict())
    save_run(Imported("test", config, ModelSpec((1, 8, 8), 20, classes=3), tensors), tmp_path / "classes")
    with pytest.raises(SpecError, match="has classes, and the images have none"):
        Trainer.fine_tune(tmp_path / "b", dataset(tmp_path), tmp_path / "classes", SETTINGS, device="cpu")
    with pytest.raises(FileFormatError, match="no checkpoint"):
        Trainer.fine_tune(tmp_path / "b", dataset(tmp_path), tmp_path / "none", SETTINGS, device="cpu")


def test_an_imported_run_is_not_resumed_and_the_way_is_named(imported):
    with pytest.raises(FileFormatError, match="was imported") as caught:
        recorded_source(imported)
    assert f"--from {imported}" in caught.value.hint


def test_new_networks_have_no_attention_without_effect_and_old_runs_may(tmp_path):
    odd = dataclasses.replace(UNET, attention=(16,))
    spec = ModelSpec((1, 8, 8), 20)
    with pytest.raises(InputError, match="attention 16 has no effect"):
        Trainer(tmp_path / "a", dataset(tmp_path), spec, odd, SETTINGS, device="cpu")
    save_run(Imported("test", odd, spec, dict(make_network(odd).state_dict())), tmp_path / "old")
    Trainer.fine_tune(tmp_path / "b", dataset(tmp_path), tmp_path / "old", SETTINGS, device="cpu").train(1)
    Trainer.resume(tmp_path / "b", dataset(tmp_path), device="cpu").train(2)


def test_the_white_of_an_npz_says_nothing_of_a_folder(tmp_path):
    from ddpm_export.proof.proof import images_for

    np.savez(tmp_path / "unit.npz", images=np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    images = load_dataset(tmp_path / "unit.npz", white=1)
    Trainer(tmp_path / "run", images, ModelSpec((1, 8, 8), 20), UNET, SETTINGS, device="cpu").train(1)
    (tmp_path / "greys").mkdir()
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "greys" / "a.png")
    assert len(np.unique(images_for(tmp_path / "greys", tmp_path / "run"))) == 64
