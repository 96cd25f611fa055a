"""`ddpmx eval nll`: what it prints and writes is the library's result, and every mistake is one clear error."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpmx as package
from ddpmx.formats.model_file import identify
from ddpmx.pipeline import Pipeline
from ddpmx.tasks.likelihood import nll
from oracles import gaussian
from oracles.cuda_on_host import Toy
from oracles.plans import SPEC
from oracles.toy_backend import ToyBackend

pytest.importorskip("onnxruntime", reason="not verified here: ddpmx eval (no onnxruntime)")


def gaussians(n, shape=gaussian.SHAPE):
    z = np.random.default_rng(0).standard_normal((n, *shape)) * 0.3
    return np.clip(z.transpose(0, 2, 3, 1) * 127.5 + 128, 0, 255).astype(np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with images.npz, and the same as photos/."""
    monkeypatch.chdir(tmp_path)
    images = gaussians(6)
    np.savez("images.npz", images=images)
    Path("photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"photos/{i}.png")
    return tmp_path


def figures(out: str) -> dict[str, str]:
    """The first lines: {"bits/dim": "4.5 ± 0.1", …}"""
    return {line.split()[0]: line[14:].split("   ")[0] for line in out.splitlines()[1:4]}


def bits(done):
    assert done.code == 0, done
    return json.loads(done.out)["images"]


# --- results ---------------------------------------------------------------------------------------------------------


def test_it_prints_and_writes_what_the_library_computes(ddpmx, here, gaussian_onnx):
    done = ddpmx("eval", "nll", gaussian_onnx, "images.npz", "--terms", 12, "-o", "nll.csv")
    assert done.code == 0, done
    with package.load(gaussian_onnx) as pipeline:
        wanted = nll(pipeline, gaussians(6), terms=12)
    first = done.out.splitlines()[0]
    assert "6 images of images.npz, 12 of 1000 terms, variance fixed_large, seed 0, on onnxruntime" in first
    shown = figures(done.out)
    assert shown["bits/dim"] == f"{wanted.bits_per_dim:.4f} ± {wanted.standard_error:.4f}"
    assert shown["rate"] == f"{wanted.rate:.4f}"
    assert shown["distortion"] == f"{wanted.distortion:.4f}"
    assert done.out.splitlines()[-1] == "nll.csv"
    with open("nll.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12
    for row, values in zip(rows, wanted.rows(), strict=True):
        assert {name: float(text) for name, text in row.items()} == pytest.approx(values, rel=1e-9)
    printed = [line.split() for line in done.out.splitlines()[6:-1]]
    assert [float(words[0]) for words in printed] == sorted((float(w[0]) for w in printed), reverse=True)
    assert printed[-1] == ["0", f"{wanted.rate:.5f}", f"{wanted.rmse[0]:.2f}"]


def test_json_has_everything(ddpmx, here, gaussian_onnx):
    arguments = ("eval", "nll", gaussian_onnx, "photos", "--terms", 3, "--images", 2, "--seed", 7)
    done = ddpmx(*arguments, "--variance", "fixed_small", "--json", "-o", "nll.json")
    assert done.code == 0, done
    values = json.loads(done.out)
    assert values == json.loads(Path("nll.json").read_text())
    with package.load(gaussian_onnx) as pipeline:
        options = {"terms": 3, "seed": 7, "variance": "fixed_small"}
        wanted = nll(pipeline, gaussians(6)[[1, 4]], indices=np.array([1, 4]), **options).to_json()
    assert {name: values[name] for name in wanted} == wanted
    about = {name: values[name] for name in values.keys() - wanted.keys() - {"runs_on"}}
    assert about == {
        "ddpmx": package.__version__,
        "file": "gaussian.onnx",
        "data": "photos",
        "of_images": 6,
        "indices": [1, 4],
    }


def test_one_image_has_no_standard_error(ddpmx, here, gaussian_onnx):
    done = ddpmx("eval", "nll", gaussian_onnx, "photos", "--terms", 2, "--images", 1, "-o", "a.csv")
    assert "±" not in done.out
    assert "1 of 6 images of photos" in done.out
    with open("a.csv", newline="") as stream:
        assert [row["standard_error"] for row in csv.DictReader(stream)] == ["", ""]


def test_a_plan_says_what_the_host_says(ddpmx, here, plan, fake_tensorrt, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    np.savez("mine.npz", images=gaussians(5, SPEC.shape))
    done = ddpmx("eval", "nll", plan, "mine.npz", "--terms", 6, "--json")
    assert done.code == 0, done
    with Pipeline(SPEC, Toy(SPEC.shape)) as pipeline:
        wanted = nll(pipeline, gaussians(5, SPEC.shape), terms=6)
    assert json.loads(done.out)["images"] == wanted.images.tolist()
    assert json.loads(done.out)["runs_on"].startswith("TensorRT-RTX 1.7.1.116 on NVIDIA RTX 4090")


def test_an_mnn_model_says_what_its_onnx_file_says(ddpmx, here, gaussian_onnx, figure):
    pytest.importorskip("MNN", reason="not verified here: the likelihood of MNN models (no MNN)")
    assert ddpmx("build", gaussian_onnx, "--for", "mnn", "-o", "model.mnn").code == 0
    both = [ddpmx("eval", "nll", file, "images.npz", "--terms", 6, "--json") for file in (gaussian_onnx, "model.mnn")]
    assert [done.code for done in both] == [0, 0], both
    one, other = (np.array(json.loads(done.out)["images"]) for done in both)
    figure("bits/dim, MNN against ONNX Runtime", np.abs(one - other).max(), at_most=1e-3)


def test_a_plot(ddpmx, here, gaussian_onnx):
    pytest.importorskip("matplotlib", reason="not verified here: the plot of ddpmx eval (no matplotlib)")
    done = ddpmx("eval", "nll", gaussian_onnx, "photos", "--terms", 3, "--plot", "nll.png")
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == "nll.png"
    with Image.open("nll.png") as picture:
        assert picture.size == (990, 704)
    assert ddpmx("eval", "nll", gaussian_onnx, "photos", "--terms", 3, "--plot", "nll.png").code == 0  # its own


@pytest.mark.parametrize(("flag", "name"), [("--plot", "mine.png"), ("-o", "mine.json"), ("-o", "mine.csv")])
def test_files_of_others_stay(refused, here, gaussian_onnx, flag, name):
    if name == "mine.png":
        Image.new("RGB", (8, 8)).save(name)
    else:
        Path(name).write_text('{"mine": 1}')
    before = Path(name).read_bytes()
    assert "refusing to overwrite" in refused("eval", "nll", gaussian_onnx, "photos", "--terms", 3, flag, name)
    assert Path(name).read_bytes() == before


def test_it_needs_no_torch(ddpmx, here, gaussian_onnx, monkeypatch):
    """Reading images is a part of ddpm_export that does without."""
    for name in ("torch", "onnx", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("ddpm_export.training")]:
        monkeypatch.delitem(sys.modules, name)
    assert ddpmx("eval", "nll", gaussian_onnx, "photos", "--terms", 2).code == 0


def test_without_matplotlib_there_is_a_note_and_everything_else(ddpmx, here, gaussian_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = ddpmx("eval", "nll", gaussian_onnx, "photos", "--terms", 3, "--plot", "nll.png", "-o", "nll.csv")
    assert done.code == 0, done
    assert done.out.startswith("Note: there will be no plot, since matplotlib is not installed")
    assert "bits/dim" in done.out
    assert {path.name for path in here.iterdir()} == {"images.npz", "photos", "nll.csv"}


# --- images that do not fit ------------------------------------------------------------------------------------------


def test_resize_brings_photos_to_the_model_s_size(ddpmx, refused, here, gaussian_onnx):
    Path("large").mkdir()
    for i, image in enumerate(gaussians(3, (1, 8, 8))):
        Image.fromarray(np.kron(image[..., 0], np.ones((4, 4), np.uint8))).save(f"large/{i}.png")
    text = refused("eval", "nll", gaussian_onnx, "large", "--terms", 2)
    assert "large: images of 32×32×1" in text
    assert "the model takes 8×8×3" in text
    assert "--resize" in text
    done = ddpmx("eval", "nll", gaussian_onnx, "large", "--terms", 2, "--resize")
    assert done.code == 0, done
    Image.fromarray(gaussians(1)[0]).save("large/odd.png")
    text = refused("eval", "nll", gaussian_onnx, "large", "--terms", 2)
    assert "--resize brings all of them to 8×8 and 3 channels, as ddpmx train does" in text
    assert "--size" not in text


def test_white_is_a_number_as_for_train(ddpmx, here, gaussian_onnx):
    images = gaussians(6)
    np.savez("floats.npz", images=images / np.float32(255))
    one, other = (
        bits(ddpmx("eval", "nll", gaussian_onnx, *data, "--terms", 2, "--json"))
        for data in (("images.npz",), ("floats.npz", "--white", 1))
    )
    assert one == other


WRONG = {
    "no such data": (("nothing",), "there is no such file or folder"),
    "an empty folder": (("empty",), "no images in this folder"),
    "something else": (("model.onnx",), "neither a folder nor an .npz"),
    "an array of another size": (("small.npz",), "images of 4×5×1"),
    "floats": (("floats.npz",), "holds numbers below 0"),
    "more images than there are": (("photos", "--images", 7), "--images 7: there are 6 in photos"),
    "no images wanted": (("photos", "--images", 0), "--images must be at least 1"),
    "one term": (("photos", "--terms", 1), "terms must be a whole number from 2 to 1000"),
    "a variance that is not learned": (("photos", "--variance", "learned"), "the network has no variance output"),
    "a variance that is none": (("photos", "--variance", "large"), "there is no such variance"),
    "a class without classes": (("photos", "--label", 1), "the model has no classes, but --label was passed"),
    "no labels without classes": (("photos", "--no-labels"), "this one has no classes at all"),
    "a condition without one": (("photos", "--cond", "photos"), "the model takes no condition"),
    "arrays resized": (("images.npz", "--resize"), "--resize is for image files"),
    "a batch of nothing": (("photos", "--batch", 0), "batch must be"),
    "a seed below 0": (("photos", "--seed", -1), "the seed must be"),
    "a table as text": (("photos", "-o", "nll.txt"), "--out nll.txt: not a .csv or .json"),
    "a plot as GIF": (("photos", "--plot", "nll.gif"), "--plot nll.gif: not a .png"),
    "a foreign file in its place": (("photos", "-o", "notes.csv"), "refusing to overwrite notes.csv"),
    "no folder for it": (("photos", "-o", "a/nll.csv"), "there is no folder a"),
    "guidance of a model without": (("photos", "--guidance", 2), "cannot be guided"),
    "a path that is empty": (("photos", "-o", ""), "--out is empty"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_refused(refused, here, gaussian_onnx, kind):
    Path("empty").mkdir()
    Path("model.onnx").write_bytes(gaussian_onnx.read_bytes())
    Path("notes.csv").write_text("mine\n")
    np.savez("small.npz", images=np.zeros((3, 4, 5), np.uint8))
    np.savez("floats.npz", images=np.zeros((3, 8, 8, 3), np.float32) - 1)
    before = {path.name for path in here.iterdir()}
    arguments, message = WRONG[kind]
    text = refused("eval", "nll", gaussian_onnx, *arguments)
    assert message in text
    assert text.count("Error: ") == 1
    assert {path.name for path in here.iterdir()} == before
    assert Path("notes.csv").read_text() == "mine\n"


# --- classes and conditions ------------------------------------------------------------------------------------------


@pytest.fixture
def classes(here, conditioned_onnx):
    """A model with five classes, and images with labels as folders and as an array."""
    images, labels = gaussians(4), np.array([0, 1, 1, 4])
    np.savez("labelled.npz", images=images, labels=labels)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Path(f"sorted/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"sorted/{label}/{i}.png")
    return lambda **changes: conditioned_onnx("classes", **changes)


def test_labels_are_those_of_the_data_or_one_for_all(ddpmx, classes):
    file = classes(null_class=True)

    def of(*arguments, **expected):
        with package.load(file) as pipeline:
            wanted = nll(pipeline, gaussians(4), terms=3, **expected).images.tolist()
        assert bits(ddpmx("eval", "nll", file, *arguments, "--terms", 3, "--json")) == wanted
        return wanted

    of("labelled.npz", labels=[0, 1, 1, 4])
    of("sorted", labels=[0, 1, 1, 2])  # folders are numbered in the order of their names
    assert of("labelled.npz", "--label", 3, labels=3) != of("labelled.npz", "--no-labels")
    of("labelled.npz", "--guidance", 2, labels=[0, 1, 1, 4], guidance=2)


def test_classes_that_have_names_are_found_by_them(ddpmx, refused, classes):
    """In a folder of some of the classes: there their order is not the model's."""
    file = classes(class_names=("bag", "boot", "coat", "dress", "shirt"))
    for old, new in (("0", "shirt"), ("1", "coat"), ("4", "bag")):
        Path(f"sorted/{old}").rename(f"sorted/{new}")
    with package.load(file) as pipeline:
        turns = np.stack([gaussians(4)[i] for i in (3, 1, 2, 0)])  # as the folders are read
        wanted, of_coat = (nll(pipeline, turns, labels=labels, terms=3) for labels in ([0, 2, 2, 4], "coat"))
    assert bits(ddpmx("eval", "nll", file, "sorted", "--terms", 3, "--json")) == wanted.images.tolist()
    of_all = ddpmx("eval", "nll", file, "sorted", "--label", "coat", "--terms", 3, "--json")
    assert bits(of_all) == of_coat.images.tolist()
    assert "there is no class 'hat'" in refused("eval", "nll", file, "sorted", "--label", "hat")
    Path("sorted/bag").rename("sorted/hat")
    assert "there is no class 'hat'" in refused("eval", "nll", file, "sorted", "--terms", 3)


def test_wrong_labels(refused, classes):
    file = classes()
    text = refused("eval", "nll", file, "photos", "--terms", 2)
    assert text.startswith("Error: missing labels: the model has 5 classes\n")
    assert "the images lie in no subfolders" in text
    assert "--no-labels" not in text
    assert "missing labels" in refused("eval", "nll", file, "images.npz", "--terms", 2)
    Path("labels").mkdir()  # what is wrong is not the labels, whatever the name says
    assert "no images" in refused("eval", "nll", file, "labels", "--terms", 2)
    np.savez("six.npz", images=gaussians(4), labels=[0, 1, 5, 2])
    assert "there is no class 5" in refused("eval", "nll", file, "six.npz", "--terms", 2)
    assert "there is no class 5" in refused("eval", "nll", file, "labelled.npz", "--label", 5)
    assert "exclude each other" in refused("eval", "nll", file, "labelled.npz", "--label", 1, "--no-labels")
    assert "its spec has no null_class" in refused("eval", "nll", file, "labelled.npz", "--no-labels")
    assert "--no-labels" in refused("eval", "nll", classes(null_class=True), "photos", "--terms", 2)


def test_conditions(ddpmx, refused, here, conditioned_onnx):
    file = conditioned_onnx("condition", condition=1)
    conditions = gaussians(6, (1, 8, 8))
    np.savez("cond.npz", cond=conditions)
    with package.load(file) as pipeline:
        cond = (conditions.astype(np.float32) / np.float32(127.5) - 1).transpose(0, 3, 1, 2)
        wanted = nll(pipeline, gaussians(6)[[1, 4]], indices=np.array([1, 4]), cond=cond[[1, 4]], terms=3)
    flags = ("--images", 2, "--terms", 3, "--json")
    assert bits(ddpmx("eval", "nll", file, "images.npz", "--cond", "cond.npz", *flags)) == wanted.images.tolist()
    assert "missing condition" in refused("eval", "nll", file, "images.npz")
    np.savez("five.npz", cond=conditions[:5])
    refused("eval", "nll", file, "images.npz", "--cond", "five.npz")
    two = conditioned_onnx("condition", condition=3)
    assert "cond must be float32" in refused("eval", "nll", two, "images.npz", "--cond", "cond.npz")


# --- models that have no likelihood ----------------------------------------------------------------------------------


def test_a_model_of_eps_that_ends_without_signal(refused, here, gaussian_onnx):
    """Its schedule ends at ᾱ = 0: no such file can be described, and one that says so is refused by name."""
    Path("spec.json").write_text(
        json.dumps({**gaussian.SPEC.to_json(), "schedule": "jsd", "schedule_params": {}, "coefficients": None})
    )
    text = refused("eval", "nll", gaussian_onnx, "photos", "--spec", "spec.json")
    assert text.startswith("Error: spec.json: this schedule ends at ᾱ = 0, where x_0 does not follow from ε")


def test_an_output_that_is_not_finite(refused, here, gaussian_onnx, monkeypatch):
    backend = ToyBackend(poison=(0, np.nan))
    monkeypatch.setattr("ddpmx.pipeline.open_model", lambda *_, **__: (gaussian.SPEC, backend))
    text = refused("eval", "nll", gaussian_onnx, "photos", "-o", "nll.csv")
    assert text.startswith("Error: the network's output at t = 0 is not finite")
    assert not Path("nll.csv").exists()


@pytest.mark.torch
def test_file_half_and_checkpoint_say_the_same(ddpmx, trained, tmp_path, figure):
    """The same bound of the same images, from torch, a float32 and a float16 file: within 1e-3 bits per dimension."""
    from conftest import FASHION

    assert identify(trained.run) == "checkpoint"
    flags = (FASHION, "--images", 48, "--terms", 60, "--json", "--threads", 1)
    found = {
        name: np.array(bits(ddpmx("eval", "nll", file, *flags)))
        for name, file in {"torch": trained.run, "fp32": trained.fp32, "fp16": trained.fp16}.items()
    }
    for name, most in (("fp32", 1e-5), ("fp16", 1e-3)):
        apart = abs(found[name].mean() - found["torch"].mean())
        figure(f"bits/dim, {name} against the checkpoint", apart, at_most=most)
    assert np.any(found["fp16"] != found["torch"])  # control: it is another network
