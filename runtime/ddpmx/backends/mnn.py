"""Runs a network by MNN on the CPU: its convolutions need fewer multiplications (Winograd) than ONNX Runtime's.

MNN's own threads gain little, and with another number of them an answer has other bits. So each core gets a copy of the
network that runs in one thread, and a batch is cut into parts that the copies take in turn. Which copy takes a part makes
no difference; how many images are in it does, and so does an image's place: both are the same wherever a file runs.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import VARIANCE, Buffers
from ddpmx.backends.parts import Workers
from ddpmx.device.cores import usable_cores
from ddpmx.errors import BackendError, FileFormatError, InputError
from ddpmx.formats.mnn_file import MnnInfo, read_mnn, rebuild_command
from ddpmx.formats.spec import ModelSpec, input_type
from ddpmx.mnn import library

MAX_THREADS = 256

_PRECISION_NORMAL, _PRECISION_LOW = 0, 2  # of MNN's BackendConfig; by name each session would print a line
_WINOGRAD_MEMORY = 3  # of MNN's HintMode: how much memory transformed weights may take
_WINOGRAD_LEVELS = {"normal": 3, "low": 1}
_WINOGRAD_IN_HALF = 1  # MNN sums in half as well, and then large tiles cost two to three times the precision
_HWCAP, _FPHP, _ASIMDHP = 16, 1 << 9, 1 << 10  # of Linux' <elf.h> and its <asm/hwcap.h> for aarch64


class MnnBackend:
    """One .mnn file, in as many copies as there are threads.

    Args:
        path: the file. Its description and its hash have been checked by the caller.
        info: that description.
        threads: how many parts run at once; 0 for one per core.
        widen: compute an fp16 file in float32, on processors too that could compute it in half.

    Raises:
        BackendError: MNN is not installed.
        FileFormatError: MNN refuses the file, or it is not the network that it says.
        InputError: a negative number of threads.
    """

    def __init__(self, path: str | os.PathLike[str], info: MnnInfo, *, threads: int = 0, widen: bool = False) -> None:
        if not 0 <= threads <= MAX_THREADS:
            raise InputError(f"threads must be from 0 to {MAX_THREADS}, not {threads}", hint="0 for one per core")
        self._module = library.load()
        self._path, self._info, self._workers = Path(path), info, Workers(threads or usable_cores())
        self._part, self._widen = info.record.part, widen
        self._half = not widen and _in_half(info.spec)
        self._copies: list[_Copy] = []
        self._parts: list[Buffers] = []
        self._closed = False
        self._opened = _identity(self._path)
        self._copy(0)

    @property
    def description(self) -> str:
        """Library, version, whether it computes in half, and how many threads do."""
        used = max(1, len(self._copies))
        half = " in half" if self._half else ""
        return f"MNN {self._module.version()}, CPU{half}, {used} thread{'s' if used > 1 else ''}"

    @property
    def largest_part(self) -> int:
        """As the file says, which was made for it: see :attr:`ddpmx.formats.mnn_file.MnnRecord.part`."""
        return self._info.record.part

    def use_part(self, part: int) -> None:
        """See :meth:`ddpmx.backends.base.PartBackend.use_part`."""
        self._part = part

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers, and make as many copies of the network as can run at once.

        Raises:
            BackendError: it is closed, or its graph lacks an input or output.
            FileFormatError: another copy is needed, and the file has changed since it was opened.
        """
        if self._closed:
            raise BackendError(f"{self.description}: the file is closed")
        self._parts = [buffers.rows(slice(at, at + self._part)) for at in range(0, len(buffers.x), self._part)]
        for number in range(min(len(self._parts), self._workers.threads)):
            self._copy(number).bind(self._part, buffers)

    def enqueue(self) -> None:
        """Run the network once.

        Raises:
            BackendError: MNN failed.
        """
        used = self._copies[: min(len(self._parts), self._workers.threads)]
        self._workers.run(self._parts, [partial(_run_all, copy) for copy in used])

    def share(self) -> MnnBackend:
        """A backend of the same file for another thread, with copies and buffers of its own.

        Raises:
            FileFormatError: the file has changed since it was opened.
        """
        self._check_unchanged()
        return MnnBackend(self._path, self._info, threads=self._workers.threads, widen=self._widen)

    def close(self) -> None:
        """Free the copies. Safe to call again."""
        self._closed = True
        self._workers.close()
        self._parts = []
        self._copies.clear()

    def _copy(self, number: int) -> _Copy:
        if number == len(self._copies):
            self._check_unchanged()
            self._copies.append(_Copy(self._module, self._path, self._info, half=self._half))
        return self._copies[number]

    def _check_unchanged(self) -> None:
        """Every copy reads the file again: of another one, some images of a batch would come from another network."""
        if _identity(self._path) != self._opened and read_mnn(self._path) != self._info:
            raise FileFormatError(f"{self._path}: has changed since it was opened", hint="load it again")


class _Copy:
    """A network with weights and arrays of its own, for one thread at a time."""

    def __init__(self, module: Any, path: Path, info: MnnInfo, *, half: bool) -> None:
        spec = info.spec
        self._mnn, self._spec, self._record = module, spec, info.record
        try:
            self._network = module.Interpreter(os.fspath(path))
            level = _WINOGRAD_IN_HALF if half else _WINOGRAD_LEVELS[info.record.memory]
            self._network.setSessionHint(_WINOGRAD_MEMORY, level)
            precision = _PRECISION_LOW if half else _PRECISION_NORMAL
            self._session = self._network.createSession({"backend": "CPU", "numThread": 1, "precision": precision})
        except Exception as error:  # MNN raises plain exceptions
            raise FileFormatError(f"{path}: MNN {module.version()} refuses this file", note=str(error)[:300]) from error
        self._names = {"out": spec.prediction, "var": VARIANCE}
        self._check(path)
        self._bound = (0, False)
        self._tensors: dict[str, Any] = {}
        self._views: dict[str, NDArray[Any]] = {}

    def bind(self, batch: int, buffers: Buffers) -> None:
        """Prepare the network for ``batch`` images with the arrays of ``buffers``."""
        bound = (batch, buffers.var is not None)  # a chain of fixed σ reads no var, whatever the network has
        if bound == self._bound:
            return
        self._bound = (0, False)
        network, session = self._network, self._session
        inputs, outputs = buffers.inputs(), buffers.outputs()
        try:
            for name, array in inputs.items():
                network.resizeTensor(network.getSessionInput(session, name), (batch, *array.shape[1:]))
            network.resizeSession(session)
            for name, array in {**inputs, **outputs}.items():
                self._tensors[name] = self._host_tensor((batch, *array.shape[1:]), array.dtype)
                self._views[name] = self._tensors[name].getNumpyData()
            self._inputs = [(name, network.getSessionInput(session, name)) for name in inputs]
            self._outputs = [(name, network.getSessionOutput(session, self._names[name])) for name in outputs]
        except Exception as error:
            raise BackendError("MNN does not take these arrays", note=str(error)[:300]) from error
        self._bound = bound

    def run(self, part: Buffers) -> None:
        """Compute the outputs of a part. Where it has fewer images than the others, its last one fills it up."""
        n = len(part.x)
        inputs, outputs = part.inputs(), part.outputs()
        for name, tensor in self._inputs:
            view, array = self._views[name], inputs[name]
            view[:n] = array
            view[n:] = array[-1]
            if not tensor.copyFrom(self._tensors[name]):
                raise BackendError(f"MNN does not take the input {name}")
        if (code := self._network.runSession(self._session)) != 0:  # other Python threads run meanwhile
            raise BackendError("MNN failed to run the network", note=f"error code {code}")
        for name, tensor in self._outputs:
            if not tensor.copyToHostTensor(self._tensors[name]):
                raise BackendError(f"MNN does not give the output {self._names[name]}")
            outputs[name][...] = self._views[name][:n]

    def _check(self, path: Path) -> None:
        """Refuse a network with other inputs or outputs than its description: MNN itself would not notice."""
        spec, network, session = self._spec, self._network, self._session
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            **{name: (input_type(name), dims) for name, dims in spec.inputs.items()},
            **dict.fromkeys(spec.outputs, (np.float32, spec.shape)),
        }
        kinds = {self._mnn.Halide_Type_Int: np.int32, self._mnn.Halide_Type_Float: np.float32}
        there = {
            name: (kinds.get(tensor.getDataType()), tuple(tensor.getShape())[1:])
            for name, tensor in {**network.getSessionInputAll(session), **network.getSessionOutputAll(session)}.items()
        }
        if odd := sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name)):
            raise FileFormatError(
                f"{path}: the network in this file is not the one that its description says",
                note="; ".join(f"{name}: {_shown(there.get(name))}, not {_shown(wanted.get(name))}" for name in odd),
                hint=rebuild_command(path, self._record),
            )

    def _host_tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        kind = self._mnn.Halide_Type_Int if dtype == np.int32 else self._mnn.Halide_Type_Float
        return self._mnn.Tensor(shape, kind, np.zeros(shape, dtype), self._mnn.Tensor_DimensionType_Caffe)


def _shown(tensor: tuple[Any, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "nothing"
    return (
        f"{'another type' if tensor[0] is None else tensor[0].__name__} [batch{''.join(f', {n}' for n in tensor[1])}]"
    )


def _run_all(copy: _Copy, left: Iterator[Buffers]) -> None:
    for part in left:
        copy.run(part)


def _in_half(spec: ModelSpec) -> bool:
    """Whether a network is computed in half: an fp16 file's, on an ARM CPU that can. MNN asks for the same features."""
    if spec.precision != "fp16" or platform.machine() != "aarch64":
        return False
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):  # not Linux
        return False
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    features: int = getauxval(_HWCAP)
    return bool(features & _FPHP and features & _ASIMDHP)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written; None if it cannot be asked."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
