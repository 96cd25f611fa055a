"""From images to a model file: the ε-network, its training, its export. Needs torch; running the file does not.

``train("photos/", "runs/photos")`` trains, and ``load("runs/photos")`` opens a run as ``ddpmx.load`` opens a model file.
``export(module, spec, "model.onnx")`` exports any torch module; :class:`Adapter` describes in what ways it differs from
ddpmx's own. All are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_export.any_module.adapter import Adapter
    from ddpm_export.any_module.export import Exported, export, spec_from_arrays
    from ddpm_export.any_module.fit_time import TimeFit, fit_time
    from ddpm_export.training.api import Run, train
    from ddpm_export.training.config import RunConfig
    from ddpm_export.training.pipeline import load
    from ddpm_export.training.session import Housekeeping, Progress

__all__ = [
    "Adapter",
    "Exported",
    "Housekeeping",
    "Progress",
    "Run",
    "RunConfig",
    "TimeFit",
    "export",
    "fit_time",
    "load",
    "spec_from_arrays",
    "train",
]

_MODULES = {
    "Adapter": "any_module.adapter",
    "Exported": "any_module.export",
    "Housekeeping": "training.session",
    "Progress": "training.session",
    "Run": "training.api",
    "RunConfig": "training.config",
    "TimeFit": "any_module.fit_time",
    "export": "any_module.export",
    "fit_time": "any_module.fit_time",
    "load": "training.pipeline",
    "spec_from_arrays": "any_module.export",
    "train": "training.api",
}
"""Where each public name is."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
