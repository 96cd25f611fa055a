"""Half precision for an unknown module: which layers may compute in half, by a rule that looks at how they are used.

A layer computes in half if it is a plain convolution or linear layer (no forward of its own: that would be unknown code,
such as weights standardised before use), with weights of its own, that is applied to many positions of an image, not to
one vector per image as in the time path. The first and the last such layer stay float32, and so does a layer whose numbers
come near the end of half's range. Each layer casts its input to half and its output back, so that everything between them
(norms, softmax, products of attention, sums) stays float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LARGEST = 65504 / 8
"""Half ends at 65504; the factor is a margin, since the probe runs on a few images only."""


KINDS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Halved(nn.Module):
    """Base class put before a layer's own: input and output are float32, whatever the dtype of the weights."""

    HALVED: ClassVar[tuple[str, ...]] = ("itself",)
    weight: Tensor

    @property
    def itself(self) -> nn.Module:
        """The part that :func:`~ddpm_export.graph.onnx_export.to_precision` halves: the layer."""
        return self

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """For any input that the layer takes."""
        out: Tensor = super().forward(input.to(self.weight.dtype), *args, **kwargs)
        return out.to(torch.float32)


def is_plain(module: nn.Module) -> bool:
    """Whether it computes what torch's own layer does, with a weight that is a parameter and not computed."""
    for kind in KINDS:
        if isinstance(module, kind):
            same = all(
                getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
            )
            # torch's old weight_norm replaces the parameter by a computed tensor, in a hook
            hooks = module._forward_pre_hooks or module._forward_hooks
            return same and not hooks and isinstance(module._parameters.get("weight"), Tensor)
    return False


def mark(network: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Mark the layers that may be halved; until they are, they compute the same as before.

    Args:
        network: changed in place.
        run: runs it once on typical inputs.

    Returns:
        The paths of these layers.
    """
    users = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    calls: list[tuple[nn.Module, bool]] = []  # in running order, with whether the layer's numbers fit into half
    handles: list[RemovableHandle] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        x = inputs[0]
        linear = isinstance(module, nn.Linear)
        positions = x[0].numel() // x.shape[-1 if linear else 1] if x.ndim > 2 else 1
        if positions > 1:
            tensors = (x, out, *module.parameters())
            fits = all(t.dtype == torch.float32 and float(t.detach().abs().max()) < LARGEST for t in tensors)
            calls.append((module, fits))

    for module in network.modules():
        if is_plain(module):
            handles.append(module.register_forward_hook(note))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        return []
    refused = {id(calls[0][0]), id(calls[-1][0])} | {id(module) for module, fits in calls if not fits}
    chosen = []
    for name, module in network.named_modules():
        if id(module) in refused or all(module is not one for one, _ in calls):
            continue
        if all(users[id(p)] == 1 for p in module.parameters(recurse=False)):
            module.__class__ = type(f"Halved{type(module).__name__}", (Halved, type(module)), {})
            chosen.append(name)
    return chosen
