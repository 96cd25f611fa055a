"""From images to a model file: the ε-network, its training, its export. Needs torch; running the file does not.

``export(module, spec, "model.onnx")`` exports any torch module; :class:`Adapter` describes in what ways it differs from
ddpmx's own. Both are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_export.any_module.adapter import Adapter
    from ddpm_export.any_module.export import Exported, export, spec_from_arrays

__all__ = ["Adapter", "Exported", "export", "spec_from_arrays"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "Adapter":
        from ddpm_export.any_module.adapter import Adapter

        return Adapter
    if name in __all__:
        from ddpm_export.any_module import export as any_module

        return getattr(any_module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
