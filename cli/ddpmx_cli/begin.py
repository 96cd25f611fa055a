"""How `ddpmx train` begins: with images and a new network, with another run's weights, or where a run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddpmx.errors import InputError
from ddpmx_cli.console import busy, counting, duration, say

if TYPE_CHECKING:
    from ddpm_export.training.log import Tracker
    from ddpm_export.training.train import Trainer

# Flags that are about this session and change no weight.
SESSION = {
    "images",
    "data",
    "condition",
    "out",
    "steps",
    "resume",
    "other_images",
    "dry_run",
    "device",
    "threads",
    "compiled",
    "checkpoint_activations",
    "sample_every",
    "log_every",
    "save_minutes",
    "keep",
    "keep_every",
    "cache",
    "tensorboard",
    "wandb",
}
# Flags with another name than their setting.
_NAMES = {"compiled": "--compile", "begin_from": "--from"}
_ABOUT_SETTINGS = re.compile(r"((?:\w+ and )*\w+) (must be|cannot be set with|cannot be changed) (.*)", re.DOTALL)


@contextlib.contextmanager
def as_flags() -> Iterator[None]:
    """Replace the names of settings by those of their flags in error messages."""
    try:
        yield
    except InputError as error:
        hint = error.hint
        if error.fact.startswith("attention "):
            hint = (hint or "").replace("attention ", "--attention ", 1)
            error = InputError(f"--{error.fact}", note=error.note, hint=hint)
        elif (found := _ABOUT_SETTINGS.fullmatch(error.fact)) and found[1] != "T":
            names, what, rest = found.groups()
            rest = flag(rest) if what.endswith("with") else rest
            error = InputError(f"{_flags(names.split(' and '))} {what} {rest}", note=error.note, hint=hint)
        raise error from None


def flag(name: str) -> str:
    """The flag of a setting."""
    return _NAMES.get(name, f"--{name.replace('_', '-')}")


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """Turn a lack of memory, which torch reports as a RuntimeError, into an InputError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise InputError(
            "there is not enough memory for this training",
            note=str(error).splitlines()[0][:200],
            hint="a smaller --batch or --width, --accumulate 2, or --checkpoint-activations; checkpoints are untouched",
        ) from error


def given(ctx: typer.Context) -> dict[str, Any]:
    """The parameters that stand on the command line, by their names, with their values."""
    return {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def options(given: Mapping[str, Any], **parsed: Any) -> dict[str, Any]:
    """What of ``given`` are choices of a :class:`RunConfig`; ``parsed`` replaces what was text."""
    from ddpm_export.training.config import RunConfig

    fields = {field.name for field in dataclasses.fields(RunConfig)}
    return {name: parsed.get(name, value) for name, value in given.items() if name in fields}


def check_device(device: str | None) -> str | None:
    """The device as it was named.

    Raises:
        InputError: torch cannot use it.
    """
    import torch

    if device is None:
        return None
    try:
        (torch.zeros(1, device=device) + 1).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError or its own, by device
        raise InputError(f"--device {device!r} cannot be used", note=str(error).splitlines()[0][:200]) from error
    return device


def _flags(names: Iterable[str]) -> str:
    return " and ".join(flag(name) for name in names)


def new(data: Path, out: Path, begin_from: Path | None, how: Mapping[str, Any], **choices: Any) -> tuple[Trainer, int]:
    """A new run, and the steps in all, see :func:`ddpm_export.training.api.new_run`."""
    from ddpm_export.training import api

    if begin_from is not None and begin_from.is_file() and begin_from.suffix not in (".onnx", ".plan", ".mnn"):
        raise InputError(
            f"{begin_from}: a file, and --from takes a run",
            hint=f"ddpmx import {shlex.quote(str(begin_from))} -o runs/imported makes one of another project's checkpoint",
        )
    with counting("reading images") as progress, as_flags(), memory():
        return api.new_run(data, out, begin_from=begin_from, progress=progress, **choices, **how)


def check_resumable(given: Mapping[str, Any], out: Path) -> None:
    """Check that only what may change stands beside --resume.

    Raises:
        InputError: something else does.
    """
    from ddpm_export.training.train import CHANGEABLE

    if fixed := [name for name in given if name not in SESSION | CHANGEABLE and name != "begin_from"]:
        raise InputError(
            f"{_flags(fixed)} cannot be changed when a run is resumed",
            note=f"{out} keeps the settings that it was started with, but for {_flags(sorted(CHANGEABLE))}",
            hint="omit it, or start a new run",
        )


def resume(
    data: Path | None,
    condition: Path | None,
    out: Path,
    options: Mapping[str, Any],
    other_images: bool,
    cache: bool,
    how: Mapping[str, Any],
) -> tuple[Trainer, int]:
    """The run in --out, with the images that it was begun with, and the steps in all."""
    from ddpm_export.training import api

    changes = {name: value for name, value in options.items() if value is not None}
    with counting("reading images") as progress, as_flags():
        return api.resumed(
            out,
            data,
            changes,
            condition=condition,
            cache=cache,
            progress=progress,
            other_images=other_images,
            **how,
        )


def trackers(out: Path, tensorboard: bool, wandb: bool, trainer: Trainer) -> list[Tracker]:
    """Those of TensorBoard and Weights & Biases that were asked for: in the first process."""
    from ddpm_export.training import watch

    if not trainer.processes.first:
        return []
    found: list[Tracker] = []
    if tensorboard:
        found.append(watch.TensorBoard(out))
    if wandb:
        found.append(watch.WeightsAndBiases(out, dataclasses.asdict(trainer.settings)))
    return found


def print_estimate(trainer: Trainer, steps: int) -> None:
    """What --dry-run says."""
    from ddpm_export.training import advice
    from ddpm_export.training.estimate import estimate

    for line in advice.introduce(trainer, steps, cached=False):
        say(line)
    with busy("measuring"):
        costs = estimate(trainer)
    left = (steps - trainer.step) * costs.seconds
    say(f"parameters    {costs.parameters:,}")
    say(f"arithmetic    {costs.flops / 1e9:,.1f} GFLOP an image, forwards and backwards")
    say(f"memory        about {costs.memory / 1e9:,.2f} GB for weights, moments and activations")
    say(f"time          {costs.seconds:.3g} s a step, measured on {trainer.device}; {duration(left)} in all")
    say("nothing was written (--dry-run)")
