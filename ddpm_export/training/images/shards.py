"""Images in tar files, as WebDataset lays them out: members ``KEY.jpg`` and ``KEY.cls`` or ``KEY.txt`` beside each other.

Only the headers are read to find the images; each is then read by its offset, in any order. So shards are shuffled and
resumed exactly like folders. Names of members are text and never used as paths.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ddpm_export.training.images.decode import plugins
from ddpm_export.training.images.find import HIDDEN, NOT_IMAGES, PLUGIN_SUFFIXES, SUFFIXES, Found, missing
from ddpmx.errors import DataError

MAX_IMAGE = 1 << 30
"""The largest image file that is read, in bytes."""

MAX_LABEL = 1024
"""The longest label, in bytes."""

MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """A file in a tar; see :class:`.Inside`.

    Attributes:
        shard: the tar.
        offset, size: where its bytes are.
        key: its name as far as it is the same for an image and its label.
        path: its name.
    """

    shard: Path
    offset: int
    size: int
    key: str
    path: str

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.shard.name}: {self.path}"

    @property
    def stem(self) -> str:
        """Its key."""
        return self.key

    def open(self) -> BinaryIO:
        """Its bytes."""
        return io.BufferedReader(_Part(self.shard, self.offset, self.size))

    def stamp(self) -> bytes:
        """Where it lies in its tar."""
        return f"{self.shard.name} {self.offset} {self.size} {self.path}".encode(errors="surrogateescape")


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._at = path.open("rb", buffering=0), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        if not view:
            return 0
        self._stream.seek(self._offset + self._at)
        count = self._stream.readinto(view)
        if not count:
            raise OSError("the tar ends before this image")
        self._at += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass
class Shards:
    """What was found in tars.

    Attributes:
        found: the images.
        labels: by shard and key, the member with the label and the kind of it, ``cls`` or ``txt``.
    """

    found: Found = field(default_factory=Found)
    labels: dict[tuple[Path, str], dict[str, Member]] = field(default_factory=lambda: defaultdict(dict))


def is_shards(path: Path) -> bool:
    """Whether a path means tars: one, several by ``{0000..0009}``, or a folder that holds some and no images or folders."""
    if path.is_dir():
        with os.scandir(path) as entries:
            names = [(entry.name.lower(), entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        suffixes = {PurePosixPath(name).suffix for name, _ in names}
        return ".tar" in suffixes and not suffixes & SUFFIXES and not any(folder for _, folder in names)
    return path.suffix.lower() == ".tar"


def expand(path: Path, suffix: str = ".tar") -> list[Path]:
    """The tars, or the files of another suffix, that a path means, in their order.

    Raises:
        DataError: some are not there, all of which are named.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and file.name[0] != ".")
    paths = [path] if path.exists() else [Path(text) for text in _expanded(str(path))]
    if gone := [file.name for file in paths if not file.is_file()]:
        raise DataError(
            f"{path}: {len(gone)} of {len(paths)} shards are not there",
            hint="one file, a folder of them, or several as shards-{0000..0009}.tar",
            items=gone,
        )
    return paths


def _expanded(text: str) -> Iterator[str]:
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= MAX_SHARDS:
        raise DataError(f"{text}: {match[0]} is no range of shards", hint="{0000..0009} means ten")
    for number in range(first, last + 1):
        yield from _expanded(f"{text[: match.start()]}{number:0{len(match[1])}}{text[match.end() :]}")


def find_in_shards(path: Path) -> Shards:
    """The images and labels in the tars that ``path`` means, in the order of the tars and in theirs.

    Raises:
        DataError: there are none, a tar is damaged or compressed, or a key has several images.
    """
    shards = Shards()
    for file in expand(path):
        before = len(shards.found.files)
        _read_headers(file, shards)
        keys: dict[str, str] = {}
        for item in shards.found.files[before:]:
            assert isinstance(item, Member)
            if item.key in keys:
                raise DataError(
                    f"{file}: several images have the key {item.key!r}",
                    note=f"{keys[item.key]} and {item.path}",
                    hint="one image for each key; condition images go into shards of their own",
                )
            keys[item.key] = item.path
        shards.found.containers.append(file)
    if not shards.found.files and not shards.found.unreadable:
        raise DataError(
            f"{path}: no images in {'this tar' if len(shards.found.containers) == 1 else 'these tars'}",
            note=shards.found.describe(),
            hint="members named KEY.jpg, KEY.png, …",
        )
    return shards


def _read_headers(file: Path, shards: Shards) -> None:
    try:
        with tarfile.open(file, "r:") as tar:  # ":" is not compressed: members are read by their offsets
            length = file.stat().st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # tarfile keeps all of them
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError(f"it ends in {member.name[:100]!r}")
                    _sort_in(Member(file, member.offset_data, member.size, *_key(member.name)), shards)
                elif not member.isdir():
                    shards.found.leave_out(PurePosixPath(member.name), "links or devices in a tar")
            # tarfile takes a damaged header for the end
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at {tar.offset:,}")
    except (OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        hint = "download or write it again"
        with file.open("rb") as stream:
            if stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
                hint = "unpack it: images are read out of a tar by their place, which a compressed one does not have"
        raise DataError(f"{file}: not a tar that can be read", note=str(error)[:200], hint=hint) from error


def _key(name: str) -> tuple[str, str]:
    """The key of a member's name, which ends at the first dot of its last part, and the name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.split('.', 1)[0]}", name


def _sort_in(member: Member, shards: Shards) -> None:
    path = PurePosixPath(member.path)
    suffix = path.suffix.lower()
    plugin = PLUGIN_SUFFIXES.get(suffix)
    if path.name.startswith("."):
        shards.found.leave_out(path, HIDDEN)
    elif suffix in (".cls", ".txt") and path.name.count(".") == 1:
        shards.labels[member.shard, member.key][suffix[1:]] = member
    elif plugin is not None and plugin not in plugins():
        shards.found.leave_out(path, missing(plugin))
    elif suffix in SUFFIXES or plugin is not None:
        if member.size > MAX_IMAGE:
            shards.found.unreadable.append((member, f"{member.size / 2**30:.1f} GiB in one image"))
        else:
            shards.found.files.append(member)
    else:
        shards.found.leave_out(path, NOT_IMAGES)


def label_texts(shards: Shards, items: Sequence[object]) -> list[str | None]:
    """The text of each image's label, its ``.cls`` or else its ``.txt``; None where there is none.

    Raises:
        DataError: one is too long, no UTF-8, or can no longer be read.
    """
    texts: list[str | None] = []
    for item in items:
        assert isinstance(item, Member)
        beside = shards.labels.get((item.shard, item.key), {})
        label = beside.get("cls") or beside.get("txt")
        if label is None:
            texts.append(None)
            continue
        try:
            if label.size > MAX_LABEL:
                raise ValueError(f"{label.size:,} bytes")
            with label.open() as stream:
                texts.append(stream.read(MAX_LABEL).decode().strip())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{label.name}: no label", note=str(error)[:200], hint="a number 0…K−1 in KEY.cls, or a name in KEY.txt"
            ) from error
    return texts
