"""How `ddpmx train` begins: with images and a new network, with another run's weights, or where a run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddpmx.errors import InputError
from ddpmx_cli.console import busy, counting, duration, say

if TYPE_CHECKING:
    from ddpm_export.training.config import RunConfig
    from ddpm_export.training.data import Dataset
    from ddpm_export.training.log import Tracker
    from ddpm_export.training.session import Housekeeping
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
# Flags that a network has settled, of which training begins by --from.
SETTLED = {
    "timesteps",
    "schedule",
    "scale_betas",
    "prediction",
    "variance",
    "self_condition",
    "width",
    "mult",
    "blocks",
    "attention",
    "groups",
}
# Flags with another name than their setting.
_NAMES = {"channels": "--width", "multipliers": "--mult", "compiled": "--compile"}


@contextlib.contextmanager
def as_flags() -> Iterator[None]:
    """Replace the names of settings by those of their flags in error messages."""
    try:
        yield
    except InputError as error:
        name, _, rest = error.fact.partition(" must be ")
        if error.fact.startswith("attention "):
            hint = (error.hint or "").replace("attention ", "--attention ", 1)
            error = InputError(f"--{error.fact}", note=error.note, hint=hint)
        elif rest and name.isidentifier() and name != "T":
            error = InputError(f"{flag(name)} must be {rest}", note=error.note, hint=error.hint)
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


def data_of(config: Path) -> Path | None:
    """The images that a configuration file names; a relative path is relative to the file."""
    from ddpm_export.training.config import read_config

    named = read_config(config).get("data")
    return None if named is None else config.parent / named


def reading_of(config: Path | None) -> dict[str, Any]:
    """How a configuration file says that images are read, see :func:`ddpm_export.training.api.reading_of`."""
    from ddpm_export.training import api

    return api.reading_of(config)


def load(data: Path, config: RunConfig, reading: Mapping[str, Any]) -> Dataset:
    """The images of a new run, with a progress display."""
    from ddpm_export.training.api import read_images

    with counting("reading images") as progress:
        return read_images(data, config, reading, progress=progress)


def check_new(out: Path) -> None:
    """Check that a new run may be made there, see :func:`ddpm_export.training.api.check_new`."""
    from ddpm_export.training import api

    api.check_new(out)


def has_checkpoint(out: Path) -> bool:
    """Whether there is a run to resume."""
    from ddpmx.formats import model_file

    return bool(model_file.checkpoints(out))


def pixels(megapixels: float) -> int:
    """The flag --max-megapixels as a number of pixels.

    Raises:
        InputError: it is none.
    """
    if not 0 < megapixels <= 1e6:
        raise InputError(f"--max-megapixels must be above 0 and at most 1000000, not {megapixels:g}")
    return max(1, int(megapixels * 1e6))


def _flags(names: Iterable[str]) -> str:
    return " and ".join(flag(name) for name in names)


@dataclass(frozen=True)
class New:
    """A run that is to begin.

    Attributes:
        data: the images.
        out: its folder.
        preset, config: as named, or None.
        options: choices over both.
        reading: how images are read.
        given: what stands on the command line.
        how: the device and the like, for the trainer.
    """

    data: Path
    out: Path
    preset: str | None
    config: Path | None
    options: Mapping[str, Any]
    reading: Mapping[str, Any]
    given: Mapping[str, Any]
    how: Mapping[str, Any]

    def trainer(self) -> tuple[Trainer, int]:
        """The trainer, and the steps in all."""
        from ddpm_export.training import api

        with as_flags():
            chosen = api.choices(self.data, self.how["device"], self.preset, self.config, self.options)
            chosen.settings()
        dataset = load(self.data, chosen, self.reading)
        with as_flags(), memory():
            trainer = api.begin(chosen, dataset, self.out, **self.how)
        return trainer, chosen.steps

    def fine_tuned(self, source: Path, weights: str) -> tuple[Trainer, int]:
        """The same with the weights of another run. A folder's images are brought to its size and channels."""
        from ddpm_export.training import api, checkpoint
        from ddpm_export.training.data import are_files
        from ddpm_export.training.train import Trainer

        if weights not in ("ema", "raw"):
            raise InputError(f"--weights {weights!r}: not one of ema and raw")
        if settled := [name for name in self.given if name in SETTLED]:
            raise InputError(
                f"{_flags(settled)} cannot be set with --from",
                note=f"network and schedule are those of {source}",
                hint="omit it, or train a new network without --from",
            )
        if source.suffix in (".onnx", ".plan", ".mnn"):
            raise InputError(
                f"{source}: a model file cannot be trained", hint="--from the run that it was exported from"
            )
        if source.is_file():
            raise InputError(
                f"{source}: a file, and --from takes a run",
                hint=f"ddpmx import {shlex.quote(str(source))} -o runs/imported makes one of another project's checkpoint",
            )
        with busy(f"reading {source}"):
            _, spec = checkpoint.load_network(source)
        c, height, width = spec.shape
        # a preset's rate is for a network that knows nothing: without a name the paper's is taken
        preset = self.preset or "cifar10"
        with as_flags():
            chosen = api.choices(self.data, self.how["device"], preset, self.config, {"size": None, **self.options})
        if are_files(self.data):
            whole = (height, width) if chosen.crop is None else chosen.size
            chosen = dataclasses.replace(chosen, size=self.options.get("size", whole), channels=chosen.channels or c)
        chosen = dataclasses.replace(chosen, classes=spec.classes is not None)
        dataset = load(self.data, chosen, self.reading)
        if chosen.crop is None and dataset.shape != spec.shape:
            raise InputError(
                f"{self.data}: images of {dataset.shape[1]}×{dataset.shape[2]}×{dataset.shape[0]}",
                note=f"the network of {source} takes {height}×{width}×{c}",
                hint="a folder is brought to that by itself, without --size and --channels",
            )
        with as_flags(), memory():
            settings = chosen.settings()
            if not spec.null_class:
                settings = dataclasses.replace(settings, label_dropout=0.0)
            trainer = Trainer.fine_tune(
                self.out,
                dataset,
                source,
                settings,
                weights="raw" if weights == "raw" else "ema",
                dropout=self.given.get("dropout"),
                **self.how,
            )
        return trainer, chosen.steps


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
    """Those of TensorBoard and Weights & Biases that were asked for."""
    from ddpm_export.training import watch

    found: list[Tracker] = []
    if tensorboard:
        found.append(watch.TensorBoard(out))
    if wandb:
        found.append(watch.WeightsAndBiases(out, dataclasses.asdict(trainer.settings)))
    return found


def with_trackers(house: Housekeeping, trackers: Sequence[Tracker]) -> Housekeeping:
    """The same with trackers."""
    return dataclasses.replace(house, trackers=trackers)


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
