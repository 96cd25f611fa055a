"""FID, KID, the Inception score, precision and recall of samples, by torch-fidelity, with the protocol beside the figures.

FID is the Fréchet distance of two Gaussians that are fitted to the features of two sets of images (Heusel et al. 2017):
|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½). KID is the unbiased estimate of the squared MMD with the kernel (x·y/D + 1)³
(Bińkowski et al. 2018), IS is exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016), and precision and recall are the shares of
samples, and of real images, that lie within the third neighbour's distance of one of the others (Kynkäänniemi et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_export.quality.extractor import LOGITS, PACKAGE, Extractor, library
from ddpmx.errors import InputError, NumericError

METRICS = ("fid", "kid", "is", "pr")

PAPERS = 50_000
"""Samples that papers draw for FID."""

SUBSETS, SUBSET = 100, 1000
"""How often KID is estimated, and from how many images of each set: torch-fidelity's."""

SPLITS = 10
"""Parts of the samples, for each of which IS is computed: the paper's."""

NEIGHBOURS = 3
SEED = 2020
"""torch-fidelity's own."""

_LEAST = {"fid": 2, "kid": 2, "is": SPLITS, "pr": NEIGHBOURS + 1}
_AT_ONCE = 1000  # rows of distances


class Images(Protocol):
    """A set of images: a :class:`ddpm_export.training.data.Dataset`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Those of these numbers, uint8 [B, H, W, C]."""


@dataclass(frozen=True)
class Quality:
    """Figures of samples, and how they were computed. What was not asked for is None.

    Attributes:
        samples, reference: how many images there were of each.
        size: (H, W) of all of them.
        extractor: the network, for people.
        resizing: what it does to an image first.
        device: where it ran.
        seed: of KID's subsets and the order of the samples for IS.
        fid: the Fréchet distance.
        kid: the mean over KID's subsets.
        kid_deviation: over the subsets; None if there was one.
        kid_subsets: (how many, of how many images).
        inception_score: the mean over 10 parts.
        inception_score_deviation: over the parts.
        precision, recall: shares.
        notes: what keeps the figures from being compared with others.
    """

    samples: int
    reference: int
    size: tuple[int, int]
    extractor: str
    resizing: str
    device: str
    seed: int
    fid: float | None = None
    kid: float | None = None
    kid_deviation: float | None = None
    kid_subsets: tuple[int, int] | None = None
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    precision: float | None = None
    recall: float | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }  # asdict would copy the same


def check_metrics(metrics: Sequence[str], extractor_layers: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics in their own order, each once.

    Raises:
        InputError: there is no such metric, none, or the network does not give what one needs.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise InputError(
            f"there is no metric {unknown[0]!r}" if unknown else "no metric was named", hint=f"of: {', '.join(METRICS)}"
        )
    if "is" in metrics and extractor_layers is not None and LOGITS not in extractor_layers:
        raise InputError(
            "the Inception score needs logits, and this network gives features alone",
            hint=f"--weights FILE in place of --weights {PACKAGE}, or --metrics without is",
        )
    return tuple(name for name in METRICS if name in metrics)


def judge(
    samples: Images,
    reference: Images,
    extractor: Extractor,
    *,
    metrics: Sequence[str] = ("fid", "kid"),
    batch: int = 64,
    seed: int = SEED,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Compare two sets of images of one size by a network's features.

    Args:
        samples: what a model has drawn; grey or RGB.
        reference: real images; papers take all that the model was trained on.
        extractor: the network, of :func:`ddpm_export.quality.extractor.inception`.
        metrics: of :data:`METRICS`.
        batch: images at once.
        seed: of KID's subsets, and of the order of the samples for IS, 0 … 2³² − 1.
        device: ``cpu`` or ``cuda``; a GPU if there is one.
        progress: called with (images done, images in all).

    Raises:
        InputError: sets of other sizes, too few images, images that are neither grey nor RGB, or a number out of its range.
        BackendError: torch-fidelity is missing.
        NumericError: a feature is not finite.
    """
    metrics = check_metrics(metrics, extractor.layers)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"a seed of torch-fidelity is 0 … 2**32 - 1, not {seed}")
    if batch < 1:
        raise InputError(f"a batch is at least 1, not {batch}")
    if samples.shape[1:] != reference.shape[1:]:
        mine, theirs = (f"{h}×{w}" for _, h, w in (samples.shape, reference.shape))
        raise InputError(
            "samples and reference differ in size",
            note=f"{mine} and {theirs}: resizing one of them changes every figure",
            hint="what the model was trained on, in its size; --resize brings image files of the reference to it",
        )
    n, m = len(samples), len(reference)
    for metric in metrics:
        least = _LEAST[metric]
        if min(n, m) < least:
            raise InputError(f"{metric} needs {least} images of each set, and there are {n} and {m}")
    binary = any(name != "is" for name in metrics)
    total, done = n + m * binary, 0

    def tick(index: int) -> None:
        nonlocal done
        done = max(done, index + 1)  # torch-fidelity looks at the first image of each set once more
        if progress is not None:
            progress(done, total)

    subset = min(SUBSET, n, m)
    subsets = 1 if subset == n == m else SUBSETS
    try:
        found = library().calculate_metrics(
            input1=_as_dataset(samples, tick),
            input2=_as_dataset(reference, lambda index: tick(n + index)) if binary else None,
            feature_extractor=extractor.name,
            **{argument: metric in metrics for metric, argument in _ARGUMENTS.items()},
            kid_subsets=subsets,
            kid_subset_size=subset,
            isc_splits=SPLITS,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=_AT_ONCE,
            batch_size=batch,
            rng_seed=seed,
            cuda=device == "cuda",
            cache=False,
            save_cpu_ram=True,  # distances in parts, and no processes of its own
            verbose=False,
        )
    except np.linalg.LinAlgError as error:
        raise NumericError("the features are not finite", note=str(error), hint="look at the weights") from error
    figures = {name: found.get(key) for name, key in _KEYS.items()}
    if bad := [name for name, value in figures.items() if value is not None and not np.isfinite(value)]:
        raise NumericError(f"{bad[0]} is not finite", hint="look at the weights")
    if "kid" in metrics:
        figures["kid_deviation"] = figures["kid_deviation"] if subsets > 1 else None
    return Quality(
        n,
        m if binary else 0,
        samples.shape[1:],
        extractor.description,
        extractor.resizing,
        device,
        seed,
        **figures,
        kid_subsets=(subsets, subset) if "kid" in metrics else None,
        notes=notes(n, m, metrics, extractor.size),
    )


_ARGUMENTS = {"fid": "fid", "kid": "kid", "is": "isc", "pr": "prc"}
_KEYS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_deviation": "kernel_inception_distance_std",
    "inception_score": "inception_score_mean",
    "inception_score_deviation": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


def notes(n: int, m: int, metrics: Sequence[str], size: int) -> tuple[str, ...]:
    """What a reader has to know who compares the figures with others'.

    Args:
        n, m: samples and real images.
        metrics: what was computed.
        size: how many features there are.
    """
    said = []
    if "fid" in metrics and n < PAPERS:
        said.append(
            f"papers draw {PAPERS:,} samples for FID, and here are {n:,}: the fewer, the larger FID is, for any model; "
            "compare it with others of the same number alone"
        )
    if "fid" in metrics and min(n, m) <= size:
        said.append(
            f"{min(n, m):,} images span at most {min(n, m) - 1:,} of the {size:,} directions of features, so that the "
            "covariances of FID are singular; KID has no such bias"
        )
    if "is" in metrics and n < PAPERS:
        said.append(f"papers draw {PAPERS:,} samples for IS, and of fewer it is smaller")
    if "pr" in metrics:
        said.append(
            "precision and recall are by Inception's features, as in OpenAI's evaluations, and not by VGG-16's; they "
            "depend on both numbers of images"
        )
    return tuple(said)


def _as_dataset(images: Images, tick: Callable[[int], None]) -> torch.utils.data.Dataset[torch.Tensor]:
    """Images as torch-fidelity takes them: uint8 [3, H, W] each."""
    if images.shape[0] not in (1, 3):
        raise InputError(f"the images have {images.shape[0]} channels, and Inception takes 3", hint="grey or RGB")

    class Given(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> torch.Tensor:
            (pixels,) = images.take(np.array([index]))
            rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)
            tick(index)
            return torch.from_numpy(np.array(rgb, order="C"))

    return Given()
