"""Conditioning inputs of a network: the class of an image, its condition, and x̂_0 of the step before."""

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
        labels: one for all of them, or n: whole numbers, in a list or in an array on the host, or names
            (:attr:`ModelSpec.class_names`); None if missing: no class, which only a network with
            :attr:`ModelSpec.null_class` knows.

    Raises:
        InputError: the model has no classes, labels are missing or of another type or shape, or the model has no such
            class.
    """
    classes = spec.classes
    if classes is None:
        raise InputError("the model has no classes, but labels were passed")
    if labels is None and spec.null_class:
        return np.full(n, classes, np.int32)
    if labels is None:
        raise InputError(f"missing labels: the model has {classes} classes", hint=f"labels: 0…{classes - 1}")
    if isinstance(labels, str):
        labels = spec.class_number(labels)
    elif isinstance(labels, (list, tuple)):
        labels = [spec.class_number(label) if isinstance(label, str) else label for label in labels]
    with ExitStack() as stack:
        if not isinstance(labels, (int, float, list, tuple, np.generic)):
            where = stack.enter_context(view(labels))
            if where.on_device:
                raise InputError("labels are in GPU memory, and must be on the host", hint="labels.cpu() in PyTorch")
            labels = where.numpy()
        try:
            array = np.asarray(labels)
        except (ValueError, OverflowError) as error:
            raise InputError(f"labels must be one whole number, or {n} of them", note=str(error)[:200]) from error
        if array.dtype.kind not in "iu" or array.shape not in ((), (n,)):
            raise InputError(
                f"labels must be one whole number, or {n} of them", note=f"they are {array.dtype} {[*array.shape]}"
            )
        wrong = array[(array < 0) | (array >= classes)]
        if wrong.size:
            raise InputError(f"there is no class {wrong[0]}", hint=f"the model's are 0…{classes - 1}")
        return np.broadcast_to(array, n).astype(np.int32)


def example(spec: ModelSpec, images: NDArray[np.int64], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Conditioning for measurements: ``y`` int32 [n] and ``cond`` float32 [n, K, H, W], as far as the model takes them.

    Classes in turns, "no class" among them where the network knows it, and noise in −1…1, as a function of the image's
    index and the seed.
    """
    conditioning: dict[str, NDArray[Any]] = {}
    if spec.classes is not None:
        conditioning["y"] = (images % spec.label_count).astype(np.int32)
    if (dims := spec.conditioning_shapes.get("cond")) is not None:
        z = noise.normal(seed, images, 0, Purpose.CONDITION, int(np.prod(dims)))
        conditioning["cond"] = np.clip(z, -1, 1).reshape(len(images), *dims)
    return conditioning


def check_conditioning(shapes: ConditioningShapes, conditioning: Mapping[str, NDArray[Any] | int], n: int) -> None:
    """Check that the conditioning of ``n`` images has the inputs that their network takes, and no others.

    An address, an int, is not checked.

    Raises:
        InputError: an input is missing, unknown, or of another type or shape.
    """
    for name in shapes.keys() - conditioning.keys() - {"x0_prev"}:
        raise InputError(f"missing model input {name!r}")
    for name, array in conditioning.items():
        dims, dtype = shapes.get(name), np.dtype(input_type(name))
        if dims is None or name == "x0_prev":
            raise InputError(f"the model has no input {name!r}")
        if not isinstance(array, int) and (array.dtype != dtype or array.shape != (n, *dims)):
            raise InputError(f"{name} must be {dtype.name} {[n, *dims]}", note=f"it is {array.dtype} {[*array.shape]}")
