"""Where images came from and how they were read: what a run records, so that it is resumed with the same pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import ImageColor

from ddpmx.errors import FileFormatError, InputError

WHITE = (255, 255, 255)
MAX_PIXELS = 178_956_970
"""H·W of one image, unless the user allows more: Pillow's own limit. A file of a few bytes can unpack to gigabytes."""

READING = 4
"""1: files are found by their suffix and links to folders are not followed, hidden colours of transparent pixels are
kept, 65535 is white in 16 bits, and JPEGs are decoded whole. 2: AVIF and HEIC are left out, and TIFFs on their side are
cropped to the shape that they lie in. 3: the sheets beside what ``ddpmx generate`` has drawn are images as well. 4: as
:mod:`.find` and :mod:`.decode` say."""


@dataclass(frozen=True)
class Source:
    """Where images came from: the arguments of :func:`ddpm_export.training.data.load_dataset`.

    Attributes:
        path: a folder, or an ``.npz``.
        size: (H, W) that every image was brought to, or None.
        channels: 1, 3 or 4 that every image was converted to, or None.
        background: the colour (R, G, B), 0…255, behind transparent pixels where no alpha is kept.
        white: the number that is white in greys of more than 8 bits; None where there are none.
        max_pixels: the largest H·W of an image file.
        reading: the rules by which files were found and decoded, see :data:`READING`.
        classes: whether the images have labels: the subfolders of a folder, or an array in an ``.npz``.
        condition: where the condition images are, a folder or an ``.npz``, or None.
        condition_white: as ``white``, for them.
        skip_broken: whether files that cannot be read are left out.
        identity: what the images are known by when a run is resumed: their ``pixels``, or ``files``, of which names, sizes
            and both ends count, since pixels that do not fit into memory would have to be decoded for that.
    """

    path: Path
    size: tuple[int, int] | None = None
    channels: int | None = None
    background: tuple[int, int, int] = WHITE
    white: float | None = None
    max_pixels: int = MAX_PIXELS
    reading: int = READING
    classes: bool = False
    condition: Path | None = None
    condition_white: float | None = None
    skip_broken: bool = False
    identity: str = "pixels"

    def check(self) -> None:
        """Check the ranges.

        Raises:
            InputError: one is out of its range.
        """
        if self.channels not in (None, 1, 3, 4):
            raise InputError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), not {self.channels!r}")
        if self.size is not None and not all(1 <= side <= 65536 for side in self.size):
            raise InputError(f"a size is two whole numbers from 1 to 65536, not {self.size!r}")
        if len(self.background) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in self.background):
            raise InputError(f"background must be three whole numbers from 0 to 255, not {self.background!r}")
        for white in (self.white, self.condition_white):
            if white is not None and not (math.isfinite(white) and white > 0):
                raise InputError(f"white must be a number above 0, not {white!r}")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels must be a whole number above 0, not {self.max_pixels!r}")

    def to_config(self) -> dict[str, Any]:
        """Keys of a run's ``config.toml`` beside the fields of :class:`RunConfig`, where they are not the defaults."""
        values: dict[str, Any] = {}
        if self.condition is not None:
            values["condition"] = str(self.condition.resolve())
        if self.background != WHITE:
            values["background"] = "#{:02x}{:02x}{:02x}".format(*self.background)
        if self.white is not None:
            values["white"] = float(self.white)
        if self.max_pixels != MAX_PIXELS:
            values["max_megapixels"] = self.max_pixels / 1e6
        if self.skip_broken:
            values["skip_broken"] = True
        return values

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; paths are absolute. Labels and conditions are there only if they were asked for."""
        values: dict[str, Any] = {
            "path": str(self.path.resolve()),
            "size": self.size,
            "channels": self.channels,
            "background": self.background,
            "white": self.white,
            "max_pixels": self.max_pixels,
            "reading": self.reading,
        }
        if self.classes:
            values["classes"] = True
        if self.skip_broken:
            values["skip_broken"] = True
        if self.identity != "pixels":
            values["identity"] = self.identity
        if self.condition is not None:
            values["condition"] = str(self.condition.resolve())
        if self.condition_white is not None:
            values["condition_white"] = self.condition_white
        return values

    def images_alone(self) -> Source:
        """The same images without labels and conditions."""
        return replace(self, classes=False, condition=None, condition_white=None)

    @classmethod
    def from_json(cls, values: Any, where: str) -> Source:
        """The source from the values of :meth:`to_json`; those of earlier versions have the first three only.

        Raises:
            FileFormatError: the values are not of that form; the error names ``where``.
        """
        try:
            size, channels, white = values["size"], values["channels"], values.get("white")
            condition, condition_white = values.get("condition"), values.get("condition_white")
            background = values.get("background", WHITE)
            source = cls(
                Path(values["path"]),
                None if size is None else (int(size[0]), int(size[1])),
                channels,
                (background[0], background[1], background[2]),
                white,
                int(values.get("max_pixels", MAX_PIXELS)),
                int(values.get("reading", 1)),
                values.get("classes", False),
                None if condition is None else Path(condition),
                condition_white,
                values.get("skip_broken", False),
                values.get("identity", "pixels"),
            )
            assert channels is None or type(channels) is int
            assert all(number is None or type(number) in (int, float) for number in (white, condition_white))
            assert type(source.classes) is type(source.skip_broken) is bool
            assert source.identity in ("pixels", "files")
            assert 1 <= source.reading <= READING
            source.check()
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            IndexError,
            AssertionError,
            InputError,
        ) as error:
            raise FileFormatError(f"{where}: the images it was trained on are not recorded") from error
        return source


def parse_colour(text: str) -> tuple[int, int, int]:
    """A colour by name or as ``#rrggbb`` → (R, G, B), 0…255.

    Raises:
        InputError: it is neither.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
        if alpha and alpha[0] != 255:
            raise ValueError("it is transparent itself")
    except ValueError as error:
        raise InputError(
            f"background must be a colour, not {text!r}", note=str(error), hint="white, or '#f0f0f0'"
        ) from None
    return red, green, blue


def as_pixels(megapixels: float) -> int:
    """A number of megapixels as ``max_pixels``.

    Raises:
        InputError: it is out of its range.
    """
    if not 0 < megapixels <= 1e6:
        raise InputError(f"max_megapixels must be above 0 and at most 1000000, not {megapixels:g}")
    return max(1, round(megapixels * 1e6))
