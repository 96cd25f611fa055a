"""Whether a model file may be overwritten: it is the same model, perhaps trained further, or it is somebody else's."""

from __future__ import annotations

from pathlib import Path

from ddpmx.errors import DdpmxError, OutputError
from ddpmx.formats import onnx_file
from ddpmx.formats.spec import ModelSpec

_NOT_THE_MODEL = {"precision": "fp32", "weights": None, "ddpmx": ""}
"""Fields of a spec in which two exports of one model may differ."""


def check_same_model(path: Path, spec: ModelSpec) -> str | None:
    """Refuse to overwrite an ONNX file of another model, or one that is not of ddpmx.

    A file that is no whole ONNX file, such as one that was cut off, may be replaced.

    Args:
        path: the file to be written.
        spec: the model that goes there.

    Returns:
        The sha256 of other weights of this model that the file holds; None if it holds these, or there is no such file.

    Raises:
        OutputError: it is another model's.
    """
    if not path.is_file():
        return None
    try:
        info = onnx_file.read_onnx(path)
    except DdpmxError:
        return None
    hint = "another -o, or --overwrite"
    if onnx_file.METADATA_KEY not in info.metadata:
        raise OutputError(f"refusing to overwrite {path}: ddpmx has not written it", hint=hint)
    try:
        there = onnx_file.onnx_spec(path, info)
    except DdpmxError as error:
        raise OutputError(
            f"refusing to overwrite {path}: its model cannot be told", note=error.fact, hint=hint
        ) from error
    if there.replace(**_NOT_THE_MODEL) != spec.replace(**_NOT_THE_MODEL):
        mine, other = spec.to_json(), there.to_json()
        odd = [name for name in mine if name not in (*_NOT_THE_MODEL, "coefficients") and mine[name] != other.get(name)]
        name = odd[0] if odd else next(iter(other.keys() - mine.keys()))
        raise OutputError(
            f"refusing to overwrite {path}: it is another model",
            note=f"its {name} is {str(other.get(name))[:80]}, and would become {str(mine.get(name))[:80]}",
            hint=hint,
        )
    return there.weights if there.weights != spec.weights else None
