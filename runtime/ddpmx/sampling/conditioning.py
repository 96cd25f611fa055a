"""Conditioning: the class of an image, its condition, and x̂_0 of the step before, as a network takes them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.views import view
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.errors import InputError
from ddpmx.formats.spec import ConditioningShapes, ModelSpec, input_type


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


def example(spec: ModelSpec, images: NDArray[np.int64], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """What to tell a network of images nobody has said anything about: ``y`` int32 [n] and ``cond`` float32 [n, K, H, W].

    Classes in turns, and noise in −1…1, as a function of the image's index and the seed. Empty for a network that is told
    nothing.
    """
    found: dict[str, NDArray[Any]] = {}
    if spec.classes is not None:
        found["y"] = (images % spec.classes).astype(np.int32)
    if (dims := spec.conditioning_shapes.get("cond")) is not None:
        z = noise.normal(seed, images, 0, Purpose.CONDITION, int(np.prod(dims)))
        found["cond"] = np.clip(z, -1, 1).reshape(len(images), *dims)
    return found


def check_conditioning(shapes: ConditioningShapes, conditioning: Mapping[str, NDArray[Any] | int], n: int) -> None:
    """See that ``n`` images are told what their network asks for, and nothing else. Addresses are believed.

    Raises:
        InputError: something is missing, too much, or of another type or shape.
    """
    for name in shapes.keys() - conditioning.keys() - {"x0_prev"}:
        raise InputError(f"the network is told {name} as well, and there is none")
    for name, array in conditioning.items():
        dims, dtype = shapes.get(name), np.dtype(input_type(name))
        if dims is None or name == "x0_prev":
            raise InputError(f"the network is told no {name}")
        if not isinstance(array, int) and (array.dtype != dtype or array.shape != (n, *dims)):
            raise InputError(f"{name} must be {dtype.name} {[n, *dims]}", note=f"it is {array.dtype} {[*array.shape]}")
