"""The files that hold ranges of images: PNGs, ``.npz``, tar files for WebDataset, and Parquet as Hugging Face has it.

Each says of which run its images are and which they are, so that a folder never mixes two runs and work that was broken
off goes on. A file's bytes depend on its images and on the version of what compresses them alone: no clock, no user.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import BackendError, DdpmxError, FileFormatError
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.npz import read_npy_header
from ddpmx.formats.png_text import png_text
from ddpmx.images import writers
from ddpmx.scale.ranges import Range

if TYPE_CHECKING:
    from ddpmx.scale.work import Work

VERSION = 1
"""Of what a file says of itself."""

ABOUT = "ddpmx"
"""The key in a Parquet file's metadata."""

ROWS = 128
"""Of a group in a Parquet file: a group is read as a whole, and images are large."""


class Form(Protocol):
    """A kind of file."""

    suffix: str
    one_image: bool
    """Whether a file is one image, and not a range."""

    def encode(self, work: Work, images: Range, pixels: NDArray[np.uint8]) -> bytes:
        """The file of these images, uint8 [n, H, W, C]."""

    def about(self, stream: BinaryIO) -> Mapping[str, Any]:
        """What a file says of itself: :func:`described`, or a PNG's text.

        Raises:
            ValueError: the file is not whole.
        """


def described(work: Work, images: Range) -> dict[str, Any]:
    """What a file of a range says of itself."""
    return {"version": VERSION, "run": work.identity(), "first": images.first, "count": images.count}


class Png:
    """One image, with where it is from as text: the files of a plain ``ddpmx generate``."""

    suffix, one_image = "png", True

    def encode(self, work: Work, images: Range, pixels: NDArray[np.uint8]) -> bytes:
        """See :class:`Form`."""
        return writers.png(pixels[0], text=work.origin(images).text(0))

    def about(self, stream: BinaryIO) -> Mapping[str, Any]:
        """See :class:`Form`."""
        return png_text(stream)[1]


class Npz:
    """``images`` uint8 [n, H, W, C], ``index`` int64 [n], and ``labels`` int64 [n] of a model with classes."""

    suffix, one_image = "npz", False

    def encode(self, work: Work, images: Range, pixels: NDArray[np.uint8]) -> bytes:
        """See :class:`Form`."""
        arrays: dict[str, NDArray[Any]] = {"images": pixels, "index": np.arange(images.first, images.end)}
        labels = work.labels(images)
        if labels is not None:
            arrays["labels"] = np.array(labels, np.int64)
        stream = io.BytesIO()
        np.savez_compressed(stream, about=np.array(_text(work, images)), **arrays)  # type: ignore[arg-type]
        return stream.getvalue()

    def about(self, stream: BinaryIO) -> Mapping[str, Any]:
        """See :class:`Form`."""
        try:
            with zipfile.ZipFile(stream) as archive:  # its directory is at the end
                with archive.open("images.npy") as member:
                    read_npy_header(member)
                with archive.open("about.npy") as member:
                    _, _, dtype = read_npy_header(member)
                    text = member.read(1 << 20).decode("utf-32-le" if dtype.str.startswith("<") else "utf-32-be")
        except Exception as error:  # zipfile, zlib and NumPy raise anything
            raise ValueError(f"not a whole .npz: {error}") from error
        return _parsed(text)


class Tar:
    """For WebDataset: ``00000012.png``, and of a model with classes ``00000012.cls`` after it.

    What the file says of itself is the comment of its global header (POSIX pax), which readers pass over; ``git archive``
    keeps a commit there.
    """

    suffix, one_image = "tar", False

    def encode(self, work: Work, images: Range, pixels: NDArray[np.uint8]) -> bytes:
        """See :class:`Form`."""
        stream, labels, origin = io.BytesIO(), work.labels(images), work.origin(images)
        header = {"comment": _text(work, images)}
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers=header) as tar:
            for position, image in enumerate(pixels):
                members = {"png": writers.png(image, text=origin.text(position))}
                if labels is not None:
                    members["cls"] = str(labels[position]).encode()
                for suffix, data in members.items():  # those of one key in a row: WebDataset reads a tar as a stream
                    member = tarfile.TarInfo(f"{images.first + position:08d}.{suffix}")  # of 1970, and nobody's
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return stream.getvalue()

    def about(self, stream: BinaryIO) -> Mapping[str, Any]:
        """See :class:`Form`."""
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
        end = stream.read()
        if size % tarfile.RECORDSIZE or len(end) < 2 * tarfile.BLOCKSIZE or any(end):
            raise ValueError("a tar that does not come to its end")
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                return _parsed(tar.pax_headers.get("comment", ""))
        except (tarfile.TarError, OSError, UnicodeError) as error:
            raise ValueError(str(error)) from error


class Parquet:
    """A table with ``image`` {bytes, path} and ``index``, and ``label`` of a model with classes.

    ``image`` is Hugging Face's Image feature, and the file says so: ``datasets`` decodes it unasked.
    """

    suffix, one_image = "parquet", False

    def encode(self, work: Work, images: Range, pixels: NDArray[np.uint8]) -> bytes:
        """See :class:`Form`."""
        arrow, parquet = _pyarrow()
        origin, labels = work.origin(images), work.labels(images)
        cells = [
            {"bytes": writers.png(image, text=origin.text(position)), "path": f"{images.first + position:08d}.png"}
            for position, image in enumerate(pixels)
        ]
        image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        columns = {
            "image": arrow.array(cells, image),
            "index": arrow.array(range(images.first, images.end), arrow.int64()),
        }
        features: dict[str, Any] = {"image": {"_type": "Image"}, "index": {"dtype": "int64", "_type": "Value"}}
        if labels is not None:
            columns["label"] = arrow.array(labels, arrow.int64())
            names = work.class_names
            known = names is not None and max(work.turns or ()) < len(names)  # ∅ is one more than there are names
            features["label"] = {"names": list(names or ()), "_type": "ClassLabel"} if known else features["index"]
        metadata = {"huggingface": json.dumps({"info": {"features": features}}), ABOUT: _text(work, images)}
        table, stream = arrow.table(columns).replace_schema_metadata(metadata), io.BytesIO()
        parquet.write_table(table, stream, row_group_size=ROWS, compression="none")  # PNGs are compressed
        return stream.getvalue()

    def about(self, stream: BinaryIO) -> Mapping[str, Any]:
        """See :class:`Form`."""
        _, parquet = _pyarrow()
        try:
            metadata = parquet.read_schema(stream).metadata or {}  # it is at the end
        except Exception as error:  # pyarrow's errors are of several kinds
            raise ValueError(f"not a whole Parquet file: {error}") from error
        return _parsed(metadata.get(ABOUT.encode(), b"").decode("utf-8", "replace"))


FORMS: Mapping[str, Form] = {"png": Png(), "npz": Npz(), "tar": Tar(), "parquet": Parquet()}
"""By the names of ``--format``."""


def check_usable(form: str) -> None:
    """Check that a form's library is installed, before time is spent.

    Raises:
        BackendError: it is not.
    """
    if form == "parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(
            "Parquet files are written by pyarrow", note=str(error), hint="pip install 'ddpmx[data]', or --format tar"
        ) from error
    return pyarrow, pyarrow.parquet


def _text(work: Work, images: Range) -> str:
    return json.dumps(described(work, images), separators=(",", ":"), sort_keys=True)


def _parsed(text: str) -> Mapping[str, Any]:
    """A file's description; {} of a whole file that has none, and so is somebody else's."""
    try:
        values = parse_json(text) if text else {}
    except (DdpmxError, FileFormatError):
        return {}
    return values if isinstance(values, dict) else {}
