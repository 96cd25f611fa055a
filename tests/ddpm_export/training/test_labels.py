"""Which class an image is of: its subfolder, or a number beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpm_export.training.images import cache
from ddpm_export.training.labels import named
from ddpmx.errors import DataError, FileFormatError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 6, 3), np.uint8)
LABELS = np.array([2, 0, 1, 1, 2, 0])


def put(path: Path, value: int) -> None:
    """An image of one grey, by which its place in the data set is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(path, classes=True)
    return caught.value


@pytest.fixture
def folders(tmp_path) -> Path:
    data = tmp_path / "data"
    for name, values in {"owl": [5, 6], "cat": [1, 2, 3], "dog": [4]}.items():
        for value in values:
            put(data / name / f"{value}.png", value)
    put(data / "dog" / "deep" / "7.png", 7)
    return data


def test_subfolders_are_classes_sorted_by_name(folders):
    (folders / "empty").mkdir()
    (folders / ".git").mkdir()
    dataset = load_dataset(folders, classes=True)
    assert dataset.classes == ("cat", "dog", "owl")
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int32
    of = dict(zip(dataset.take(np.arange(7))[:, 0, 0, 0].tolist(), dataset.labels.tolist(), strict=True))
    assert of == {1: 0, 2: 0, 3: 0, 4: 1, 7: 1, 5: 2, 6: 2}
    assert "3 classes: cat 3, dog 2, owl 2" in dataset.notes
    assert "no classes, since there are no images in them: empty" in dataset.notes
    assert load_dataset(folders).labels is load_dataset(folders).classes is None


def test_images_beside_the_classes_are_named(folders):
    for value in (8, 9):
        put(folders / f"{value}.png", value)
    error = refusal(folders)
    assert error.items == ("8.png", "9.png")
    assert error.fact == f"{folders}: 2 images lie beside the subfolders that are the classes"
    assert "no subfolders" in refusal(folders / "cat").fact


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_labels_of_an_npz(tmp_path, shape, kind):
    arrays = {"x": IMAGES, "y": LABELS.astype(kind).reshape(shape), "ids": np.array([f"{i}.png" for i in range(6)])}
    np.savez(tmp_path / "a.npz", **arrays)
    dataset = load_dataset(tmp_path / "a.npz", classes=True)
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.classes == ("0", "1", "2")
    for names in (np.array(["a", "é", "c"]), np.array([b"a", "é".encode(), b"c"])):
        np.savez(tmp_path / "a.npz", **arrays, names=names)
        assert load_dataset(tmp_path / "a.npz", classes=True).classes == ("a", "é", "c")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no array of labels"),
        ({"y": LABELS[:5]}, "y [5] int64"),
        ({"y": LABELS / 1}, "y [6] float64"),
        ({"y": LABELS, "z": LABELS}, "more than one array of labels"),
        ({"y": LABELS - 1}, "holds -1"),
        ({"y": LABELS + (1 << 20)}, "holds 1048578"),
        ({"y": LABELS.astype(str)}, "np.unique(y, return_inverse=True)"),
        ({"y": LABELS, "a": np.array(["a", "b", "c"]), "b": np.array(["a", "b", "c"])}, "more than one array of names"),
        ({"y": LABELS, "a": np.array([b"a", b"\xff", b"c"])}, "no UTF-8"),
    ],
)
def test_an_npz_without_one_array_of_labels(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", images=IMAGES, **arrays)
    load_dataset(tmp_path / "a.npz")
    error = refusal(tmp_path / "a.npz")
    assert says in str(error)
    assert error.hint


def test_classes_without_images_are_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, y=LABELS + 1)
    dataset = load_dataset(tmp_path / "a.npz", classes=True)
    assert dataset.classes == ("0", "1", "2", "3")
    assert "1 of 4 classes have no image: 0" in dataset.notes


def test_a_run_remembers_classes(folders, tmp_path):
    dataset = load_dataset(folders, classes=True)
    source = Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")
    assert source == dataset.source
    cache.store(tmp_path, dataset.cache_key, dataset.images, ())
    for cached in (None, tmp_path / cache.NAME):
        again = load_source(source, cached=cached)
        assert again.fingerprint() == dataset.fingerprint() != load_dataset(folders).fingerprint()
        assert again.classes == dataset.classes
    (folders / "owl").rename(folders / "ape")  # the same images, of other classes
    assert load_source(source).fingerprint() != dataset.fingerprint()
    with pytest.raises(FileFormatError):
        Source.from_json(source.to_json() | {"classes": "yes"}, "run")


@pytest.mark.parametrize(
    ("names", "kept", "said"),
    [
        (("cats", "dogs"), ("cats", "dogs"), None),
        (("0", "1"), None, None),
        (None, None, None),
        (("cats", "7"), None, "'7' can be no name there"),
        (("cats", "a,b"), None, "'a,b' can be no name there"),
        (("a" * 100, *(f"{i:0100x}x" for i in range(39))), None, "40 names do not fit"),
    ],
)
def test_a_model_file_names_the_classes_where_it_can(names, kept, said):
    spec = ModelSpec((3, 8, 8), classes=2 if names is None else len(names), null_class=True)
    got, note = named(spec, names)
    assert (got.class_names, note is None) == (kept, said is None)
    assert got.replace(class_names=None) == spec
    assert said is None or said in note
    got.replace(weights="ab" * 32, ddpmx="0.10.0.dev12+g1234567").to_text()  # fits


def test_the_fingerprint_is_of_labels_too(tmp_path):
    def fingerprint(labels: np.ndarray | None, names: tuple[str, ...] | None = ("a", "b", "c")) -> str:
        numbers = None if labels is None else labels.astype(np.int32)
        return Dataset(IMAGES, Source(tmp_path), labels=numbers, classes=names).fingerprint()

    assert fingerprint(LABELS) == fingerprint(LABELS.copy())
    assert (
        len({fingerprint(LABELS), fingerprint(LABELS[::-1]), fingerprint(LABELS, ("a", "b", "d")), fingerprint(None)})
        == 4
    )
