"""Whether a model file may be overwritten: it is the same model, perhaps trained further, or it is somebody else's."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from ddpmx.errors import DdpmxError, InputError, OutputError
from ddpmx.formats import onnx_file, output_file
from ddpmx.formats.spec import ModelSpec

_NOT_THE_MODEL = {"precision": "fp32", "weights": None, "ddpmx": "", "class_names": None}
"""Fields of a spec in which two exports of one model may differ."""


_BEGINS = b"\x08"  # ir_version, the lowest field of a ModelProto, comes first


def check_output(output: Path) -> None:
    """Check that an ONNX file can be written there, before anything takes long.

    Raises:
        OutputError, InputError: it cannot, or something else is there.
    """
    if not output.is_dir() and output.suffix.lower() in (".plan", ".engine", ".npz", ".json", ".safetensors"):
        raise InputError(
            f"{output}: not a name for an ONNX file", hint=f"-o {shlex.quote(str(output.with_suffix('.onnx')))}"
        )
    output_file.check_output(
        output,
        [],
        what="an ONNX file",
        suffix=".onnx",
        is_ours=lambda path: path.suffix.lower() == ".onnx" or output_file.begins_with(path, (_BEGINS,)),
    )


def check_record(record: Path) -> None:
    """Refuse to overwrite a file that is no parity record, although it has the name of one.

    Raises:
        OutputError: there is such a file.
    """
    is_ours = partial(output_file.is_npz_of, form="ddpmx-parity")
    output_file.check_output(record, [], what="a parity record", suffix="", is_ours=is_ours)


def check_same_model(path: Path, spec: ModelSpec) -> str | None:
    """Refuse to overwrite an ONNX file of another model, or one that is not of ddpmx.

    An empty file may be replaced, and an ONNX file that was cut off.

    Args:
        path: the file to be written.
        spec: the model that goes there.

    Returns:
        The sha256 of other weights of this model that the file holds; None if it holds these, or there is no such file.

    Raises:
        OutputError: it is another model's, or no ONNX file.
    """
    if not path.is_file():
        return None
    hint = "another -o, or --overwrite"
    try:
        info = onnx_file.read_onnx(path)
    except DdpmxError:
        with path.open("rb") as stream:
            if stream.read(1) in (b"", _BEGINS):
                return None
        raise OutputError(f"refusing to overwrite {path}: not an ONNX file", hint=hint) from None
    if onnx_file.METADATA_KEY not in info.metadata:
        raise OutputError(f"refusing to overwrite {path}: ddpmx has not written it", hint=hint)
    try:
        there = onnx_file.onnx_spec(path, info)
    except DdpmxError as error:
        raise OutputError(
            f"refusing to overwrite {path}: its model is not known", note=error.fact, hint=hint
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
