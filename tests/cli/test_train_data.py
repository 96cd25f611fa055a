"""`ddpmx train`: what it says of the images and of the network before it begins, and what has no effect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from conftest import FASHION

pytest.importorskip("torch", reason="not verified here: the train command (no torch)")
pytestmark = pytest.mark.torch

TINY = ("--width", 8, "--groups", 4, "--mult", "1,2", "--blocks", 1, "--batch", 4, "--sample-every", 0, "--warmup", 0)
RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        pixels = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}", "PNG")
    (folder / "labels.csv").write_text("0,cat")
    return folder


def test_the_first_lines_say_what_is_trained_on_what(ddpmx, photos, tmp_path):
    out = tmp_path / "run"
    done = ddpmx(
        "train", "--data", photos, "--channels", 3, "--background", "#102030", "--out", out, *TINY, "--steps", 2
    )
    assert done.code == 0, done
    for part in (
        "4 images of 8×8×3, none mirrored",
        "network: 8×8 (8, attention) → 4×4 (16)",
        "4 images: 4 with transparency (it becomes #102030, --background); not read: 1 .csv (labels.csv)",
        "images-cache.npz",
    ):
        assert part in done.out, part
    assert "Note" not in done.out
    settings = json.loads((out / "checkpoints" / "00000002" / "training.json").read_text())["settings"]
    assert settings["train"]["hflip"] is False
    assert settings["data"]["background"] == [0x10, 0x20, 0x30]
    resumed = ddpmx("train", "--out", out, "--resume", "--steps", 3)
    assert "it becomes #102030" in resumed.out, resumed
    flipped = ddpmx("train", "--data", photos, "--out", tmp_path / "other", *TINY, "--steps", 1, "--flip", "--no-cache")
    assert "half of them mirrored" in flipped.out
    assert not (tmp_path / "other" / "images-cache.npz").exists()


def test_a_run_among_its_images_is_resumed(ddpmx, photos):
    run = photos / "run"
    done = ddpmx("train", "--data", photos, "--out", run, *TINY, "-T", 2, "--steps", 1, "--sample-every", 1)
    assert done.code == 0, done
    assert (run / "samples" / "grid-00000001.png").is_file()
    resumed = ddpmx("train", "--out", run, "--resume", "--steps", 2, "--sample-every", 0)
    assert resumed.code == 0, resumed
    assert "4 images of" in resumed.out


@pytest.mark.parametrize("steps", [-5, 0, 10**24])
def test_a_number_of_steps_that_cannot_be_is_refused_before_anything_is_read(refused, tmp_path, steps):
    for flags in (["--data", tmp_path / "none", "--out", tmp_path / "run"], ["--out", tmp_path / "run", "--resume"]):
        assert f"--steps must be a whole number from 1 to 1,000,000,000,000, not {steps}" in refused(
            "train", *flags, "--warmup", 0, "--steps", steps
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("--save-minutes", 0), ("--save-minutes", "nan"), ("--sample-every", -1)])
def test_the_flag_that_is_wrong_is_the_one_that_is_named(refused, tmp_path, flag, value):
    err = refused("train", "--data", tmp_path, flag, value)
    assert err.startswith(f"Error: {flag} must be "), err
    assert err.count("--") == 1, err


def test_what_will_not_come_out_well_is_said_before_and_after(ddpmx, tmp_path):
    short = ("--steps", 2, "-T", 50, "--no-ema-ramp", "--warmup", 4)
    done = ddpmx("train", "--data", FASHION, "--out", tmp_path / "run", *TINY, *short)
    assert done.code == 0, done
    for part in (
        "√ᾱ_T = 0.78",
        "a mean of 0.40",
        "--scale-betas",
        "rises over 4 steps",
        "will hold 100%",
        "holds 100%",
    ):
        assert part in done.out, part
    assert f"next: ddpmx export {tmp_path / 'run'} --weights raw" in done.out
    scaled = ddpmx("train", "--data", FASHION, "--out", tmp_path / "scaled", *TINY, *short[:4], "--scale-betas")
    assert "Note" not in scaled.out, scaled
    spec = json.loads((tmp_path / "scaled" / "checkpoints" / "00000002" / "spec.json").read_text())["model"]
    assert spec["schedule_params"] == {"beta_start": 0.002, "beta_end": 0.4}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention", "10"], "--attention 16"),
        (["--scale-betas", "--schedule", "cosine"], "not to be scaled"),
        (["--background", "black"], "without it"),
        (["--weights", "raw"], "--from"),
        (["--max-megapixels", "0"], "--max-megapixels"),
        (["--resume", "--from", "x"], "one of the two"),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else None,
)
def test_what_has_no_effect_is_refused(refused, tmp_path, flags, message):
    out = tmp_path / "run"
    assert message in refused("train", "--data", FASHION, "--out", out, "--steps", 1, *TINY, *flags)
    assert not out.exists()


def test_images_that_are_nearly_black_are_told(ddpmx, tmp_path):
    np.savez(tmp_path / "bits.npz", images=RNG.integers(0, 2, (6, 8, 8), dtype=np.uint8))
    dark = ddpmx("train", "--data", tmp_path / "bits.npz", "--out", tmp_path / "dark", *TINY, "--steps", 2)
    assert "no number in the images is above 1 of 255" in dark.out, dark
    right = ddpmx("train", "--data", tmp_path / "bits.npz", "--out", tmp_path / "a", *TINY, "--steps", 2, "--white", 1)
    assert "Note" not in right.out, right
    assert "Note" not in ddpmx("train", "--out", tmp_path / "a", "--resume", "--steps", 3).out


def test_a_background_that_is_no_colour(refused, photos, tmp_path):
    assert "--background must be a colour" in refused(
        "train", "--data", photos, "--out", tmp_path / "run", "--background", "nocolour"
    )
    assert "--white has no effect" in refused("train", "--data", photos, "--out", tmp_path / "run", "--white", 4095)
    assert "--channels 3" in refused("train", "--data", photos, "--out", tmp_path / "run", "--background", "black")


def test_training_begins_with_another_run(ddpmx, refused, photos, tmp_path):
    first, out = tmp_path / "first", tmp_path / "tuned"
    tuning = ("--batch", 2, "--sample-every", 0, "--warmup", 0, "--steps", 1)
    assert ddpmx("train", "--data", FASHION, "--out", first, *TINY, "--steps", 1, "-T", 60, "--scale-betas").code == 0
    done = ddpmx("train", "--data", photos, "--from", first, "--out", out, *tuning)
    assert done.code == 0, done
    assert f"begun with the ema weights of {first}" in done.out
    assert "4 images of 16×16×1" in done.out, "brought to the network's size and channels"
    assert ddpmx("train", "--out", out, "--resume", "--steps", 2).code == 0
    for source, message in (("nowhere", "no checkpoint"), (FASHION, "ddpmx import"), ("a.onnx", "exported from")):
        assert message in refused("train", "--data", photos, "--from", source, "--out", tmp_path / "x")
    assert "--timesteps" in refused("train", "--data", photos, "--from", first, "--out", tmp_path / "x", "-T", 50)
    wrong = refused("train", "--data", photos, "--from", first, "--out", tmp_path / "x", "--size", 8)
    assert "16×16×1" in wrong
    assert not (tmp_path / "x").exists()


def test_the_first_command_needs_nothing_but_a_folder(ddpmx, tmp_path, monkeypatch):
    """Photos of different sizes: the preset's size is taken, and the run is named after the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(40, 50), (64, 48), (33, 70)]):
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    done = ddpmx("train", "photos", "--steps", 1, "--width", 8, "--groups", 4, "--batch", 2, "--device", "cpu")
    assert done.code == 0, done
    assert "3 images of 32×32×3" in done.out
    assert "s a step (measured)" in done.out
    assert (tmp_path / "runs" / "photos" / "data.png").is_file()
    values = (tmp_path / "runs" / "photos" / "config.toml").read_text()
    assert "size = [32, 32]" in values
    assert "lr = 0.001" in values, "of the preset tiny"
    again = ddpmx("train", "--config", "runs/photos/config.toml", "--out", "runs/again", "--device", "cpu")
    assert again.code == 0, again
    first, second = (tmp_path / "runs" / name / "checkpoints" / "00000001" for name in ("photos", "again"))
    assert (first / "ema.safetensors").read_bytes() == (second / "ema.safetensors").read_bytes()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(ddpmx, photos, tmp_path):
    done = ddpmx("train", photos, "--channels", 3, "--out", tmp_path / "run", *TINY, "--dry-run", "--device", "cpu")
    assert done.code == 0, done
    for part in ("parameters ", "GFLOP an image", "GB for weights", "s a step, measured on cpu", "nothing was written"):
        assert part in done.out, part
    assert not (tmp_path / "run").exists()


def test_classes_are_the_folders(ddpmx, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(2):
            image = Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8))
            image.save(tmp_path / "pets" / name / f"{number}.png")
    done = ddpmx(
        "train",
        tmp_path / "pets",
        "--classes",
        "--out",
        tmp_path / "run",
        *TINY,
        "--steps",
        1,
        "-T",
        5,
        "--device",
        "cpu",
    )
    assert done.code == 0, done
    assert "cats" in done.out
    spec = json.loads((tmp_path / "run" / "checkpoints" / "00000001" / "spec.json").read_text())
    assert spec["model"]["classes"] == 2
    assert spec["model"]["null_class"] is True
    assert spec["model"]["class_names"] == ["cats", "dogs"]
    assert spec["network"]["null_class"] is True
    drawn = ddpmx("generate", tmp_path / "run", "-n", 2, "--label", 1, "--guidance", 2, "--out", tmp_path / "drawn")
    assert drawn.code == 0, drawn


def test_curves_are_drawn_by_a_command(ddpmx, refused, photos, tmp_path):
    pytest.importorskip("matplotlib", reason="not verified here: the curves of a run (no matplotlib)")
    run = tmp_path / "run"
    done = ddpmx("train", photos, "--out", run, *TINY, "--steps", 2, "--log-every", 1, "--device", "cpu")
    assert done.code == 0, done
    drawn = ddpmx("plot", run)
    assert drawn.code == 0, drawn
    with Image.open(run / "curves.png") as picture:
        assert picture.size[0] > 3 * picture.size[1]
    assert "no log" in refused("plot", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--other-images"], "without --resume"),
        (["--config", "none.toml"], "not a configuration"),
        (["--resume", "--preset", "tiny"], "--preset"),
        (["--resume", "--batch", "3"], "--batch"),
        (["--tensorboard", "--steps", "1"], "pip install tensorboard"),
        (["--wandb", "--steps", "1"], "pip install wandb"),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else None,
)
def test_new_flags_that_contradict(refused, photos, tmp_path, monkeypatch, flags, message):
    import sys

    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert message in refused("train", photos, "--out", tmp_path / "run", *TINY[:-2], *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()
