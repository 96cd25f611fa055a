"""How `ddpmx train` begins: with images and a new network, with another run's weights, or where a run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddpmx.errors import InputError
from ddpmx_cli.console import busy, counting

if TYPE_CHECKING:
    from ddpm_export.training.data import Dataset, Source
    from ddpm_export.training.train import Trainer, TrainSettings

# Flags that may be used with --resume; everything else is fixed when a run is started.
FREE = {"data", "condition", "out", "steps", "resume", "device", "threads", "sample_every", "save_minutes", "cache"}
# Flags that a network has settled, of which training begins by --from.
SETTLED = {
    "timesteps",
    "schedule",
    "scale_betas",
    "prediction",
    "variance",
    "width",
    "mult",
    "blocks",
    "attention",
    "groups",
}


@contextlib.contextmanager
def as_flags() -> Iterator[None]:
    """Replace the names of settings by those of their flags in error messages."""
    names = {"channels": "--width", "multipliers": "--mult", "grad_clip": "--grad-clip"}
    try:
        yield
    except InputError as error:
        name, _, rest = error.fact.partition(" must be ")
        if error.fact.startswith("attention "):
            hint = (error.hint or "").replace("attention ", "--attention ", 1)
            error = InputError(f"--{error.fact}", note=error.note, hint=hint)
        elif rest and name.isidentifier() and name != "T":
            error = InputError(f"{names.get(name, '--' + name)} must be {rest}", note=error.note, hint=error.hint)
        raise error from None


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
            hint="a smaller --batch or --width; checkpoints are untouched",
        ) from error


def load(data: Path, **how: Any) -> Dataset:
    """The images of --data, with a progress display; ``how`` goes to ``load_dataset``."""
    from ddpm_export.training.data import load_dataset

    with counting("reading images") as progress:
        return load_dataset(data, **how, progress=progress)


def check_new(out: Path) -> None:
    """Check that a new run may be made there.

    Raises:
        InputError: there is a run already, or a file.
    """
    from ddpmx.formats import model_file

    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out}: is a file, and a run is a folder", hint="another --out")
    if model_file.checkpoints(out):
        raise InputError(f"{out} already holds a run", hint="--resume continues it; another --out starts a new one")


def pixels(megapixels: float) -> int:
    """The flag --max-megapixels as a number of pixels.

    Raises:
        InputError: it is none.
    """
    if not 0 < megapixels <= 1e6:
        raise InputError(f"--max-megapixels must be above 0 and at most 1000000, not {megapixels:g}")
    return max(1, int(megapixels * 1e6))


def _given(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """The flags of ``names`` that stand on the command line."""
    return [
        f"--{name.replace('_', '-')}"
        for name in ctx.params
        if name in names and (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]


def fine_tune(
    ctx: typer.Context,
    data: Path,
    how: dict[str, Any],
    source: Path,
    weights: str,
    out: Path,
    settings: TrainSettings,
    dropout: float,
    device: str | None,
) -> Trainer:
    """A new run with the weights of another. A folder's images are brought to its size and channels."""
    from ddpm_export.training import checkpoint
    from ddpm_export.training.data import are_files
    from ddpm_export.training.train import Trainer

    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights!r}: not one of ema and raw")
    if flags := _given(ctx, SETTLED):
        raise InputError(
            f"{' and '.join(flags)} cannot be set with --from",
            note=f"network and schedule are those of {source}",
            hint="omit it, or train a new network without --from",
        )
    if source.suffix in (".onnx", ".plan"):
        raise InputError(f"{source}: a model file cannot be trained", hint="--from the run that it was exported from")
    if source.is_file():
        raise InputError(
            f"{source}: a file, and --from takes a run",
            hint=f"ddpmx import {shlex.quote(str(source))} -o runs/imported makes one of another project's checkpoint",
        )
    with busy(f"reading {source}"):
        _, spec = checkpoint.load_network(source)
    c, height, width = spec.shape
    if are_files(data):
        how = {**how, "size": how["size"] or (height, width), "channels": how["channels"] or c}
    dataset = load(data, **how)
    if dataset.shape != spec.shape:
        raise InputError(
            f"{data}: images of {dataset.shape[1]}×{dataset.shape[2]}×{dataset.shape[0]}",
            note=f"the network of {source} takes {height}×{width}×{c}",
            hint="a folder is brought to that by itself, without --size and --channels",
        )
    with as_flags(), memory():
        return Trainer.fine_tune(
            out,
            dataset,
            source,
            settings,
            weights="raw" if weights == "raw" else "ema",
            dropout=dropout if _given(ctx, {"dropout"}) else None,
            device=device,
        )


def resume(ctx: typer.Context, data: Path | None, out: Path, device: str | None) -> Trainer:
    """The run in --out, with the images that it was begun with.

    Raises:
        InputError: a flag is set that a run keeps from its beginning.
    """
    from ddpm_export.training.data import load_source
    from ddpm_export.training.images.cache import NAME
    from ddpm_export.training.train import Trainer, recorded_source

    if flags := _given(ctx, ctx.params.keys() - FREE):
        raise InputError(
            f"{' and '.join(flags)} cannot be changed when a run is resumed",
            note=f"{out} keeps the settings that it was started with",
            hint="omit it, or start a new run",
        )
    recorded = recorded_source(out)
    with counting("reading images") as progress:
        source = _moved(recorded, data, ctx.params.get("condition"))
        keep = out if ctx.params.get("cache", True) else None
        dataset = load_source(source, progress=progress, cached=out / NAME, keep=keep)
    return Trainer.resume(out, dataset, device=device)


def _moved(recorded: Source, data: Path | None, condition: Path | None) -> Source:
    """A run's source with the places that images and conditions may have moved to.

    Raises:
        InputError: the run has no conditions.
    """
    if condition is not None and recorded.condition is None:
        raise InputError("--condition: this run was begun without condition images", hint="omit it, or start a new run")
    if data is None:
        return recorded if condition is None else dataclasses.replace(recorded, condition=condition)
    if condition is None:  # conditions in the same .npz move with it
        condition = data if recorded.condition == recorded.path else recorded.condition
    return dataclasses.replace(recorded, path=data, condition=condition)
