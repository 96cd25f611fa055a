"""Condition images from files, for models that take one: an .npz, a folder of pictures, or one picture."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.npz import read_npz
from ddpmx.formats.spec import ModelSpec
from ddpmx.images.pictures import MAX_SENT, SENT, is_animated, opened
from ddpmx.images.resize import resized
from ddpmx.sampling.pixels import from_uint8, size_text

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 1 << 32
"""Of all conditions of a call, unpacked."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Conditions(NamedTuple):
    """Condition images.

    Attributes:
        values: float32 [N, K, H, W], N ≥ 1.
        names: of them, N.
        note: what was done to pictures of another size or of several frames, or None.
    """

    values: NDArray[np.float32]
    names: list[str]
    note: str | None = None


def read_conditions(path: str | os.PathLike[str], spec: ModelSpec) -> Conditions:
    """The conditions in a file or a folder.

    Args:
        path: an .npz whose array ``cond`` (or only array) is float [N, K, H, W] as the network takes it, or uint8
            [N, H, W, K]; a folder of pictures, taken in the order of their names; or one picture. Pictures become K
            channels in [−1, 1], on white where they are transparent and K is not 4. One of another size is brought to the
            model's as ``ddpmx train --condition`` does.
        spec: the model.

    Raises:
        InputError: the model takes none, or they do not fit it.
        FileFormatError: no such file, a damaged one, or none of these kinds.
    """
    dims = spec.conditioning_shapes.get("cond")
    if dims is None:
        raise InputError("the model takes no condition", hint="leave out --cond")
    path = Path(path)
    if path.suffix.lower() == ".npz":
        conditions = _from_npz(path, dims)
        return Conditions(conditions, [f"{path.name}[{index}]" for index in range(len(conditions))])
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise FileFormatError(f"{path}: there are no pictures in it")
    else:
        files = [path]
    if len(files) * 4 * int(np.prod(dims)) > MAX_BYTES:
        raise InputError(f"{path}: {len(files)} conditions do not fit into memory", hint="fewer of them at a time")
    if dims[0] not in _MODES:
        raise InputError(
            f"{path}: a picture has 1, 3 or 4 channels, and the condition {dims[0]}",
            hint=f"an .npz with cond: float32 [N, {', '.join(map(str, dims))}]",
        )
    pictures, faults, changed, animated = [], [], 0, 0
    for file in files:
        try:
            picture, other_size = _fitted(opened(file, first_frame=True), dims)
            pictures.append(picture)
            changed += other_size
            animated += is_animated(file)
        except (OSError, ValueError) as error:
            faults.append(f"{file.name}: {error}")
    if faults:
        raise FileFormatError(
            f"{path}: {len(faults)} of {len(files)} files cannot be taken as a condition",
            note="; ".join(faults[:5]) + ("; …" if len(faults) > 5 else ""),
            hint=f"pictures, or an .npz with cond: float32 [N, {', '.join(map(str, dims))}]",
        )
    # np.stack keeps the order in memory of what it stacks, and that of a picture is H, W, K
    notes = []
    if changed:
        notes.append(f"{changed} of {len(files)} conditions are brought to {size_text(*dims[1:])}, as in training")
    if animated:
        notes.append(f"of {animated} that are animated the first frame is taken")
    names = [file.name for file in files]
    return Conditions(np.ascontiguousarray(np.stack(pictures)), names, "; ".join(notes) or None)


def read_sent(data: bytes, spec: ModelSpec) -> NDArray[np.float32]:
    """A condition that somebody has sent as a PNG, JPEG or WebP of any size, float32 [1, K, H, W].

    Args:
        data: the file.
        spec: the model.

    Raises:
        InputError: no such picture; or the model takes no condition, or none that is a picture.
    """
    dims = spec.conditioning_shapes.get("cond")
    if dims is None:
        raise InputError("the model takes no condition", hint="leave out cond")
    if dims[0] not in _MODES:
        raise InputError(f"a picture has 1, 3 or 4 channels, and the condition {dims[0]}", hint="use it from Python")
    try:
        picture = opened(BytesIO(data), first_frame=True, most=MAX_SENT, formats=SENT)
        return _fitted(picture, dims)[0][None]
    except OSError as error:
        raise InputError("cond: no PNG, JPEG or WebP, or a damaged one") from error
    except ValueError as error:
        raise InputError(f"cond: {error}") from error


def _from_npz(path: Path, dims: tuple[int, ...]) -> NDArray[np.float32]:
    arrays = read_npz(path, max_bytes=MAX_BYTES, kinds="biuf")
    name = "cond" if "cond" in arrays else next(iter(arrays)) if len(arrays) == 1 else None
    if name is None:
        raise FileFormatError(f"{path}: there is no array 'cond'", note=f"it holds {', '.join(arrays) or 'none'}"[:200])
    array, (channels, height, width) = arrays[name], dims
    if array.ndim == 4 and len(array) and array.dtype.kind == "f" and array.shape[1:] == dims:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {name!r} holds NaN or infinities, or numbers beyond float32")
        return values
    if array.ndim == 4 and len(array) and array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(from_uint8(array).transpose(0, 3, 1, 2))
    raise InputError(
        f"{path}: {name!r} does not fit the model",
        note=f"it is {array.dtype} {[*array.shape]}",
        hint=f"float32 [N, {channels}, {height}, {width}], or uint8 [N, {height}, {width}, {channels}]",
    )


def _fitted(picture: Image, dims: tuple[int, ...]) -> tuple[NDArray[np.float32], bool]:
    """A picture as float32 [K, H, W], and whether it had another size."""
    from PIL import Image as PilImage

    channels, *size = dims
    height, width = size
    if channels != 4 and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PilImage.new("RGBA", picture.size, "white")
        picture = PilImage.alpha_composite(white, picture)
    picture = picture.convert(_MODES[channels])
    fitting = resized(picture, (height, width), bicubic=True)
    pixels = from_uint8(np.asarray(fitting).reshape(height, width, channels)).transpose(2, 0, 1)
    return pixels, fitting.size != picture.size
