"""`ddpmx interpolate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, cast

from typer import Argument, Option

from ddpmx.diffusion.grids import SPACINGS, Spacing
from ddpmx.diffusion.samplers import SAMPLERS, Sampler
from ddpmx.errors import InputError
from ddpmx_cli import flags
from ddpmx_cli.console import counting, parse_numbers, say
from ddpmx_cli.opened import Where, conditions_of, opens_model

EXAMPLES = """
Examples:\n
  ddpmx interpolate model.onnx a.png b.png -o between.png\n
  ddpmx interpolate model.onnx a.png b.png -o rows.png --t 125,250,500   # a row for each, as in the paper's Figure 9\n
  ddpmx interpolate model.onnx a.png b.png -o between/ --lambdas 30      # each a picture of its own\n
"""


@opens_model
def interpolate(
    file: flags.Model,
    a: Annotated[Path, Argument(help="A picture of the model's size.")],
    b: Annotated[Path, Argument(help="Another one.")],
    out: Annotated[
        Path,
        Option(
            "-o", "--out", help="FILE.png for one sheet, with A and B at its ends; or a folder.", show_default=False
        ),
    ],
    t: Annotated[
        str | None,
        Option(
            "--t",
            help="The timesteps at which they are mixed, a row of the sheet for each; -1 mixes the pictures themselves."
            "  \\[default: the middle]",
            metavar="T,…",
        ),
    ] = None,
    lambdas: Annotated[int, Option(help="How many pictures from A to B.", metavar="N")] = 9,
    steps: Annotated[int | None, Option(help="Use only this many of the T timesteps.  \\[default: all]")] = None,
    sampler: Annotated[
        str | None,
        Option(help=f"{', '.join(SAMPLERS)}.  \\[default: ancestral; unipc for few steps]", metavar="NAME"),
    ] = None,
    spacing: Annotated[
        str | None, Option(help=f"Spacing of the timesteps: {', '.join(SPACINGS)}.", metavar="NAME")
    ] = None,
    seed: flags.Seed = 0,
    label: flags.Label = None,
    guidance: flags.Guidance = 1.0,
    cond: Annotated[
        Path | None,
        Option(
            help="The condition of all pictures: one picture, or an .npz with cond float32 \\[1, K, H, W].",
            metavar="PICTURE|FILE",
        ),
    ] = None,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """Draw the pictures between two: both noised to t, mixed there, and denoised."""
    from ddpmx.images import gallery, pictures, writers
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.sampling.request import Sampling
    from ddpmx.tasks import interpolate as task

    path = shipped.find(file)
    with where.open(path) as pipeline:
        channels, height, width = pipeline.spec.shape
        ends = [pictures.read_picture(end, channels, size=(height, width)) for end in (a, b)]
        times = [pipeline.spec.timesteps // 2] if t is None else list(parse_numbers("--t", t))
        if not times:
            raise InputError("--t names no timestep", hint="without --t it is the middle")
        sheet = gallery.is_picture(out)
        if not sheet and len(times) > 1:
            raise InputError(f"{out} is a folder, and there are {len(times)} rows", hint="-o FILE.png, or one --t")
        names = [out.name] if sheet else [f"{index:05d}" for index in range(lambdas)]
        targets = pictures.targets(out, names, whole_folder=False)
        pictures.check_replaceable(out, targets, [a, b], overwrite=overwrite)
        sampling = Sampling.chosen(
            pipeline.spec.timesteps,
            sampler=cast("Sampler | None", sampler),
            steps=steps,
            spacing=cast("Spacing | None", spacing),
        )
        conditions, conditioned_by = conditions_of(pipeline.spec, cond)
        if conditioned_by and len(conditioned_by) > 1:
            raise InputError(
                f"{cond} holds {len(conditioned_by)} conditions, and the pictures between two have one",
                hint="--cond PICTURE",
            )
        begun, rows = time.monotonic(), []
        for number, at in enumerate(times):
            row = f", row {number + 1} of {len(times)}" if len(times) > 1 else ""
            with counting(f"{lambdas} pictures{row}", unit="steps") as progress:
                rows.append(
                    task.interpolate(
                        pipeline,
                        ends[0].pixels,
                        ends[1].pixels,
                        at,
                        lambdas,
                        sampling=sampling,
                        seed=seed,
                        batch=batch,
                        labels=label,
                        cond=conditions,
                        guidance=guidance,
                        progress=progress,
                    )
                )
        if sheet:
            shown = [each for row in rows for each in (ends[0].pixels, *row.pixels, ends[1].pixels)]
            made = [writers.sheet(shown, columns=lambdas + 2)]
        else:
            made = list(rows[0].pixels)
        words = {"of": f"{ends[0].name}, {ends[1].name}", "t": ",".join(str(row.t) for row in rows), "seed": seed}
        words |= {
            "precision": pipeline.spec.precision,
            "sampler": sampling.sampler,
            "steps": len(pipeline.table(sampling)),
            "lambdas": lambdas,
        }
        words |= {"cond": conditioned_by[0]} if conditioned_by else {}
        for at, done in zip(times, rows, strict=True):
            if done.t != at:
                say(
                    f"Note: t = {at} is not among the chain's {words['steps']} timesteps; mixed at {done.t}, the nearest"
                )
        text = pictures.text("interpolate", model=model_hash(pipeline.spec, path), **words)
        pictures.save_pictures(targets, made, [text] * len(made))
        say(
            f"{lambdas * len(rows)} pictures between {ends[0].name} and {ends[1].name}, mixed at t = {words['t']}, "
            f"{words['steps']} steps of {words['sampler']}, seed {seed}, "
            f"in {time.monotonic() - begun:.1f} s on {pipeline.backend}"
        )
    say(f"{targets[0]}" + (f" … {targets[-1].name}" if len(targets) > 1 else ""))
