"""Half precision for a module of which nothing is known: the layers that may, by a rule that looks at how they are used.

A layer computes in half if it is a plain convolution or linear layer (no forward of its own: that would be unknown code,
such as weights standardised before use), with weights of its own, that is asked about many positions of an image: not
about one vector per image, as the time path is. The first and the last such layer stay float32, and so does a layer whose
numbers come near the end of half's range. Each casts what comes in and casts its answer back, so that everything between
them (norms, softmax, products of attention, sums) stays float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LARGEST = 65504 / 8
"""Half ends at 65504; the probe has seen only a few images."""


KINDS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Halved(nn.Module):
    """Goes in front of a layer's class: it takes and gives float32, whatever its weights are."""

    HALVED: ClassVar[tuple[str, ...]] = ("itself",)
    weight: Tensor

    @property
    def itself(self) -> nn.Module:
        """What :func:`~ddpm_export.graph.onnx_export.to_precision` halves."""
        return self

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """For any input that the layer takes."""
        out: Tensor = super().forward(input.to(self.weight.dtype), *args, **kwargs)
        return out.to(torch.float32)


def is_plain(module: nn.Module) -> bool:
    """Whether it computes what torch's own layer does, with a weight that is a parameter and nothing computed."""
    for kind in KINDS:
        if isinstance(module, kind):
            same = all(
                getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
            )
            # torch's old weight_norm puts a tensor where the parameter was, by a hook
            hooks = module._forward_pre_hooks or module._forward_hooks
            return same and not hooks and isinstance(module._parameters.get("weight"), Tensor)
    return False


def mark(network: nn.Module, ask: Callable[[], Any]) -> list[str]:
    """Mark the layers that half precision halves; until it does, they compute what they did.

    Args:
        network: changed in place.
        ask: runs it once on typical inputs.

    Returns:
        The paths of these layers.
    """
    held = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    asked: list[tuple[nn.Module, bool]] = []  # in running order, and whether the layer may
    handles: list[RemovableHandle] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        given = inputs[0]
        linear = isinstance(module, nn.Linear)
        positions = given[0].numel() // given.shape[-1 if linear else 1] if given.ndim > 2 else 1
        if positions > 1:
            tensors = (given, out, *module.parameters())
            fits = all(t.dtype == torch.float32 and float(t.detach().abs().max()) < LARGEST for t in tensors)
            asked.append((module, fits))

    for module in network.modules():
        if is_plain(module):
            handles.append(module.register_forward_hook(note))
    try:
        ask()
    finally:
        for handle in handles:
            handle.remove()
    if not asked:
        return []
    refused = {id(asked[0][0]), id(asked[-1][0])} | {id(module) for module, fits in asked if not fits}
    chosen = []
    for name, module in network.named_modules():
        if id(module) in refused or all(module is not one for one, _ in asked):
            continue
        if all(held[id(p)] == 1 for p in module.parameters(recurse=False)):
            module.__class__ = type(f"Halved{type(module).__name__}", (Halved, type(module)), {})
            chosen.append(name)
    return chosen
