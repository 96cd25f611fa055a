"""Pictures brought to a model's size: in training and where the trained model runs, by the same arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def resized(picture: Image, size: tuple[int, int], *, bicubic: bool = False) -> Image:
    """The largest centred part that has the shape of ``size``, resized to it.

    Args:
        picture: of any mode that Pillow resizes.
        size: (H, W).
        bicubic: enlarge by a bicubic filter, as conditions are, and not by Lanczos'. Lanczos' reduces in any case.
    """
    from PIL.Image import Resampling

    height, width = size
    if (picture.height, picture.width) == size:
        return picture
    scale = max(height / picture.height, width / picture.width)
    crop_h, crop_w = min(picture.height, height / scale), min(picture.width, width / scale)
    left, top = (picture.width - crop_w) / 2, (picture.height - crop_h) / 2
    box = (left, top, left + crop_w, top + crop_h)
    return picture.resize((width, height), Resampling.BICUBIC if bicubic and scale > 1 else Resampling.LANCZOS, box)
