"""The images on which the model `garments` is judged: Fashion-MNIST's, padded by 2 to 32×32 and averaged over 2×2 pixels.

It was trained on the test split, which is in examples/fashion_mnist, and has not seen the training split. On Debian:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb . &&
    ls usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OWN = Path(__file__).parents[2] / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"


def load_images(path: Path | None, count: int) -> NDArray[np.float64]:
    """float64 [count, 16, 16], 0…255: of train-images-idx3-ubyte.gz, or of what the model was trained on."""
    if path is None:
        return np.load(OWN)["images"][:count].astype(np.float64)
    raw = np.frombuffer((gzip.open if path.suffix == ".gz" else open)(path, "rb").read(), np.uint8)
    side = raw[8:16].view(">u4")
    images = raw[16:].reshape(-1, *side)[:count].astype(np.float64)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.floor(padded.reshape(len(images), 16, 2, 16, 2).mean(axis=(2, 4)) + 0.5)
