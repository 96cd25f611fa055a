"""Choices of a new run: presets, TOML files and flags, the later of which win; what a run writes down begins it again."""

from __future__ import annotations

import dataclasses

import pytest

from ddpm_export.networks.unet_config import cifar10, lsun256
from ddpm_export.training.config import (
    CONFIG,
    PRESET_SIZES,
    PRESETS,
    RunConfig,
    default_preset,
    read_config,
    resolve,
    write_config,
)
from ddpm_export.training.settings import TrainSettings
from ddpmx.errors import FileFormatError, InputError


def test_the_presets_of_the_paper_are_the_paper_s():
    """Appendix B of Ho et al.: CIFAR-10, and 256×256 (whose likelihoods and samples are of σ² = β̃)."""
    small, large = resolve("cifar10"), resolve("256")
    assert small.network(small.spec((3, 32, 32), None, None)) == cifar10()
    assert large.network(large.spec((3, 256, 256), None, None)) == lsun256()
    assert small.settings() == TrainSettings(batch=128, lr=2e-4, warmup=5000, ema=0.9999)
    assert large.settings() == TrainSettings(batch=64, lr=2e-5, warmup=5000, ema=0.9999)
    assert (small.steps, large.steps) == (800_000, 500_000)
    assert (small.variance, large.variance) == ("fixed_large", "fixed_small")


def test_every_preset_can_be_built_and_says_how_large_it_is():
    torch = pytest.importorskip("torch", reason="not verified here: the sizes of presets (no torch)")
    from ddpm_export.networks.unet import UNet

    for name, (text, _) in PRESETS.items():
        config = resolve(name)
        config.settings()
        side = PRESET_SIZES[name]
        with torch.device("meta"):
            network = UNet(config.network(config.spec((3, side, side), None, None)))
        parameters = sum(p.numel() for p in network.parameters())
        said = [float(words) for words in text.replace(",", "").split() if words.replace(".", "").isdigit()]
        assert any(parameters / 1e6 == pytest.approx(number, rel=0.06) for number in said), (name, parameters, text)
    assert default_preset(True) == "cifar10"
    assert default_preset(False) == "tiny"


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    (tmp_path / "run.toml").write_text(
        'steps = 7\nbatch = 9\nmult = [1, 2]\nsize = "64x48"\ngrad-clip = 2\nflip = true\n'
    )
    file = read_config(tmp_path / "run.toml")
    chosen = resolve("tiny", file, {"batch": 5})
    assert (chosen.steps, chosen.batch, chosen.mult, chosen.size) == (7, 5, (1, 2), (64, 48))
    assert (chosen.grad_clip, chosen.flip) == (2.0, True)
    assert (chosen.width, chosen.lr) == (32, 1e-3), "the preset's"


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_run_writes_down_is_read_again_as_the_same(tmp_path, preset):
    config = dataclasses.replace(
        resolve(preset), size=(64, 48), crop=(16, 32), min_snr=5.0, attention=(8,), self_condition=True
    )
    write_config(tmp_path, config, data=tmp_path / 'a "quoted" name')
    read = read_config(tmp_path / CONFIG)
    assert read.pop("data") == str(tmp_path / 'a "quoted" name')
    assert resolve("tiny", read) == config


def test_every_field_survives_the_file(tmp_path):
    """Each field with a value that is not its default, so that none is forgotten."""
    changed = {}
    for field in dataclasses.fields(RunConfig):
        kind, value = str(field.type), getattr(RunConfig(), field.name)
        if kind == "bool":
            changed[field.name] = not value
        elif kind.startswith("int"):
            changed[field.name] = (value or 0) + 3
        elif kind.startswith("float"):
            changed[field.name] = 0.125
        elif kind.startswith("tuple"):
            changed[field.name] = (8, 16)
    changed |= {"schedule": "cosine", "prediction": "v", "variance": "learned", "loss": "vlb"}
    config = dataclasses.replace(RunConfig(), timestep_sampling="importance", **changed)
    write_config(tmp_path, config, data=tmp_path)
    read = read_config(tmp_path / CONFIG)
    del read["data"]
    assert RunConfig(**read) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bach = 4", "there is no key 'bach'"),
        ("batch = 4.5", "batch must be a whole number"),
        ("batch = true", "batch must be a whole number"),
        ('lr = "fast"', "lr must be a number"),
        ("flip = 1", "flip must be true or false"),
        ("mult = [1, 2.5]", "mult must be whole numbers"),
        ('size = "large"', "size must be whole numbers"),
        ("schedule = 3", "schedule must be text"),
        ("lr_decay = true\nlr-decay = true", "is there twice"),
    ],
)
def test_wrong_keys_and_values(tmp_path, text, says):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        read_config(tmp_path / "run.toml")


def test_a_key_that_is_nearly_one_is_hinted_at(tmp_path):
    (tmp_path / "run.toml").write_text("bach = 4")
    with pytest.raises(InputError) as caught:
        read_config(tmp_path / "run.toml")
    assert caught.value.hint == "batch?"


@pytest.mark.parametrize("content", [b"batch = ", b"\xff\xfe", b"a = 1\n" * 400_000], ids=["cut", "no text", "large"])
def test_files_that_are_not_toml(tmp_path, content):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(FileFormatError, match="not a configuration in TOML"):
        read_config(tmp_path / "run.toml")
    with pytest.raises(FileFormatError, match="not a configuration in TOML"):
        read_config(tmp_path / "none.toml")


def test_label_dropout_has_a_default_where_there_are_classes():
    assert resolve("tiny").settings().label_dropout == 0
    config = resolve("tiny", {"classes": True})
    assert config.settings().label_dropout == 0.1
    assert config.spec((3, 32, 32), 10, None).null_class
    without = resolve("tiny", {"classes": True, "label_dropout": 0.0})
    assert not without.spec((3, 32, 32), 10, None).null_class
    with pytest.raises(InputError, match="no effect without classes"):
        resolve("tiny", {"label_dropout": 0.1}).settings()


@pytest.mark.parametrize(("choice", "says"), [({"width": 0}, "width must"), ({"mult": (0,)}, "mult must")])
def test_numbers_of_the_network_are_refused_by_the_names_of_choices(choice, says):
    config = resolve("tiny", choice)
    with pytest.raises(InputError, match=says):
        config.network(config.spec((3, 32, 32), None, None))


def test_a_learned_variance_has_a_network_with_two_outputs():
    config = resolve("tiny", {"variance": "learned_range", "loss": "hybrid"})
    assert config.network(config.spec((3, 32, 32), None, None)).out_channels == 6
