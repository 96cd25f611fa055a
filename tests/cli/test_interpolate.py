"""`ddpmx interpolate`, `ddpmx generate --share-from` and `--strip`, on a model that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx import Sampling, load
from ddpmx.formats.png_text import read_png_text
from ddpmx.images import writers
from ddpmx.tasks.interpolate import interpolate

QUICK = ("--steps", 6)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures a.png and b.png and nothing else."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(60, 190, (8, 8, 3), dtype=np.uint8)).save(f"{name}.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_sheet_and_single_pictures(ddpmx, gaussian_onnx, here):
    common = ("interpolate", gaussian_onnx, "a.png", "b.png", *QUICK, "--seed", 3, "--lambdas", 4)
    done = ddpmx(*common, "-o", "sheet.png", "--t", "200,600,-1")
    assert (done.code, done.err) == (0, ""), done
    assert "12 pictures between a.png and b.png, mixed at t = 166,666,-1, 6 steps of unipc, seed 3" in done.out
    assert "Note: t = 200 is not among the chain's 6 timesteps; mixed at 166, the nearest\n" in done.out
    assert "t = -1 is not" not in done.out
    done = ddpmx(*common, "-o", "single", "--t", 600)
    assert names(here / "single") == ["00000.png", "00001.png", "00002.png", "00003.png"]
    ends, sampling = [pixels("a.png"), pixels("b.png")], Sampling.chosen(1000, steps=6)
    shown = []
    with load(gaussian_onnx) as pipeline:
        for t in (200, 600, -1):
            row = interpolate(pipeline, *ends, t, 4, sampling=sampling, seed=3)
            shown += [ends[0], *row.pixels, ends[1]]
            if t == 600:
                assert np.array_equal(
                    np.stack([pixels(path) for path in sorted((here / "single").iterdir())]), row.pixels
                )
    assert np.array_equal(pixels("sheet.png"), writers.sheet(shown, columns=6))
    text = read_png_text("sheet.png")[1]
    assert (text["task"], text["of"], text["t"]) == ("interpolate", "a.png, b.png", "166,666,-1")


def test_all_pictures_have_one_condition(ddpmx, refused, conditioned_onnx, here):
    path = conditioned_onnx("condition")
    cond = np.random.default_rng(0).uniform(-1, 1, (2, 2, 8, 8)).astype(np.float32)
    np.savez("two.npz", cond=cond)
    np.savez("one.npz", cond=cond[1:])
    common = ("interpolate", path, "a.png", "b.png", *QUICK, "--lambdas", 3, "--t", 6)
    assert ddpmx(*common, "--cond", "one.npz", "-o", "made").code == 0
    with load(path) as pipeline:
        sampling = Sampling.chosen(pipeline.spec.timesteps, steps=6)
        ends = pixels("a.png"), pixels("b.png")
        wanted = interpolate(pipeline, *ends, 6, 3, sampling=sampling, cond=cond[[1, 1, 1]]).pixels
        other = interpolate(pipeline, *ends, 6, 3, sampling=sampling, cond=cond[:1]).pixels
    assert np.array_equal(np.stack([pixels(f"made/0000{i}.png") for i in range(3)]), wanted)
    assert not np.array_equal(wanted, other)
    assert "two.npz holds 2 conditions" in refused(*common, "--cond", "two.npz", "-o", "none")
    assert "missing condition" in refused(*common, "-o", "none")


def test_what_interpolate_refuses(refused, gaussian_onnx, here):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save("odd.png")
    before = names(here)
    for b, flags, message in (
        ("odd.png", ("-o", "x.png"), "it is 9×8 (height×width), and the model takes 8×8"),
        ("nothing.png", ("-o", "x.png"), "no such file"),
        ("b.png", ("-o", "x.png", "--t", "1000"), "t must be from -1 to 999"),
        ("b.png", ("-o", "x.png", "--t", "x"), "not a list of whole numbers"),
        ("b.png", ("-o", "x.png", "--t", ""), "--t names no timestep"),
        ("b.png", ("-o", "x", "--t", "1,2"), "there are 2 rows"),
        ("b.png", ("-o", "x.png", "--lambdas", 1), "lambdas must be 2 or more"),
        ("b.png", ("-o", "x.png", "--sampler", "magic"), "there is no sampler"),
        ("b.png", ("-o", "a.png"), "it is made from this file"),
        ("b.png", ("-o", "odd.png"), "not a picture that a task of ddpmx has written"),
    ):
        assert message in refused("interpolate", gaussian_onnx, "a.png", b, *flags)
    assert names(here) == before


# --- generate --------------------------------------------------------------------------------------------------------


def test_images_share_a_latent(ddpmx, refused, gaussian_onnx, here):
    common = ("generate", gaussian_onnx, "-n", 3, "--steps", 12, "--seed", 2)
    assert ddpmx(*common, "--sampler", "ancestral", "--spacing", "linspace", "--out", "alone").code == 0
    done = ddpmx(*common, "--share-from", 400, "--out", "shared")
    assert (done.code, done.err) == (0, ""), done
    assert "5 steps of ancestral, from t = 363" in done.out
    assert np.array_equal(pixels("shared/00000.png"), pixels("alone/00000.png")), "image 0 is itself"
    assert not np.array_equal(pixels("shared/00001.png"), pixels("alone/00001.png"))
    text = read_png_text("shared/00001.png")[1]
    assert (text["shared"], text["start"]) == ("363", "363")
    assert ddpmx(*common, "--share-from", 400, "--out", "shared").code == 0, "the same run again"
    for flags, message in (
        (("--share-from", 400, "--sampler", "unipc"), "draws no noise"),
        (("--share-from", 1000), "t must be from 0 to 999"),
        (("--share-from", 400, "--init", "a.png"), "exclude each other"),
    ):
        assert message in refused(*common, "--out", "new", *flags)
    assert not (here / "new").exists()


def test_a_strip_and_its_figures(ddpmx, refused, gaussian_onnx, here):
    done = ddpmx("generate", gaussian_onnx, "-n", 3, "--steps", 4, "--strip", "--animate", "--out", "out")
    assert (done.code, done.err) == (0, ""), done
    assert names(here / "out") == ["00000.png", "00001.png", "00002.png", "strip.png", "x0.gif"]
    zoom = writers.zoom_for(4 * 9 + 1)
    assert pixels("out/strip.png").shape == (zoom * (3 * 9 + 1), zoom * (4 * 9 + 1), 3)
    rows = pixels("out/strip.png")[::zoom, ::zoom]
    for index in range(3):  # the last picture of a row is the image
        assert np.array_equal(rows[index * 9 + 1 : index * 9 + 9, 28:36], pixels(f"out/0000{index}.png"))
    figures = [line.split() for line in done.out.splitlines() if line.startswith("  t = ")]
    assert [int(words[2]) for words in figures] == [999, 749, 499, 249]
    assert float(figures[-1][-1]) == 0
    assert float(figures[0][-1]) > 1
    assert "a strip is another one" in refused("generate", gaussian_onnx, "--strip", "--out", "x.png")
