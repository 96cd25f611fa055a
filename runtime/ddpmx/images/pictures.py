"""Pictures that a task begins with, read from files, and those that come of it, written: all of them, or none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import DataError, FileFormatError, InputError, OutputError
from ddpmx.formats import png_text
from ddpmx.formats.atomic import check_folder, exchange, make_folder, staging, write_synced
from ddpmx.formats.output_file import check_output
from ddpmx.images import writers
from ddpmx.images.gallery import check_not_in_parts, earlier_images, is_picture
from ddpmx.images.origin import SOFTWARE, TASK, is_of_a_task, one_line
from ddpmx.sampling.pixels import size_text

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 26
"""Of one picture: 8192×8192."""

MAX_BYTES = 1 << 32
"""Of all pictures of a call, decoded."""

SENT = ("PNG", "JPEG", "WEBP")
"""What is read of strangers, of Pillow's forty formats."""

MAX_SENT = 1 << 22
"""Pixels of a picture that somebody has sent, and that may have any size: 2048×2048."""

_CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_KINDS = {1: "grey", 3: "colour", 4: "colour with transparency"}


class Picture(NamedTuple):
    """A picture.

    Attributes:
        name: of its file, without the folder.
        pixels: uint8 [H, W, C].
    """

    name: str
    pixels: NDArray[np.uint8]


def opened(
    path: str | os.PathLike[str] | BinaryIO,
    size: tuple[int, int] | None = None,
    *,
    first_frame: bool = False,
    most: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image:
    """A picture of 8 bits as Pillow's, turned the way that its camera held it, without a palette.

    Args:
        path: the file.
        size: (H, W) that it has to have; by default any.
        most: pixels that it may have; by default :data:`MAX_PIXELS`.
        formats: those that are tried, by Pillow's names; by default all.
        first_frame: whether an animation may stand for its first frame, see :func:`is_animated`.

    Raises:
        OSError: no picture that Pillow can read, or a damaged one.
        ValueError: another size, numbers whose range is not known, or an animation.
    """
    from PIL import Image as PilImage
    from PIL import ImageOps

    most = MAX_PIXELS if most is None else most
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)  # the size is judged below
            picture = PilImage.open(path, formats=formats)
        with picture:
            if size is not None and sorted(picture.size) != sorted(size):  # before anything is decoded: it may be huge
                raise _odd_size(picture, size)
            if picture.width * picture.height > most:
                raise ValueError(f"it is {size_text(picture.height, picture.width)}, more than {most >> 20} megapixels")
            if picture.mode not in (*_CHANNELS, "P", "PA"):
                raise ValueError(f"pictures of mode {picture.mode} have no range that is known")
            if not first_frame and _animated(picture):
                raise ValueError("it is an animation, and one picture is needed")
            turned = ImageOps.exif_transpose(picture)  # cameras store a picture as it is, and how to turn it
            if size is not None and turned.size != (size[1], size[0]):
                raise _odd_size(turned, size)
            if turned.mode in ("P", "PA"):
                turned = turned.convert("RGBA" if turned.has_transparency_data else "RGB")
            elif turned.mode in ("L", "RGB") and turned.has_transparency_data:  # one colour stands for nothing
                turned = turned.convert("RGBA")
            return turned
    except OSError as error:
        raise OSError(error.strerror or "no picture that Pillow can read, or a damaged one") from error
    except (SyntaxError, PilImage.DecompressionBombError) as error:  # Pillow's, for some damaged files
        raise ValueError(str(error)[:200]) from error


def read_sent(data: bytes, what: str, channels: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture that somebody has sent, uint8 [H, W, C], as :func:`read_picture` reads one: PNG, JPEG or WebP.

    Args:
        data: the file.
        what: its name, for errors.
        channels: C of the model, 1, 3 or 4.
        size: (H, W) that it has to have.

    Raises:
        InputError: no picture, or one that does not fit.
    """
    try:
        return _exact(opened(BytesIO(data), size, formats=SENT), channels, widen=True)
    except OSError as error:
        raise InputError(f"{what}: no PNG, JPEG or WebP, or a damaged one") from error
    except ValueError as error:
        hint = f"a {_KINDS[channels]} picture of {size_text(*size)}, 8 bits"
        raise InputError(f"{what}: {error}", hint=hint) from error


def is_animated(path: str | os.PathLike[str]) -> bool:
    """Whether a picture that :func:`opened` takes has more frames than one."""
    from PIL import Image as PilImage

    with PilImage.open(path) as picture:
        return _animated(picture)


def _animated(picture: Image) -> bool:
    return picture.format != "MPO" and getattr(picture, "is_animated", False)  # MPO: a photo with its depth map


def read_pictures(
    path: str | os.PathLike[str], channels: int, *, size: tuple[int, int] | None = None, widen: bool = True
) -> list[Picture]:
    """The picture at ``path``, or those of a folder in the order of their names, with every value as in the file.

    Grey stays grey and colour colour, by what they hold: a file of three equal channels is grey, and one that is opaque
    everywhere has no transparency. Nothing is lost: colour is not made grey.

    Args:
        path: a picture, or a folder of them.
        channels: C of the model, 1, 3 or 4.
        size: (H, W) that they have to have; by default any.
        widen: whether grey may become colour with equal channels, and what is opaque get a channel that says so.

    Raises:
        FileFormatError: no such file, or no pictures in the folder.
        InputError: a model of other channels.
        DataError: files that are no pictures, or do not fit; all of them are named.
    """
    if channels not in _KINDS:
        raise InputError(
            f"the model's images have {channels} channels, and pictures in files have 1, 3 or 4",
            hint="pass arrays, from Python",
        )
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise FileFormatError(f"{path}: there are no pictures in it")
    elif not os.path.lexists(path):
        raise FileFormatError(f"{path}: no such file")
    else:
        files = [path]
    found, faults, held = [], [], 0
    for file in files:
        try:
            pixels = _exact(opened(file, size), channels, widen=widen)
        except (OSError, ValueError) as error:
            faults.append(f"{file.name}: {error}")
            continue
        held += pixels.nbytes
        if held > MAX_BYTES:
            raise InputError(f"{path}: {len(files)} pictures do not fit into memory", hint="fewer of them at a time")
        found.append(Picture(file.name, pixels))
    if faults:
        what = f"{path}: {len(faults)} of {len(files)} files cannot be taken" if len(files) > 1 else str(path)
        needed = "any size" if size is None else size_text(*size)
        hint = f"{_KINDS[channels]} pictures of {needed}, 8 bits"
        if len(files) == 1:
            raise DataError(f"{what}: {faults[0].partition(': ')[2]}", hint=hint)
        raise DataError(what, items=faults, hint=hint)
    return found


def read_picture(path: str | os.PathLike[str], channels: int, *, size: tuple[int, int] | None = None) -> Picture:
    """One picture, see :func:`read_pictures`.

    Raises:
        FileFormatError, InputError, DataError: as there, and for a folder.
    """
    if Path(path).is_dir():
        raise FileFormatError(f"{path}: is a folder, and one picture is needed", hint="name a picture in it")
    return read_pictures(path, channels, size=size)[0]


def read_mask(path: str | os.PathLike[str], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask, bool [H, W]: True where the picture is light, from 128 on.

    Args:
        path: a picture, in which transparent counts as dark.
        size: (H, W) that it has to have.

    Raises:
        FileFormatError: no such file.
        DataError: no picture, or one of another size.
    """
    if not os.path.lexists(path):
        raise FileFormatError(f"{path}: no such file")
    try:
        picture = opened(path, size).convert("RGBA")
    except (OSError, ValueError) as error:
        hint = f"a picture of {size_text(*size)}: white is drawn anew, black stays"
        raise DataError(f"{path}: {error}", hint=hint) from error
    mask: NDArray[np.bool_] = (np.asarray(picture.convert("L")) >= 128) & (np.asarray(picture)[..., 3] >= 128)
    return mask


def _odd_size(picture: Image, size: tuple[int, int]) -> ValueError:
    return ValueError(f"it is {size_text(picture.height, picture.width)}, and the model takes {size_text(*size)}")


def _exact(picture: Image, channels: int, *, widen: bool) -> NDArray[np.uint8]:
    """uint8 [H, W, C] without a loss, or ValueError."""
    pixels = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    pixels = pixels.reshape(picture.height, picture.width, -1)
    colour, alpha = pixels, None
    if pixels.shape[2] in (2, 4):
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
        if alpha.min() == 255:
            alpha = None
    if alpha is not None and channels != 4:
        raise ValueError("it is transparent in places, and the model's images are not")
    grey = colour.shape[2] == 1 or bool((colour == colour[..., :1]).all())
    if channels == 1:
        if not grey:
            raise ValueError("it is a colour picture, and the model's images are grey")
        return np.ascontiguousarray(colour[..., :1])
    if grey and not widen:
        raise ValueError("it is grey, and the model's images are of colour")
    if alpha is None and channels == 4 and not widen:
        raise ValueError("it has no transparency, and the model's images have")
    wide = np.broadcast_to(colour, (*colour.shape[:2], 3))
    if channels == 3:
        return np.ascontiguousarray(wide)
    opaque = np.full((*wide.shape[:2], 1), 255, np.uint8)
    return np.concatenate([wide, opaque if alpha is None else alpha], axis=2)


# --- writing ---------------------------------------------------------------------------------------------------------


def targets(out: Path, names: Sequence[str], *, whole_folder: bool) -> list[Path]:
    """Where pictures go that come of files of these names: to ``out`` if that is one PNG, or into it under their names.

    Args:
        out: one PNG, or a folder.
        names: of the files.
        whole_folder: whether ``out`` has to be a folder, since the files were one.

    Raises:
        InputError: ``out`` is one picture and there are several, or is none that is written; or two would be the same file.
    """
    if is_picture(out):
        if whole_folder or len(names) != 1:
            raise InputError(f"{out} is one file, and there are {len(names)} pictures to write", hint="a folder as -o")
        return [out]
    found: dict[str, str] = {}
    for name in names:
        stem = Path(name).stem + ".png"
        if stem in found:
            raise InputError(f"{found[stem]} and {name} would both become {stem}", hint="rename one of them")
        found[stem] = name
    return [out / stem for stem in found]


def text(task: str, *, model: str, **values: object) -> dict[str, str]:
    """The text for a picture that a task has made: which task, model and numbers.

    Args:
        task: its name.
        model: what :func:`ddpmx.images.origin.model_hash` says of the model.
        **values: what else it depends on, by keyword.
    """
    words = {SOFTWARE: f"ddpmx {ddpmx.__version__}", TASK: task, "model": model, **values}
    return {keyword.replace("_", "-"): one_line(str(value)) for keyword, value in words.items()}


def check_replaceable(out: Path, targets: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool = False) -> None:
    """Check that pictures can be written: where nothing is, or instead of others that a task of ddpmx has written, and not
    into a folder of ``ddpmx generate``, whose images they would be taken for.

    Args:
        out: one PNG, or a folder, which need not exist.
        targets: the files, as :func:`targets` has them.
        inputs: what they are made from, which is never replaced.
        overwrite: whether other files may be replaced.

    Raises:
        OutputError: they cannot.
    """
    for parent in {target.parent for target in targets}:
        check_folder(parent)
    if not is_picture(out):
        check_not_in_parts(out)
        for path in earlier_images(out)[:1]:
            if path not in inputs and not is_of_a_task(path) and _of_ddpmx(path):
                raise OutputError(
                    f"refusing to mix pictures of a task with the images of `ddpmx generate` in {out}",
                    note=f"{path.name} is one of them",
                    hint="another -o",
                )
    for target in targets:
        if target.parent.is_dir():
            check_output(
                target,
                [path for path in inputs if path.exists()],
                what="a picture that a task of ddpmx has written",
                suffix=".png",
                hint="another -o, or --overwrite",
                is_ours=(lambda _: True) if overwrite else is_of_a_task,
            )


def _of_ddpmx(path: Path) -> bool:
    try:
        return png_text.read_png_text(path)[1].get(SOFTWARE, "").startswith("ddpmx ")
    except FileFormatError:
        return False


def save_pictures(
    targets: Sequence[Path], pictures: Sequence[NDArray[np.uint8]], texts: Sequence[Mapping[str, str]]
) -> None:
    """Write pictures into one folder, which is made if it does not exist: all of them, or none.

    Args:
        targets: the files.
        pictures: uint8 [H, W, C] each.
        texts: what is written into each.

    Raises:
        OutputError: a file could not be written; then none was.
        InputError: they do not have 1, 3 or 4 channels.
    """
    (parent,) = {target.parent for target in targets}
    folder = make_folder(parent)
    for target in targets:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder, and a file is to be written there", hint="choose another -o")
    with staging(folder, folder) as part:
        for target, pixels, text in zip(targets, pictures, texts, strict=True):
            write_synced(part / target.name, writers.png(pixels, text=text))
        exchange(folder, part, [target.name for target in targets])
