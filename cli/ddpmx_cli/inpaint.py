"""`ddpmx inpaint`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx_cli import flags
from ddpmx_cli.console import counted, counting, say
from ddpmx_cli.opened import Where, conditions_of, opens_model

EXAMPLES = """
Examples:\n
  ddpmx inpaint model.onnx photo.png --mask mask.png -o whole.png\n
  ddpmx inpaint model.onnx photo.png --mask mask.png -o wholes/ -n 8   # eight answers\n
  ddpmx inpaint model.onnx photo.png --mask mask.png -o whole.png --steps 100 --resamplings 5   # faster\n
"""


@opens_model
def inpaint(
    file: flags.Model,
    image: Annotated[Path, Argument(help="A picture of the model's size.")],
    mask: Annotated[
        Path,
        Option(
            help="A picture of the same size: what is white is drawn anew, what is black stays.", show_default=False
        ),
    ],
    out: flags.Out,
    n: Annotated[int, Option("-n", "--count", help="How many answers. More than one need a folder as -o.")] = 1,
    steps: Annotated[
        int | None, Option(help="Use only this many of the T timesteps.  \\[default: 250, or all if that is fewer]")
    ] = None,
    jump: Annotated[int, Option(help="Steps of a way back.")] = 10,
    resamplings: Annotated[
        int, Option(help="How often each stretch is gone down. The network runs about --steps times this.")
    ] = 10,
    seed: flags.Seed = 0,
    first: flags.First = 0,
    label: flags.Label = None,
    guidance: flags.Guidance = 1.0,
    cond: flags.Cond = None,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """Draw a part of a picture anew, so that it goes with the rest."""
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.sampling.request import Sampling
    from ddpmx.tasks import inpaint as task

    path = shipped.find(file)
    with where.open(path) as pipeline:
        channels, *size = pipeline.spec.shape
        name, pixels = pictures.read_picture(image, channels, size=(size[0], size[1]))
        hole = pictures.read_mask(mask, (size[0], size[1]))
        pipeline.check_request(n, seed=seed, first=first, batch=batch, sampling=Sampling(steps=steps))
        conditions, conditioned_by = conditions_of(pipeline.spec, cond, n, first)
        targets = pictures.targets(out, [f"{index:05d}" for index in range(first, first + n)], whole_folder=False)
        pictures.check_replaceable(out, targets, [image, mask], overwrite=overwrite)
        begun = time.monotonic()
        with counting(counted(n, "image"), unit="calls") as progress:
            done = task.inpaint(
                pipeline,
                pixels,
                hole,
                n,
                steps=steps,
                jump=jump,
                resamplings=resamplings,
                seed=seed,
                first=first,
                batch=batch,
                labels=label,
                cond=conditions,
                guidance=guidance,
                progress=progress,
            )
        words = {
            "of": name,
            "mask": mask.name,
            "seed": seed,
            "steps": min(task.STEPS, pipeline.spec.timesteps) if steps is None else steps,
        }
        words |= {"jump": jump, "resamplings": resamplings, "label": label, "guidance": f"{guidance:g}"}
        words |= {"precision": pipeline.spec.precision}
        kept = {keyword: word for keyword, word in words.items() if word is not None}
        model = model_hash(pipeline.spec, path)
        conditioned = [{"cond": each} for each in conditioned_by] if conditioned_by else [{}] * n
        texts = [
            pictures.text("inpaint", model=model, index=index, **kept, **each)
            for index, each in zip(range(first, first + n), conditioned, strict=True)
        ]
        pictures.save_pictures(targets, list(done.pixels), texts)
        say(
            f"{counted(n, 'image')}, {hole.mean():.0%} drawn anew, {words['steps']} steps, jump {jump}, "
            f"{resamplings} resamplings, seed {seed}, in {time.monotonic() - begun:.1f} s "
            f"on {pipeline.backend}"
        )
    say(f"{targets[0]}" + (f" … {targets[-1].name}" if n > 1 else ""))
