"""A run or a checkpoint as a :class:`ddpmx.Pipeline`: torch runs the network, and ddpmx the chain around it."""

from __future__ import annotations

import os

import torch

from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.training import checkpoint
from ddpm_export.training.checkpoint import Weights
from ddpmx.errors import BackendError, InputError
from ddpmx.pipeline import Pipeline


def load(path: str | os.PathLike[str], *, weights: Weights = "ema", device: str = "cpu", threads: int = 0) -> Pipeline:
    """Open a run's newest checkpoint, or a checkpoint, as :func:`ddpmx.load` opens a model file.

    Args:
        path: the folder.
        weights: the averaged ones (``ema``), or those as trained (``raw``).
        device: torch's name of it.
        threads: CPU threads, of all of torch; 0 leaves the choice to torch.

    Raises:
        FileFormatError, SpecError: no checkpoint there, or a damaged one.
        InputError: ``threads`` out of its range.
        BackendError: torch cannot use the device.
    """
    if not 0 <= threads <= 1024:
        raise InputError(f"threads must be from 0 to 1024, not {threads}")
    if threads:
        torch.set_num_threads(threads)
    network, spec = checkpoint.load_network(path, weights)
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # by device one or the other
        raise BackendError(
            f"torch cannot use the device {device!r}", note=str(error).splitlines()[0][:200], hint="the device cpu"
        ) from error
    return Pipeline(spec, TorchBackend(network))
