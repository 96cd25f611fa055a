"""Images in a column of Parquet files, or of a data set that Hugging Face's ``datasets`` has saved with ``save_to_disk``.

They are read by pyarrow, which has to be installed; ``datasets`` need not be. Nothing is downloaded, nothing is unpickled,
and a file that a cell names by its path is not opened: the image has to be in the cell.
"""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images.find import SUFFIXES, Found
from ddpm_export.training.images.shards import MAX_IMAGE, expand
from ddpmx.device.versions import version_numbers
from ddpmx.errors import DataError

OLDEST = (14, 0, 1)
"""Older versions of pyarrow unpickle types that a file brings along (CVE-2023-47248)."""

MAX_GROUP = 8 << 30
"""A group of rows may unpack to this much."""

_GROUPS = 2
"""Groups of rows that are kept in memory."""

_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)\b", re.IGNORECASE)


def is_tables(path: Path) -> bool:
    """Whether a path means tables: a Parquet file or several, a folder of them alone, or what ``save_to_disk`` wrote."""
    if not path.is_dir():
        return path.suffix.lower() == ".parquet"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return True
    with os.scandir(path) as entries:
        names = [(entry.name.lower(), entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    suffixes = {PurePosixPath(name).suffix for name, _ in names}
    return ".parquet" in suffixes and not suffixes & (SUFFIXES | {".tar"}) and not any(folder for _, folder in names)


@dataclass(frozen=True, eq=False)
class Cell:
    """The image in a row; see :class:`.Inside`.

    Attributes:
        reader: of its file.
        group, row: where it is.
        number: of the row in the whole data set.
    """

    reader: _Reader
    group: int
    row: int
    number: int

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"row {self.number} ({self.reader.file.name})"

    @property
    def stem(self) -> str:
        """The number of the row."""
        return str(self.number)

    def open(self) -> BinaryIO:
        """Its bytes."""
        value = self.reader.column(self.reader.image, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError("there is no image in the cell, at most the path of a file")
        if len(data) > MAX_IMAGE:
            raise OSError(f"{len(data) / 2**30:.1f} GiB in one image")
        return io.BytesIO(data)

    def stamp(self) -> bytes:
        """Where it is."""
        return b"%d %d" % (self.group, self.row)


class _Reader:
    """The groups of rows of one file, by column; the last few stay in memory."""

    def __init__(self, file: Path, image: str = "") -> None:
        self.file, self.image = file, image
        self._arrow = _pyarrow(file)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        with _refused(file):
            self._open()

    def _open(self) -> None:
        if self.file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            self._table = None
            self._parquet = pyarrow.parquet.ParquetFile(self.file)
            self.schema = self._parquet.schema_arrow
            meta = self._parquet.metadata
            self.rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
            for group in range(meta.num_row_groups):
                if meta.row_group(group).total_byte_size > MAX_GROUP:
                    raise ValueError(
                        f"a group of rows unpacks to {meta.row_group(group).total_byte_size / 2**30:.0f} GiB"
                    )
        else:
            # mapped into memory: read when a row is, and given back when memory is short
            with self.file.open("rb") as stream:
                is_file = stream.read(6) == b"ARROW1"
            mapped = self._arrow.memory_map(str(self.file))
            opened = self._arrow.ipc.open_file(mapped) if is_file else self._arrow.ipc.open_stream(mapped)
            self._table = opened.read_all()
            self._table.validate()
            self.schema, self.rows = self._table.schema, [self._table.num_rows]

    def column(self, name: str, group: int) -> Any:
        """A column in a group of rows.

        Raises:
            DataError: it cannot be read.
        """
        if self._table is not None:
            return self._table.column(name)
        with self._lock, _refused(self.file):
            key = name, group
            if key not in self._kept:
                while len(self._kept) >= _GROUPS:
                    self._kept.popitem(last=False)
                column = self._parquet.read_row_group(group, [name]).column(name)
                column.validate()
                self._kept[key] = column
            self._kept.move_to_end(key)
            return self._kept[key]

    def whole(self, name: str) -> Iterator[Any]:
        """A column, group by group."""
        for group in range(len(self.rows)):
            yield self.column(name, group)


class _refused:  # noqa: N801 - a context
    """Whatever pyarrow raises on a damaged file becomes a DataError."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(
                f"{self._file}: not a table that can be read",
                note=(str(error).splitlines() or [type(error).__name__])[0][:200],
                hint="download or write it again",
            ) from error


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(f"{path}: tables are read by pyarrow", hint="pip install 'pyarrow>=14.0.1'") from error
    if version_numbers(pyarrow.__version__, 3) < OLDEST:
        raise DataError(
            f"{path}: this version of pyarrow unpickles what a file brings along",
            note=f"pyarrow {pyarrow.__version__}",
            hint="pip install 'pyarrow>=14.0.1'",
        )
    return pyarrow  # type: ignore[no-any-return]


class Tables:
    """Images in the rows of tables.

    Args:
        path: where they are, see :func:`is_tables`.

    Attributes:
        found: the images.

    Raises:
        DataError: there are none, or it is not clear which; a file is damaged; or pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        files = _files(path)
        self._readers = [_Reader(file) for file in files]
        self._schema = self._readers[0].schema
        if other := [reader.file.name for reader in self._readers if not reader.schema.equals(self._schema)]:
            raise DataError(f"{path}: tables with different columns", hint="tables of one data set", items=other)
        self._features = self._described()
        self.image = self._image_column()
        self.found = Found(containers=files, in_order=files[0].suffix.lower() == ".parquet")
        for reader in self._readers:
            reader.image = self.image
            for group, rows in enumerate(reader.rows):
                start = len(self.found.files)
                self.found.files += [Cell(reader, group, row, start + row) for row in range(rows)]
        if not self.found.files:
            raise DataError(f"{path}: no rows in it", hint="another table")

    def labels(self) -> tuple[list[str | None], tuple[str, ...] | None]:
        """The text of each row's label, None where there is none, and the names of the classes if the table has them.

        Raises:
            DataError: it is not clear which column has the labels.
        """
        import pyarrow.types as types

        described = [name for name, value in self._features.items() if value.get("_type") == "ClassLabel"]
        whole = [field.name for field in self._schema if types.is_integer(field.type)]
        texts = [f.name for f in self._schema if types.is_string(f.type) and f.name in ("label", "labels", "class")]
        for candidates in (described, whole, [name for name in whole if name in ("label", "labels", "class")], texts):
            if len(candidates) == 1:
                break
        else:
            raise DataError(
                f"{self._path}: {'more than one column' if described or whole else 'no column'} of labels",
                note=f"its columns: {self._listing()}",
                hint="whole numbers in a column named label",
            )
        (name,) = candidates
        values = [value for reader in self._readers for column in reader.whole(name) for value in column.to_pylist()]
        # -1 is how data sets of this kind write that there is no label
        given = [None if value is None or value == -1 else str(value) for value in values]
        names = self._features.get(name, {}).get("names")
        return given, tuple(map(str, names)) if isinstance(names, list) and names else None

    def pixels(self) -> NDArray[np.uint8] | None:
        """The images if they are no files but nested lists of numbers, uint8 [N, H, W] or [N, H, W, C]; None otherwise.

        Raises:
            DataError: they have different sizes, or are not 0…255.
        """
        import pyarrow.types as types

        if not _is_list(types, self._schema.field(self.image).type):
            return None
        parts = []
        for reader in self._readers:
            for column in reader.whole(self.image):
                parts += [
                    self._unnested(types, getattr(chunk, "storage", chunk)) for chunk in column.chunks if len(chunk)
                ]
        if len({part.shape[1:] for part in parts}) != 1:
            raise self._uneven()
        return np.concatenate(parts)

    def _unnested(self, types: ModuleType, array: Any) -> NDArray[np.uint8]:
        shape = [len(array)]
        while _is_list(types, array.type):
            lengths = np.asarray(array.value_lengths()) if not types.is_fixed_size_list(array.type) else None
            side = array.type.list_size if lengths is None else int(lengths[0])
            if array.null_count or (lengths is not None and not (lengths == side).all()):
                raise self._uneven()
            array = getattr(flat := array.flatten(), "storage", flat)
            shape.append(side)
        numbers = np.asarray(array)
        if len(shape) not in (3, 4) or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 255:
            raise DataError(
                f"{self._path}: {self.image!r} holds no images of numbers 0…255",
                note=f"it is {self._schema.field(self.image).type}"[:200],
                hint="lists [H, W] or [H, W, C] of whole numbers 0…255, or encoded images",
            )
        return numbers.astype(np.uint8).reshape(shape)

    def _uneven(self) -> DataError:
        return DataError(f"{self._path}: the lists in {self.image!r} have different sizes", hint="images of one size")

    def _described(self) -> dict[str, dict[str, Any]]:
        """What ``datasets`` has noted about the columns."""
        try:
            text = (self._schema.metadata or {}).get(b"huggingface", b"{}")
            features = json.loads(text).get("info", {}).get("features", {})
            return {name: value for name, value in features.items() if isinstance(value, dict)}
        except (ValueError, AttributeError):
            return {}

    def _image_column(self) -> str:
        import pyarrow.types as types

        described = [name for name, value in self._features.items() if value.get("_type") == "Image"]
        encoded = [field.name for field in self._schema if _is_encoded(types, field.type)]
        lists = [field.name for field in self._schema if _is_list(types, field.type)]
        for candidates in (described, encoded, lists):
            if len(candidates) == 1 and candidates[0] in self._schema.names:
                return candidates[0]
            if candidates:
                break
        raise DataError(
            f"{self._path}: {'more than one column' if candidates else 'no column'} of images",
            note=f"its columns: {self._listing()}",
            hint="one column of encoded images ({bytes, path}, or bytes), or of lists of numbers",
        )

    def _listing(self) -> str:
        return ", ".join(f"{field.name} {str(field.type)[:40]}" for field in self._schema)[:400]


def _is_encoded(types: ModuleType, kind: Any) -> bool:
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return "bytes" in names and _is_encoded(types, kind.field(names.index("bytes")).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_list(types: ModuleType, kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _files(path: Path) -> list[Path]:
    """The files of a data set, in their order.

    Raises:
        DataError: there are none, or those of several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise DataError(
            f"{path}: a data set of several splits",
            note=", ".join(splits) or None,
            hint="--data names the folder of one",
        )
    if (path / "state.json").is_file():
        try:
            state = json.loads((path / "state.json").read_bytes())
            names = [entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / 'state.json'}: not what save_to_disk writes", hint="save it again") from error
        if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise DataError(f"{path / 'state.json'}: names no files of its folder", hint="save it again")
        if gone := [name for name in names if not (path / name).is_file()]:
            raise DataError(
                f"{path}: {len(gone)} of {len(names)} files are not there", hint="save it again", items=gone
            )
        return [path / name for name in names]
    files = expand(path, ".parquet")
    splits = sorted({match[1].lower() for file in files if (match := _SPLIT.match(file.name))})
    if len(splits) > 1:
        raise DataError(
            f"{path}: tables of several splits",
            note=", ".join(splits),
            hint="--data names one file, or several as train-{00000..00004}.parquet, or a folder of one split",
        )
    return files


def checked(texts: Sequence[str | None], names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of classes if all labels are their numbers."""
    fits = names is not None and all(text is None or (text.isdigit() and int(text) < len(names)) for text in texts)
    return names if fits else None
