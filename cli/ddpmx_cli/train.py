"""`ddpmx train`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ddpmx.diffusion.samplers import PREDICTIONS, VARIANCES
from ddpmx.diffusion.schedule import SCHEDULES
from ddpmx.errors import BackendError, InputError
from ddpmx.formats import model_file
from ddpmx_cli import begin, console, signals
from ddpmx_cli.console import busy, duration, parse_numbers, parse_size, plain, progress_bar, say

if TYPE_CHECKING:
    from ddpm_export.training.session import Housekeeping
    from ddpm_export.training.train import Trainer

EXAMPLES = """
Examples:\n
  ddpmx train photos/\n
  ddpmx train photos/ --preset small --size 64 --out runs/photos --dry-run\n
  ddpmx train sorted/ --classes --preset tiny --steps 5000\n
  ddpmx train --out runs/photos --resume --steps 900000\n
  ddpmx train photos/ --from runs/imported --out runs/tuned --steps 20000 --lr 2e-5 --warmup 500\n
  torchrun --nproc-per-node 4 -m ddpmx_cli.main train photos/ --preset 256
"""

_DATA, _MODEL, _NETWORK, _TRAINING = "Images", "Diffusion", "Network", "Training"
_RUN, _WATCH = "This session", "Watching"


def _choice(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    """A flag whose default is the preset's."""
    return Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


def train(
    ctx: typer.Context,
    images: Annotated[
        Path | None,
        Argument(help="Folder of images (with its subfolders), .npz, .npy, or tar shards.", show_default=False),
    ] = None,
    data: Annotated[Path | None, Option(help="The same as IMAGES.", show_default=False)] = None,
    out: Annotated[Path | None, Option(help="Folder of the run.  \\[default: runs/NAME-OF-DATA]")] = None,
    preset: Annotated[
        str | None,
        Option(
            help="tiny, small, cifar10 or 256: network, batch, rate and steps; other flags win.  "
            "\\[default: cifar10 on a GPU, else tiny]",
            metavar="NAME",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Option(help="TOML file with flags as keys; flags given here win. A run's own is RUN/config.toml."),
    ] = None,
    steps: Annotated[int | None, Option(help="Optimiser steps in all.  \\[default: by preset]")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    begin_from: Annotated[
        Path | None,
        Option(
            "--from",
            help="Begin a new run with the weights, the network and the schedule of this one, trained or imported.",
            metavar="RUN",
        ),
    ] = None,
    weights: Annotated[str, Option(help="Which weights of --from: ema (averaged) or raw.", metavar="NAME")] = "ema",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what the training takes (memory, time, arithmetic), and end.")
    ] = False,
    size: Annotated[
        str | None,
        _choice(
            _DATA, "Crop and resize every image to this size: 64, or 64x48 (height first).  \\[default: by preset]"
        ),
    ] = None,
    channels: Annotated[int | None, _choice(_DATA, "Convert every image: 1 grey, 3 RGB, 4 RGBA.")] = None,
    background: Annotated[
        str | None,
        _choice(
            _DATA,
            "Colour behind transparent parts, if --channels is 1 or 3: white, black, '#f0f0f0'.  \\[default: white]",
            metavar="COLOUR",
        ),
    ] = None,
    white: Annotated[
        float | None,
        _choice(
            _DATA,
            "The number that is white, in greys of more than 8 bits and in an .npz: 4095, 1, …  "
            "\\[default for 16 bits: full scale of as many bits as are used]",
            metavar="NUMBER",
        ),
    ] = None,
    max_megapixels: Annotated[
        float | None, _choice(_DATA, "Largest image file that is read.  \\[default: 179]", metavar="NUMBER")
    ] = None,
    skip_broken: Annotated[
        bool | None, _choice(_DATA, "Leave out files that cannot be read, and name them.", "--skip-broken")
    ] = None,
    classes: Annotated[
        bool | None,
        _choice(_DATA, "Images have classes: the folders they lie in, or labels in the .npz.", "--classes"),
    ] = None,
    condition: Annotated[
        Path | None,
        _choice(_DATA, "A condition image for each image, with the same name: what is to be restored or enlarged."),
    ] = None,
    crop: Annotated[
        str | None, _choice(_DATA, "Train on random parts of this size: 64, or 64x48.  \\[default: whole images]")
    ] = None,
    flip: Annotated[
        bool | None,
        _choice(
            _DATA,
            "Mirror half of the images: where left and right do not matter, which they do in letters.",
            "--flip/--no-flip",
        ),
    ] = None,
    holdout: Annotated[
        int | None, _choice(_DATA, "Images that are not trained on; the log has their bits/dim.  \\[default: 0]")
    ] = None,
    timesteps: Annotated[
        int | None, _choice(_MODEL, "Number of timesteps, T.  \\[default: 1000]", "--timesteps", "-T")
    ] = None,
    schedule: Annotated[
        str | None,
        _choice(_MODEL, f"Noise schedule β_t: {', '.join(SCHEDULES)}.  \\[default: linear]", metavar="NAME"),
    ] = None,
    scale_betas: Annotated[
        bool | None,
        _choice(_MODEL, "Multiply β by 1000/T, so that x_T is noise with fewer timesteps as well.", "--scale-betas"),
    ] = None,
    prediction: Annotated[
        str | None,
        _choice(_MODEL, f"What the network predicts: {', '.join(PREDICTIONS)}.  \\[default: eps]", metavar="NAME"),
    ] = None,
    variance: Annotated[
        str | None,
        _choice(
            _MODEL, f"Variance σ² of the reverse step: {', '.join(VARIANCES)}.  \\[default: by preset]", metavar="NAME"
        ),
    ] = None,
    loss: Annotated[
        str | None,
        _choice(
            _MODEL,
            "What is minimised: simple (L_simple), vlb (the variational bound), hybrid (both; for a learned variance).  "
            "\\[default: simple]",
            metavar="NAME",
        ),
    ] = None,
    timestep_sampling: Annotated[
        str | None,
        _choice(
            _MODEL, "Which t: uniform, or importance (where the bound is large).  \\[default: uniform]", metavar="NAME"
        ),
    ] = None,
    min_snr: Annotated[
        float | None,
        _choice(_MODEL, "γ of min-SNR weighting: 5 is usual.  \\[default: equal weights]", metavar="NUMBER"),
    ] = None,
    label_dropout: Annotated[
        float | None,
        _choice(
            _MODEL,
            "Share of images trained without their class, for guidance.  \\[default: 0.1 with --classes]",
            metavar="NUMBER",
        ),
    ] = None,
    self_condition: Annotated[
        bool | None, _choice(_MODEL, "The network takes its last x̂₀ as an input as well.", "--self-condition")
    ] = None,
    width: Annotated[int | None, _choice(_NETWORK, "Channels of the first level.  \\[default: by preset]")] = None,
    mult: Annotated[
        str | None, _choice(_NETWORK, "Channels of each level, as multiples of --width.  \\[default: by preset]")
    ] = None,
    blocks: Annotated[int | None, _choice(_NETWORK, "Residual blocks per level.  \\[default: by preset]")] = None,
    attention: Annotated[
        str | None,
        _choice(
            _NETWORK,
            "Heights, in pixels, of the levels with attention; '' for none.  \\[default: the level nearest to 16×16]",
        ),
    ] = None,
    dropout: Annotated[float | None, _choice(_NETWORK, "Dropout rate.  \\[default: by preset]")] = None,
    groups: Annotated[int | None, _choice(_NETWORK, "Groups of each group norm.  \\[default: by preset]")] = None,
    batch: Annotated[int | None, _choice(_TRAINING, "Images per step.  \\[default: by preset]")] = None,
    accumulate: Annotated[
        int | None,
        _choice(_TRAINING, "In how many parts a batch goes through the network: less memory.  \\[default: 1]"),
    ] = None,
    lr: Annotated[float | None, _choice(_TRAINING, "Learning rate of Adam.  \\[default: by preset]")] = None,
    warmup: Annotated[
        int | None, _choice(_TRAINING, "Steps until the learning rate is reached.  \\[default: by preset]")
    ] = None,
    lr_decay: Annotated[
        bool | None,
        _choice(
            _TRAINING,
            "Let the learning rate fall to 0 over the run, by a half cosine.",
            "--lr-decay/--no-lr-decay",
        ),
    ] = None,
    grad_clip: Annotated[float | None, _choice(_TRAINING, "Largest norm of the gradient.  \\[default: 1]")] = None,
    ema: Annotated[float | None, _choice(_TRAINING, "Decay of the averaged weights.  \\[default: by preset]")] = None,
    ema_ramp: Annotated[
        bool | None,
        _choice(
            _TRAINING,
            "Start with a short average: the decay of step s is at most (1 + s)/(10 + s).  \\[default: ema-ramp]",
            "--ema-ramp/--no-ema-ramp",
        ),
    ] = None,
    seed: Annotated[int | None, _choice(_TRAINING, "Seed of everything random.  \\[default: 0]")] = None,
    bf16: Annotated[bool | None, _choice(_TRAINING, "Use bfloat16 autocast.", "--bf16")] = None,
    other_images: Annotated[
        bool,
        Option("--other-images", help="With --resume: go on with other images than before.", rich_help_panel=_RUN),
    ] = False,
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1 …  \\[default: a GPU if there is one]", rich_help_panel=_RUN)
    ] = None,
    threads: Annotated[int | None, Option(help="CPU threads of torch.", rich_help_panel=_RUN)] = None,
    compiled: Annotated[
        bool, Option("--compile", help="Let torch.compile translate the network.", rich_help_panel=_RUN)
    ] = False,
    checkpoint_activations: Annotated[
        bool,
        Option(
            "--checkpoint-activations",
            help="Compute activations twice instead of keeping them: less memory, more time.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    save_minutes: Annotated[float, Option(help="Minutes between checkpoints.", rich_help_panel=_RUN)] = 10.0,
    keep: Annotated[int, Option(help="How many of the newest checkpoints are kept.", rich_help_panel=_RUN)] = 2,
    keep_every: Annotated[
        int, Option(help="Keep a checkpoint at each multiple of so many steps; 0 for none.", rich_help_panel=_RUN)
    ] = 0,
    cache: Annotated[
        bool, Option(help="Keep a folder's pixels in the run, to resume without decoding.", rich_help_panel=_RUN)
    ] = True,
    sample_every: Annotated[
        int, Option(help="Steps between grids of samples; 0 for none.", rich_help_panel=_WATCH)
    ] = 1000,
    log_every: Annotated[int, Option(help="Steps between rows of log.csv.", rich_help_panel=_WATCH)] = 50,
    tensorboard: Annotated[
        bool, Option("--tensorboard", help="Write TensorBoard's events into the run.", rich_help_panel=_WATCH)
    ] = False,
    wandb: Annotated[
        bool, Option("--wandb", help="Send figures and samples to Weights & Biases.", rich_help_panel=_WATCH)
    ] = False,
) -> None:
    """Train a DDPM on a folder of images, an .npz, an .npy or tar shards.

    The presets cifar10 and 256 are the paper's (Ho, Jain, Abbeel 2020), except that images are not mirrored without --flip.
    Ctrl-C saves; --resume continues exactly where the run stopped. Its log.csv has losses by t; ddpmx plot draws them.
    """  # fmt: skip
    from ddpm_export.training import openmp

    openmp.wait_briefly()
    try:
        with busy("loading torch"):
            import torch

            from ddpm_export.training import api
            from ddpm_export.training.config import read_config
            from ddpm_export.training.distributed import joined, restarts
            from ddpm_export.training.images.source import as_pixels, parse_colour
            from ddpm_export.training.session import Housekeeping
            from ddpm_export.training.settings import check_steps
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError("training needs torch", note=str(error), hint="pip install torch safetensors") from error

    if images is not None and data is not None and images != data:
        raise InputError(f"{images} and --data {data}: two sources of images", hint="one of the two")
    given = begin.given(ctx)
    file = {} if config is None else read_config(config)
    data = images or data or (Path(file["data"]) if "data" in file else None)
    if data is None and not (resume and out is not None):
        raise InputError("images are missing", hint="ddpmx train FOLDER (or an .npz); or --out RUN --resume")
    if out is None:
        assert data is not None
        out = Path("runs") / data.resolve().stem
    if threads is not None:
        if not 1 <= threads <= 256:
            raise InputError(f"--threads must be from 1 to 256, not {threads}")
        torch.set_num_threads(threads)
    with begin.as_flags():
        if steps is not None:
            check_steps(steps)
        house = Housekeeping(sample_every, save_minutes, keep, keep_every, log_every, cache)
        reading = {
            "white": white,
            "background": None if background is None else parse_colour(background),
            "max_pixels": None if max_megapixels is None else as_pixels(max_megapixels),
            "condition": condition,
            "skip_broken": skip_broken,
            "keep": out if cache and not dry_run else None,
        }
    options = begin.options(
        given,
        size=None if size is None else parse_size(size),
        crop=None if crop is None else parse_size(crop, "--crop"),
        mult=None if mult is None else parse_numbers("--mult", mult),
        attention=None if attention is None else parse_numbers("--attention", attention),
    )
    stopped = False
    with joined(device) as (processes, own_device):
        how = {
            "device": begin.check_device(own_device),  # not before: each process would take memory of the first GPU
            "processes": processes,
            "compiled": compiled,
            "checkpoint_activations": checkpoint_activations,
        }
        with console.quiet() if not processes.first else contextlib.nullcontext():
            # by torchrun, with the same words
            again = not resume and restarts() > 0 and bool(model_file.checkpoints(out))
            if resume and begin_from is not None:
                raise InputError("--from begins a new run, and --resume continues one", hint="one of the two")
            if resume:
                begin.check_resumable(given, out)
            if resume or again:
                changes = {**({} if again else options), "steps": steps}
                trainer, steps = begin.resume(data, condition, out, changes, other_images, cache, how)
            else:
                if other_images:
                    raise InputError("--other-images has no effect without --resume", hint="omit it")
                if begin_from is None and weights != "ema":
                    raise InputError("--weights has no effect without --from", hint="--from RUN, or omit it")
                assert data is not None
                if not dry_run:
                    api.check_new(out)
                trainer, steps = begin.new(
                    data,
                    out,
                    begin_from,
                    how,
                    preset=preset,
                    file=file,
                    options=options,
                    reading={name: value for name, value in reading.items() if value is not None},
                    weights=weights,
                )
            with begin.memory():
                if dry_run:
                    begin.print_estimate(trainer, steps)
                    return
                trackers = begin.trackers(out, tensorboard, wandb, trainer)
                stopped = _train(trainer, steps, dataclasses.replace(house, trackers=trackers))
    if stopped:  # once the processes have parted
        raise typer.Exit(130)  # or 143: the signal is remembered


def _train(trainer: Trainer, steps: int, house: Housekeeping) -> bool:
    """Train, and say so. Whether a signal has stopped it."""
    from ddpm_export.training import advice
    from ddpm_export.training.session import Progress

    for line in advice.introduce(trainer, steps, cached=house.cache_images):
        say(plain(line))
    if trainer.processes.first:
        say(advice.duration_line(trainer, steps))
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
            if display.disable and time.monotonic() - logged > console.LOG_SECONDS:
                logged = time.monotonic()
                say(f"step {state.step:,} of {state.steps:,}: {figures}, {left}")

        checkpoint = trainer.train(
            steps, progress=show, stop=stopped, message=lambda line: say(f"Note: {plain(line)}"), housekeeping=house
        )
    if last is not None:
        say(f"step {last.step:,}: loss {last.loss:.4f}, {last.images_per_second:,.0f} images/s")
    say(f"saved {checkpoint}")
    raw = ""
    if note := advice.average_note(trainer, trainer.step, "holds"):
        say(note)
        raw = " --weights raw"
    if stopped() and trainer.step < steps:
        say(f"stopped; continue with: ddpmx train --out {shlex.quote(str(trainer.run))} --resume --steps {steps}")
        return True
    say(f"next: ddpmx export {shlex.quote(str(trainer.run))}{raw} -o model.onnx")
    return False
