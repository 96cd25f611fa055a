"""Judges whether pictures look like garments, by three numbers, with controls that must fail.

The judge does not know how the images were made. It uses a small classifier trained on real images, and the total
variation, which noise raises and blur lowers:

- confident: the share of images to which the classifier gives one class a probability of at least 0.9, against the same
  share among real images that it was not trained on: at least 0.6 of it;
- every class occurs;
- total variation: within ±20 % of the real images'.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

DATA = Path(__file__).with_name("fashion_mnist_16x16_10k.npz")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
HELD_OUT = 2000
CONFIDENT, MIN_SHARE, MAX_VARIATION = 0.9, 0.6, 0.2

UInt8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Verdict:
    """The judge's three numbers for a set of images."""

    confident: float
    """Share of confident images, as a fraction of the same share among real ones."""
    classes: int
    """How many of the ten classes occur."""
    variation: float
    """Total variation, as a fraction of the real images'."""

    @property
    def passed(self) -> bool:
        return self.confident >= MIN_SHARE and self.classes == len(CLASSES) and abs(self.variation - 1) <= MAX_VARIATION


class Judge:
    """Trains its classifier on real images; takes a few seconds."""

    def __init__(self) -> None:
        with np.load(DATA) as data:
            images, labels = data["images"], data["labels"]
        self.train, self.real = images[:-HELD_OUT], images[-HELD_OUT:]
        self._classifier = MLPClassifier((128,), alpha=1e-2, batch_size=100, random_state=0, max_iter=25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 25 passes are intended
            self._classifier.fit(_features(self.train), labels[:-HELD_OUT])
        self.accuracy = float(self._classifier.score(_features(self.real), labels[-HELD_OUT:]))
        self._real_share = self._confident(self.real).mean()
        self._real_variation = total_variation(self.real)

    def __call__(self, images: UInt8) -> Verdict:
        """Judge uint8 [n, 16, 16] or [n, 16, 16, 1]."""
        images = images.reshape(-1, 16, 16)
        return Verdict(
            float(self._confident(images).mean() / self._real_share),
            len(np.unique(self._classifier.predict(_features(images)))),
            total_variation(images) / self._real_variation,
        )

    def _confident(self, images: UInt8) -> NDArray[np.bool_]:
        return np.asarray(self._classifier.predict_proba(_features(images)).max(axis=1) >= CONFIDENT)

    def controls(self, n: int = 256, seed: int = 0) -> dict[str, UInt8]:
        """Sets of ``n`` images that are not garments, or damaged ones. Each must fail."""
        rng = np.random.default_rng(seed)
        flat = self.train.reshape(len(self.train), -1).astype(np.float64)
        first, second = rng.permutation(len(self.real))[: 2 * n].reshape(2, n)
        pairs = (self.real[first].astype(np.float64) + self.real[second]) / 2
        noisy = self.real[first] + rng.normal(0, 0.2 * 127.5, (n, 16, 16))  # σ = 0.2 in [−1, 1]
        return {
            "pure noise": rng.integers(0, 256, (n, 16, 16), dtype=np.uint8),
            "Gaussian fit": _uint8(rng.multivariate_normal(flat.mean(0), np.cov(flat.T), n).reshape(n, 16, 16)),
            "averaged pairs": _uint8(pairs),
            "real + noise 0.2": _uint8(noisy),
        }


def total_variation(images: UInt8) -> float:
    """Mean absolute difference between neighbouring pixels."""
    x = images.astype(np.float64)
    return float(np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean())


def _features(images: UInt8) -> NDArray[np.float64]:
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def _uint8(x: NDArray[np.float64]) -> UInt8:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)
