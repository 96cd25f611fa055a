"""Reads the images that a command evaluates a model on, and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import DataError, InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.pixels import from_uint8

if TYPE_CHECKING:
    from ddpm_export.training.data import Dataset


@dataclass(frozen=True, eq=False)
class Data:
    """Some images of a data set.

    Attributes:
        images: uint8 [n, H, W, C].
        indices: int64 [n], their numbers in the data set.
        total: how many there are in it.
        labels: int32 [n], their classes, or None.
        cond: float32 [n, K, H, W], their conditions, or None.
        notes: what there is to say of how they were read.
    """

    images: NDArray[np.uint8]
    indices: NDArray[np.int64]
    total: int
    labels: NDArray[np.int32] | None
    cond: NDArray[np.float32] | None
    notes: tuple[str, ...]


def read_data(
    path: Path,
    spec: ModelSpec,
    *,
    count: int | None = None,
    resize: bool = False,
    white: float | None = None,
    label: str | None = None,
    no_labels: bool = False,
    cond: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Data:
    """Images for a model, as ``ddpmx train`` reads them; labels and conditions if the model takes them.

    Args:
        path: a folder of images, an .npz or .npy, shards or tables.
        spec: the model.
        count: only so many images, spread evenly over the data set, which may be sorted.
        resize: bring image files to the model's size and channels.
        white: the number that is white, in arrays that are no uint8 and in greys of more than 8 bits.
        label: the class of all of them, by number or name, instead of labels that the data have.
        no_labels: leave labels out, for a model that knows "no class".
        cond: condition images, one for each image.
        progress: called with (images read, images in all).

    Raises:
        DataError: they cannot be read.
        InputError: they do not fit the model, or labels or conditions are missing.
    """
    from ddpm_export.training.data import are_files, load_dataset

    c, height, width = spec.shape
    files = are_files(path)
    number = _check_flags(spec, label=label, no_labels=no_labels, cond=cond, resize=resize and not files)
    if count is not None and count < 1:
        raise InputError(f"--images must be at least 1, not {count}")
    to_size = {"size": (height, width), "channels": c} if resize else {}
    labelled = spec.classes is not None and label is None and not no_labels

    def load(classes: bool) -> Dataset:
        more: dict[str, Any] = {"condition": cond, "white": white, "progress": progress, **to_size}
        return load_dataset(path, classes=classes, **more)

    try:
        try:
            data = load(labelled)
        except DataError as error:
            if not labelled:
                raise
            load(False)  # if it is not the labels that are wrong, this says what is
            without = ", or --no-labels for the model without a class" if spec.null_class else ""
            one = (spec.class_names or "0")[0]
            raise InputError(
                f"missing labels: the model has {spec.classes} classes",
                note=error.fact,
                hint=f"--label {one} for all images, a subfolder for each class, or an array of labels{without}",
            ) from error
    except DataError as error:
        raise DataError(error.fact, note=error.note, hint=_our_hint(error.hint, spec), items=error.items) from error
    if data.shape != spec.shape:
        channels, high, wide = data.shape
        raise InputError(
            f"{path}: images of {high}×{wide}×{channels}",
            note=f"the model takes {height}×{width}×{c}",
            hint="--resize brings image files to that, as ddpmx train does"
            if files
            else "an array is taken as it is; --resize is for image files",
        )
    n = len(data) if count is None else count
    if n > len(data):
        raise InputError(f"--images {n}: there are {len(data)} in {path}", hint="omit it for all of them")
    indices = np.floor((np.arange(n) + 0.5) * len(data) / n).astype(np.int64)
    labels = None if data.labels is None else _by_name(spec, data.labels[indices], data.classes)
    if number is not None:
        labels = np.full(n, number, np.int32)
    conditions = None
    if data.conditions is not None:
        conditions = np.ascontiguousarray(from_uint8(data.conditions.take(indices)).transpose(0, 3, 1, 2))
    return Data(data.take(indices), indices, len(data), labels, conditions, data.notes)


def read_pictures(
    path: Path, *, size: tuple[int, int] | None = None, progress: Callable[[int, int], None] | None = None
) -> Dataset:
    """Images that are compared with others, as ``ddpmx train`` reads them, grey or RGB: all of them of one size.

    Args:
        path: a folder of images, of which the sheets that ``ddpmx generate`` adds are left out; an .npz or .npy, shards or
            tables.
        size: (H, W) to bring image files to.
        progress: called with (images read, images in all).

    Raises:
        DataError: they cannot be read, or have several sizes.
        InputError: an array is to be resized, or has another number of channels.
    """
    from ddpm_export.training.data import are_files, load_dataset

    files = are_files(path)
    if size is not None and not files:
        raise InputError("--resize is for image files; an array is taken as it is", hint="omit it")
    try:
        data = load_dataset(path, channels=3 if files else None, size=size, progress=progress)
    except DataError as error:
        hint = "images of one size" if error.hint and "--size" in error.hint else error.hint
        hint = hint and hint.replace("--data takes", "it is")
        raise DataError(error.fact, note=error.note, hint=hint, items=error.items) from error
    if data.shape[0] not in (1, 3):
        raise InputError(f"{path}: images of {data.shape[0]} channels", hint="1 or 3")
    return data


def _by_name(spec: ModelSpec, labels: NDArray[np.int32], names: tuple[str, ...] | None) -> NDArray[np.int32]:
    """The model's numbers of the data's classes: by their names, where the model has names; else they are the same."""
    if spec.class_names is None or names is None:
        return labels
    used = np.unique(labels)
    numbers = np.zeros(len(names), np.int32)
    numbers[used] = [spec.class_number(names[number]) for number in used.tolist()]
    return numbers[labels]


def _check_flags(spec: ModelSpec, *, label: str | None, no_labels: bool, cond: Path | None, resize: bool) -> int | None:
    """Check the flags against the model, before anything is read. The number of the class."""
    if label is not None and no_labels:
        raise InputError("--label and --no-labels exclude each other")
    if label is not None and spec.classes is None:
        raise InputError("the model has no classes, but --label was passed")
    number = None if label is None else spec.class_number(label.strip())
    if number is not None and not 0 <= number < (spec.classes or 0):
        raise InputError(f"there is no class {label}", hint=f"the model's are 0…{(spec.classes or 1) - 1}")
    if no_labels and not spec.null_class:
        raise InputError(
            "--no-labels is for a model that was also trained without classes",
            note="its spec has no null_class" if spec.classes is not None else "this one has no classes at all",
            hint="omit it",
        )
    if cond is not None and spec.condition is None:
        raise InputError("the model takes no condition", hint="leave out --cond")
    if cond is None and spec.condition is not None:
        raise InputError(
            "missing condition: the model takes a condition image",
            hint="--cond PATH, the same kind of data with a condition for each image",
        )
    if resize:
        raise InputError("--resize is for image files; an array is taken as it is", hint="omit it")
    return number


def _our_hint(hint: str | None, spec: ModelSpec) -> str | None:
    """What `ddpmx train` says to do, by the flags that there are here."""
    c, height, width = spec.shape
    if hint is None:
        return None
    if "--size" in hint or "--channels" in hint:
        return f"--resize brings all of them to {height}×{width} and {c} channel{'s' * (c > 1)}, as ddpmx train does"
    return hint.replace("--data takes", "DATA is")
