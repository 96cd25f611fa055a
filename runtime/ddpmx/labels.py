"""The classes that a user names, made what a network is told."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays import view
from ddpmx.errors import InputError
from ddpmx.spec import ModelSpec


def class_labels(spec: ModelSpec, n: int, labels: Any) -> NDArray[np.int32]:
    """The class of each image, int32 [n].

    Args:
        spec: the model.
        n: images.
        labels: one whole number for all of them, or n, in a list or in an array on the host; None if nothing was said.

    Raises:
        InputError: the model has no classes, or they are not such numbers, or one is no class of the model's, or nothing
            was said.
    """
    classes = spec.classes
    if classes is None:
        raise InputError("the model has no classes, and labels name some")
    if labels is None:
        raise InputError(
            f"the model draws images of {classes} classes, and none is named", hint=f"labels: 0…{classes - 1}"
        )
    with ExitStack() as seen:
        if not isinstance(labels, (int, float, list, tuple, np.generic)):
            where = seen.enter_context(view(labels))
            if where.on_device:
                raise InputError("labels lie on a GPU, and are looked at on the host", hint="labels.cpu() in PyTorch")
            labels = where.numpy()
        try:
            array = np.asarray(labels)
        except (ValueError, OverflowError) as error:
            raise InputError(f"labels must be one whole number, or {n}", note=str(error)[:200]) from error
        if array.dtype.kind not in "iu" or array.shape not in ((), (n,)):
            raise InputError(
                f"labels must be one whole number, or {n}", note=f"they are {array.dtype} {[*array.shape]}"
            )
        wrong = array[(array < 0) | (array >= classes)]
        if wrong.size:
            raise InputError(f"there is no class {wrong[0]}", hint=f"the model's are 0…{classes - 1}")
        return np.broadcast_to(array, n).astype(np.int32)
