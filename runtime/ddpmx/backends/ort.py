"""ε by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpmx.backends import Buffers
from ddpmx.errors import BackendError, FileFormatError, InputError

MAX_THREADS = 256

_INSTALL = "pip install onnxruntime (or onnxruntime-gpu on a machine with an NVIDIA GPU, never both)"
_SHORT = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class OrtBackend:
    """One ONNX file in one session.

    Args:
        path: the file. Its spec and external data have been checked by the caller.
        output: the name of the graph's output.
        providers: execution providers in order of preference: "cpu", "cuda", "tensorrt" or ONNX Runtime's own names.
        fallback: whether another provider than the first, in the end the CPU, may do the work. Otherwise that is an
            error, since a chain that silently runs on the CPU looks like a chain that is slow.
        threads: CPU threads; 0 leaves the choice to ONNX Runtime.

    Raises:
        BackendError: ONNX Runtime is not installed, or a provider is not there.
        FileFormatError: ONNX Runtime refuses the file.
        InputError: a negative number of threads, or no provider.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        output: str,
        *,
        providers: Sequence[str] = ("cpu",),
        fallback: bool = False,
        threads: int = 0,
    ) -> None:
        ort = _import()
        wanted = [_SHORT.get(name, name) for name in ([providers] if isinstance(providers, str) else providers)]
        if fallback and _SHORT["cpu"] not in wanted:
            wanted.append(_SHORT["cpu"])
        if not wanted or not 0 <= threads <= MAX_THREADS:
            raise InputError(f"at least one provider and 0…{MAX_THREADS} threads are needed, not {threads}")
        # Azure's provider stands in every build, and calls a service instead of computing
        available = [name for name in ort.get_available_providers() if name != "AzureExecutionProvider"]
        missing = [name for name in wanted if name not in available]
        if missing and not (fallback and len(missing) < len(wanted)):
            raise BackendError(
                f"ONNX Runtime has no {missing[0]} here",
                note=f"version {ort.__version__} has {', '.join(available)}",
                hint=f"--provider cpu, or {_INSTALL}",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                os.fspath(Path(path)), options, providers=[name for name in wanted if name in available]
            )
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            raise FileFormatError(
                f"{path}: ONNX Runtime {ort.__version__} refuses this file", note=str(error).strip()[-300:]
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted[0] and not fallback:
            raise BackendError(
                f"{wanted[0]} was asked for, and ONNX Runtime gave {self.provider}",
                hint="--fallback accepts that; see its own message above for why",
            )
        self._output = output
        self._version: str = ort.__version__
        self._binding: Any = None
        self._buffers: Buffers | None = None

    @property
    def description(self) -> str:
        """Library, version and the provider really in use."""
        return f"onnxruntime {self._version}, {self.provider}"

    def bind(self, buffers: Buffers) -> None:
        """Point the session at the buffers: no copy and no allocation per step."""
        self._buffers = buffers  # they have to outlive the binding, which knows only their addresses
        self._binding = self._session.io_binding()
        for name, array in (("x", buffers.x), ("t", buffers.t)):
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        out = buffers.out
        self._binding.bind_output(self._output, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)

    def enqueue(self) -> None:
        """Run the network once."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError("ONNX Runtime failed to run the network", note=str(error).strip()[-300:]) from error

    def close(self) -> None:
        """Drop the session."""
        self._binding = self._buffers = self._session = None


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("ONNX Runtime is not installed", note=str(error), hint=_INSTALL) from error
    return onnxruntime
