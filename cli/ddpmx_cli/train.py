"""`ddpmx train`."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ddpmx.diffusion.samplers import FIXED_VARIANCES, PREDICTIONS
from ddpmx.diffusion.schedule import SCHEDULES
from ddpmx.errors import BackendError, InputError
from ddpmx_cli import signals
from ddpmx_cli.console import busy, counting, duration, parse_numbers, parse_size, progress_bar, say

if TYPE_CHECKING:
    from ddpm_export.training.data import Dataset
    from ddpm_export.training.train import Trainer

EXAMPLES = """
Examples:\n
  ddpmx train --data photos/ --size 32 --out runs/photos\n
  ddpmx train --data digits.npz --steps 3000 --width 32 --groups 8 --mult 1,2,2 --warmup 100 --ema-ramp --lr 1e-3\n
  ddpmx train --out runs/photos --resume --steps 900000
"""

LOG_SECONDS = 30.0
"""Between lines of progress, if standard error is not a terminal."""

_MODEL, _NETWORK, _TRAINING = "Diffusion", "Network", "Training"
# Flags that may be used with --resume; everything else is fixed when a run is started.
_FREE = {"data", "out", "steps", "resume", "device", "threads", "sample_every", "save_minutes"}


def train(
    ctx: typer.Context,
    data: Annotated[Path | None, Option(help="Folder of images (with its subfolders), or an .npz.")] = None,
    out: Annotated[Path | None, Option(help="Folder of the run.  \\[default: runs/NAME-OF-DATA]")] = None,
    steps: Annotated[int, Option(help="Optimiser steps in all.")] = 800_000,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    size: Annotated[
        str | None, Option(help="Crop and resize every image to this size: 64, or 64x48 (height first).")
    ] = None,
    channels: Annotated[int | None, Option(help="Convert every image: 1 grey, 3 RGB, 4 RGBA.")] = None,
    timesteps: Annotated[
        int, Option("--timesteps", "-T", help="Number of timesteps, T.", rich_help_panel=_MODEL)
    ] = 1000,
    schedule: Annotated[
        str, Option(help=f"Noise schedule β_t: {', '.join(SCHEDULES)}.", rich_help_panel=_MODEL, metavar="NAME")
    ] = "linear",
    prediction: Annotated[
        str,
        Option(help=f"What the network predicts: {', '.join(PREDICTIONS)}.", rich_help_panel=_MODEL, metavar="NAME"),
    ] = "eps",
    variance: Annotated[
        str,
        Option(
            help=f"Variance σ² of the reverse step: {', '.join(FIXED_VARIANCES)}.",
            rich_help_panel=_MODEL,
            metavar="NAME",
        ),
    ] = "fixed_large",
    width: Annotated[int, Option(help="Channels of the first level.", rich_help_panel=_NETWORK)] = 128,
    mult: Annotated[
        str, Option(help="Channels of each level, as multiples of --width.", rich_help_panel=_NETWORK)
    ] = "1,2,2,2",
    blocks: Annotated[int, Option(help="Residual blocks per level.", rich_help_panel=_NETWORK)] = 2,
    attention: Annotated[
        str, Option(help="Heights, in pixels, of the levels with attention.", rich_help_panel=_NETWORK)
    ] = "16",
    dropout: Annotated[float, Option(help="Dropout rate.", rich_help_panel=_NETWORK)] = 0.1,
    groups: Annotated[int, Option(help="Groups of each group norm.", rich_help_panel=_NETWORK)] = 32,
    batch: Annotated[int, Option(help="Images per step.", rich_help_panel=_TRAINING)] = 128,
    lr: Annotated[float, Option(help="Learning rate of Adam.", rich_help_panel=_TRAINING)] = 2e-4,
    warmup: Annotated[int, Option(help="Steps until the learning rate is reached.", rich_help_panel=_TRAINING)] = 5000,
    grad_clip: Annotated[float, Option(help="Largest norm of the gradient.", rich_help_panel=_TRAINING)] = 1.0,
    ema: Annotated[float, Option(help="Decay of the averaged weights.", rich_help_panel=_TRAINING)] = 0.9999,
    ema_ramp: Annotated[
        bool,
        Option(
            "--ema-ramp",
            help="Start with a short average: for runs of a few thousand steps.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    flip: Annotated[bool, Option(help="Mirror half of the images.", rich_help_panel=_TRAINING)] = True,
    seed: Annotated[int, Option(help="Seed of everything random.", rich_help_panel=_TRAINING)] = 0,
    bf16: Annotated[bool, Option("--bf16", help="Use bfloat16 autocast.", rich_help_panel=_TRAINING)] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 …  \\[default: a GPU if there is one]")] = None,
    threads: Annotated[int | None, Option(help="CPU threads of torch.")] = None,
    sample_every: Annotated[int, Option(help="Steps between grids of samples; 0 for none.")] = 1000,
    save_minutes: Annotated[float, Option(help="Minutes between checkpoints.")] = 10.0,
) -> None:
    """Train a DDPM on a folder of images or an .npz.

    The defaults are the paper's for CIFAR-10 (Ho, Jain, Abbeel 2020). Ctrl-C saves; --resume continues exactly where the
    run stopped.
    """  # fmt: skip
    try:
        with busy("loading torch"):
            import torch

            from ddpm_export.networks.unet import UNetConfig
            from ddpm_export.training.train import Trainer, TrainSettings
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError("training needs torch", note=str(error), hint="pip install torch safetensors") from error
    from ddpmx.formats.spec import ModelSpec

    if out is None:
        if data is None:
            raise InputError("--data is missing", hint="a folder of images or an .npz; or --out RUN --resume")
        out = Path("runs") / data.resolve().stem
    if threads is not None:
        if not 1 <= threads <= 256:
            raise InputError(f"--threads must be from 1 to 256, not {threads}")
        torch.set_num_threads(threads)
    if not (save_minutes > 0 and sample_every >= 0):
        raise InputError("--save-minutes must be above 0, and --sample-every at least 0")
    device = _check_device(device)
    if resume:
        trainer = _resume(ctx, data, out, device)
    else:
        if data is None:
            raise InputError("--data is missing", hint="a folder of images or an .npz")
        _check_new(out)
        dataset = _load(data, size=parse_size(size), channels=channels)
        c, height, width_ = dataset.shape
        with _as_flags():
            named: dict[str, Any] = {"prediction": prediction, "variance": variance}  # checked by ModelSpec
            model = ModelSpec(dataset.shape, timesteps, schedule, **named)
            network = UNetConfig(
                in_channels=c,
                out_channels=c,
                size=(height, width_),
                channels=width,
                multipliers=parse_numbers("--mult", mult),
                blocks=blocks,
                attention=parse_numbers("--attention", attention),
                dropout=dropout,
                groups=groups,
            )
            settings = TrainSettings(batch, lr, warmup, grad_clip, ema, ema_ramp, flip, seed, bf16)
        with _memory():
            trainer = Trainer(out, dataset, model, network, settings, device=device)
    with _memory():
        _train(trainer, steps, sample_every, save_minutes * 60)


@contextlib.contextmanager
def _as_flags() -> Iterator[None]:
    """Replace the names of settings by those of their flags in error messages."""
    names = {"channels": "--width", "multipliers": "--mult", "grad_clip": "--grad-clip"}
    try:
        yield
    except InputError as error:
        name, _, rest = error.fact.partition(" must be ")
        if rest and name.isidentifier() and name != "T":
            error = InputError(f"{names.get(name, '--' + name)} must be {rest}", note=error.note, hint=error.hint)
        raise error from None


@contextlib.contextmanager
def _memory() -> Iterator[None]:
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


def _train(trainer: Trainer, steps: int, sample_every: int, save_seconds: float) -> None:
    from ddpm_export.training.train import Progress

    parameters = sum(p.numel() for p in trainer.network.parameters())
    c, height, width = trainer.spec.shape
    say(
        f"{trainer.run}: {parameters:,} parameters, {len(trainer.dataset):,} images of {height}×{width}×{c}, "
        f"steps {trainer.step:,} → {steps:,} on {trainer.device}"
    )
    last: Progress | None = None
    logged = time.monotonic()
    with signals.held() as stopped, progress_bar("{task.fields[figures]}", unit="steps", remaining=False) as display:
        task = display.add_task("training", total=steps, figures="")

        def show(state: Progress) -> None:
            nonlocal last, logged
            last = state
            figures = f"loss {state.loss:.4f} · {state.images_per_second:,.0f} images/s"
            left = f"{duration(state.seconds_left)} left"  # rich would count the time of sample grids as slow steps
            display.update(task, completed=state.step, figures=f"{figures} · {left}")
            if display.disable and time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                say(f"step {state.step:,} of {state.steps:,}: {figures}, {left}")

        checkpoint = trainer.train(
            steps, progress=show, stop=stopped, sample_every=sample_every, save_seconds=save_seconds
        )
    if last is not None:
        say(f"step {last.step:,}: loss {last.loss:.4f}, {last.images_per_second:,.0f} images/s")
    say(f"saved {checkpoint}")
    if stopped() and trainer.step < steps:
        say(f"stopped; continue with: ddpmx train --out {shlex.quote(str(trainer.run))} --resume --steps {steps}")
        raise typer.Exit(130)  # or 143: the signal is remembered
    say(f"next: ddpmx export {shlex.quote(str(trainer.run))} -o model.onnx")


def _load(data: Path, **how: Any) -> Dataset:
    from ddpm_export.training.data import load_dataset

    with counting("reading images") as progress:
        return load_dataset(data, **how, progress=progress)


def _check_new(out: Path) -> None:
    from ddpmx.formats import model_file

    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out}: is a file, and a run is a folder", hint="another --out")
    if model_file.checkpoints(out):
        raise InputError(f"{out} already holds a run", hint="--resume continues it; another --out starts a new one")


def _resume(ctx: typer.Context, data: Path | None, out: Path, device: str | None) -> Trainer:
    from ddpm_export.training.train import Trainer, recorded_source

    flags = [
        f"--{name.replace('_', '-')}"
        for name in ctx.params
        if name not in _FREE and (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if flags:
        raise InputError(
            f"{' and '.join(flags)} cannot be changed when a run is resumed",
            note=f"{out} keeps the settings that it was started with",
            hint="omit it, or start a new run",
        )
    recorded = recorded_source(out)
    dataset = _load(data or recorded.path, size=recorded.size, channels=recorded.channels)
    return Trainer.resume(out, dataset, device=device)


def _check_device(device: str | None) -> str | None:
    import torch

    if device is None:
        return None
    try:
        (torch.zeros(1, device=device) + 1).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError or its own, by device
        raise InputError(f"--device {device!r} cannot be used", note=str(error).splitlines()[0][:200]) from error
    return device
