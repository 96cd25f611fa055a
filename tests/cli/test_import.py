"""`ddpmx import` and `ddpmx convert`: from another project's file to a run that all commands take, and back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the import and convert commands (no torch)")
pytest.importorskip("safetensors", reason="not verified here: the import and convert commands (no safetensors)")

import torch

from conftest import FASHION
from ddpm_export.importers.registry import Imported, convert, save_run
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training.checkpoint import load_network, load_training
from ddpmx.formats.spec import ModelSpec
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONFIG = UNetConfig(3, 3, (8, 8), 32, (1, 2), 1, (4,), 0.0, 32)


def ours(config: UNetConfig = CONFIG, **spec: object) -> Imported:
    network = UNet(config)
    rerandomise(network)
    return Imported("ddpmx", config, ModelSpec((3, 8, 8), **spec), dict(network.state_dict()))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path):
    """A diffusers pipeline, as a folder."""
    convert(ours(variance="fixed_small"), "diffusers", tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def bare(tmp_path):
    """A bare state dict: weights without any settings."""
    convert(ours(), "pesser", tmp_path / "bare")
    return tmp_path / "bare" / "model.ckpt"


def test_import_prints_the_source_of_each_setting_and_writes_a_run(ddpmx, folder, tmp_path):
    done = ddpmx("import", folder, "-o", tmp_path / "run")
    assert done.code == 0, done
    for line in (
        "linear  (scheduler_config.json: linear)",
        "8x8  (config.json)",
        "checkpoint of",
        "next: ddpmx export",
    ):
        assert line in done.out
    network, spec = load_network(tmp_path / "run")
    assert spec.variance == "fixed_small"
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in ours().tensors.items())
    assert load_training(tmp_path / "run").settings["imported"]["from"] == "diffusers"
    info = json.loads(ddpmx("info", tmp_path / "run", "--json").out)
    assert info["spec"]["variance"] == "fixed_small"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]


def test_a_schedule_without_a_formula_survives(ddpmx, folder, tmp_path):
    file = folder / "scheduler" / "scheduler_config.json"
    betas = [0.01 + 0.001 * i for i in range(40)]
    file.write_text(json.dumps({**json.loads(file.read_text()), "trained_betas": betas}))
    done = ddpmx("import", folder, "-o", tmp_path / "run")
    assert done.code == 0, done
    spec = load_network(tmp_path / "run")[1]
    np.testing.assert_array_equal(spec.make_schedule().betas, betas)
    assert ddpmx("convert", tmp_path / "run", "--to", "diffusers", "-o", tmp_path / "back").code == 0
    back = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert back["trained_betas"] == betas


def test_too_few_timesteps_for_the_schedule_are_warned_of(ddpmx, tmp_path):
    convert(ours(variance="fixed_small", timesteps=50), "diffusers", tmp_path / "theirs")
    done = ddpmx("import", tmp_path / "theirs", "-o", tmp_path / "run")
    assert done.code == 0, done
    assert "Note: √ᾱ_T = 0.78" in done.out
    assert "draws a mean of 0.40" in done.out


def test_classes_and_a_learned_variance_survive(ddpmx, tmp_path):
    config = dataclasses.replace(CONFIG, out_channels=6, classes=5, head_channels=16, norm_eps=1e-5)
    convert(ours(config, variance="learned_range", classes=5), "diffusers", tmp_path / "theirs")
    assert ddpmx("import", tmp_path / "theirs", "-o", tmp_path / "run").code == 0
    network, spec = load_network(tmp_path / "run")
    assert network.config == config
    assert (spec.classes, spec.variance) == (5, "learned_range")


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "fp16"])
def test_an_import_is_exported_checked_and_built(ddpmx, folder, tmp_path, precision):
    assert ddpmx("import", folder, "-o", tmp_path / "run").code == 0
    try:
        import tensorrt_rtx  # noqa: F401 - whether it is there

        plan = "--plan"
    except ImportError:
        plan = "--no-plan"
    flags = [plan] if precision == "fp32" else [plan, f"--{precision}"]
    done = ddpmx("export", tmp_path / "run", "-o", tmp_path / "model.onnx", *flags)
    assert done.code == 0, done
    assert "NOT VERIFIED" not in done.out
    if plan == "--no-plan":
        pytest.skip("not verified here: a plan of an imported network (no TensorRT-RTX)")
    assert json.loads(ddpmx("info", tmp_path / "model.plan", "--json").out)["kind"] == "plan"


def test_open_settings_are_an_error_that_lists_the_flags(refused, bare, tmp_path):
    error = refused("import", bare, "-o", tmp_path / "run")
    for text in ("--size", "--timesteps", "--variance fixed_large|fixed_small", "--schedule linear|quad", "--probe"):
        assert text in error
    assert not (tmp_path / "run").exists()


FLAGS = ("--size", 8, "-T", 500, "--schedule", "quad", "--variance", "fixed_small", "--clip", "none")


def test_flags_set_settings_and_are_noted(ddpmx, bare, tmp_path):
    done = ddpmx("import", bare, "-o", tmp_path / "run", *FLAGS, "--set", "beta_end=0.03")
    assert done.code == 0, done
    spec = load_network(tmp_path / "run")[1]
    assert (spec.shape, spec.timesteps, spec.schedule, spec.clip) == ((3, 8, 8), 500, "quad", None)
    assert spec.schedule_params["beta_end"] == 0.03
    assert "(set by the user)" in done.out
    assert "assumed: the only one in its code" in done.out  # it predicts ε


def test_the_default_name_of_a_run(ddpmx, bare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ddpmx("import", bare, *FLAGS).code == 0
    assert (tmp_path / "runs" / "model" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "heds=4"), "heds"),
        (("--set", "heads"), "NAME=VALUE"),
        (("--set", "size=8x8"), "twice"),
        (("--heads", "4"), "not a setting of a pesser checkpoint"),
        (("--schedule", "sigmoid"), "schedule cannot be"),
        (("--weights", "best"), "ema and raw"),
        (("--from", "me"), "--from 'me'"),
        (("--from", "ddpm-torch"), "not a checkpoint of ddpm-torch"),
        (("--clip", "much"), "clip cannot be"),
        (("--model", "imagenet"), "model cannot be"),
        (("-T", "0"), "T must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_bad_flags_are_refused(refused, bare, tmp_path, flags, message):
    base = [flag for flag in FLAGS if "schedule" not in str(flags) or flag not in ("--schedule", "quad")]
    assert message in refused("import", bare, "-o", tmp_path / "run", *base, *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(refused, ddpmx, folder, tmp_path):
    assert ddpmx("import", folder, "-o", tmp_path / "run").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "not an empty folder" in refused("import", folder, "-o", tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_full_disk_leaves_nothing_behind(refused, folder, tmp_path, monkeypatch):
    from ddpm_export.training import tensor_files

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    assert "No space left" in refused("import", folder, "-o", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


# --- converting ------------------------------------------------------------------------------------------------------


def test_convert_restores_what_was_imported(ddpmx, bare, tmp_path):
    assert ddpmx("import", bare, "-o", tmp_path / "run", *FLAGS).code == 0
    done = ddpmx("convert", tmp_path / "run", "--to", "pesser", "-o", tmp_path / "back")
    assert done.code == 0, done
    assert "model.ckpt" in done.out
    before, after = (torch.load(file, weights_only=True) for file in (bare, tmp_path / "back" / "model.ckpt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_refuses(refused, ddpmx, folder, gaussian_onnx, tmp_path):
    assert ddpmx("import", folder, "-o", tmp_path / "run").code == 0
    out = ("-o", tmp_path / "out")
    assert "--to 'lucidrains'" in refused("convert", tmp_path / "run", "--to", "lucidrains", *out)
    assert "no checkpoint there" in refused("convert", tmp_path / "none", "--to", "diffusers", *out)
    assert f"Hint: ddpmx import {folder} " in refused("convert", folder, "--to", "diffusers", *out)
    model = refused("convert", gaussian_onnx, "--to", "diffusers", *out)
    assert "a model file, not a checkpoint" in model
    assert "import" not in model, "import refuses it as well"
    assert "not an empty folder" in refused("convert", tmp_path / "run", "--to", "diffusers", "-o", tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_a_network_with_further_inputs_is_shown_and_not_converted(refused, ddpmx, tmp_path):
    config = dataclasses.replace(CONFIG, self_condition=True, condition=2)
    save_run(ours(config, self_condition=True, condition=2), tmp_path / "run")
    shown = " ".join(ddpmx("info", tmp_path / "run").out.split())
    assert "takes: x̂_0 of the step before (self-conditioning)" in shown
    assert "condition: 2 channels of the image's size" in shown
    assert "self_condition; condition 2" in shown
    error = refused("convert", tmp_path / "run", "--to", "diffusers", "-o", tmp_path / "out")
    assert "no network of diffusers has the inputs x0_prev and cond" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- real images decide ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_scheduler(trained, tmp_path):
    """A trained network in diffusers' format, without its scheduler."""
    network, spec = load_network(trained.run)
    convert(Imported("ddpmx", network.config, spec, dict(network.state_dict())), "diffusers", tmp_path / "trained")
    (tmp_path / "trained" / "scheduler" / "scheduler_config.json").unlink()
    return tmp_path / "trained"


@pytest.mark.slow
def test_real_images_decide_open_settings(ddpmx, without_scheduler, tmp_path):
    done = ddpmx("import", without_scheduler, "-o", tmp_path / "run", "-T", 1000, "--probe", FASHION)
    assert done.code == 0, done
    spec = load_network(tmp_path / "run")[1]
    assert (spec.schedule, spec.prediction) == ("linear", "eps")
    assert "the smallest error of ε" in done.out
    table = done.out[done.out.index("mean square of") :].splitlines()[2:14]
    errors = [float(line.split()[0]) for line in table]
    assert len(errors) == 12
    assert errors == sorted(errors)


@pytest.mark.slow
def test_images_that_decide_nothing_are_an_error(refused, without_scheduler, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise)
    error = refused("import", without_scheduler, "-o", tmp_path / "run", "-T", 1000, "--probe", tmp_path / "noise.npz")
    assert "no candidate finds" in error or "do not decide" in error
    assert not (tmp_path / "run").exists()


def test_settings_that_images_cannot_decide_stay_open(refused, bare, tmp_path):
    error = refused("import", bare, "-o", tmp_path / "run", "--probe", FASHION)
    assert "--variance" in error
    assert "the file does not have these settings: size, timesteps, variance" in error


def test_images_of_another_size_are_refused(refused, bare, tmp_path):
    flags = [flag for flag in FLAGS if flag not in ("--schedule", "quad")]
    assert "images of 16×16×1" in refused("import", bare, "-o", tmp_path / "run", *flags, "--probe", FASHION)


# --- the hub ---------------------------------------------------------------------------------------------------------


def hub(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`ddpmx import` with its own hub cache, offline."""
    return subprocess.run(
        [sys.executable, "-m", "ddpmx_cli.main", "import", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )


def test_an_id_on_the_hub(folder, tmp_path):
    pytest.importorskip("huggingface_hub", reason="not verified here: hf: ids (no huggingface_hub)")
    cached = tmp_path / "hf" / "hub" / "models--me--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / revision)
    done = hub(tmp_path, "hf:me/tiny")
    assert done.returncode == 0, done
    assert load_network(tmp_path / "runs" / "tiny")[1].variance == "fixed_small"


def test_an_id_without_a_network_is_a_clear_error(tmp_path):
    pytest.importorskip("huggingface_hub", reason="not verified here: hf: ids (no huggingface_hub)")
    done = hub(tmp_path, "hf:me/other")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: hf:me/other cannot be downloaded")
    assert "Traceback" not in done.stderr
    assert "not the name of a repository" in hub(tmp_path, "hf:me/o/t/her").stderr
