"""A torch network as a backend of the runtime's chain: one chain, whatever computes ε."""

from __future__ import annotations

import torch
from torch import nn

from ddpmx.backends.base import Buffers
from ddpmx.errors import BackendError


class TorchBackend:
    """ε by a module, on the device where its parameters are.

    It takes x float32 [B, C, H, W] and t int [B] and, by their names, those of y int [B], x0_prev float32 [B, C, H, W]
    and cond float32 [B, K, H, W] that it knows, and gives float32 [B, C, H, W], or two of these if it learns its variance.
    It is used as it stands: the caller puts it into eval mode.
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
        """Use these buffers."""
        self._inputs = {name: torch.from_numpy(array) for name, array in buffers.inputs().items()}
        self._answers = [torch.from_numpy(array) for array in buffers.answers().values()]

    @torch.no_grad()
    def enqueue(self) -> None:
        """Run the network once."""
        try:
            told = {name: tensor.to(self._device) for name, tensor in self._inputs.items()}
            answers = self._network(told.pop("x"), told.pop("t"), **told)
            given = answers if isinstance(answers, tuple) else (answers,)
            if len(given) < len(self._answers):
                raise BackendError("the network gives no variance", note="it was asked for one, as a second answer")
            for mine, theirs in zip(self._answers, given, strict=False):
                mine.copy_(theirs)
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                "torch could not run the network", note=str(error).strip()[:300], hint="is there enough memory for it?"
            ) from error

    def close(self) -> None:
        """There is nothing to free."""
