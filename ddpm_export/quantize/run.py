"""Runs a graph in memory, by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ddpmx.backends.base import Buffers
from ddpmx.backends.forks import never_free_in_forks
from ddpmx.backends.ort_common import rounds_halves
from ddpmx.backends.ort_integers import as_integers
from ddpmx.errors import BackendError
from ddpmx.formats.widen import widen


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("8 bits need ONNX Runtime", note=str(error), hint="pip install onnxruntime") from error
    if not rounds_halves(onnxruntime):
        raise BackendError(
            f"8 bits need ONNX Runtime 1.30 or later, and this is {onnxruntime.__version__}",
            note="before that its QuantizeLinear cuts float16 off and does not round it",
            hint="pip install --upgrade onnxruntime",
        )
    return onnxruntime


class Runner:
    """A graph that is open in ONNX Runtime.

    Args:
        model: the graph.
        inner: names of values inside it that are to be seen as well.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the graph.
    """

    def __init__(self, model: onnx.ModelProto, inner: Sequence[str] = ()) -> None:
        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        outputs = {value.name for value in opened.graph.output}
        opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in outputs)
        self._open(opened.SerializeToString())

    @classmethod
    def in_integers(cls, model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> Runner:
        """As the file runs on a CPU: with products of integers where there are some, and float32 beside them.

        Args:
            model: the graph.
            inputs: for one image.
        """
        runner, data = cls.__new__(cls), model.SerializeToString()
        wide = widen(memoryview(data), {}) or data
        runner._open(as_integers(_onnxruntime(), wide, inputs) or wide)
        return runner

    def _open(self, model: bytes) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has no common base
            raise BackendError(
                "ONNX Runtime refuses the graph with 8-bit convolutions",
                note=str(error).strip()[:300],
                hint="another version of onnxruntime",
            ) from error
        never_free_in_forks(self._session)

    def __call__(self, inputs: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[NDArray[np.floating]]:
        """Values of the graph by their names.

        Raises:
            BackendError: it could not be run.
        """
        try:
            found: list[NDArray[np.floating]] = self._session.run(list(names), dict(inputs))
        except Exception as error:
            raise BackendError("ONNX Runtime could not run the graph", note=str(error).strip()[:300]) from error
        return found


class RunnerBackend:
    """A graph in memory as a backend of the runtime, so that a chain runs it."""

    description = "ONNX Runtime, a graph in memory"

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._names = model, [value.name for value in model.graph.output]

    def bind(self, buffers: Buffers) -> None:
        """Read inputs from, and write outputs to, these buffers."""
        self._inputs, self._outputs = buffers.inputs(), list(buffers.outputs().values())
        self._runner = Runner.in_integers(self._model, {name: array[:1] for name, array in self._inputs.items()})

    def enqueue(self) -> None:
        """Run the graph once.

        Raises:
            BackendError: it could not be run.
        """
        values = self._runner(self._inputs, self._names)
        for buffer, value in zip(self._outputs, values, strict=True):
            buffer[...] = value

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
