"""The classes of images: the subfolders that they lie in, or an array of numbers beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images.on_disk import Slot
from ddpmx.errors import DataError
from ddpmx.formats.spec import MAX_CLASSES, MAX_TEXT, ModelSpec, is_class_name

_SHOWN = 8

_LATER = 256
"""Bytes of a spec's text that export adds: the hash of the weights, the version."""


@dataclass(frozen=True)
class Labels:
    """Which class each image is of.

    Attributes:
        numbers: int32 [N], 0…K−1.
        names: of the K classes; their numbers as text where nothing names them.
        notes: how many images each class has, and what is odd about that.
    """

    numbers: NDArray[np.int32]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def named(spec: ModelSpec, names: Sequence[str] | None) -> tuple[ModelSpec, str | None]:
    """A spec with the names of its classes, where a model file can hold them.

    Args:
        spec: the model.
        names: of its classes, as :class:`Labels` has them; None without.

    Returns:
        The spec, and if it lacks the names, why: None where there were none but numbers.
    """
    if spec.classes is None or names is None or all(name.isdigit() for name in names):
        return spec, None
    without = "the model file will not name the classes, which are numbered from 0 in this order"
    if len(names) != spec.classes or not all(map(is_class_name, names)):
        wrong = next((name for name in names if not is_class_name(name)), "")
        return spec, f"{without}: {wrong[:40]!r} can be no name there"
    with_names = spec.replace(class_names=tuple(names))
    if len(json.dumps(with_names.to_json())) + _LATER > MAX_TEXT:
        return spec, f"{without}: {len(names)} names do not fit"
    return with_names, None


def from_folders(folder: Path, files: Sequence[Path]) -> Labels:
    """The classes of files below ``folder``: its subfolders that images lie in, sorted by name.

    Raises:
        DataError: images lie beside the subfolders, or there are none.
    """
    parts = [file.relative_to(folder).parts for file in files]
    if beside := [part[0] for part in parts if len(part) == 1]:
        if len(beside) == len(files):
            raise DataError(
                f"{folder}: the images lie in no subfolders, which would be their classes",
                hint="one subfolder for each class, or no classes",
            )
        raise DataError(
            f"{folder}: {len(beside)} images lie beside the subfolders that are the classes",
            hint="move them into a subfolder, or train without classes",
            items=beside,
        )
    names = tuple(sorted({part[0] for part in parts}))
    number = {name: index for index, name in enumerate(names)}
    notes = []
    try:
        empty = sorted(
            path.name
            for path in folder.iterdir()
            if path.is_dir() and path.name not in number and not path.name.startswith(".")
        )
    except OSError:
        empty = []
    if empty:
        shown = ", ".join(empty[:3]) + (", …" if len(empty) > 3 else "")
        notes.append(f"no classes, since there are no images in them: {shown}")
    return _labels(np.array([number[part[0]] for part in parts], np.int32), names, notes)


def from_texts(
    path: Path, names: Sequence[str], texts: Sequence[str | None], classes: tuple[str, ...] | None = None
) -> Labels:
    """The classes of images that have a text each: numbers 0…K−1, or names, which are sorted.

    Args:
        path: the data set, for errors.
        names: of the images, for errors.
        texts: the labels, None where there is none.
        classes: the names of classes, of which the texts are the numbers.

    Raises:
        DataError: images have no label, all of which are named, or the labels are no classes.
    """
    if without := [name for name, text in zip(names, texts, strict=True) if not text]:
        raise DataError(
            f"{path}: {len(without)} of {len(names)} images have no label",
            hint="a label for each (in a tar a number 0…K−1 in KEY.cls, or a name in KEY.txt), or train without classes",
            items=without,
        )
    given = [text or "" for text in texts]
    different = sorted(set(given))
    if all(text.isascii() and text.isdigit() and len(text) < 10 for text in different):
        most = max(map(int, different))
        if most >= MAX_CLASSES:
            raise DataError(f"{path}: {most} is no class", hint="labels are 0…K−1")
        numbers = np.array([int(text) for text in given], np.int32)
        return _labels(numbers, tuple(map(str, range(most + 1))) if classes is None else classes, [])
    if len(different) > max(2, len(given) // 2):
        raise DataError(
            f"{path}: the labels of {len(given)} images are {len(different)} different texts",
            note=f"such as {different[0][:80]!r}",
            hint="classes are shared by many images; captions are none",
        )
    number = {text: index for index, text in enumerate(different)}
    return _labels(np.array([number[text] for text in given], np.int32), tuple(different), [])


def from_arrays(path: Path, arrays: Mapping[str, NDArray[Any] | Slot], images: str) -> Labels:
    """The classes of the images in an .npz: its array of N whole numbers, and a text array of K names if there is one.

    Args:
        path: the file, for errors.
        arrays: all that it holds.
        images: the name of the array of images.

    Raises:
        DataError: there is no such array, or more than one, or its numbers are no classes.
    """
    n = arrays[images].shape[0]
    others = {name: array for name, array in arrays.items() if name != images and isinstance(array, np.ndarray)}
    found = [
        name
        for name, array in others.items()
        if array.dtype.kind in "iu" and array.shape in ((n,), (n, 1))  # CIFAR's are [N, 1]
    ]
    if len(found) != 1:
        listing = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in others.items())
        texts = [name for name, array in others.items() if array.dtype.kind in "US" and array.shape == (n,)]
        as_numbers = (
            f"names, numbers = np.unique({texts[0]}, return_inverse=True) makes numbers of text" if texts else None
        )
        raise DataError(
            f"{path}: {'more than one array' if found else 'no array'} of labels beside the images",
            note=f"beside {images!r}: {listing or 'nothing'}",
            hint="remove all but one" if found else as_numbers or f"whole numbers [{n}], 0…K−1, under any name",
        )
    numbers = others[found[0]].reshape(n)
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most >= MAX_CLASSES:
        raise DataError(
            f"{path}: {found[0]!r} holds {least if least < 0 else most}, which is no class",
            note=f"numbers from {least} to {most}",
            hint="labels are 0…K−1: np.unique(labels, return_inverse=True)[1] makes them so",
        )
    count = most + 1
    named = [name for name, array in others.items() if array.dtype.kind in "US" and array.shape == (count,)]
    if len(named) > 1:
        raise DataError(
            f"{path}: more than one array of names for {count} classes",
            note=", ".join(named),
            hint="remove all but one",
        )
    names = _texts(path, named[0], others[named[0]]) if named else tuple(map(str, range(count)))
    return _labels(numbers.astype(np.int32), names, [])


def _texts(path: Path, name: str, array: NDArray[Any]) -> tuple[str, ...]:
    try:
        return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in array.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {name!r} is no UTF-8", hint="save names as text (dtype U)") from error


def _labels(numbers: NDArray[np.int32], names: tuple[str, ...], notes: list[str]) -> Labels:
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    each = ", ".join(f"{name} {count:,}" for name, count in zip(names[:_SHOWN], counts, strict=False))
    more = f", … ({min(counts):,} to {max(counts):,} images)" if len(names) > _SHOWN else ""
    notes.insert(0, f"{len(names)} class{'' if len(names) == 1 else 'es'}: {each}{more}")
    if without := [name for name, count in zip(names, counts, strict=True) if not count]:
        shown = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        notes.append(f"{len(without)} of {len(names)} classes have no image: {shown}")
    return Labels(numbers, names, tuple(notes))
