"""`ddpmx inpaint` and `ddpmx generate --init`, on a model that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpmx import Sampling, load
from ddpmx.formats.png_text import read_png_text
from ddpmx.tasks.inpaint import inpaint
from ddpmx.tasks.variations import variations

QUICK = ("--steps", 6, "--jump", 2, "--resamplings", 2)
MASK = np.zeros((8, 8), bool)
MASK[2:5, 3:] = True


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures a.png and b.png, a mask.png and nothing else."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "two").mkdir()
    for name in ("a.png", "two/a.png", "two/b.png"):
        Image.fromarray(rng.integers(60, 190, (8, 8, 3), dtype=np.uint8)).save(name)
    Image.fromarray(MASK.astype(np.uint8) * 255).save("mask.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_hole_is_filled(ddpmx, refused, gaussian_onnx, here):
    common = ("inpaint", gaussian_onnx, "a.png", "--mask", "mask.png", *QUICK, "--seed", 3)
    done = ddpmx(*common, "-o", "whole.png")
    assert (done.code, done.err) == (0, ""), done
    assert "1 image, 23% drawn anew, 6 steps, jump 2, 2 resamplings, seed 3" in done.out
    assert ddpmx(*common, "-n", 3, "-o", "wholes").code == 0
    assert names(here / "wholes") == ["00000.png", "00001.png", "00002.png"]
    with load(gaussian_onnx) as pipeline:
        wanted = inpaint(pipeline, pixels("a.png"), MASK, 3, steps=6, jump=2, resamplings=2, seed=3).pixels
    assert np.array_equal(np.stack([pixels(path) for path in sorted((here / "wholes").iterdir())]), wanted)
    assert np.array_equal(pixels("whole.png"), wanted[0])
    assert np.array_equal(wanted[:, ~MASK], np.stack([pixels("a.png")[~MASK]] * 3))
    text = read_png_text(here / "wholes" / "00001.png")[1]
    assert (text["task"], text["of"], text["mask"], text["index"]) == ("inpaint", "a.png", "mask.png", "1")
    assert text["steps"] == "6"
    assert ddpmx(*common, "-n", 1, "--first", 2, "-o", "third.png").code == 0
    assert np.array_equal(pixels("third.png"), wanted[2])


def test_what_inpaint_refuses(refused, gaussian_onnx, here):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("odd.png")
    before = names(here)
    for image, mask, flags, message in (
        ("a.png", "black.png", (), "the mask leaves nothing to draw"),
        ("a.png", "odd.png", (), "odd.png: it is 9×8 (height×width), and the model takes 8×8"),
        ("a.png", "nothing.png", (), "no such file"),
        ("odd.png", "mask.png", (), "it is 9×8 (height×width), and the model takes 8×8"),
        ("two", "mask.png", (), "is a folder, and one picture is needed"),
        ("a.png", "mask.png", ("-n", 2), "there are 2 pictures to write"),
        ("a.png", "mask.png", ("-n", 0), "n must be"),
        ("a.png", "mask.png", ("--jump", 0), "jump must be"),
        ("a.png", "mask.png", ("--resamplings", 0), "resamplings must be"),
        ("a.png", "mask.png", ("--steps", 1001), "steps must be"),
        ("a.png", "mask.png", ("--label", 1), "the model has no classes"),
        ("a.png", "mask.png", ("-o", "a.png"), "it is made from this file"),
        ("a.png", "mask.png", ("-o", "two/b.png"), "not a picture that a task of ddpmx has written"),
    ):
        out = () if "-o" in flags else ("-o", "whole.png")
        assert message in refused("inpaint", gaussian_onnx, image, "--mask", mask, *out, *flags)
    assert names(here) == before


def test_answers_take_conditions_in_turns(ddpmx, refused, conditioned_onnx, here):
    path = conditioned_onnx("condition")
    with load(path) as pipeline:
        conditions = np.random.default_rng(0).uniform(-1, 1, (2, 2, 8, 8)).astype(np.float32)
        np.savez("c.npz", cond=conditions)
        wanted = inpaint(
            pipeline, pixels("a.png"), MASK, 3, steps=6, jump=2, resamplings=2, cond=conditions[[0, 1, 0]]
        ).pixels
    common = ("inpaint", path, "a.png", "--mask", "mask.png", *QUICK, "-n", 2, "--first", 1)
    assert ddpmx(*common, "--cond", "c.npz", "-o", "turns").code == 0
    assert np.array_equal(np.stack([pixels("turns/00001.png"), pixels("turns/00002.png")]), wanted[1:])
    assert [read_png_text(f"turns/0000{i}.png")[1]["cond"] for i in (1, 2)] == ["c.npz[1]", "c.npz[0]"]
    assert "missing condition" in refused(*common, "-o", "none")


def test_a_mask_is_what_is_light(ddpmx, gaussian_onnx, here):
    """In any kind of picture, and where it is there at all."""
    alpha = np.full((8, 8, 4), 255, np.uint8)
    alpha[~MASK, 3] = 0
    Image.fromarray(alpha).save("alpha.png")
    grey = np.where(MASK, 128, 127).astype(np.uint8)
    Image.fromarray(grey).save("grey.png")
    for mask in ("mask.png", "alpha.png", "grey.png"):
        assert ddpmx("inpaint", gaussian_onnx, "a.png", "--mask", mask, *QUICK, "-o", f"of-{mask}").code == 0
    assert len({pixels(f"of-{mask}").tobytes() for mask in ("mask.png", "alpha.png", "grey.png")}) == 1


# --- generate --init -------------------------------------------------------------------------------------------------


def test_variations_of_pictures_in_turns(ddpmx, gaussian_onnx, here):
    done = ddpmx(
        "generate", gaussian_onnx, "--init", "two", "-n", 4, "--first", 1, "--strength", 0.3, "--steps", 10, "--seed", 2
    )
    assert (done.code, done.err) == (0, ""), done
    assert "4 variations, 3 steps of unipc" in done.out
    assert "from t = 299" in done.out
    images = np.stack([pixels(f"two/{name}.png") for name in "baba"])
    sampling = Sampling.chosen(1000, steps=10)
    with load(gaussian_onnx) as pipeline:
        wanted = variations(pipeline, images, 0.3, sampling=sampling, seed=2, first=1)
    assert np.array_equal(np.stack([pixels(path) for path in sorted((here / "samples").iterdir())]), wanted)
    text = read_png_text(here / "samples" / "00001.png")[1]
    assert (text["init"], text["start"]) == ("b.png", "299")
    assert read_png_text(here / "samples" / "00002.png")[1]["init"] == "a.png"
    assert "init" in ddpmx("info", "samples/00001.png").out


def test_variations_of_another_picture_or_strength_are_another_run(ddpmx, refused, gaussian_onnx, here):
    common = ("generate", gaussian_onnx, "-n", 2, "--steps", 5, "--out", "out")
    assert ddpmx(*common, "--init", "a.png").code == 0
    assert ddpmx(*common, "--init", "a.png").code == 0, "the same run again"
    assert "steps 3, and now 1" in refused(*common, "--init", "a.png", "--strength", 0.2)
    assert "init a.png, and now" in refused(*common, "--init", "two/b.png")
    assert "steps 3, and now 5" in refused(*common)
    for flags, message in (
        (("--strength", 0.2), "--strength is for --init only"),
        (("--init", "a.png", "--strength", 0), "strength must be above 0"),
        (("--init", "nothing.png"), "no such file"),
        (("--init", gaussian_onnx), "no picture that Pillow can read"),
    ):
        assert message in refused("generate", gaussian_onnx, "--out", "new", *flags)
    assert not (here / "new").exists()
