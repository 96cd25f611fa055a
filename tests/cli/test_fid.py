"""`ddpmx eval fid`: what it prints is the library's result, on images as `train` reads them; every mistake is one error."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: ddpmx eval fid (no torch)")

from ddpm_export.quality import extractor, fidelity

PIXELS = extractor.Extractor("given", "a network of pixels", (extractor.FEATURES, extractor.LOGITS), "no resizing", 3)
RESULTS = {
    "frechet_inception_distance": 12.3456,
    "kernel_inception_distance_mean": 0.01234,
    "kernel_inception_distance_std": 0.005,
    "inception_score_mean": 2.5,
    "inception_score_std": 0.25,
    "precision": 0.75,
    "recall": 0.5,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """What `generate --grid` leaves, and real images; torch-fidelity is one that returns known figures."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    (tmp_path / "drawn").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(f"drawn/{number:05}.png")
    Image.new("RGB", (70, 30)).save("drawn/grid.png")
    np.savez("real.npz", images=pixels[:11])
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("L", (20, 16), number).save(f"photos/{number}.png")
    seen = SimpleNamespace(weights=[], sets=[])

    def calculate(**arguments):
        seen.sets.append(
            [each and (len(each), tuple(each[0].shape)) for each in (arguments["input1"], arguments["input2"])]
        )
        return RESULTS

    library = SimpleNamespace(calculate_metrics=calculate)
    monkeypatch.setattr(extractor, "library", lambda: library)
    monkeypatch.setattr(fidelity, "library", lambda: library)
    monkeypatch.setattr(extractor, "inception", lambda weights: seen.weights.append(weights) or PIXELS)
    return seen


def test_the_figures_come_with_the_protocol(ddpmx, here):
    done = ddpmx("eval", "fid", "drawn", "real.npz", "--metrics", "pr,is,kid,fid", "--device", "cpu", "--seed", 7)
    assert done.code == 0, done
    said = done.out
    assert "drawn against real.npz: 12 and 11 images of 8×8" in said
    assert "FID        12.346\n" in said
    assert "KID        0.01234 ± 0.00500   100 subsets of 11 images\n" in said
    assert "IS         2.500 ± 0.250\n" in said
    assert "precision  0.7500   recall 0.5000\n" in said
    assert "by a network of pixels, on cpu\n  no resizing; seed 7\n" in said
    assert "papers draw 50,000 samples for FID, and here are 12" in " ".join(said.split())
    assert here.sets == [[(12, (3, 8, 8)), (11, (3, 8, 8))]]
    assert here.weights == ["package"]


def test_json_has_everything(ddpmx, here):
    done = ddpmx("eval", "fid", "drawn", "photos", "--resize", "--weights", "mine.pth", "--device", "cpu", "--json")
    values = json.loads(done.out)
    assert (values["fid"], values["kid"], values["precision"]) == (12.3456, 0.01234, 0.75)
    assert (values["samples"], values["reference"], values["size"], values["seed"]) == (12, 4, [8, 8], 2020)
    assert here.weights == ["mine.pth"]


def test_wrong_input_is_one_clear_error(refused, here):
    for arguments, message in (
        (("drawn", "photos"), "samples and reference differ in size"),
        (("drawn", "real.npz", "--resize"), "--resize is for image files"),
        (("drawn", "real.npz", "--metrics", "fid,lpips"), "no metric 'lpips'"),
        (("drawn", "real.npz", "--metrics", ","), "no metric was named"),
        (("drawn", "real.npz", "--device", "cuda:1"), "runs on cpu or cuda"),
        (("drawn", "nowhere"), "nowhere"),
    ):
        assert message in refused("eval", "fid", *arguments)
    assert here.sets == []


def test_without_torch_fidelity_it_says_what_to_install(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    assert "pip install 'ddpmx[eval]'" in refused("eval", "fid", tmp_path, tmp_path)
