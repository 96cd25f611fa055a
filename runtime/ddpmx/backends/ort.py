"""Runs a network by ONNX Runtime in host memory. For providers on NVIDIA GPUs see ``ort_device.py``."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.base import VARIANCE, Backend, Buffers, CopyingBackend
from ddpmx.backends.forks import never_free_in_forks
from ddpmx.backends.ort_common import (
    NAMES,
    PLUGINS,
    available_providers,
    device_provider,
    import_onnxruntime,
    last_words,
    no_provider,
    plugin_devices,
    session_options,
)
from ddpmx.backends.ort_integers import as_integers
from ddpmx.backends.ort_waiting import set_waiting
from ddpmx.backends.parts import Parts
from ddpmx.device.cores import usable_cores
from ddpmx.errors import BackendError, FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

MAX_THREADS = 256

PART_PIXELS = 1024
"""Pixels of a part of a batch in 8 bits, unless one image has more: what is gathered for a convolution, nine times its
input, then stays in a core's cache. Of images of 16×16, parts of 4 were among the fastest, in one thread and in two."""


class OrtBackend:
    """One ONNX file in one session.

    Args:
        path: the file. Its spec and external data have been checked by the caller.
        output: the name of the graph's output.
        providers: execution providers in order of preference: "cpu", "cuda", "tensorrt" or ONNX Runtime's own names.
            A plugin (OpenVINO, WebGPU) runs with the CPU alone beside it.
        fallback: whether another provider than the first, in the end the CPU, may run the network. Otherwise that is an
            error, since a chain that silently runs on the CPU looks like a slow chain.
        threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        instead: the providers that it replaces, and why, for :attr:`description`.
        model: a model to be run in the file's place.
        arithmetic: in what that computes, for :attr:`description`.

    Attributes:
        provider: the provider in use, by ONNX Runtime's name.
        sleeping: whether its threads sleep while they wait, since others compute here: see :mod:`.ort_waiting`.

    Raises:
        BackendError: ONNX Runtime is not installed, or lacks a provider.
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
        instead: Sequence[str] = (),
        model: bytes | None = None,
        arithmetic: str = "",
    ) -> None:
        ort = import_onnxruntime()
        wanted = [NAMES.get(name, name) for name in ([providers] if isinstance(providers, str) else providers)]
        if fallback and NAMES["cpu"] not in wanted:
            wanted.append(NAMES["cpu"])
        if not wanted:
            raise InputError("at least one provider is needed")
        _check_threads(threads)
        left_out = list(instead)
        available = available_providers(ort)
        options = session_options(ort)
        options.intra_op_num_threads = threads
        self.sleeping = set_waiting(options, threads)
        taken: list[str] = []
        plugin = None  # ONNX Runtime takes a plugin by its devices, or providers by their names
        for name in dict.fromkeys(wanted):
            if plugin is not None:
                left_out += [f"{name} (beside {plugin} runs only the CPU)"] * (name != NAMES["cpu"])
            elif name in available:
                taken.append(name)
            elif name not in PLUGINS or not taken:  # a plugin after a provider that works is not needed
                try:
                    if name not in PLUGINS:
                        raise no_provider(ort, name)
                    devices = plugin_devices(ort, name)  # before 1.22 options know nothing of devices
                    options.add_provider_for_devices(devices[:1], {})
                    plugin = name
                except BackendError as error:
                    if not fallback:
                        raise
                    left_out.append(f"{name} ({error.fact})")
        listed = None if plugin is not None else taken
        try:
            self._session = ort.InferenceSession(model or os.fspath(Path(path)), options, providers=listed)
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            raise FileFormatError(
                f"{path}: ONNX Runtime {ort.__version__} refuses this file", note=last_words(error)
            ) from error
        never_free_in_forks(self._session)
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted[0] and not fallback:
            raise BackendError(
                f"{wanted[0]} was requested, but ONNX Runtime uses {self.provider}",
                hint="--fallback accepts that; see its own message above for why",
            )
        self._output, self._instead = output, tuple(left_out)
        self._arithmetic = f", {arithmetic}" if arithmetic else ""
        self._version: str = ort.__version__
        self._binding: Any = None
        self._buffers: Buffers | None = None

    @property
    def description(self) -> str:
        """Library, version, the provider really in use, and in what it computes where that is not the file's matter."""
        return f"onnxruntime {self._version}, {self.provider}{self._arithmetic}" + "".join(
            f", not {why}" for why in self._instead
        )

    def bind(self, buffers: Buffers) -> None:
        """Bind the session to the buffers: no copy and no allocation per step.

        Raises:
            BackendError: it is closed, or its graph lacks an output.
        """
        if self._session is None:
            raise BackendError(f"{self.description}: the session is closed")
        self._buffers = buffers  # they have to outlive the binding, which holds only their addresses
        self._binding = self._session.io_binding()
        try:
            for name, array in buffers.inputs().items():
                self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, output in ((self._output, buffers.out), (VARIANCE, buffers.var)):
                if output is not None:
                    self._binding.bind_output(name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
        except Exception as error:
            raise BackendError("ONNX Runtime does not take these buffers", note=last_words(error)) from error

    def enqueue(self) -> None:
        """Run the network once."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError("ONNX Runtime failed to run the network", note=last_words(error)) from error

    def share(self) -> OrtBackend:
        """A backend with the same session, which several threads may run at once, and buffers of its own."""
        other = copy.copy(self)
        other._binding = other._buffers = None
        return other

    def close(self) -> None:
        """Release the session. Safe to call again."""
        self._binding = self._buffers = self._session = None


def open_onnx(
    path: Path,
    spec: ModelSpec,
    *,
    providers: Sequence[str] = ("cpu",),
    fallback: bool = False,
    threads: int = 0,
    widened: bytes | None = None,
    eight_bits: bytes | None = None,
) -> Backend:
    """The backend of an ONNX file: on a GPU a :class:`ddpmx.backends.base.CopyingBackend`, else an :class:`OrtBackend`.

    Args:
        path: the file, checked.
        spec: its spec.
        providers: in order of preference. Without ``fallback`` the first has to run the network.
        fallback: whether the next one, and in the end the CPU, may run it where a provider does not work.
        threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        widened: the file's model in float32, to be run in its place.
        eight_bits: the same of a file in 8 bits, to be run on the CPU by products of integers (:mod:`.ort_integers`).

    Raises:
        As :class:`OrtBackend` and :class:`ddpmx.backends.ort_device.OrtDevice`.
    """
    from ddpmx.backends.ort_device import OrtDevice

    left = [providers] if isinstance(providers, str) else list(providers)
    ort, instead = import_onnxruntime(), []
    for name in left:
        if NAMES.get(name, name) not in (*NAMES.values(), *ort.get_all_providers(), *available_providers(ort)):
            raise no_provider(ort, name)  # an unknown name is an error even with fallback
    while left and device_provider(left[0]) is not None:
        learned = spec.learns_variance
        try:
            device = OrtDevice(
                path,
                spec.prediction,
                shape=spec.shape,
                provider=left[0],
                variance=learned,
                conditioning_shapes=spec.conditioning_shapes,
                widened=widened,
            )
        except BackendError as error:
            if not fallback:
                raise
            instead.append(f"{left[0]} ({error.fact})")
            left = left[1:] or ["cpu"]
            continue
        try:
            return CopyingBackend(device)
        except BaseException:
            device.close()
            raise
    _check_threads(threads)
    integers = None if eight_bits is None else as_integers(ort, eight_bits, _one_image(spec))
    if integers is not None:
        with contextlib.suppress(FileFormatError):  # then the file itself is opened, or says what is wrong with it
            alone = OrtBackend(
                path,
                spec.prediction,
                threads=1,
                instead=instead,
                model=integers,
                arithmetic="in 8-bit integers and float32",
            )
            return Parts(alone, max(1, PART_PIXELS // (spec.shape[1] * spec.shape[2])), threads or usable_cores())
    return OrtBackend(
        path,
        spec.prediction,
        providers=left,
        fallback=fallback,
        threads=threads,
        instead=instead,
        model=widened,
        arithmetic="in float32" if widened is not None else "",
    )


def _check_threads(threads: int) -> None:
    if not 0 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be from 0 to {MAX_THREADS}, not {threads}", hint="0 for one per core")


def _one_image(spec: ModelSpec) -> dict[str, NDArray[np.generic]]:
    """Inputs for one image, all 0."""
    buffers = Buffers.of(1, spec.shape, var=spec.learns_variance, conditioning_shapes=spec.conditioning_shapes)
    return {name: np.zeros_like(array) for name, array in buffers.inputs().items()}


def computes_on_cpu(providers: Sequence[str]) -> bool:
    """Whether the first of these providers is ONNX Runtime's CPU."""
    names = [providers] if isinstance(providers, str) else list(providers)
    return NAMES.get(names[0], names[0]) == NAMES["cpu"] if names else False
