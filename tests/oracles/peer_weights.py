"""Weights for another project's network, from a seed and the shapes alone: see tests/data/peers/README.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def peer_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random values that keep activations near 1, none near zero; RandomState's stream is frozen for all time."""
    random = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name])
        if len(shapes[name]) > 1:
            values /= math.sqrt(math.prod(shapes[name][1:]))
        else:
            values = 0.2 * values + (0.8 if name.endswith("weight") else 0.0)
        weights[name] = values.astype(np.float32)
    return weights
