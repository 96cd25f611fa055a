"""How fast is a file here? Steps, chains and the network alone, measured in turns, with the machine's state beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ddpmx
from ddpmx import pipeline
from ddpmx.backends.base import EXECUTORS, Backend, CopyingBackend, DeviceBackend
from ddpmx.backends.open import open_model
from ddpmx.bench.figures import LEAST_STEPS, Cell, Settings, beginning
from ddpmx.bench.host import measure_host
from ddpmx.device.discovery import gpus
from ddpmx.diffusion.samplers import make_table
from ddpmx.errors import BackendError, InputError
from ddpmx.formats import model_file, plan_file
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example
from ddpmx.system import machine

DEFAULT_BATCHES = (1, 4, 16, 64)
DEFAULT_BATCHES_CPU = (1, 4)
MAX_SECONDS = 3600.0

ALL_EXECUTORS = EXECUTORS[::-1]
"""The slowest first, as the table has them."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        file: the model, what it says about itself, and how long it took to open and to build.
        machine: what it ran on. ``gpu`` is None for a file that runs on the CPU.
        settings: what was asked for.
        cells: the table, line by line.
        left_out: batch sizes that were not measured, and why.
        method: sentences on what the figures are, and are not.
    """

    file: dict[str, Any]
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell]
    left_out: list[str]
    method: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
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
    **opening: Any,
) -> Report:
    """Measure a model file.

    Args:
        path: an ONNX file or a plan.
        batches: batch sizes; by default 1, 4, 16 and 64, on a CPU 1 and 4, as far as they fit.
        executor: of a chain on a GPU: ``auto``, ``all``, or one of :data:`ddpmx.backends.base.EXECUTORS`.
            On a CPU there is only ``host``.
        steps: of each chain, 3…T; by default as many as fit into ``seconds``.
        seconds: for each batch size and executor, about.
        progress: called with (what is being measured, lines done, lines in all).
        **opening: see :func:`ddpmx.backends.open.open_model`.

    Raises:
        InputError: a number out of its range, a batch that the file does not take, or no such executor.
        BackendError: nothing could be measured.
        FileFormatError, SpecError, NumericError: as for :func:`ddpmx.pipeline.load`, and the chain.
    """
    path = Path(path)
    _check(path, batches, executor, steps, seconds)
    on_gpu = model_file.identify(path) == "plan" or list(opening.get("providers", ("cpu",))) != ["cpu"]
    with contextlib.ExitStack() as stack:
        begun = time.perf_counter()
        free_before = stack.enter_context(_context()) if on_gpu else None
        spec, backend = open_model(path, **opening)
        stack.callback(backend.close)
        device = backend.device if isinstance(backend, CopyingBackend) else None
        names = _executors(executor, device)
        chosen, left_out = _choose(batches, spec, device)
        if steps is not None and steps > spec.timesteps:
            raise InputError(f"the chain has {spec.timesteps} steps, not {steps}", hint=f"--steps {spec.timesteps}")
        _first_answer(backend, spec, chosen[0])
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
        description = backend.description
    if all(cell.failed for cell in cells):
        raise BackendError(
            f"{path}: nothing could be measured",
            note="; ".join(dict.fromkeys(str(cell.failed) for cell in cells)),
            hint="--executor all says for each whether it works; `ddpmx doctor` what is here",
        )
    return Report(
        file=_file(path, spec, description, load_s),
        machine=_machine(ordinal, before, after, int(opening.get("threads", 0))),
        settings={"executor": executor, "seconds": seconds, "steps": steps},
        cells=cells,
        left_out=left_out,
        method=_method(cells, on_gpu=device is not None),
    )


def _check(path: Path, batches: Sequence[int] | None, executor: str, steps: int | None, seconds: float) -> None:
    """See what can be known before a file is opened."""
    names = ("auto", "all", "host", *ALL_EXECUTORS)
    if executor not in names:
        raise InputError(f"there is no executor {executor!r}", hint=f"one of {', '.join(names)}")
    if not os.path.lexists(path):
        raise InputError(f"{path}: there is no such file", hint="a model.onnx or model.plan")
    if batches is not None and (not batches or any(type(n) is not int or n < 1 for n in batches)):
        raise InputError(f"batch sizes are whole numbers from 1, not {list(batches)}", hint="--batch 1,4,16")
    if steps is not None and not (type(steps) is int and steps >= LEAST_STEPS):
        raise InputError(f"{steps!r} steps tell nothing", hint=f"--steps {LEAST_STEPS}, or more")
    if not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"{seconds!r} is no length of time to measure", hint=f"0 < seconds ≤ {MAX_SECONDS:g}")


def _executors(executor: str, device: DeviceBackend | None) -> tuple[str, ...]:
    if device is None:
        if executor not in ("auto", "all", "host"):
            raise InputError(
                f"the executor {executor!r} is for a chain on a GPU, and this file runs on the CPU here",
                hint="--executor host; or a plan, or --provider cuda",
            )
        return ("host",)
    if executor == "host":
        raise InputError(
            "the executor 'host' is for files that run on the CPU", hint=f"one of auto, all, {', '.join(ALL_EXECUTORS)}"
        )
    if executor not in ("auto", "all", *device.executors):
        raise InputError(
            f"{device.description} does not run by executor {executor!r}", hint=f"auto, {', '.join(device.executors)}"
        )
    return ALL_EXECUTORS if executor == "all" else (executor,)


def _choose(
    batches: Sequence[int] | None, spec: ModelSpec, device: DeviceBackend | None
) -> tuple[list[int], list[str]]:
    """(batch sizes, what was left out and why)."""
    elements = int(np.prod(spec.shape))
    most = max(1, pipeline.MAX_BATCH_ELEMENTS // elements)
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
        return wanted, [f"batches {rest.replace(',', ' and ')}: they take long on a CPU; --batch {rest} measures them"]
    taken = [n for n in DEFAULT_BATCHES if n <= most and any(low <= n <= high for low, high in device.batches)]
    if not taken:  # a plan for one unusual batch, say
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
    """Hold the GPU's context, and yield how much memory is free before anything of the file is there.

    Without it the memory of a plan's weights would come and go unseen. None where no driver answers: opening the file
    says better what is missing.
    """
    from ddpmx.device.driver import Driver

    with contextlib.ExitStack() as stack:
        free = None
        with contextlib.suppress(BackendError):
            driver = stack.enter_context(Driver())
            with driver.current():
                free = driver.free_memory()[0]
        yield free


def _first_answer(backend: Backend, spec: ModelSpec, batch: int) -> None:
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
    told: dict[str, Any] = {
        "name": path.name,
        "kind": kind,
        "bytes": path.stat().st_size,
        "spec": spec.to_json(),
        "runs_on": description,
        "load_s": load_s,
        "build_s": None,
        "engine": None,
    }
    if kind == "plan":  # it was opened, so host code was agreed to, if there is any
        info = plan_file.read_plan(path, trust_host_code=True)
        seconds = ((info.sidecar or {}).get("build") or {}).get("seconds")
        told["build_s"] = seconds if isinstance(seconds, int | float) else None
        told["engine"] = info.engine.to_json()
    return told


def _machine(
    ordinal: int | None, before: machine.GpuState | None, after: machine.GpuState | None, threads: int
) -> dict[str, Any]:
    jetson = machine.jetson()
    told: dict[str, Any] = {
        "cpu": dataclasses.asdict(machine.cpu()) | {"asked_threads": threads},
        "jetson": None if jetson is None else {"mode": jetson.mode, "clocks_fixed": jetson.clocks_fixed},
        "gpu": None,
    }
    if ordinal is not None:
        found = gpus()
        device = found.devices[ordinal] if ordinal < len(found.devices) else None
        told["gpu"] = {
            "name": device.name if device else None,
            "sm": device.sm if device else None,
            "memory": device.memory if device else None,
            "driver_cuda": found.cuda,
            "before": None if before is None else _plain(before),
            "after": None if after is None else _plain(after),
        }
    return told


def _plain(state: machine.GpuState) -> dict[str, Any]:
    return dataclasses.asdict(state) | {"slowed_by": list(state.slowed_by)}


def _method(cells: Sequence[Cell], *, on_gpu: bool) -> list[str]:
    """What the figures are. Only what holds for these cells."""
    measured = [cell for cell in cells if not cell.failed]
    said = [
        "A step is the network, its noise and the update. A chain is also x_T's noise before, and uint8 after"
        + (", copied to the host." if on_gpu else ".")
        + " PNG and loading are not included.",
    ]
    if on_gpu:
        said += [
            "Steps are timed by events in the chain's stream. Host: this thread's CPU time per step.",
            "Chain ÷ net: against the same network captured alone in a graph and launched as often in the same stream, in "
            "turns with the chain; median over the chains.",
            "Memory: what is less free on the whole device than before the file was opened, CUDA's own context not "
            "counted; other processes on it count.",
        ]
        if any(cell.executor == "while" for cell in measured):
            said.append(
                "By while a chain is one launch, so that its steps cannot be told apart: only their mean is known."
            )
    else:
        said += [
            "Host: what a step takes beside the network. Small images' noise is drawn for several steps at once, so steps "
            "are uneven. Chain ÷ net: against the network alone on the same arrays, in turns step by step; median over "
            "the chains.",
            "Memory: the most that the process has had so far.",
        ]
    if any(cell.extrapolated for cell in measured):
        said.append(
            "*: extrapolated. The first steps of the full chain were measured, as many as the table says, and T of them "
            "are taken to cost the same."
        )
    return said
