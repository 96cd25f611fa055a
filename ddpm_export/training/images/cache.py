"""The pixels of a folder, kept beside a run's checkpoints so that resuming it decodes nothing.

One file for a run: ``images-cache.npz`` with ``images``, uint8 [N, H, W, C], and ``about``, JSON as bytes. It counts only
while every file has the size and the times that it had, and the settings are the same; anything else is read again. It
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from ddpm_export.training.images.source import Source
from ddpmx.errors import FileFormatError, OutputError, SpecError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.npz import read_npz

NAME = "images-cache.npz"
MAX_BYTES = 2 << 30
"""More pixels are not cached."""

_MAX_ABOUT = 1 << 20


def key_of(source: Source, files: Sequence[Path]) -> str:
    """A hash of everything on which the pixels depend: the settings, Pillow, and each file's name, size and times."""
    settings = {name: value for name, value in source.images_alone().to_json().items() if name != "path"}
    digest = hashlib.sha256(json.dumps([PIL.__version__, settings]).encode())
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            continue  # reading it says what is wrong
        line = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
        digest.update(line.encode() + os.fsencode(file.relative_to(source.path)) + b"\n")
    return digest.hexdigest()


def load(file: Path, key: str) -> tuple[NDArray[np.uint8], tuple[str, ...]] | None:
    """The images and what was said about them, or None if there is no cache with that key, or it is damaged."""
    try:
        arrays = read_npz(file, max_bytes=MAX_BYTES + _MAX_ABOUT, kinds="u")
        images, about = arrays["images"], parse_json(arrays["about"].tobytes())
        notes = [str(note) for note in about["notes"]]  # type: ignore[index]
        matches = about["key"] == key and images.dtype == np.uint8 and images.ndim == 4  # type: ignore[index]
    except (FileFormatError, SpecError, KeyError, TypeError):
        return None
    return (images, tuple(notes)) if matches else None


def store(folder: Path, key: str, images: NDArray[np.uint8], notes: Sequence[str]) -> None:
    """Write the cache into an existing folder, unless it is there or would be too large. A full disk is no error."""
    file = folder / NAME
    if images.nbytes > MAX_BYTES or load(file, key) is not None:
        return
    about = json.dumps({"key": key, "notes": list(notes)}).encode()
    with contextlib.suppress(OutputError), atomic_write(file) as stream:
        np.savez(stream, about=np.frombuffer(about[:_MAX_ABOUT], np.uint8), images=images)
