"""`ddpmx denoise`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx.errors import InputError
from ddpmx_cli import flags
from ddpmx_cli.console import counted, counting, plain, say
from ddpmx_cli.opened import Where, opens_model

EXAMPLES = """
Examples:\n
  ddpmx denoise model.onnx noisy.png -o clean.png --sigma 25\n
  ddpmx denoise model.onnx scans/ -o clean/            # the noise of each is measured\n
  ddpmx denoise model.onnx noisy.png -o drawn.png --sigma 25 --sample\n
"""


@opens_model
def denoise(
    file: flags.Model,
    noisy: Annotated[Path, Argument(help="A picture, or a folder of them. Any size; 8 bits.", metavar="IN")],
    out: flags.Out,
    sigma: Annotated[
        float | None,
        Option(help="Standard deviation of the noise, on the scale of 0…255.", metavar="S"),
    ] = None,
    blind: Annotated[bool, Option("--blind", help="Measure the noise in each picture; so without --sigma.")] = False,
    sample: Annotated[
        bool, Option("--sample", help="Draw what may have been below the noise, in place of the best estimate.")
    ] = False,
    overlap: Annotated[
        int | None,
        Option(
            help="Of tiles, in pixels, where a picture is larger than the network's.  \\[default: a quarter of one]"
        ),
    ] = None,
    seed: flags.Seed = 0,
    label: flags.Label = None,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """Take noise out of pictures, by what the model knows of pictures without it."""
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import denoise as task

    if blind and sigma is not None:
        raise InputError(
            "--sigma and --blind exclude each other", hint="--sigma says how much noise there is, --blind measures it"
        )
    path = shipped.find(file)
    with where.open(path) as pipeline:
        found = pictures.read_pictures(noisy, pipeline.spec.shape[0], widen=False)
        targets = pictures.targets(out, [picture.name for picture in found], whole_folder=noisy.is_dir())
        inputs = [noisy / picture.name for picture in found] if noisy.is_dir() else [noisy]
        pictures.check_replaceable(out, targets, inputs, overwrite=overwrite)
        clean, texts, lines = [], [], []
        begun = time.monotonic()
        with counting(counted(len(found), "picture"), unit="pictures") as progress:
            for number, (name, pixels) in enumerate(found):
                done = task.denoise(
                    pipeline,
                    pixels[None],
                    sigma,
                    sample=sample,
                    seed=seed,
                    first=number,
                    overlap=overlap,
                    batch=batch,
                    labels=label,
                    progress=lambda *_, number=number: progress(number, len(found)),
                )
                clean.append(done.pixels[0])
                value, t = float(done.sigma[0]), int(done.t[0])
                texts.append(
                    pictures.text(
                        "denoise",
                        model=model_hash(pipeline.spec, path),
                        of=name,
                        sigma=f"{value:.4g}",
                        t=t,
                        **({"seed": seed, "index": number} if sample else {}),
                    )
                )
                measured = "" if sigma is not None else " (measured)"
                progress(number + 1, len(found))
                lines.append(f"{plain(name)}: σ = {value:.1f}{measured}, t = {t}")
        for line in lines:
            say(line)
        pictures.save_pictures(targets, clean, texts)
        seconds = time.monotonic() - begun
        how = "drawn" if sample else "estimated"
        say(f"{len(found)} picture{'s' * (len(found) > 1)} {how} in {seconds:.1f} s on {pipeline.backend}")
    say(f"{targets[0]}" + (f" … {targets[-1].name}" if len(targets) > 1 else ""))
