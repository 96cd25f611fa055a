"""Conversion between the model's [−1, 1] and pixels: uint8 images, channels last, as in files and on screens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]


def to_uint8(x: NDArray[np.float32]) -> UInt8:
    """[−1, 1] to 0…255: floor(127.5·x + 128), clipped, computed in float32.

    Each of the 256 levels round-trips. Truncating (x + 1)·127.5, as is often done, puts 63 of them one too
    low. NaN gives 0.
    """
    scaled = np.asarray(x, np.float32) * np.float32(127.5) + np.float32(128)
    pixels: UInt8 = np.nan_to_num(np.clip(scaled, np.float32(0), np.float32(255)), nan=0.0).astype(np.uint8)
    return pixels


def from_uint8(images: UInt8) -> NDArray[np.float32]:
    """0…255 to [−1, 1]: u/127.5 − 1, float32."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def size_text(height: int, width: int) -> str:
    """A size in words, ``28×28``; which number is which is said where they differ: ``24×32 (height×width)``."""
    return f"{height}×{width}" + (" (height×width)" if height != width else "")


def to_nhwc(x: NDArray[np.float32]) -> UInt8:
    """float32 [n, C, H, W] in [−1, 1] to uint8 [n, H, W, C]."""
    return to_uint8(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
