"""The files of ranges, read by the libraries that they are for."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from ddpmx.scale.forms import FORMS, described
from ddpmx.scale.ranges import Range
from oracles import conditioning

IMAGES = Range(8, 5)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
LABELS = [2, 4, 0, 2, 4]  # of (4, 0, 2) at 8…12


def encoded(work, images=IMAGES, pixels=PIXELS):
    return work.kind.encode(work, images, pixels)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(params=["npz", "tar", "parquet"])
def form(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason="not verified here: Parquet files (there is no pyarrow)")
    return request.param


def test_a_file_says_of_which_run_it_is_and_has_the_same_bytes_again(make_work, form):
    work = make_work(form=form)
    data = encoded(work)
    assert FORMS[form].about(io.BytesIO(data)) == json.loads(json.dumps(described(work, IMAGES)))
    assert encoded(make_work(form=form)) == data
    assert encoded(make_work(form=form, seed=4)) != data


def test_a_file_that_was_cut_off_is_not_whole(make_work, form):
    data = encoded(make_work(form=form))
    for end in (0, 1, 100, len(data) // 2, len(data) - 512, len(data) - 8):
        with pytest.raises(ValueError, match=r".*"):
            FORMS[form].about(io.BytesIO(data[:end]))


def test_npz(make_work):
    with np.load(io.BytesIO(encoded(make_work(form="npz"))), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], PIXELS)
        assert (arrays["index"].tolist(), arrays["labels"].tolist()) == ([8, 9, 10, 11, 12], LABELS)


def test_tar(make_work):
    with tarfile.open(fileobj=io.BytesIO(encoded(make_work()))) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert {member.mtime for member in tar.getmembers()} == {0}
    assert list(members) == [f"{index:08d}.{suffix}" for index in range(8, 13) for suffix in ("png", "cls")]
    np.testing.assert_array_equal(decoded(members["00000012.png"]), PIXELS[4])
    assert [int(members[f"{index:08d}.cls"]) for index in range(8, 13)] == LABELS


def test_tar_by_webdataset(make_work, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="not verified here: tar files by webdataset (it is not here)")
    (tmp_path / "images-000001.tar").write_bytes(encoded(make_work()))
    data = webdataset.WebDataset(str(tmp_path / "images-000001.tar"), shardshuffle=False).decode("rgb8")
    found = list(data.to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in found] == [f"{index:08d}" for index in range(8, 13)]
    np.testing.assert_array_equal(np.stack([image for _, image, _ in found]), PIXELS)
    assert [label for _, _, label in found] == LABELS


@pytest.mark.parametrize("names", [None, ("a", "b", "c", "d", "e")])
def test_parquet_by_pyarrow(make_work, names):
    parquet = pytest.importorskip("pyarrow.parquet", reason="not verified here: Parquet files (there is no pyarrow)")
    spec = conditioning.spec_of("classes", class_names=names)
    table = parquet.read_table(io.BytesIO(encoded(make_work(form="parquet", spec=spec))))
    rows = table.to_pylist()
    assert [row["image"]["path"] for row in rows] == [f"{index:08d}.png" for index in range(8, 13)]
    np.testing.assert_array_equal(np.stack([decoded(row["image"]["bytes"]) for row in rows]), PIXELS)
    assert ([row["label"] for row in rows], [row["index"] for row in rows]) == (LABELS, list(range(8, 13)))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"].get("names") == (None if names is None else list(names))


def test_parquet_by_datasets(make_work, tmp_path):
    pytest.importorskip("pyarrow", reason="not verified here: Parquet files (there is no pyarrow)")
    datasets = pytest.importorskip("datasets", reason="not verified here: Parquet files by datasets (it is not here)")
    spec = conditioning.spec_of("classes", class_names=("a", "b", "c", "d", "e"))
    (tmp_path / "images-000001.parquet").write_bytes(encoded(make_work(form="parquet", spec=spec)))
    data = datasets.Dataset.from_parquet(str(tmp_path / "images-000001.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(data.features["image"], datasets.Image)
    np.testing.assert_array_equal(np.stack([np.asarray(row["image"]) for row in data]), PIXELS)
    assert [data.features["label"].int2str(label) for label in data["label"]] == list("ceace")


def test_a_model_without_classes_has_no_labels(make_work, form):
    work = make_work(form=form, turns=None)
    data = encoded(work)
    assert "labels" not in FORMS[form].about(io.BytesIO(data))["run"]
    if form == "tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png"}


@pytest.mark.torch
@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_training_reads_them(make_work, toy, tmp_path, form):
    data = pytest.importorskip("ddpm_export.training.data", reason="not verified here: training on them (no torch)")
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="not verified here: Parquet files (there is no pyarrow)")
    from ddpmx.scale.stores import open_store
    from ddpmx.scale.work import claim, draw

    work, store = make_work(form=form), open_store(str(tmp_path / "drawn"))
    claim(work, store)
    draw(toy, work, store, work.units(Range(0, 20)))
    wanted = toy.generate(20, seed=3, batch=4, labels=work.labels(Range(0, 20)), steps=3)
    found = data.load_dataset(tmp_path / "drawn")
    np.testing.assert_array_equal(np.stack([found.images[index] for index in range(20)]), wanted)
