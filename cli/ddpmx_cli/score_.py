"""`ddpmx score`: the model as a score, by the reverse SDE and the probability-flow ODE."""

from __future__ import annotations

import json
import math
import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer
from numpy.typing import NDArray
from typer import Argument, Option

from ddpmx.diffusion.grids import SPACINGS
from ddpmx.errors import InputError
from ddpmx_cli import flags
from ddpmx_cli.console import counted, counting, plain, say
from ddpmx_cli.data import read_data
from ddpmx_cli.opened import Where, opens_model
from ddpmx_cli.paths import PathCommand

if TYPE_CHECKING:
    from ddpmx.diffusion.grids import Spacing
    from ddpmx.pipeline import Pipeline
    from ddpmx.tasks.flow import Divergence

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_DRAW = """
Examples:\n
  ddpmx score draw model.onnx -n 16 -o drawn/                    # Euler-Maruyama\n
  ddpmx score draw model.onnx -n 16 -o drawn/ --corrections 1    # predictor-corrector\n
  ddpmx score draw model.onnx -n 16 -o drawn/ --ode\n
"""
_ENCODE = """
Examples:\n
  ddpmx score encode model.onnx photos/ -o noise.npz\n
  ddpmx score encode model.onnx photo.png -o noise.npz --ddim 50\n
"""
_DECODE = """
Examples:\n
  ddpmx score decode model.onnx noise.npz -o again/\n
"""
_NLL = """
Examples:\n
  ddpmx score nll model.onnx photos/ --images 16\n
"""

Tolerance = Annotated[
    float, Option(help="Relative and absolute, of the ODE: 1e-7 … 0.1. Smaller ones take more calls of the network.")
]


@app.callback()
def _score() -> None:
    """The model as a score: draw by its SDE or ODE, images to noise and back, log p."""


@app.command(cls=PathCommand, epilog=_DRAW)
@opens_model
def draw(
    file: flags.Model,
    out: flags.Out,
    n: Annotated[int, Option("-n", help="How many images.")] = 16,
    steps: Annotated[int | None, Option(help="Timesteps of the SDE that are visited.  \\[default: all T]")] = None,
    corrections: Annotated[int, Option(help="Langevin steps after each step of the SDE.", metavar="K")] = 0,
    ratio: Annotated[float, Option(help="Of signal to noise in them.")] = 0.16,
    ode: Annotated[bool, Option("--ode", help="Follow the ODE in place of the SDE, from the same x_T.")] = False,
    tolerance: Tolerance = 1e-4,
    seed: flags.Seed = 0,
    first: flags.First = 0,
    label: flags.Label = None,
    guidance: flags.Guidance = 1.0,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """Draw images by the reverse SDE, with or without a corrector, or by the ODE."""
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import flow, score

    if ode and (steps is not None or corrections):
        raise InputError("--steps and --corrections are of the SDE, and --ode has neither", hint="--tolerance")
    path = shipped.find(file)
    with where.open(path) as pipeline:
        pipeline.check_request(n, seed=seed, first=first, batch=batch, labels=label, guidance=guidance)
        targets = pictures.targets(out, [f"{first + i:05}.png" for i in range(n)], whole_folder=n > 1)
        pictures.check_replaceable(out, targets, [], overwrite=overwrite)
        how: dict[str, Any] = {"seed": seed, "first": first, "batch": batch, "labels": label, "guidance": guidance}
        begun = time.monotonic()
        with counting(counted(n, "image"), unit="images" if ode else "steps") as progress:
            if ode:
                images = flow.sample(pipeline, n, tolerance=tolerance, progress=progress, **how)
            else:
                images = score.sde(
                    pipeline, n, steps=steps, corrections=corrections, ratio=ratio, progress=progress, **how
                )
        name = "ode" if ode else "pc" if corrections else "sde"
        model = model_hash(pipeline.spec, path)
        by: dict[str, object] = {"tolerance": f"{tolerance:g}"}
        if not ode:
            by = {"steps": pipeline.spec.timesteps if steps is None else steps}
            by |= {"corrections": corrections, "ratio": f"{ratio:g}"} if corrections else {}
        by |= {"precision": pipeline.spec.precision} | ({"label": label} if label is not None else {})
        by |= {"guidance": f"{guidance:g}"} if guidance != 1 else {}
        texts = [pictures.text(f"score draw, {name}", model=model, seed=seed, index=first + i, **by) for i in range(n)]
        pictures.save_pictures(targets, list(images), texts)
        say(f"{counted(n, 'image')} by {name} in {time.monotonic() - begun:.1f} s on {pipeline.backend}")
    _say_written(targets)


@app.command(cls=PathCommand, epilog=_ENCODE)
@opens_model
def encode(
    file: flags.Model,
    images: Annotated[Path, Argument(help="A picture of the model's size, or a folder of them.", metavar="IN")],
    out: Annotated[Path, Option("-o", "--out", help="noise.npz, for `ddpmx score decode`.", show_default=False)],
    ddim: Annotated[
        int | None, Option(help="Go back along the ddim chain of so many steps, in place of the ODE.", metavar="STEPS")
    ] = None,
    spacing: Annotated[str, Option(help=f"Its timesteps: {', '.join(SPACINGS)}.", metavar="NAME")] = "linspace",
    iterations: Annotated[int, Option(help="Calls of the network in each of its steps.", metavar="K")] = 3,
    tolerance: Tolerance = 1e-4,
    label: flags.Label = None,
    batch: flags.Batch = None,
    *,
    where: Where,
) -> None:
    """From images to the noise that they are made of."""
    from ddpmx.formats import noise_file
    from ddpmx.formats.noise_file import Noise
    from ddpmx.formats.output_file import check_output, is_npz_of
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import flow
    from ddpmx.tasks.invert import invert

    if out.suffix.lower() != ".npz":
        raise InputError(
            f"{out}: not a name for the noise of images", hint=f"-o {shlex.quote(str(out.with_suffix('.npz')))}"
        )
    is_ours = partial(is_npz_of, form=noise_file.FORMAT)
    check_output(out, [], what="the noise of images", suffix=".npz", is_ours=is_ours)
    path = shipped.find(file)
    with where.open(path) as pipeline:
        c, height, width = pipeline.spec.shape
        found = pictures.read_pictures(images, c, size=(height, width))
        pixels = np.stack([picture.pixels for picture in found])
        begun = time.monotonic()
        with counting(counted(len(found), "picture"), unit="images" if ddim is None else "network calls") as progress:
            if ddim is None:
                x = flow.encode(pipeline, pixels, tolerance=tolerance, batch=batch, labels=label, progress=progress).x
            else:
                x = invert(
                    pipeline,
                    pixels,
                    steps=ddim,
                    spacing=cast("Spacing", spacing),
                    iterations=iterations,
                    batch=batch,
                    labels=label,
                    progress=progress,
                )
        Noise(
            x,
            tuple(f"{Path(picture.name).stem}.png" for picture in found),
            model_hash(pipeline.spec, path),
            "ode" if ddim is None else "ddim",
            ddim or 0,
            "" if ddim is None else spacing,
            label or "",
        ).save(out)
        rms = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
        say(
            f"{counted(len(found), 'picture')} in {time.monotonic() - begun:.1f} s on {pipeline.backend}; "
            f"RMS of x_T {rms:.3f}"
        )
    say(str(out))


@app.command(cls=PathCommand, epilog=_DECODE)
@opens_model
def decode(
    file: flags.Model,
    noise: Annotated[Path, Argument(help="What `ddpmx score encode` wrote.", metavar="noise.npz")],
    out: flags.Out,
    tolerance: Tolerance = 1e-4,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """From noise back to the images, by the way that the noise was found."""
    from ddpmx.formats.noise_file import Noise
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import flow

    path, read = shipped.find(file), Noise.load(noise)
    with where.open(path) as pipeline:
        model = model_hash(pipeline.spec, path)
        if read.model != model:
            raise InputError(
                f"{noise} is of another model", note=f"{read.model[:12]} in the file, and {file} is {model[:12]}"
            )
        targets = pictures.targets(out, list(read.names), whole_folder=len(read.names) > 1)
        pictures.check_replaceable(out, targets, [noise], overwrite=overwrite)
        label, begun = read.label or None, time.monotonic()
        with counting(counted(len(read.x), "picture")) as progress:
            if read.by == "ode":
                images = flow.decode(
                    pipeline, read.x, tolerance=tolerance, batch=batch, labels=label, progress=progress
                )
            else:
                images = pipeline.generate(
                    len(read.x),
                    x=read.x,
                    steps=read.steps,
                    spacing=cast("Spacing", read.spacing),
                    sampler="ddim",
                    batch=batch,
                    labels=label,
                    progress=progress,
                )
        texts = [pictures.text(f"score decode, {read.by}", model=model, of=name) for name in read.names]
        pictures.save_pictures(targets, list(images), texts)
        say(f"{counted(len(read.x), 'picture')} by {read.by} in {time.monotonic() - begun:.1f} s on {pipeline.backend}")
    _say_written(targets)


@app.command(cls=PathCommand, epilog=_NLL)
@opens_model
def nll(
    file: flags.Model,
    data: Annotated[Path, Argument(help="The images: a folder, an .npz or .npy, or .tar shards.")],
    images: Annotated[
        int | None, Option(help="Only so many, spread evenly over the data.  \\[default: all]", metavar="N")
    ] = None,
    tolerance: Tolerance = 1e-4,
    seed: Annotated[int, Option(help="Of the probes, 0 … 2**64 − 1.")] = 0,
    label: flags.Label = None,
    no_labels: Annotated[
        bool, Option("--no-labels", help="Leave labels out, for a model that was also trained without classes.")
    ] = False,
    resize: Annotated[
        bool, Option("--resize", help="Bring image files to the model's size and channels, as ddpmx train does.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
    batch: flags.Batch = None,
    *,
    where: Where,
) -> None:
    """An estimate of log p of images by the ODE, in bits per dimension; `ddpmx eval nll` has the bound."""
    from ddpmx.models import shipped
    from ddpmx.tasks import flow

    path = shipped.find(file)
    with where.open(path) as pipeline:
        with counting("reading images") as progress:
            read = read_data(
                data,
                pipeline.spec,
                count=images,
                resize=resize,
                label=label,
                no_labels=no_labels,
                progress=progress,
            )
        n = len(read.images)
        with counting(counted(n, "image"), unit="images") as progress:
            found = flow.encode(
                pipeline,
                read.images,
                likelihood=True,
                divergence=_divergence(pipeline, read.labels),
                tolerance=tolerance,
                seed=seed,
                batch=batch,
                labels=read.labels,
                progress=progress,
            )
        bits = found.bits_per_dim
        error = float(bits.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        ran_on = pipeline.backend
    if as_json:
        values = {
            "bits_per_dim": float(bits.mean()),
            "standard_error": None if math.isnan(error) else error,
            "images": bits.tolist(),
            "indices": read.indices.tolist(),
            "network_calls": found.calls,
            "runs_on": ran_on,
        }
        say(json.dumps(values, indent=2))
        return
    for note in read.notes:
        say(f"  {plain(note)}")
    about = "" if math.isnan(error) else f" ± {error:.4f}"
    say(f"{file}: {n} of {read.total} images of {data}, {found.calls / n:.0f} network calls each, on {ran_on}")
    say(f"  bits/dim    {bits.mean():.4f}{about}   −log₂ p by the ODE, one probe for each image")


def _divergence(pipeline: Pipeline, labels: NDArray[np.int32] | None) -> Divergence | None:
    """torch's own derivative, where torch runs the model."""
    exact = getattr(pipeline, "divergence", None)
    return None if exact is None else partial(exact, labels=labels)


def _say_written(targets: list[Path]) -> None:
    say(f"{targets[0]}" + (f" … {targets[-1].name}" if len(targets) > 1 else ""))
