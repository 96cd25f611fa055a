"""Triton's Python backend as far as a model sees it: ``triton_python_backend_utils``, how ``model.py`` is loaded, and a
reader of config.pbtxt. By python_backend's README and utilities, release 24.10.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

DTYPES = {
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([A-Za-z_][A-Za-z0-9_]*)|(-?[0-9]+)|([{}\[\],:]))')


def parse(text: str) -> dict[str, list[Any]]:
    """Protobuf text as {field: [its values]}. Words are text; numbers are int."""
    tokens, at = [], 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        assert found is not None, f"not protobuf text: {text[at : at + 40]!r}"
        tokens.append(found)
        at = found.end()
    message, left = _message(tokens)
    assert not left
    return message


def _message(tokens):
    message: dict[str, list[Any]] = {}
    while tokens and tokens[0][2]:
        name, tokens = tokens[0][2], tokens[1:]
        if tokens[0][4] == "{":
            value, tokens = _message(tokens[1:])
            assert tokens[0][4] == "}"
            message.setdefault(name, []).append(value)
            tokens = tokens[1:]
            continue
        assert tokens[0][4] == ":", f"no value for {name}"
        if tokens[1][4] == "[":
            end = next(number for number, token in enumerate(tokens) if token[4] == "]")
            message.setdefault(name, []).extend(_value(token) for token in tokens[2:end] if token[4] != ",")
            tokens = tokens[end + 1 :]
        else:
            message.setdefault(name, []).append(_value(tokens[1]))
            tokens = tokens[2:]
    return message, tokens


def _value(token):
    return json.loads(token[1]) if token[1] else token[2] if token[2] else int(token[3])


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, INVALID_ARG, CANCELLED = range(4)

    def __init__(self, message: str, code: int = 1) -> None:
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert error is None or not output_tensors
        self._tensors, self._error = output_tensors, error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceRequest:
    def __init__(self, tensors: list[Tensor], cancelled: bool = False) -> None:
        self._tensors, self._cancelled = tensors, cancelled

    def inputs(self):
        return self._tensors

    def is_cancelled(self):
        return self._cancelled


def utils() -> ModuleType:
    """The module that Triton's stub offers."""
    module = ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor, TritonError=TritonError, InferenceRequest=InferenceRequest, InferenceResponse=InferenceResponse
    )
    return module


class Server:
    """One model of a repository, asked as Triton asks it. A context manager.

    Args:
        folder: the model's.
        kind, device: of the instance.
    """

    def __init__(self, folder: Path, *, kind: str = "CPU", device: str = "0") -> None:
        config = parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
        self.inputs = {each["name"][0]: each for each in config["input"]}
        self.outputs = {each["name"][0]: each for each in config["output"]}
        self.rows = config["max_batch_size"][0]
        parameters = {
            each["key"][0]: {"string_value": each["value"][0]["string_value"][0]} for each in config["parameters"]
        }
        self._arguments = {
            "model_config": json.dumps({"name": config["name"][0], "parameters": parameters}),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_kind": kind,
            "model_instance_device_id": device,
        }
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module.TritonPythonModel()

    def __enter__(self) -> Server:
        self._model.initialize(self._arguments)
        return self

    def __exit__(self, *_: object) -> None:
        self._model.finalize()

    def request(self, *, cancelled: bool = False, **values: Any) -> InferenceRequest:
        """A request; a value is a row's, or a list of the rows'. Checked as Triton checks it."""
        rows = max((len(value) for name, value in values.items() if isinstance(value, list)), default=1)
        assert rows <= self.rows
        missing = {name for name, each in self.inputs.items() if each.get("optional") != ["true"]} - values.keys()
        assert not missing, f"expected inputs {missing}"
        tensors = []
        for name, value in values.items():
            row = (
                [[each] if not isinstance(each, tuple) else list(each) for each in value]
                if isinstance(value, list)
                else None
            )
            each = row or [[value] if not isinstance(value, tuple) else list(value)] * rows
            kind = DTYPES[self.inputs[name]["data_type"][0]]
            if kind is np.object_:
                each = [[text.encode() for text in one] for one in each]
            array = np.array(each, kind)
            assert all(dim in (-1, size) for dim, size in zip(self.inputs[name]["dims"], array.shape[1:], strict=True))
            tensors.append(Tensor(name, array))
        return InferenceRequest(tensors, cancelled)

    def __call__(self, *requests: InferenceRequest) -> list[np.ndarray | TritonError]:
        """Their images, or errors."""
        responses = self._model.execute(list(requests))
        assert len(responses) == len(requests)
        found = []
        for response in responses:
            if response.has_error():
                found.append(response.error())
                continue
            (tensor,) = response.output_tensors()
            output = self.outputs[tensor.name()]
            assert tensor.as_numpy().dtype == DTYPES[output["data_type"][0]]
            dims = zip(output["dims"], tensor.as_numpy().shape[1:], strict=True)
            assert all(dim in (-1, size) for dim, size in dims)
            found.append(tensor.as_numpy())
        return found


def install(monkeypatch: Any) -> None:
    """Make ``import triton_python_backend_utils`` work."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils())
