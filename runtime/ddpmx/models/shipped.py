"""Names of the models that come along: ``garments`` and ``emoji`` work wherever a model file does.

Names come first, then files: a file of such a name is ``./garments``, or a ``Path``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ddpmx.errors import FileFormatError

SHIPPED = {"garments": "garments.onnx", "emoji": "emoji.onnx"}
"""Each model's name, and its file in this folder."""

_WORD = re.compile(r"[\w-]+")


def find(model: str | os.PathLike[str]) -> Path:
    """The file behind a shipped model's name; any other path as it is.

    Args:
        model: a name, or a path. A ``Path`` is never a name.

    Raises:
        FileFormatError: a single word, such as a misspelt name, that is neither shipped nor a file.
    """
    if isinstance(model, str) and model in SHIPPED:
        return Path(__file__).with_name(SHIPPED[model])
    path = Path(model)
    if model == "":  # which pathlib takes for the current folder
        raise FileFormatError(
            "the model's name is empty", hint=f"{', '.join(SHIPPED)}; or the path of a model file, such as model.onnx"
        )
    if isinstance(model, str) and _WORD.fullmatch(model) and not os.path.lexists(path):
        raise FileFormatError(
            f"{model}: neither a model that comes with ddpmx nor a file",
            hint=f"{', '.join(SHIPPED)}; or the path of a model file, such as model.onnx",
        )
    return path


def beside(model: str | os.PathLike[str], suffix: str) -> Path:
    """Where a file that belongs to a model goes: beside it; for a shipped model into the working folder.

    Raises:
        FileFormatError: ``model`` has no name to go by: it is the folder one stands in, or the root.
    """
    if isinstance(model, str) and model in SHIPPED:
        return Path(model + suffix)
    path = Path(model)
    if not path.name:  # "." and "/"
        raise FileFormatError(f"{path}: is a folder, not a model file", hint=f"the file in it: {path / 'model.onnx'}")
    return path.with_suffix(suffix)
