"""A run or a checkpoint as a :class:`ddpmx.Pipeline`: torch runs the network, and ddpmx the chain around it."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.training import checkpoint
from ddpm_export.training.checkpoint import Weights
from ddpmx.arrays.protocols import Labels
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.conditioning import class_labels


class RunPipeline(Pipeline):
    """A pipeline whose network torch runs, so that it has derivatives.

    Args:
        spec: the model.
        network: in eval mode, on its device.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module) -> None:
        super().__init__(spec, TorchBackend(network))
        self._network = network

    def divergence(
        self,
        x: NDArray[np.float32],
        t: int,
        probe: NDArray[np.float32],
        index: int = 0,
        *,
        labels: Labels | None = None,
    ) -> NDArray[np.float64]:
        """v·J·v, with J the Jacobian of the network's output by x: exact along v, by one backward pass.

        For :func:`ddpmx.tasks.flow.encode`. The mean over v of independent signs is the trace of J (Hutchinson).

        Args:
            x: float32 [n, C, H, W], x_t.
            t: 0…T−1.
            probe: v, as ``x``.
            index: of the first image among those that have ``labels``.
            labels: the class of all images, or of each.

        Returns:
            float64 [n].

        Raises:
            InputError: labels that do not fit the model.
            BackendError: torch could not compute it.
        """
        device = next(self._network.parameters()).device
        named = {}
        if self.spec.classes is not None:
            several = labels is not None and np.ndim(np.asarray(labels)) == 1
            chosen = np.asarray(labels)[index : index + len(x)] if several else labels
            named["y"] = torch.from_numpy(class_labels(self.spec, len(x), chosen)).to(device)
        try:
            with torch.enable_grad():
                states = torch.from_numpy(np.ascontiguousarray(x)).to(device).requires_grad_()
                v = torch.from_numpy(np.ascontiguousarray(probe)).to(device)
                outputs = self._network(states, torch.full((len(x),), t, device=device), **named)
                out = outputs[0] if isinstance(outputs, tuple) else outputs
                (gradient,) = torch.autograd.grad((out * v).sum(), states)
            values = (gradient * v).flatten(1).double().sum(1)
        except (RuntimeError, MemoryError) as error:
            raise BackendError("torch could not compute the derivative", note=str(error).strip()[:300]) from error
        found: NDArray[np.float64] = values.cpu().numpy()
        return found


def load(
    path: str | os.PathLike[str], *, weights: Weights = "ema", device: str = "cpu", threads: int = 0
) -> RunPipeline:
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
    return RunPipeline(spec, network)
