"""Measures a model file on this machine: steps, whole chains and the network alone, with the machine's state."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ddpmx
from ddpmx.backends.base import EXECUTORS, Backend, CopyingBackend, DeviceBackend
from ddpmx.backends.open import OpenOptions, open_model
from ddpmx.backends.ort_common import device_provider
from ddpmx.bench.figures import LEAST_STEPS, Cell, Settings, beginning
from ddpmx.bench.host import measure_host
from ddpmx.device.discovery import gpus
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, InputError
from ddpmx.formats import model_file, plan_file
from ddpmx.formats.spec import ModelSpec
from ddpmx.models import shipped
from ddpmx.sampling import chain
from ddpmx.sampling import request as requests
from ddpmx.sampling.conditioning import example
from ddpmx.system import machine

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_BATCHES = (1, 4, 16, 64)
DEFAULT_BATCHES_CPU = (1, 4)
MAX_SECONDS = 3600.0

ALL_EXECUTORS = EXECUTORS[::-1]
"""In the order of the table: the slowest first."""


@dataclass(frozen=True)
class Report:
    """The result of :func:`bench`.

    Attributes:
        file: the file's name, kind and spec, and how long it took to open and to build.
        machine: the machine. ``gpu`` is None for a file that runs on the CPU.
        settings: the arguments of the measurement.
        cells: the table, line by line.
        left_out: batch sizes that were not measured, with the reason.
        method: sentences that explain the figures.
    """

    file: dict[str, Any]
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell]
    left_out: list[str]
    method: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {"ddpmx": ddpmx.__version__, **values, "cells": [cell.to_json() for cell in self.cells]}


def bench(
    path: str | os.PathLike[str],
    *,
    batches: Sequence[int] | None = None,
    executor: str = "auto",
    steps: int | None = None,
    seconds: float = 5.0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Unpack[OpenOptions],
) -> Report:
    """Measure a model file.

    Args:
        path: an ONNX file or a plan.
        batches: batch sizes; by default those of 1, 4, 16 and 64 that fit, on a CPU 1 and 4.
        executor: for a chain on a GPU ``auto``, ``all``, or one of :data:`ddpmx.backends.base.EXECUTORS`; on a CPU there is
            only ``host``.
        steps: length of each chain, 3…T; by default as many steps as fit into ``seconds``.
        seconds: approximate time for each batch size and executor.
        progress: called with (what is being measured, lines done, lines in all).
        **options: see :func:`ddpmx.backends.open.open_model`.

    Raises:
        InputError: a number is out of range, the file does not take a batch size, or there is no such executor.
        BackendError: nothing could be measured.
        FileFormatError, SpecError, NumericError: as for :func:`ddpmx.pipeline.load` and its ``generate``.
    """
    path = shipped.find(path)
    _check(path, batches, executor, steps, seconds)
    providers = options.get("providers", ("cpu",))
    wanted = [providers] if isinstance(providers, str) else providers
    on_gpu = model_file.identify(path) == "plan" or any(map(device_provider, wanted))
    with contextlib.ExitStack() as stack:
        begun = time.perf_counter()
        free_before = stack.enter_context(_context()) if on_gpu else None
        spec, backend = open_model(path, **options)
        stack.callback(backend.close)
        device = backend.device if isinstance(backend, CopyingBackend) else None
        names = _executors(executor, device)
        chosen, left_out = _choose(batches, spec, device)
        if steps is not None and steps > spec.timesteps:
            raise InputError(f"the chain has {spec.timesteps} steps, not {steps}", hint=f"--steps {spec.timesteps}")
        _first_step(backend, spec, chosen[0])
        load_s = time.perf_counter() - begun
        if isinstance(backend, CopyingBackend):
            backend.release()
        settings = Settings(seconds, steps)
        measure: Callable[[int, str], Cell] = lambda batch, _: measure_host(backend, spec, batch, settings)  # noqa: E731
        ordinal = None
        if device is not None:
            from ddpmx.bench.gpu import DeviceBench

            assert isinstance(backend, CopyingBackend)
            measure = DeviceBench(device, spec, settings, backend=backend, free_before=free_before).measure
            ordinal = device.driver.ordinal
        before = None if ordinal is None else machine.gpu_state(ordinal)
        cells: list[Cell] = []
        for batch in chosen:
            for name in names:
                if progress is not None:
                    progress(f"batch {batch}, {name}", len(cells), len(chosen) * len(names))
                cells.append(measure(batch, name))
        after = None if ordinal is None else machine.gpu_state(ordinal)
        description, sleeping = backend.description, getattr(backend, "sleeping", False)
    if all(cell.failed for cell in cells):
        raise BackendError(
            f"{path}: nothing could be measured",
            note="; ".join(dict.fromkeys(str(cell.failed) for cell in cells)),
            hint="--executor all tries each executor; `ddpmx doctor` shows what is installed",
        )
    return Report(
        file=_file(path, spec, description, load_s),
        machine=_machine(ordinal, before, after, options.get("threads", 0)),
        settings={"executor": executor, "seconds": seconds, "steps": steps},
        cells=cells,
        left_out=left_out,
        method=_method(cells, on_gpu=device is not None, sleeping=sleeping),
    )


def _check(path: Path, batches: Sequence[int] | None, executor: str, steps: int | None, seconds: float) -> None:
    """Check the arguments before the file is opened."""
    names = ("auto", "all", "host", *ALL_EXECUTORS)
    if executor not in names:
        raise InputError(f"there is no executor {executor!r}", hint=f"one of {', '.join(names)}")
    if not os.path.lexists(path):
        raise InputError(f"{path}: there is no such file", hint="a model.onnx or model.plan")
    if batches is not None and (not batches or any(type(n) is not int or n < 1 for n in batches)):
        raise InputError(f"batch sizes are whole numbers from 1, not {list(batches)}", hint="--batch 1,4,16")
    if steps is not None and not (type(steps) is int and steps >= LEAST_STEPS):
        raise InputError(f"{steps!r} steps are too few to measure", hint=f"--steps {LEAST_STEPS}, or more")
    if not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"cannot measure for {seconds!r} seconds", hint=f"0 < seconds ≤ {MAX_SECONDS:g}")


def _executors(executor: str, device: DeviceBackend | None) -> tuple[str, ...]:
    if device is None:
        if executor not in ("auto", "all", "host"):
            raise InputError(
                f"executor {executor!r} is for chains on a GPU, and this file runs on the CPU here",
                hint="--executor host; or a plan, or --provider cuda",
            )
        return ("host",)
    if executor == "host":
        raise InputError(
            "executor 'host' is for files that run on the CPU", hint=f"one of auto, all, {', '.join(ALL_EXECUTORS)}"
        )
    if executor not in ("auto", "all", *device.executors):
        raise InputError(
            f"{device.description} does not support executor {executor!r}", hint=f"auto, {', '.join(device.executors)}"
        )
    return ALL_EXECUTORS if executor == "all" else (executor,)


def _choose(
    batches: Sequence[int] | None, spec: ModelSpec, device: DeviceBackend | None
) -> tuple[list[int], list[str]]:
    """(batch sizes to measure, those left out with the reason)."""
    most = requests.largest_batch(spec)
    if batches is not None:
        for batch in batches:
            if batch > most:
                raise InputError(f"{batch} images at once do not fit into memory", hint=f"--batch {most}, or less")
            if device is not None:
                device.check_batch(batch)
        return sorted(set(batches)), []
    if device is None:
        wanted = [n for n in DEFAULT_BATCHES_CPU if n <= most]
        rest = ",".join(str(n) for n in DEFAULT_BATCHES if n not in DEFAULT_BATCHES_CPU)
        return wanted, [f"batches {rest.replace(',', ' and ')}: slow on a CPU; --batch {rest} measures them"]
    taken = [n for n in DEFAULT_BATCHES if n <= most and any(low <= n <= high for low, high in device.batches)]
    if not taken:  # for example, a plan for one unusual batch size
        taken = sorted({min(high, most) for low, high in device.batches if low <= most})
    ranges = ", ".join(f"{low}…{high}" if low < high else f"{low}" for low, high in device.batches)
    left_out = [
        f"batch {n}: {'it does not fit into memory' if n > most else f'the file takes {ranges}'}"
        for n in DEFAULT_BATCHES
        if n not in taken
    ]
    return taken, left_out


@contextlib.contextmanager
def _context() -> Iterator[int | None]:
    """Hold the GPU's context, and yield the bytes of memory that are free before the file is opened.

    Without it the memory of a plan's weights would not be counted. Without a driver it yields None: opening the file then
    reports more clearly what is missing.
    """
    from ddpmx.device.driver import Driver

    with contextlib.ExitStack() as stack:
        free = None
        with contextlib.suppress(BackendError):
            driver = stack.enter_context(Driver())
            with driver.current():
                free = driver.free_memory()[0]
        yield free


def _first_step(backend: Backend, spec: ModelSpec, batch: int) -> None:
    table = beginning(make_table(spec.make_schedule(), spec.prediction, spec.variance), 1)
    images = np.arange(batch)
    start, conditioning = chain.initial(0, images, spec.shape), example(spec, images)
    for _ in chain.run(
        backend,
        table,
        start,
        seed=0,
        images=images,
        clip=spec.clip,
        conditioning_shapes=spec.conditioning_shapes,
        conditioning=conditioning,
    ):
        pass


def _file(path: Path, spec: ModelSpec, description: str, load_s: float) -> dict[str, Any]:
    kind = model_file.identify(path)
    values: dict[str, Any] = {
        "name": path.name,
        "kind": kind,
        "bytes": path.stat().st_size,
        "spec": spec.to_json(),
        "runs_on": description,
        "load_s": load_s,
        "build_s": None,
        "engine": None,
    }
    if kind == "plan":  # it has been opened, so any host code in it is trusted
        info = plan_file.read_plan(path, trust_host_code=True, brief=True)
        seconds = ((info.sidecar or {}).get("build") or {}).get("seconds")
        values["build_s"] = seconds if isinstance(seconds, int | float) else None
        values["engine"] = info.engine.to_json()
    return values


def _machine(
    ordinal: int | None, before: machine.GpuState | None, after: machine.GpuState | None, threads: int
) -> dict[str, Any]:
    jetson = machine.jetson()
    values: dict[str, Any] = {
        "cpu": dataclasses.asdict(machine.cpu()) | {"asked_threads": threads},
        "jetson": None if jetson is None else {"mode": jetson.mode, "clocks_fixed": jetson.clocks_fixed},
        "gpu": None,
    }
    if ordinal is not None:
        found = gpus()
        device = found.devices[ordinal] if ordinal < len(found.devices) else None
        values["gpu"] = {
            "name": device.name if device else None,
            "sm": device.sm if device else None,
            "memory": device.memory if device else None,
            "driver_cuda": found.cuda,
            "before": None if before is None else _plain(before),
            "after": None if after is None else _plain(after),
        }
    return values


def _plain(state: machine.GpuState) -> dict[str, Any]:
    return dataclasses.asdict(state) | {"slowed_by": list(state.slowed_by)}


def _method(cells: Sequence[Cell], *, on_gpu: bool, sleeping: bool) -> list[str]:
    """Sentences that explain the figures of these cells."""
    measured = [cell for cell in cells if not cell.failed]
    lines = [
        "A step is the network, the step's noise and the update. A chain also includes the noise x_T and the conversion to "
        "uint8" + (", copied to the host." if on_gpu else ".") + " PNG and loading are not included.",
    ]
    if on_gpu:
        lines += [
            "Steps are timed by events in the chain's stream. Host: this thread's CPU time per step.",
            "Chain ÷ net: against the same network, captured alone in a graph and launched as often in the same stream, in "
            "turns with the chain; median over the chains.",
            "Memory: the decrease of free memory on the whole device since before the file was opened, without CUDA's own "
            "context; it includes other processes.",
        ]
        if any(cell.executor == "while" for cell in measured):
            lines.append("With while a chain is one launch without separate steps: only their mean is known.")
    else:
        lines += [
            "Host: the part of a step that is not the network. Noise of small images is drawn for several steps at once, "
            "so steps are uneven. Chain ÷ net: against the network alone on the same arrays, in turns step by step; median "
            "over the chains.",
            "Memory: the peak of the process so far.",
        ]
        if sleeping:
            lines.append(
                "Other processes computed here when the file was opened: ONNX Runtime's threads sleep while they wait. On "
                "an idle machine they spin."
            )
    if any(cell.extrapolated for cell in measured):
        lines.append(
            "*: extrapolated. Only the first steps of the full chain were measured, as many as the table shows; all T are "
            "assumed to cost the same."
        )
    return lines
