"""`ddpmx generate`, on toy models: needs neither torch nor onnx."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpmx import ModelSpec, load
from ddpmx.formats.png_text import read_png_text
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import FEW_STEPS
from oracles.conditioning import CLASSES


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        (("--spacing", "leading", "--steps", 501), 500),
        (("--spacing", "leading", "--steps", 500), None),
        (("--spacing", "trailing", "--steps", 501), None),
        (("--spacing", "quad", "--steps", 10), None),
        ((), None),
    ],
)
def test_a_chain_that_begins_where_an_image_is_expected_says_so(ddpmx, gaussian_onnx, tmp_path, flags, begins):
    done = ddpmx("generate", gaussian_onnx, *flags, "-n", 1, "--out", tmp_path / "one.png")
    assert done.code == 0, done
    kept = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    note = "" if begins is None else f"begin at t = {begins}, where √ᾱ = {kept[begins]:.2f}, and x is pure noise there"
    assert note in done.out
    assert ("Note: these" in done.out) == (begins is not None)


def test_images_grid_and_animation_have_their_names(ddpmx, gaussian_onnx, tmp_path):
    out = tmp_path / "samples"
    done = ddpmx("generate", "--engine", gaussian_onnx, "-n", 5, "--steps", 4, "--out", out, "--grid", "--animate")
    assert done.code == 0, done
    assert files(out) == [f"0000{i}.png" for i in range(5)] + ["grid.png", "x0.gif"]
    assert Image.open(out / "00000.png").size == (8, 8)
    assert Image.open(out / "x0.gif").n_frames == 4
    assert "onnxruntime" in done.out
    assert "CPUExecutionProvider" in done.out


def test_parts_of_a_seed_are_the_same_files(ddpmx, gaussian_onnx, tmp_path):
    common = ("generate", "--engine", gaussian_onnx, "--steps", 5, "--seed", 7)
    for out, *parts in (("whole", (8, 0)), ("halves", (4, 0), (4, 4)), ("ones", *((1, i) for i in range(8)))):
        for n, first in parts:
            assert ddpmx(*common, "-n", n, "--first", first, "--out", tmp_path / out).code == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 8
    for other in ("halves", "ones"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == whole
    ddpmx(*common[:-1], 8, "-n", 8, "--out", tmp_path / "other seed")
    assert (tmp_path / "other seed" / "00000.png").read_bytes() != whole["00000.png"]


@pytest.mark.parametrize(
    "sampling", [(), ("--sampler", "ddim"), ("--sampler", "ddim", "--eta", 1), ("--sampler", "dpmpp_2m")]
)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "quad", "karras"])
def test_every_sampler_draws_what_the_runtime_draws(ddpmx, gaussian_onnx, tmp_path, sampling, spacing):
    done = ddpmx(
        "generate",
        "--engine",
        gaussian_onnx,
        "-n",
        2,
        "--steps",
        20,
        "--spacing",
        spacing,
        *sampling,
        "--out",
        tmp_path,
    )
    assert done.code == 0, done
    how = dict(zip((flag.strip("-") for flag in sampling[::2]), sampling[1::2], strict=True)) or {"sampler": "unipc"}
    with load(gaussian_onnx) as pipeline:
        drawn = pipeline.generate(2, steps=20, spacing=spacing, **how)
    np.testing.assert_array_equal(
        np.stack([np.asarray(Image.open(tmp_path / f"0000{i}.png")) for i in range(2)]), drawn
    )


def test_images_of_two_runs_are_not_mixed(ddpmx, refused, gaussian_onnx, tmp_path):
    common = ("generate", "--engine", gaussian_onnx, "--out", tmp_path, "--steps")

    def content():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert "from before" not in ddpmx(*common, 2, "-n", 3, "--grid").out
    before = content()
    for other in ((2, "--seed", 1), (3,), (2, "--seed", 1, "--first", 7), (2, "--sampler", "ddim")):
        assert refused(*common, *other, "-n", 2)
    assert "seed 0, and now 1" in refused(*common, 2, "-n", 2, "--seed", 1)
    assert content() == before
    assert ddpmx(*common, 2, "-n", 2).code == 0, "the same run again"
    assert content() == before
    assert "from before" in ddpmx(*common, 2, "-n", 2, "--first", 3).out, "further images of it"
    assert files(tmp_path) == [*(f"0000{i}.png" for i in range(5)), "grid.png"]
    done = ddpmx(*common, 2, "-n", 2, "--seed", 1, "--overwrite")
    assert "6 pictures of another run were replaced" in done.out
    assert files(tmp_path) == ["00000.png", "00001.png"]
    assert content()["00000.png"] != before["00000.png"]


def test_few_steps_without_a_sampler_are_run_by_unipc_and_the_result_says_so(ddpmx, gaussian_onnx, tmp_path):
    with load(gaussian_onnx) as pipeline:
        for flags, how in (
            (["--steps", 20], {"steps": 20, "sampler": "unipc", "spacing": "trailing"}),
            (["--steps", 20, "--eta", 0.5], {"steps": 20, "sampler": "ddim", "spacing": "trailing", "eta": 0.5}),
            (["--steps", 20, "--sampler", "ancestral"], {"steps": 20}),
            (["--steps", 20, "--variance", "fixed_small"], {"steps": 20, "variance": "fixed_small"}),
            (["--steps", FEW_STEPS], {"steps": FEW_STEPS}),
        ):
            done = ddpmx("generate", gaussian_onnx, *flags, "--out", tmp_path / "one.png", "--overwrite")
            drawn = pipeline.generate(1, **how)[0]
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), drawn)
            chosen = "spacing" in how
            assert f"of {how.get('sampler', 'ancestral')}" in done.out
            assert ("with trailing spacing (the default below" in done.out) == chosen
    asked = ddpmx("generate", gaussian_onnx, "--steps", 20, "--spacing", "leading", "--out", tmp_path / "two.png")
    assert "20 steps of unipc (the default below 100 steps) with leading spacing, seed" in asked.out


def test_one_image_or_one_sheet_is_written_to_one_file(ddpmx, refused, gaussian_onnx, tmp_path):
    common = ("generate", gaussian_onnx, "--steps", 3)
    ddpmx(*common, "-n", 2, "--out", tmp_path / "folder", "--grid")
    assert ddpmx(*common, "--out", tmp_path / "new" / "one.PNG", "--first", 1).code == 0
    assert ddpmx(*common, "-n", 2, "--grid", "--out", tmp_path / "new" / "sheet.png").code == 0
    assert files(tmp_path / "new") == ["one.PNG", "sheet.png"]
    for mine, other in (("one.PNG", "00001.png"), ("sheet.png", "grid.png")):
        assert (tmp_path / "new" / mine).read_bytes() == (tmp_path / "folder" / other).read_bytes()
    for flags, message in (
        (["-n", 2, "--out", tmp_path / "x.png"], "there are 2 images"),
        (["--animate", "--out", tmp_path / "x.png"], "an animation is another one"),
        (["--out", tmp_path / "x.jpg"], "written as PNG"),
    ):
        assert message in refused(*common, *flags)
    (tmp_path / "a.png").mkdir()  # a folder is a folder
    assert ddpmx(*common, "-n", 2, "--out", tmp_path / "a.png").code == 0
    assert files(tmp_path / "a.png") == ["00000.png", "00001.png"]


def test_a_picture_or_a_sheet_of_another_run_is_replaced_on_request_only(ddpmx, refused, gaussian_onnx, tmp_path):
    one, folder = tmp_path / "x.png", tmp_path / "folder"
    common = ("generate", gaussian_onnx, "-n", 1, "--grid")
    for out, picture in ((one, one), (folder, folder / "grid.png")):
        assert ddpmx(*common, "--steps", 2, "--out", out).code == 0
        for image in folder.glob("0*.png"):
            image.unlink()
        before = picture.read_bytes()
        err = refused(*common, "--steps", 3, "--out", out)
        assert f"refusing to overwrite {picture}: it is of another run\nNote: steps 2, and now 3" in err
        assert picture.read_bytes() == before
        assert ddpmx(*common, "--steps", 2, "--out", out).code == 0, "the same run again"
        assert ddpmx(*common, "--steps", 3, "--out", out, "--overwrite").code == 0
        assert picture.read_bytes() != before


@pytest.mark.parametrize("name", ["x.png", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_drew_there_meanwhile_counts(ddpmx, gaussian_onnx, tmp_path, monkeypatch, name, overwrite):
    out, other = tmp_path / name, tmp_path / "other" / name
    grid = ["--grid"] * (name == "x.png")
    common = ("generate", gaussian_onnx, *grid, "--steps")
    assert ddpmx(*common, 2, "-n", 3, "--out", other).code == 0
    drawn = Pipeline.generate

    def meanwhile(*arguments, **named):
        os.rename(other, out)  # an empty folder is replaced
        return drawn(*arguments, **named)

    monkeypatch.setattr(Pipeline, "generate", meanwhile)
    done = ddpmx(*common, 3, "-n", 2, "--out", out, *["--overwrite"] * overwrite)
    assert done.code == (0 if overwrite else 2), done
    assert ("steps 2, and now 3" in done.err) == (not overwrite)
    for picture in [out] if out.is_file() else out.iterdir():
        assert read_png_text(picture)[1]["steps"] == ("3" if overwrite else "2")
    if name == "folder":
        assert files(out) == [f"0000{i}.png" for i in range(2 if overwrite else 3)]


def test_the_model_is_named_once(ddpmx, refused, gaussian_onnx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "both were passed" in refused("generate", gaussian_onnx, "--engine", gaussian_onnx)
    assert "ddpmx generate garments" in refused("generate")
    err = refused("generate", "garmets", "--steps", 2)
    assert "neither a model that comes with ddpmx nor a file" in err
    assert "garments" in err.split("Hint")[1]
    assert files(tmp_path) == []


def test_the_model_that_comes_along_draws_without_any_file(ddpmx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ddpmx("generate", "garments", "-n", 2, "--grid", "--steps", 3)
    assert done.code == 0, done
    assert files(tmp_path / "samples") == ["00000.png", "00001.png", "grid.png"]
    (tmp_path / "garments").mkdir()
    assert "Note: garments is a model that comes with ddpmx" in ddpmx("generate", "garments", "--steps", 3).out
    for command in (["info"], ["parity", "--self-test"], ["bench", "--seconds", "0.01", "--batch", 1, "--steps", 3]):
        done = ddpmx(command[0], "garments", *command[1:])
        assert done.code == 0, done
    assert (tmp_path / "garments.self-test" / "report.md").exists()  # and not beside the package's own file


def test_images_of_another_model_are_overwritten_on_request_only(ddpmx, refused, conditioned_onnx, tmp_path):
    out, common = tmp_path / "out", ("-n", 2, "--steps", 2, "--grid", "--animate", "--out", tmp_path / "out")
    mine, other = conditioned_onnx("itself", weights="a" * 64), conditioned_onnx("classes", weights="b" * 64)
    assert ddpmx("generate", "--engine", mine, *common).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert ddpmx("generate", "--engine", mine, *common).code == 0
    assert "another model, aaaaaaaaaaaa" in refused("generate", "--engine", other, "--label", 0, *common)
    assert "x0.gif" in refused(
        "generate", "--engine", other, "--label", 0, "--first", 7, "-n", 1, "--animate", "--out", out
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert ddpmx("generate", "--engine", other, "--label", 0, *common, "--overwrite").code == 0
    assert all(path.read_bytes() != before[path.name] for path in out.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", 0], "n must be"),
        (["-n", -1], "n must be"),
        (["-n", 10**12], "n must be"),
        (["-n", 2**32], "memory"),
        (["-n", 1, "--batch", 10**9], "memory"),
        (["--batch", 0], "batch must be"),
        (["--seed", -1], "seed"),
        (["--seed", 2**64], "seed"),
        (["--seed", "x"], "seed"),
        (["--first", -1], "first"),
        (["--first", 2**32], "numbered"),
        (["--steps", 0], "steps"),
        (["--steps", 1001], "T = 1000"),
        (["--steps", 10**9], "steps"),
        (["--steps", 500, "--spacing", "quad"], "quad"),
        (["--sampler", "euler"], "ancestral"),
        (["--spacing", "cubic"], "linspace"),
        (["--variance", "learnt"], "fixed_small"),
        (["--eta", 0.5], "--sampler ddim"),
        (["--sampler", "ddim", "--eta", 2], "η"),
        (["--sampler", "unipc", "--eta", 1], "--eta is for the ddim sampler only"),
        (["--sampler", "ddim", "--eta", "nan"], "η"),
        (["--provider", "cuda"], "CUDAExecutionProvider"),
        (["--provider", "abacus"], "abacus"),
        (["--threads", -1], "--threads must be from 0 to 256"),
        (["--spec", "nowhere.json"], "nowhere.json"),
    ],
)
def test_absurd_flags_are_refused(refused, gaussian_onnx, tmp_path, flags, message):
    out = tmp_path / "samples"
    assert message in refused("generate", "--engine", gaussian_onnx, "--out", out, *flags)
    assert not out.exists()


def damaged(tmp_path, gaussian_onnx):
    whole = gaussian_onnx.read_bytes()
    return {
        "missing.onnx": (None, "cannot be read"),
        "empty.onnx": (b"", "empty"),
        "cut.onnx": (whole[: len(whole) // 2], "not a valid ONNX"),
        "foreign.onnx": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
        "noise.onnx": (b"\x08" + np.random.default_rng(0).bytes(5000), "not a valid ONNX"),
        "nameless.onnx": (whole.replace(b"\x05ddpmx\x12", b"\x05other\x12"), "nameless.onnx --like"),
        "edited.onnx": (whole.replace(b'"timesteps":1000', b'"timesteps":1001'), "damaged"),
        "model.plan": (b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + bytes(100), "TensorRT 10.3.0.26"),
    }


@pytest.mark.parametrize("name", damaged(None, type("F", (), {"read_bytes": lambda: b""})))
def test_files_that_are_not_a_model_are_refused(refused, gaussian_onnx, tmp_path, name):
    content, message = damaged(tmp_path, gaussian_onnx)[name]
    assert content != gaussian_onnx.read_bytes()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused("generate", "--engine", tmp_path / name, "--out", tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_a_file_without_metadata_runs_with_a_spec(ddpmx, refused, gaussian_onnx, tmp_path):
    nameless = tmp_path / "nameless.onnx"
    nameless.write_bytes(gaussian_onnx.read_bytes().replace(b"\x05ddpmx\x12", b"\x05other\x12"))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"shape": [3, 8, 8]}))
    common = ("generate", "-n", 2, "--steps", 5)
    assert ddpmx(*common, "--engine", nameless, "--spec", spec, "--out", tmp_path / "a").code == 0
    assert ddpmx(*common, "--engine", gaussian_onnx, "--out", tmp_path / "b").code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))

    spec.write_text(json.dumps({"shape": [3, 16, 8]}))
    assert "graph" in refused(*common, "--engine", nameless, "--spec", spec, "--out", tmp_path / "c")
    assert "contradicts" in refused(*common, "--engine", gaussian_onnx, "--spec", spec, "--out", tmp_path / "c")
    for text in (
        "",
        "{",
        "[]",
        '{"shape": [3, 8, 8], "timesteps": 1e99}',
        '{"shape": [1000000, 1000000, 1]}',
        '{"shape": NaN}',
    ):
        spec.write_text(text)
        refused(*common, "--engine", nameless, "--spec", spec, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_without_torch_is_sent_to_export(refused, tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "ddpm_export.training.pipeline", raising=False)
    err = refused("generate", tmp_path / "run", "--out", tmp_path / "samples")
    assert "needs torch" in err
    assert "ddpmx export" in err
    assert not (tmp_path / "samples").exists()


@pytest.mark.torch
def test_a_run_is_drawn_by_torch(ddpmx, refused, tmp_path):
    pytest.importorskip("torch", reason="not verified here: a run as a model (no torch)")
    from ddpm_export import load as load_run
    from ddpm_export.networks.unet import UNet, UNetConfig
    from ddpm_export.training.checkpoint import TrainingState, save

    config = UNetConfig(1, 1, (4, 4), channels=4, multipliers=(1,), blocks=1, attention=(), groups=2)
    ema = UNet(config).state_dict()
    raw = {name: tensor + 0.1 for name, tensor in ema.items()}
    save(tmp_path / "run", ModelSpec((1, 4, 4), timesteps=6), config, raw, ema, TrainingState(1, {}, {}))
    out = tmp_path / "out"
    done = ddpmx("generate", tmp_path / "run", "-n", 3, "--seed", 2, "--out", out, "--threads", 1)
    assert done.code == 0, done
    assert "on torch" in done.out
    with load_run(tmp_path / "run") as pipeline:
        wanted = pipeline.generate(3, seed=2)[..., 0]
    np.testing.assert_array_equal(pixels(out), wanted)
    with load_run(tmp_path / "run", weights="raw") as pipeline:
        assert not np.array_equal(pixels(out), pipeline.generate(3, seed=2)[..., 0])
    for flags in (["--spec", "x"], ["--provider", "tensorrt"], ["--executor", "graph"], ["--fallback"]):
        assert flags[0] in refused("generate", tmp_path / "run", *flags)
    assert "threads must be" in refused("generate", tmp_path / "run", "--threads", -1)


def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(refused, gaussian_onnx, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    common = ("generate", "--engine", gaussian_onnx, "-n", 2, "--steps", 2)
    assert "folder" in refused(*common, "--out", tmp_path / "file")
    assert "folder" in refused(*common, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "samples"
    out.mkdir()
    (out / "00000.png").touch()  # of a write that was broken off
    assert "No space left" in refused(*common, "--out", out)
    assert files(out) == ["00000.png"]
    assert (out / "00000.png").read_bytes() == b""


@pytest.mark.parametrize("out", [".", "./", "../here"])
def test_the_folder_one_stands_in_may_be_written_to(ddpmx, gaussian_onnx, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = ddpmx("generate", gaussian_onnx, "-n", 1, "--steps", 2, "--out", out)
    assert done.code == 0, done
    assert files(tmp_path / "here") == ["00000.png"]
    assert files(tmp_path) == ["here"]


# --- conditioning ----------------------------------------------------------------------------------------------------


@pytest.fixture
def conditioned_onnx(conditioned_onnx):
    pytest.importorskip(
        "onnxruntime", reason="not verified here: chains of files on the command line (no ONNX Runtime)"
    )
    return conditioned_onnx


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]


def test_guidance(ddpmx, tmp_path, conditioned_onnx):
    path = conditioned_onnx("classes", null_class=True)
    common = ("generate", path, "-n", 3, "--seed", 4)
    assert ddpmx(*common, "--label", 3, "--guidance", "2.5", "--out", tmp_path / "guided").code == 0
    assert ddpmx(*common, "--out", tmp_path / "nobody").code == 0
    with load(path) as pipeline:
        np.testing.assert_array_equal(pixels(tmp_path / "guided"), pipeline.generate(3, seed=4, labels=3, guidance=2.5))
        np.testing.assert_array_equal(pixels(tmp_path / "nobody"), pipeline.generate(3, seed=4))
    said = ddpmx("info", tmp_path / "guided" / "00000.png")
    assert said.code == 0
    assert re.search(r"guidance\W+2\.5", said.out)
    assert re.search(r"label\W+3", said.out)
    for arguments, fact in (
        (("--guidance", 2), "guidance needs the class of each image"),
        (("--guidance", "nan", "--label", 1), "finite"),
    ):
        refused = ddpmx(*common, *arguments, "--out", tmp_path / "nothing")
        assert refused.code == 2
        assert fact in refused.err
    assert not (tmp_path / "nothing").exists()


def test_labels_take_turns_by_the_image_s_index(ddpmx, tmp_path, conditioned_onnx):
    path = conditioned_onnx("classes")
    common = ["generate", "--engine", path, "--seed", 4]
    assert ddpmx(*common, "-n", 5, "--labels", "0,4,2", "--out", tmp_path / "all").code == 0
    assert ddpmx(*common, "-n", 2, "--first", 3, "--labels", "0,4,2", "--out", tmp_path / "part").code == 0
    with load(path) as pipeline:
        wanted = pipeline.generate(5, seed=4, labels=[0, 4, 2, 0, 4])
    np.testing.assert_array_equal(pixels(tmp_path / "all"), wanted)
    np.testing.assert_array_equal(pixels(tmp_path / "part"), wanted[3:])


def test_labels_by_name(ddpmx, tmp_path, conditioned_onnx):
    path = conditioned_onnx("classes", class_names=("cats", "dogs", "owls", "two words", "x"))
    common = ["generate", path, "--seed", 4, "-n", 3]
    assert ddpmx(*common, "--labels", "owls, 4,two words", "--out", tmp_path / "several").code == 0
    assert ddpmx(*common, "--label", "dogs", "--out", tmp_path / "one").code == 0
    with load(path) as pipeline:
        np.testing.assert_array_equal(pixels(tmp_path / "several"), pipeline.generate(3, seed=4, labels=[2, 4, 3]))
        np.testing.assert_array_equal(
            pixels(tmp_path / "several"), pipeline.generate(3, seed=4, labels=["owls", 4, "two words"])
        )
        np.testing.assert_array_equal(pixels(tmp_path / "one"), pipeline.generate(3, seed=4, labels="dogs"))
    for arguments, text in (
        (("--label", "cat"), "the model's are cats, dogs, owls, two words, x"),
        (("--labels", "0,cat"), "there is no class 'cat'"),
        (("--label", "5"), "there is no class 5"),
        ((), "--label cats, or --labels with several: cats, dogs,"),
    ):
        refused = ddpmx(*common, *arguments, "--out", tmp_path / "nothing")
        assert (refused.code, text in refused.err) == (2, True), refused.err


def test_conditions_take_turns_by_the_image_s_index(ddpmx, tmp_path, conditioned_onnx):
    path = conditioned_onnx("condition")
    conditions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", cond=conditions)
    common = ["generate", path, "--seed", 4, "--cond", tmp_path / "c.npz"]
    assert ddpmx(*common, "-n", 5, "--out", tmp_path / "all").code == 0
    assert ddpmx(*common, "-n", 2, "--first", 3, "--out", tmp_path / "part").code == 0
    with load(path) as pipeline:
        wanted = pipeline.generate(5, seed=4, cond=conditions[[0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(pixels(tmp_path / "all"), wanted)
    np.testing.assert_array_equal(pixels(tmp_path / "part"), wanted[3:])
    assert "c.npz[1]" in ddpmx("info", tmp_path / "part" / "00004.png").out


@pytest.mark.parametrize(("k", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_condition_as_their_pixels_do(ddpmx, tmp_path, conditioned_onnx, k, mode):
    path = conditioned_onnx("condition", condition=k)
    drawn = np.random.default_rng(0).integers(0, 256, (2, 8, 8, k), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for name, picture in zip("ab", drawn, strict=True):
        Image.fromarray(picture[..., 0] if k == 1 else picture, mode).save(tmp_path / "photos" / f"{name}.png")
    conditions = np.ascontiguousarray(drawn.transpose(0, 3, 1, 2) / 127.5 - 1, np.float32)
    common = ["generate", path, "--seed", 4, "--cond"]
    assert ddpmx(*common, tmp_path / "photos", "-n", 3, "--out", tmp_path / "all").code == 0
    assert ddpmx(*common, tmp_path / "photos" / "b.png", "-n", 1, "--out", tmp_path / "one").code == 0
    with load(path) as pipeline:
        wanted = pipeline.generate(3, seed=4, cond=conditions[[0, 1, 0]]).astype(int)
        one = pipeline.generate(1, seed=4, cond=conditions[1:]).astype(int)
    np.testing.assert_allclose(pixels(tmp_path / "all"), wanted, atol=1)  # float32 of pixels, computed in two ways
    np.testing.assert_allclose(pixels(tmp_path / "one"), one, atol=1)


def test_one_label_for_all(ddpmx, tmp_path, conditioned_onnx):
    path = conditioned_onnx("classes")
    assert ddpmx("generate", "--engine", path, "-n", 2, "--label", 3, "--out", tmp_path / "out").code == 0
    with load(path) as pipeline:
        np.testing.assert_array_equal(pixels(tmp_path / "out"), pipeline.generate(2, labels=3))


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("classes", [], f"missing labels: the model has {CLASSES} classes"),
        ("classes", ["--label", CLASSES], f"there is no class {CLASSES}"),
        ("classes", ["--label", -1], "there is no class -1"),
        ("classes", ["--labels", "0,7"], "there is no class 7"),
        ("classes", ["--labels", "0,,1"], "there is no class ''"),
        ("classes", ["--labels", "cat"], "there is no class 'cat'"),
        ("classes", ["--labels", ""], "there is no class ''"),
        ("classes", ["--label", 0, "--labels", "0,1"], "exclude each other"),
        ("classes", ["-n", 10**12, "--label", 0], "n must be"),
        ("itself", ["--label", 0], "no classes"),
        ("condition", [], "missing condition: the model takes a condition image"),
        ("itself", ["--cond", "x.npz"], "the model takes no condition"),
        ("condition", ["--cond", "x.npz"], "x.npz: not a valid .npz file"),
    ],
)
def test_wrong_conditioning_is_one_clear_error(ddpmx, tmp_path, conditioned_onnx, kind, flags, message):
    done = ddpmx("generate", "--engine", conditioned_onnx(kind), *flags, "--out", tmp_path / "out")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "export", "build", "generate", "parity", "info", "doctor"])
def test_help_has_examples(ddpmx, command):
    done = ddpmx(command, "--help")
    assert done.code == 0
    assert "Examples" in done.out
    assert f"ddpmx {command}" in done.out.split("Examples")[1]


def test_help_and_version(ddpmx):
    from ddpmx import __version__

    assert {"train", "export", "build", "generate", "parity", "info", "doctor"} <= set(ddpmx("--help").out.split())
    assert ddpmx("--version").out.strip() == f"ddpmx {__version__}"
    assert ddpmx("nonsense").code == 2


def test_python_m_ddpmx_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ddpmx", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ddpmx "), done
    code = "import sys, runpy; sys.modules['ddpmx_cli'] = None; runpy.run_module('ddpmx', run_name='__main__')"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (alone.returncode != 0, "pip install ddpmx" in alone.stderr, "Traceback" in alone.stderr) == (1, 1, 0)


def test_the_shell_completes_commands_and_flags():
    for words, expected in (("ddpmx gen", "generate"), ("ddpmx generate --sam", "--sampler")):
        environment = {
            **os.environ,
            "_DDPMX_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        # the name of the program decides the name of the variable
        code = "import sys; sys.argv = ['ddpmx']; from ddpmx_cli.main import app; app(prog_name='ddpmx')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert expected in done.stdout.split(), done
