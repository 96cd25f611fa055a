"""Parquet files and what Hugging Face's datasets saves: read by pyarrow alone, or one line says how to install it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpmx.errors import DataError, InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 8, 6, 3), np.uint8)
LABELS = [2, 0, 1] * 3
ORDER = np.array([7, 0, 7, 8, 3])
NAMES = ["cat", "dog", "owl"]


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def recorded(dataset: Dataset) -> Source:
    return Source.from_json(json.loads(json.dumps(dataset.source.to_json())), "run")


def test_without_pyarrow_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.parquet"}]}')
    for path in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(DataError, match="are read by pyarrow") as caught:
            load_dataset(path)
        assert caught.value.hint == "pip install 'pyarrow>=14.0.1'"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("{}", "not what save_to_disk writes"),
        ("no json", "not what save_to_disk writes"),
        ('{"_data_files": []}', "names no files"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "names no files of its folder"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', "1 of 1 files are not there"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, state, says):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=says):
        load_dataset(tmp_path)


def test_several_splits_are_a_question(tmp_path):
    for split in ("test", "train"):
        (tmp_path / "all" / split).mkdir(parents=True)
        (tmp_path / "all" / split / "state.json").write_text("{}")
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    (tmp_path / "files").mkdir()
    for split in ("test", "train"):
        (tmp_path / "files" / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1")
    for name in ("all", "files"):
        with pytest.raises(DataError, match="several splits") as caught:
            load_dataset(tmp_path / name)
        assert caught.value.note == "test, train"


class TestWithPyarrow:
    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self):
        pytest.importorskip("pyarrow", reason="not verified here: tables (no pyarrow)")

    @staticmethod
    def table(**columns):
        import pyarrow as pa

        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = [{"bytes": png(image), "path": "../../etc/passwd"} for image in IMAGES]
        return pa.table({"image": pa.array(cells, kind), "label": LABELS} | columns)

    @staticmethod
    def noted(table):
        """With what `datasets` writes about the columns."""
        label = {"_type": "ClassLabel", "names": NAMES}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        return table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})

    def write(self, path: Path, table, kind: str) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path.mkdir(exist_ok=True)
        if kind == "parquet":
            for number, start in enumerate((0, 6)):
                part = table.slice(start, 6 if number == 0 else None)
                pq.write_table(part, path / f"train-{number:05}-of-00002.parquet", row_group_size=2)
            return path
        names = []
        for number, start in enumerate((0, 6)):
            names.append({"filename": f"data-{number}.arrow"})
            new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            part = table.slice(start, 6 if number == 0 else None)
            with new(str(path / f"data-{number}.arrow"), table.schema) as writer:
                writer.write_table(part, max_chunksize=2)
        (path / "state.json").write_text(json.dumps({"_data_files": names}))
        return path

    @pytest.mark.parametrize("limit", [None, 0])
    @pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
    def test_images_and_labels(self, tmp_path, kind, limit):
        path = self.write(tmp_path / "data", self.noted(self.table(other=list(range(9)))), kind)
        run = tmp_path / "run"
        dataset = load_dataset(path, classes=True, memory_limit=limit, keep=run)
        assert np.array_equal(dataset.take(ORDER), IMAGES[ORDER])
        assert np.array_equal(dataset.images, IMAGES)
        assert dataset.labels is not None
        assert dataset.labels.tolist() == LABELS
        assert dataset.classes == tuple(NAMES)
        for again in (None, 0):
            resumed = load_source(recorded(dataset), cached=run / "images-cache.npz", keep=run, memory_limit=again)
            assert resumed.fingerprint() == dataset.fingerprint()

    def test_without_memory_and_without_a_place_arrow_is_decoded_and_parquet_refused(self, tmp_path):
        dataset = load_dataset(self.write(tmp_path / "a", self.table(), "stream"), memory_limit=0)
        assert np.array_equal(dataset.take(ORDER), IMAGES[ORDER])
        path = self.write(tmp_path / "p", self.table(), "parquet")
        with pytest.raises(DataError, match="only be read in order"):
            load_dataset(path, memory_limit=0)
        several = load_dataset(path / "train-{00000..00001}-of-00002.parquet")
        assert np.array_equal(several.images, IMAGES)
        assert len(load_dataset(path / "train-00001-of-00002.parquet")) == 3

    @pytest.mark.parametrize("levels", [3, 2])
    def test_lists_of_numbers(self, tmp_path, levels):
        import pyarrow as pa

        images = IMAGES if levels == 3 else IMAGES[..., 0]
        path = self.write(tmp_path / "a", pa.table({"pixels": images.tolist(), "label": LABELS}), "parquet")
        dataset = load_dataset(path, classes=True)
        assert np.array_equal(dataset.images, images if levels == 3 else images[..., None])
        assert dataset.labels is not None
        assert dataset.labels.tolist() == LABELS
        with pytest.raises(InputError, match="encoded images"):
            load_dataset(path, size=(4, 4))
        for pixels, says in (
            ([*images[:8].tolist(), images[8, :5].tolist()], "different sizes"),
            ((images.astype(int) + 99).tolist(), "numbers 0…255"),
        ):
            with pytest.raises(DataError, match=says):
                load_dataset(self.write(tmp_path / "b", pa.table({"pixels": pixels}), "parquet"))

    def test_conditions_are_paired_by_row(self, tmp_path):
        path = self.write(tmp_path / "a", self.table(), "parquet")
        import pyarrow as pa

        grey = pa.table({"depth": [png(image[..., 0]) for image in IMAGES]})
        dataset = load_dataset(path, condition=self.write(tmp_path / "b", grey, "stream"))
        assert dataset.conditions is not None
        assert np.array_equal(dataset.conditions.take(ORDER), IMAGES[ORDER][..., :1])

    def test_broken_cells(self, tmp_path):
        import pyarrow as pa

        cells = [png(image) for image in IMAGES]
        cells[1], cells[4] = b"no image", None
        path = self.write(tmp_path / "a", pa.table({"image": cells, "label": LABELS}), "parquet")
        with pytest.raises(DataError) as caught:
            load_dataset(path)
        assert [item.split(" (")[0] for item in caught.value.items] == ["row 1", "row 4"]
        dataset = load_dataset(path, skip_broken=True, classes=True)
        assert np.array_equal(dataset.images, np.delete(IMAGES, [1, 4], axis=0))
        assert dataset.labels is not None
        assert dataset.labels.tolist() == np.delete(LABELS, [1, 4]).tolist()

    @pytest.mark.parametrize(
        ("change", "classes", "says"),
        [
            ({"image": None}, False, "no column of images"),
            ({"more": [b"x"] * 9}, False, "more than one column of images"),
            ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 9}, False, "9 of 9 files cannot be read"),
            ({"label": None}, True, "no column of labels"),
            ({"label": None, "a": [1] * 9, "b": [1] * 9}, True, "more than one column of labels"),
            ({"label": [-1] * 9}, True, "9 of 9 images have no label"),
        ],
    )
    def test_what_is_not_clear_or_not_there(self, tmp_path, change, classes, says):
        import pyarrow as pa

        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {name: self.table()[name] for name in ("image", "label")} | change
        if isinstance(columns["image"], list):
            columns["image"] = pa.array(columns["image"], kind)
        table = pa.table({name: column for name, column in columns.items() if column is not None})
        with pytest.raises(DataError, match=says) as caught:
            load_dataset(self.write(tmp_path / "a", table, "parquet"), classes=classes)
        assert caught.value.hint

    @pytest.mark.parametrize("kind", ["parquet", "stream"])
    def test_damaged_tables(self, tmp_path, kind):
        path = self.write(tmp_path / "a", self.table(), kind)
        file = sorted(path.glob("*-0*"))[0] if kind == "parquet" else path / "data-0.arrow"
        whole = file.read_bytes()
        for data in (b"", b"hello" * 50, whole[: len(whole) // 2]):
            file.write_bytes(data)
            with pytest.raises(DataError):
                load_dataset(path)

    def test_what_datasets_itself_has_saved(self, tmp_path):
        datasets = pytest.importorskip("datasets", reason="not verified here: Hugging Face's datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        pictures = [Image.fromarray(image) for image in IMAGES]
        saved = datasets.Dataset.from_dict({"image": pictures, "label": LABELS}, features=features)
        saved.save_to_disk(tmp_path / "disk", num_shards=2)
        saved.to_parquet(tmp_path / "a.parquet")
        shape = datasets.Features({"pixels": datasets.Array3D((8, 6, 3), "uint8")})
        datasets.Dataset.from_dict({"pixels": IMAGES.tolist()}, features=shape).save_to_disk(tmp_path / "lists")
        for name in ("disk", "a.parquet"):
            dataset = load_dataset(tmp_path / name, classes=True)
            assert np.array_equal(dataset.images, IMAGES)
            assert dataset.classes == tuple(NAMES)
        assert np.array_equal(load_dataset(tmp_path / "lists").images, IMAGES)
