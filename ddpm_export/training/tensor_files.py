"""Tensors as files of other libraries: the only place where safetensors or torch writes one.

What they raise on a full disk (SafetensorError, a RuntimeError about a zip file) becomes an OutputError here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddpmx.formats.atomic import foreign_writer, write_synced


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file into a folder that is not in its place yet; the data are on disk.

    Raises:
        OutputError: it could not be written.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with foreign_writer(file, SafetensorError):
        save_file(ready, file, None if metadata is None else dict(metadata))
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())


def save_state_dict(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what ``torch.load`` reads, a dict of tensors, into a folder that is not in its place yet.

    Raises:
        OutputError: it could not be written.
    """
    packed = io.BytesIO()  # of a file that cannot be written it says "unexpected pos 576 vs 534"
    torch.save(dict(tensors), packed)
    with foreign_writer(file):
        write_synced(file, packed.getbuffer())
