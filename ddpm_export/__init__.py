"""From images to a model file: the ε-network, its training, its export. Needs torch; running the file does not.

``export(module, spec, "model.onnx")`` exports any torch module; :class:`Adapter` describes in what ways it differs from
ddpmx's own. ``load("runs/x")`` opens a checkpoint as ``ddpmx.load`` opens a model file. All are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_export.any_module.adapter import Adapter
    from ddpm_export.any_module.export import Exported, export, spec_from_arrays
    from ddpm_export.any_module.fit_time import TimeFit, fit_time
    from ddpm_export.training.pipeline import load

__all__ = ["Adapter", "Exported", "TimeFit", "export", "fit_time", "load", "spec_from_arrays"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "Adapter":
        from ddpm_export.any_module.adapter import Adapter

        return Adapter
    if name == "load":
        from ddpm_export.training.pipeline import load

        return load
    if name in ("TimeFit", "fit_time"):
        from ddpm_export.any_module import fit_time

        return getattr(fit_time, name)
    if name in __all__:
        from ddpm_export.any_module import export as any_module

        return getattr(any_module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
