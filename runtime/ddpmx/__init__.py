"""ddpmx: the whole reverse Markov chain of a DDPM, from one self-describing file, without torch.

import ddpmx

with ddpmx.load("model.onnx") as pipeline:
    images = pipeline.generate(16, seed=0)  # uint8 [16, H, W, C]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddpmx.errors import DdpmxError
    from ddpmx.formats.spec import ModelSpec
    from ddpmx.pipeline import Pipeline, load
    from ddpmx.sampling.chain import Preview
    from ddpmx.sampling.request import Conditioning, Sampling

__all__ = [
    "Conditioning",
    "DdpmxError",
    "ModelSpec",
    "Pipeline",
    "Preview",
    "Sampling",
    "__version__",
    "load",
]

_HOME = {
    "Conditioning": "sampling.request",
    "DdpmxError": "errors",
    "ModelSpec": "formats.spec",
    "Pipeline": "pipeline",
    "Preview": "sampling.chain",
    "Sampling": "sampling.request",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddpmx' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ddpmx.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
