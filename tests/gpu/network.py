"""Makes the data, or the weights, of the check's network.

python tests/gpu/network.py images OUT.npz     Fashion-MNIST at 32×32 in colour: every pixel four times
python tests/gpu/network.py random RUN         a run that was never trained: the paper's CIFAR-10 network, random weights
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS.parent / "examples" / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"


def images(output: Path) -> None:
    """uint8 [10000, 32, 32, 3]."""
    with np.load(DATA) as arrays:
        grey = next(array for array in arrays.values() if array.ndim >= 3)
    large = grey.reshape(len(grey), 16, 16).repeat(2, axis=1).repeat(2, axis=2)
    np.savez(output, images=np.repeat(large[..., None], 3, axis=-1))


def random(run: Path) -> None:
    """A run with random weights, see ``oracles/random_weights.py``."""
    sys.path.insert(0, str(TESTS))
    from ddpm_export.networks.unet import UNet, cifar10
    from ddpm_export.training import checkpoint
    from ddpmx.formats.spec import ModelSpec
    from oracles.random_weights import rerandomise

    config = cifar10()
    network = UNet(config)
    rerandomise(network)
    weights = network.state_dict()
    spec = ModelSpec((config.in_channels, *config.size))
    checkpoint.save(run, spec, config, weights, weights, checkpoint.TrainingState(0, {}, {}))


if __name__ == "__main__":
    what, where = sys.argv[1:]
    {"images": images, "random": random}[what](Path(where))
