"""Training from Python, and what the command line does as well: a configuration and images become a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageColor

from ddpm_export.training.batches import check_crop
from ddpm_export.training.config import CONFIG, PRESET_SIZES, RunConfig, default_preset, read_config, resolve
from ddpm_export.training.data import Dataset, Source, load_dataset, load_source
from ddpm_export.training.distributed import joined
from ddpm_export.training.images.cache import NAME
from ddpm_export.training.pipeline import load
from ddpm_export.training.session import Housekeeping, Progress
from ddpm_export.training.train import Trainer, recorded_source
from ddpmx.errors import InputError
from ddpmx.formats import model_file
from ddpmx.pipeline import Pipeline

LOOKED_AT = 20
"""How many images of a folder are looked at for their size."""


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
            file = None if config is None else Path(config)
            chosen = choices(Path(data), own_device, preset, file, options)
            check_new(out)
            dataset = read_images(Path(data), chosen, {**reading_of(file), **(reading or {})})
            trainer = begin(chosen, dataset, out, device=own_device, processes=processes, **how)
            steps = chosen.steps
        stop = False

        def show(progress: Progress) -> None:
            nonlocal stop
            for callback in callbacks:
                stop = callback(progress) is True or stop

        saved = trainer.train(steps, progress=show, stop=lambda: stop, message=message, housekeeping=housekeeping)
    return Run(out, saved, trainer.step, trainer.loss)


def choices(
    data: Path, device: str | None, preset: str | None, config: Path | None, options: Mapping[str, Any]
) -> RunConfig:
    """The configuration of a new run.

    Args:
        data: the images, for the size that a preset gives to a folder's.
        device: as named, or None.
        preset: as named, or None.
        config: a TOML file, or None.
        options: choices over both.

    Raises:
        InputError, FileFormatError: a name or value that does not exist.
    """
    file = {} if config is None else read_config(config)
    named = preset or file.pop("preset", None) or default_preset(on_gpu(device))
    file = {name: value for name, value in file.items() if name in RunConfig.__dataclass_fields__}
    if unknown := sorted(options.keys() - RunConfig.__dataclass_fields__.keys()):
        raise InputError(
            f"there is no option {unknown[0]!r}", hint="the fields of RunConfig, and the arguments of train"
        )
    chosen = resolve(named, file, options)
    if chosen.size is None and data.is_dir() and needs_size(data, PRESET_SIZES[named], len(chosen.mult)):
        side = PRESET_SIZES[named]
        chosen = resolve(named, file, options, {"size": (side, side)})
    return chosen


def reading_of(config: Path | None) -> dict[str, Any]:
    """How a configuration file says that images are read: arguments of ``load_dataset``.

    Args:
        config: the file, or None. Paths in it are relative to it.

    Raises:
        InputError, FileFormatError: a name or value that does not exist.
    """
    file = {} if config is None else read_config(config)
    found: dict[str, Any] = {name: file[name] for name in ("white", "skip_broken") if name in file}
    if config is not None and "condition" in file:
        found["condition"] = config.parent / file["condition"]
    if "max_megapixels" in file:
        if not 0 < file["max_megapixels"] <= 1e6:
            raise InputError(f"{config}: max-megapixels must be above 0 and at most 1000000")
        found["max_pixels"] = max(1, round(file["max_megapixels"] * 1e6))
    if "background" in file:
        try:
            red, green, blue, *alpha = ImageColor.getrgb(file["background"])
            if alpha and alpha[0] != 255:
                raise ValueError("it is transparent itself")
        except ValueError as error:
            raise InputError(f"{config}: background {file['background']!r} is not a colour", note=str(error)) from None
        found["background"] = (red, green, blue)
    return found


def on_gpu(device: str | None) -> bool:
    """Whether training would run on a GPU."""
    return torch.cuda.is_available() if device is None else not device.startswith("cpu")


def needs_size(folder: Path, side: int, levels: int) -> bool:
    """Whether a folder's images cannot be trained on as they are: of different sizes, larger than ``side``, or odd ones."""
    sizes = set()
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    for path, _ in zip(found, range(LOOKED_AT), strict=False):
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # stored on its side
                sizes.add(image.size[::-1] if turned else image.size)
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ):  # read_images says which cannot be read
            continue
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


def read_images(
    data: Path,
    config: RunConfig,
    reading: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The images of a new run.

    Raises:
        DataError, InputError: see :func:`ddpm_export.training.data.load_dataset`.
    """
    how = dict(reading)
    if config.classes:
        how["classes"] = True
    return load_dataset(data, size=config.size, channels=config.channels, **how, progress=progress)


def begin(config: RunConfig, dataset: Dataset, out: Path, **how: Any) -> Trainer:
    """A new run in memory.

    Args:
        config: its choices.
        dataset: its images.
        out: its folder.
        **how: ``device``, ``processes``, ``compiled`` and ``checkpoint_activations`` of :class:`Trainer`.

    Raises:
        SpecError, InputError: the choices contradict each other or the images.
    """
    settings = config.settings()
    check_crop(dataset.shape, config.crop)
    classes = None if dataset.labels is None else len(dataset.classes or ()) or int(dataset.labels.max()) + 1
    spec = config.spec(dataset.shape, classes, None if dataset.conditions is None else dataset.conditions.channels)
    trainer = Trainer(out, dataset, spec, config.network(spec), settings, **how)
    trainer.config = config
    return trainer


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
        steps = read_config(out / CONFIG).get("steps") if (out / CONFIG).is_file() else None
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
