"""A torch network as a backend of the runtime's chain: one chain, whatever computes ε."""

from __future__ import annotations

import torch
from torch import nn

from ddpmx.backends import Buffers
from ddpmx.errors import BackendError


class TorchBackend:
    """ε by a module that takes x float32 [B, C, H, W] and t int [B], on the device where its parameters are.

    The module is used as it stands: the caller puts it into eval mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._device = next(network.parameters()).device

    @property
    def description(self) -> str:
        """torch's version and the device."""
        return f"torch {torch.__version__}, {self._device}"

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers."""
        self._x, self._t, self._out = (torch.from_numpy(a) for a in (buffers.x, buffers.t, buffers.out))

    @torch.no_grad()
    def enqueue(self) -> None:
        """Run the network once."""
        try:
            self._out.copy_(self._network(self._x.to(self._device), self._t.to(self._device)))
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                "torch could not run the network", note=str(error).strip()[:300], hint="is there enough memory for it?"
            ) from error

    def close(self) -> None:
        """There is nothing to free."""
