"""Training from Python, and what the command line does as well: a configuration and images become a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.batches import check_crop
from ddpm_export.training.checkpoint import Weights
from ddpm_export.training.config import PRESET_SIZES, RunConfig, default_preset, read_config, resolve
from ddpm_export.training.data import Dataset, Source, are_files, load_dataset, load_source
from ddpm_export.training.distributed import joined
from ddpm_export.training.images.cache import NAME
from ddpm_export.training.images.decode import Unreadable, own_limit, read_header
from ddpm_export.training.images.find import find_images
from ddpm_export.training.images.source import as_pixels, parse_colour
from ddpm_export.training.pipeline import load
from ddpm_export.training.session import Housekeeping, Progress
from ddpm_export.training.train import Trainer, recorded_source, recorded_steps
from ddpmx.errors import InputError
from ddpmx.formats import model_file
from ddpmx.pipeline import Pipeline

LOOKED_AT = 20
"""How many images of a folder are looked at for their size."""

SETTLED = frozenset(
    {"timesteps", "schedule", "scale_betas", "prediction", "variance", "self_condition"}
    | {"width", "mult", "blocks", "attention", "groups"}
)
"""Choices that a network has settled whose weights a run begins with."""


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        path: its folder.
        checkpoint: the newest checkpoint.
        step: optimiser steps made.
        loss: a running mean of the loss.
    """

    path: Path
    checkpoint: Path
    step: int
    loss: float

    def pipeline(self, **how: Any) -> Pipeline:
        """The averaged weights as a pipeline that draws images, see :func:`ddpm_export.load`."""
        return load(self.path, **how)


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | None = None,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    begin_from: str | os.PathLike[str] | None = None,
    weights: Weights = "ema",
    device: str | None = None,
    callbacks: Sequence[Callable[[Progress], object]] = (),
    message: Callable[[str], None] | None = None,
    housekeeping: Housekeeping | None = None,
    reading: Mapping[str, Any] | None = None,
    compiled: bool = False,
    checkpoint_activations: bool = False,
    **options: Any,
) -> Run:
    """Train a DDPM, as ``ddpmx train`` does.

    ``ddpm_export.train("photos/", "runs/photos", preset="tiny", steps=500)``. Where torchrun has started several processes,
    each calls this, and they train together.

    Args:
        data: a folder of images or an ``.npz``, see :func:`ddpm_export.training.data.load_dataset`.
        out: the folder of the run.
        preset: ``tiny``, ``small``, ``cifar10`` or ``256``; by default ``cifar10`` on a GPU and else ``tiny``.
        config: a TOML file of choices over the preset.
        resume: continue the run in ``out``. Of ``options`` only ``steps``, and those that may change, are then allowed.
        begin_from: a run, trained or imported, with whose weights, network and schedule the new one begins.
        weights: which of its weights.
        device: torch's name of it; by default a GPU if there is one.
        callbacks: each is called with the :class:`Progress`; one that returns True stops training, which is then saved.
        message: called with a line that a user should read.
        housekeeping: sample grids, checkpoints, log.
        reading: further arguments of ``load_dataset``: ``condition``, ``background``, ``white`` …
        compiled, checkpoint_activations: see :class:`Trainer`.
        **options: choices over the preset and the file, the fields of :class:`RunConfig`: ``steps=…``, ``batch=…``.

    Returns:
        The run.

    Raises:
        DdpmxError: as ``ddpmx train`` refuses: images, choices or a run that do not go together.
    """
    out = Path(out)
    how: dict[str, Any] = {"compiled": compiled, "checkpoint_activations": checkpoint_activations}
    with joined(device) as (processes, own_device):
        if resume:
            trainer, steps = resumed(out, Path(data), options, device=own_device, processes=processes, **how)
        else:
            check_new(out)
            trainer, steps = new_run(
                Path(data),
                out,
                preset=preset,
                file={} if config is None else read_config(Path(config)),
                options=options,
                reading=dict(reading or {}),
                begin_from=None if begin_from is None else Path(begin_from),
                weights=weights,
                device=own_device,
                processes=processes,
                **how,
            )
        stop = False

        def show(progress: Progress) -> None:
            nonlocal stop
            for callback in callbacks:
                stop = callback(progress) is True or stop

        saved = trainer.train(steps, progress=show, stop=lambda: stop, message=message, housekeeping=housekeeping)
    return Run(out, saved, trainer.step, trainer.loss)


def new_run(
    data: Path,
    out: Path,
    *,
    preset: str | None,
    file: Mapping[str, Any],
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    begin_from: Path | None = None,
    weights: Weights = "ema",
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> tuple[Trainer, int]:
    """A new run in memory, and the steps that it is to make.

    Args:
        data: the images.
        out: its folder.
        preset: as named, or None.
        file: what :func:`read_config` gave, or nothing.
        options: choices over both.
        reading: further arguments of ``load_dataset``, over those of the file.
        begin_from, weights: as of :func:`train`.
        progress: called with (images read, images in all).
        **how: ``device``, ``processes``, ``compiled`` and ``checkpoint_activations`` of :class:`Trainer`.

    Raises:
        InputError: a name or value that does not exist, or choices that contradict each other.
        DataError: images that cannot be trained on.
        FileFormatError, SpecError: ``begin_from`` is no run, or does not fit.
    """
    if unknown := sorted(options.keys() - RunConfig.__dataclass_fields__.keys()):
        raise InputError(
            f"there is no option {unknown[0]!r}", hint="the fields of RunConfig, and the arguments of train"
        )
    reading = {**reading_of(file), **reading}
    if begin_from is not None:
        return _begun_from(begin_from, weights, data, out, preset, file, options, reading, progress, how)
    chosen = choices(data, how.get("device"), preset, file, options)
    settings = chosen.settings()
    dataset = _images(data, chosen, reading, progress)
    check_crop(dataset.shape, chosen.crop)
    labels, conditions = dataset.labels, dataset.conditions
    classes = None if labels is None else len(dataset.classes or ()) or int(labels.max()) + 1
    spec = chosen.spec(dataset.shape, classes, None if conditions is None else conditions.channels)
    trainer = Trainer(out, dataset, spec, chosen.network(spec), settings, **how)
    trainer.config = chosen
    return trainer, chosen.steps


def _begun_from(
    source: Path,
    weights: Weights,
    data: Path,
    out: Path,
    preset: str | None,
    file: Mapping[str, Any],
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
    how: Mapping[str, Any],
) -> tuple[Trainer, int]:
    """A new run with the weights of another. Image files are brought to its size and channels."""
    if weights not in ("ema", "raw"):
        raise InputError(f"weights must be ema or raw, not {weights!r}")
    if settled := [name for name in options if name in SETTLED]:
        raise InputError(
            f"{' and '.join(settled)} cannot be set with begin_from",
            note=f"network and schedule are those of {source}",
            hint="omit it, or train a new network without",
        )
    if source.suffix in (".onnx", ".plan", ".mnn"):
        raise InputError(f"{source}: a model file cannot be trained", hint="the run that it was exported from can")
    _, spec = checkpoints.load_network(source)
    c, height, width = spec.shape
    # a preset's rate is for a network that knows nothing: without a name the paper's is taken
    chosen = resolve(preset or file.get("preset") or "cifar10", _fields(file), options)
    if are_files(data):
        whole = (height, width) if chosen.crop is None else None
        chosen = dataclasses.replace(chosen, size=chosen.size or whole, channels=chosen.channels or c)
    chosen = dataclasses.replace(chosen, classes=spec.classes is not None)
    settings = chosen.settings()
    dataset = _images(data, chosen, reading, progress)
    if chosen.crop is None and dataset.shape != spec.shape:
        raise InputError(
            f"{data}: images of {dataset.shape[1]}×{dataset.shape[2]}×{dataset.shape[0]}",
            note=f"the network of {source} takes {height}×{width}×{c}",
            hint="a folder is brought to that by itself, without size and channels",
        )
    if not spec.null_class:
        settings = dataclasses.replace(settings, label_dropout=0.0)
    dropout = options.get("dropout")
    return Trainer.fine_tune(out, dataset, source, settings, weights=weights, dropout=dropout, **how), chosen.steps


def choices(
    data: Path, device: str | None, preset: str | None, file: Mapping[str, Any], options: Mapping[str, Any]
) -> RunConfig:
    """The configuration of a new run.

    Args:
        data: the images, for the size that a preset gives to a folder's.
        device: as named, or None.
        preset: as named, or None.
        file: what :func:`read_config` gave, or nothing.
        options: choices over both.

    Raises:
        InputError: a name or value that does not exist.
    """
    named = preset or file.get("preset") or default_preset(on_gpu(device))
    chosen = resolve(named, _fields(file), options)
    if chosen.size is None and data.is_dir() and needs_size(data, PRESET_SIZES[named], len(chosen.mult)):
        side = PRESET_SIZES[named]
        chosen = dataclasses.replace(chosen, size=(side, side))
    return chosen


def _fields(file: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in file.items() if name in RunConfig.__dataclass_fields__}


def reading_of(file: Mapping[str, Any]) -> dict[str, Any]:
    """How a configuration file says that images are read: arguments of ``load_dataset``.

    Raises:
        InputError: a value out of its range.
    """
    found: dict[str, Any] = {name: file[name] for name in ("white", "skip_broken", "condition") if name in file}
    if "max_megapixels" in file:
        found["max_pixels"] = as_pixels(file["max_megapixels"])
    if "background" in file:
        found["background"] = parse_colour(file["background"])
    return found


def on_gpu(device: str | None) -> bool:
    """Whether training would run on a GPU."""
    return torch.cuda.is_available() if device is None else not device.startswith("cpu")


def needs_size(folder: Path, side: int, levels: int) -> bool:
    """Whether a folder's images cannot be trained on as they are: of different sizes, larger than ``side``, or odd ones.

    Some of them are looked at, spread over the folder.
    """
    files = [item for item in find_images(folder).files if isinstance(item, Path)]
    sizes = set()
    places = np.unique(np.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).round().astype(int))
    for file in (files[place] for place in places):
        try:
            with own_limit():
                header = read_header(file, Source(folder))
        except Unreadable:  # reading them says which
            continue
        sizes.add((header.height, header.width))
    return len(sizes) > 1 or any(max(size) > side or any(n % 2 ** (levels - 1) for n in size) for size in sizes)


def check_new(out: Path) -> None:
    """Check that a new run may be made there.

    Raises:
        InputError: there is a run already, or a file.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out}: is a file, and a run is a folder", hint="another --out")
    if model_file.checkpoints(out):
        raise InputError(f"{out} already holds a run", hint="--resume continues it; another --out starts a new one")


def _images(
    data: Path, config: RunConfig, reading: Mapping[str, Any], progress: Callable[[int, int], None] | None
) -> Dataset:
    how = {**reading, "classes": True} if config.classes else reading
    return load_dataset(data, size=config.size, channels=config.channels, **how, progress=progress)


def resumed(
    out: Path,
    data: Path | None,
    options: Mapping[str, Any],
    *,
    condition: Path | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> tuple[Trainer, int]:
    """The run in ``out``, and the steps at which it is to end: those of ``options``, or as many as it was begun for.

    Args:
        out: the run's folder.
        data: its images, if they are elsewhere now.
        options: ``steps``, and settings that are to change.
        condition: the condition images, if they are elsewhere now.
        cache: keep the pixels of a folder in the run.
        progress: called with (images read, images in all).
        **how: of :meth:`Trainer.resume`.

    Raises:
        InputError: an option that cannot be changed.
        FileFormatError: there is no run, or other images.
    """
    changes = dict(options)
    steps = changes.pop("steps", None)
    source = _moved(recorded_source(out), data, condition)
    if steps is None:
        steps = recorded_steps(out)
    if steps is None:
        raise InputError("steps is missing", hint="how many steps the run is to have made in all")
    if "lr_decay" in changes:  # a choice says whether, a setting until which step
        changes["lr_decay"] = steps if changes["lr_decay"] else 0
    trainer = Trainer.resume(
        out,
        load_source(source, cached=out / NAME, keep=out if cache else None, progress=progress),
        changes=changes,
        **how,
    )
    return trainer, steps


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
