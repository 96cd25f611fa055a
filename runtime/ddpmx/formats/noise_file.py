"""noise.npz: the x_T of images, and how they were found, so that the same way back gives the images again."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import FileFormatError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.npz import read_npz

FORMAT = "ddpmx-noise1"
MAX_BYTES = 4 << 30
WAYS = ("ode", "ddim")
_FIELDS = {"format": str, "model": str, "by": str, "steps": int, "spacing": str, "names": list, "label": str}
_LONGEST = 255
"""Characters of a picture's name."""


@dataclass(frozen=True, eq=False)
class Noise:
    """What the images of a model were made from.

    Attributes:
        x: float32 [n, C, H, W], x_T.
        names: of the pictures, n different ones without a folder.
        model: what :func:`ddpmx.images.origin.model_hash` says of the model.
        by: ``ode`` or ``ddim``.
        steps, spacing: of the ddim chain; 0 and "" with the ODE.
        label: the class, by name or number; "" for none.
    """

    x: NDArray[np.float32]
    names: tuple[str, ...]
    model: str
    by: str
    steps: int = 0
    spacing: str = ""
    label: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file.

        Raises:
            OutputError: it could not be written; an earlier file is untouched.
        """
        values = {name: getattr(self, name) for name in _FIELDS if name not in ("format", "names")}
        about = json.dumps({"format": FORMAT, **values, "names": list(self.names)})
        packed = io.BytesIO()
        np.savez_compressed(packed, about=np.frombuffer(about.encode(), np.uint8), x=self.x)
        with atomic_write(path) as stream:
            stream.write(packed.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Noise:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileFormatError: missing, damaged, or not such a file.
        """
        path = Path(path)
        arrays = read_npz(path, max_bytes=MAX_BYTES)
        about, x = arrays.get("about"), arrays.get("x")
        if about is None or about.dtype != np.uint8 or about.ndim != 1:
            raise FileFormatError(f"{path}: not the noise of images", hint="`ddpmx score encode` writes it")
        values: Any = parse_json(about.tobytes())
        if not (
            isinstance(values, dict)
            and values.keys() == _FIELDS.keys()
            and all(type(values[name]) is kind for name, kind in _FIELDS.items())
            and values.pop("format") == FORMAT
        ):
            raise FileFormatError(f"{path}: written by another version of ddpmx, or damaged")
        if x is None or x.dtype != np.float32 or x.ndim != 4 or 0 in x.shape or not np.isfinite(x).all():
            raise FileFormatError(f"{path}: x must be float32 [n, C, H, W], without NaN and infinities")
        names = tuple(values.pop("names"))
        fits = all(isinstance(name, str) and _is_name(name) for name in names)
        if not fits or len(names) != len(x) or len(set(names)) < len(names) or values["by"] not in WAYS:
            raise FileFormatError(f"{path}: the names of the pictures, or the way back, are damaged")
        return cls(x, names, **values)


def _is_name(name: str) -> bool:
    """Whether a file may have this name: no folder, no hidden file, nothing that does not print."""
    return (
        1 <= len(name) <= _LONGEST and name.isprintable() and not name.startswith(".") and not {"/", "\\"} & set(name)
    )
