"""`ddpmx train`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ddpmx.diffusion.samplers import FIXED_VARIANCES, PREDICTIONS
from ddpmx.diffusion.schedule import SCHEDULES, scaled_params
from ddpmx.errors import BackendError, InputError
from ddpmx_cli import begin, console, signals
from ddpmx_cli.console import busy, duration, parse_colour, parse_numbers, parse_size, plain, progress_bar, say

if TYPE_CHECKING:
    from ddpm_export.training.train import Trainer

EXAMPLES = """
Examples:\n
  ddpmx train --data photos/ --size 32 --out runs/photos\n
  ddpmx train --data digits.npz --steps 3000 --width 32 --groups 8 --mult 1,2,2 --warmup 100 --lr 1e-3\n
  ddpmx train --out runs/photos --resume --steps 900000\n
  ddpmx train --data photos/ --from runs/imported --out runs/tuned --steps 20000 --lr 2e-5 --warmup 500
"""

_MODEL, _NETWORK, _TRAINING = "Diffusion", "Network", "Training"


def train(
    ctx: typer.Context,
    data: Annotated[
        Path | None, Option(help="Folder of images (with its subfolders), an .npz or .npy, or .tar shards.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder of the run.  \\[default: runs/NAME-OF-DATA]")] = None,
    steps: Annotated[int, Option(help="Optimiser steps in all.")] = 800_000,
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
    size: Annotated[
        str | None, Option(help="Crop and resize every image to this size: 64, or 64x48 (height first).")
    ] = None,
    channels: Annotated[int | None, Option(help="Convert every image: 1 grey, 3 RGB, 4 RGBA.")] = None,
    background: Annotated[
        str | None,
        Option(
            help="Colour behind transparent parts, if --channels is 1 or 3: white, black, '#f0f0f0'.  "
            "\\[default: white]",
            metavar="COLOUR",
        ),
    ] = None,
    white: Annotated[
        float | None,
        Option(
            help="The number that is white, in greys of more than 8 bits and in an .npz: 4095, 1, …  "
            "\\[default for 16 bits: full scale of as many bits as are used]",
            metavar="NUMBER",
        ),
    ] = None,
    max_megapixels: Annotated[
        float | None, Option(help="Largest image file that is read.  \\[default: 179]", metavar="NUMBER")
    ] = None,
    timesteps: Annotated[
        int, Option("--timesteps", "-T", help="Number of timesteps, T.", rich_help_panel=_MODEL)
    ] = 1000,
    schedule: Annotated[
        str, Option(help=f"Noise schedule β_t: {', '.join(SCHEDULES)}.", rich_help_panel=_MODEL, metavar="NAME")
    ] = "linear",
    scale_betas: Annotated[
        bool,
        Option(
            "--scale-betas",
            help="Multiply β by 1000/T, so that x_T is noise with fewer timesteps as well.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
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
        str | None,
        Option(
            help="Heights, in pixels, of the levels with attention; '' for none.  \\[default: the level nearest to 16×16]",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
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
            help="Start with a short average: the decay of step s is at most (1 + s)/(10 + s).",
            rich_help_panel=_TRAINING,
        ),
    ] = True,
    flip: Annotated[
        bool,
        Option(
            help="Mirror half of the images: where left and right do not matter, which they do in letters.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    seed: Annotated[int, Option(help="Seed of everything random.", rich_help_panel=_TRAINING)] = 0,
    bf16: Annotated[bool, Option("--bf16", help="Use bfloat16 autocast.", rich_help_panel=_TRAINING)] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 …  \\[default: a GPU if there is one]")] = None,
    threads: Annotated[int | None, Option(help="CPU threads of torch.")] = None,
    sample_every: Annotated[int, Option(help="Steps between grids of samples; 0 for none.")] = 1000,
    save_minutes: Annotated[float, Option(help="Minutes between checkpoints.")] = 10.0,
    cache: Annotated[bool, Option(help="Keep a folder's pixels in the run, to resume without decoding.")] = True,
    skip_broken: Annotated[
        bool, Option("--skip-broken", help="Leave out files that cannot be read, and name them.")
    ] = False,
) -> None:
    """Train a DDPM on a folder of images or an .npz.

    The defaults are the paper's for CIFAR-10 (Ho, Jain, Abbeel 2020), except that images are not mirrored without --flip.
    Ctrl-C saves; --resume continues exactly where the run stopped.
    """  # fmt: skip
    try:
        with busy("loading torch"):
            import torch

            from ddpm_export.networks.unet_config import UNetConfig, attention_heights
            from ddpm_export.training.settings import check_steps
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
    with begin.as_flags():
        check_steps(steps)
    if not save_minutes > 0:
        raise InputError(f"--save-minutes must be above 0, not {save_minutes:g}")
    if sample_every < 0:
        raise InputError(f"--sample-every must be at least 0, not {sample_every}", hint="0 draws no grids")
    device = _check_device(device)
    if resume:
        if begin_from is not None:
            raise InputError("--from begins a new run, and --resume continues one", hint="one of the two")
        trainer = begin.resume(ctx, data, out, device)
    else:
        if data is None:
            raise InputError("--data is missing", hint="a folder of images or an .npz")
        begin.check_new(out)
        how: dict[str, Any] = {"size": parse_size(size), "channels": channels, "white": white}
        how["background"] = None if background is None else parse_colour("--background", background)
        how |= {"skip_broken": skip_broken, "keep": out if cache else None}
        how["max_pixels"] = None if max_megapixels is None else begin.pixels(max_megapixels)
        if begin_from is None and weights != "ema":
            raise InputError("--weights has no effect without --from", hint="--from RUN, or omit it")
        with begin.as_flags():
            settings = TrainSettings(batch, lr, warmup, grad_clip, ema, ema_ramp, flip, seed, bf16)
        if begin_from is None:
            dataset = begin.load(data, **how)
            with begin.as_flags():
                named: dict[str, Any] = {"prediction": prediction, "variance": variance}  # checked by ModelSpec
                params = scaled_params(schedule, timesteps) if scale_betas else {}
                model = ModelSpec(dataset.shape, timesteps, schedule, params, **named)
                c, *sides = dataset.shape
                multipliers = parse_numbers("--mult", mult)
                network = UNetConfig(
                    in_channels=c,
                    out_channels=c,
                    size=(sides[0], sides[1]),
                    channels=width,
                    multipliers=multipliers,
                    blocks=blocks,
                    attention=attention_heights((sides[0], sides[1]), len(multipliers))
                    if attention is None
                    else parse_numbers("--attention", attention),
                    dropout=dropout,
                    groups=groups,
                )
                network.check_attention()
            with begin.memory():
                trainer = Trainer(out, dataset, model, network, settings, device=device)
        else:
            trainer = begin.fine_tune(ctx, data, how, begin_from, weights, out, settings, dropout, device)
    with begin.memory():
        _train(trainer, steps, sample_every, save_minutes * 60, cache)


def _train(trainer: Trainer, steps: int, sample_every: int, save_seconds: float, cache: bool) -> None:
    from ddpm_export.training import advice
    from ddpm_export.training.train import Progress

    for line in advice.introduce(trainer, steps, cached=cache):
        say(plain(line))
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
            steps,
            progress=show,
            stop=stopped,
            sample_every=sample_every,
            save_seconds=save_seconds,
            cache_images=cache,
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
        raise typer.Exit(130)  # or 143: the signal is remembered
    say(f"next: ddpmx export {shlex.quote(str(trainer.run))}{raw} -o model.onnx")


def _check_device(device: str | None) -> str | None:
    import torch

    if device is None:
        return None
    try:
        (torch.zeros(1, device=device) + 1).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError or its own, by device
        raise InputError(f"--device {device!r} cannot be used", note=str(error).splitlines()[0][:200]) from error
    return device
