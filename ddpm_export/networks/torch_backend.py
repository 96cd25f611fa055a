"""A torch network as a backend of the runtime, so that the same chain runs it as runs model files."""

from __future__ import annotations

import torch
from torch import nn

from ddpmx.backends.base import Buffers
from ddpmx.errors import BackendError


class TorchBackend:
    """Runs a module, on the device of its parameters.

    The module takes x float32 [B, C, H, W], t int [B] and, by name, its conditioning inputs among y int [B], x0_prev
    float32 [B, C, H, W] and cond float32 [B, K, H, W]. Its output is float32 [B, C, H, W], or two such tensors if the
    variance is learned. The caller puts it into eval mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        tensors = (*network.parameters(), *network.buffers())
        self._device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def description(self) -> str:
        """torch's version and the device."""
        return f"torch {torch.__version__}, {self._device}"

    def bind(self, buffers: Buffers) -> None:
        """Read inputs from, and write outputs to, these buffers."""
        self._inputs = {name: torch.from_numpy(array) for name, array in buffers.inputs().items()}
        self._outputs = [torch.from_numpy(array) for array in buffers.outputs().values()]

    @torch.no_grad()
    def enqueue(self) -> None:
        """Run the network once."""
        try:
            conditioning = {name: tensor.to(self._device) for name, tensor in self._inputs.items()}
            outputs = self._network(conditioning.pop("x"), conditioning.pop("t"), **conditioning)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if len(outputs) < len(self._outputs):
                raise BackendError(
                    "the network has no variance output", note="the spec declares one as its second output"
                )
            for buffer, output in zip(self._outputs, outputs, strict=False):
                buffer.copy_(output)
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                "torch could not run the network",
                note=str(error).strip()[:300],
                hint="check that there is enough memory for it",
            ) from error

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
