"""`ddpmx compress`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx_cli import flags
from ddpmx_cli.console import counted, counting, say
from ddpmx_cli.opened import Where, opens_model

EXAMPLES = """
Examples:\n
  ddpmx compress photo.png -o photo.ddpm --model model.onnx\n
  ddpmx compress photos/ -o photos.ddpm --model model.onnx --rate 0.5   # bits per dimension\n
  ddpmx compress photos/ -o photos.ddpm --model model.onnx --rmse 4     # levels of 0…255\n
  ddpmx compress photos/ -o photos.ddpm --model model.onnx --lossless\n
"""


@opens_model
def compress(
    images: Annotated[
        list[Path], Argument(help="Pictures of the model's size, or a folder of them.", metavar="IMAGE…")
    ],
    out: Annotated[Path, Option("-o", "--out", help="The file, x.ddpm.", show_default=False)],
    model: Annotated[
        str,
        Option(
            help="A model that comes along, a model.onnx, model.plan or model.mnn, or a run.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    rate: Annotated[
        float | None,
        Option(help="Bits per dimension, about.  \\[default: 1; of a lossless file what makes it smallest]"),
    ] = None,
    rmse: Annotated[
        float | None, Option(help="As many bits as this error needs, in levels of 0…255.", metavar="LEVELS")
    ] = None,
    stop: Annotated[int | None, Option(help="Send the states of the chain down to this t.", metavar="T")] = None,
    lossless: Annotated[bool, Option("--lossless", help="Send what is left of the images too.")] = False,
    steps: Annotated[
        int,
        Option(
            help="About how many states are sent, a few more of a small number. The decoder needs a network call each."
        ),
    ] = 64,
    book: Annotated[
        int,
        Option(help="How far the coder searches, 8 … 22: each doubles its work. More need fewer bits.", metavar="BITS"),
    ] = 16,
    seed: flags.Seed = 0,
    label: flags.Label = None,
    batch: flags.Batch = None,
    *,
    where: Where,
) -> None:
    """Compress images by what a model knows of such images."""
    import numpy as np

    from ddpmx.formats import compressed
    from ddpmx.formats.atomic import atomic_write
    from ddpmx.formats.output_file import check_output
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import codec

    path = shipped.find(model)
    check_output(
        out,
        [each for each in images if each.is_file()],
        what="compressed images of ddpmx",
        suffix=".ddpm",
        is_ours=compressed.is_compressed,
    )
    with where.open(path, widen=True) as pipeline:
        channels, *size = pipeline.spec.shape
        found = [each for place in images for each in pictures.read_pictures(place, channels, size=(size[0], size[1]))]
        begun = time.monotonic()
        with counting(counted(len(found), "image"), unit="states") as progress:
            done = codec.compress(
                pipeline,
                np.stack([picture.pixels for picture in found]),
                rate=rate,
                rmse=rmse,
                stop=stop,
                lossless=lossless,
                labels=label,
                seed=seed,
                steps=steps,
                book=book,
                model=model_hash(pipeline.spec, path),
                batch=batch,
                progress=progress,
            )
        with atomic_write(out) as stream:
            stream.write(done.data)
        error = "exact" if lossless else f"RMSE {done.sent[-1].rmse:.2f} levels"
        say(
            f"{len(found)} image{'s' * (len(found) > 1)}, {len(done.sent)} states down to t = {done.header.times[0]}, "
            f"{error}, in {time.monotonic() - begun:.1f} s on {pipeline.backend}"
        )
    say(f"{out}: {len(done.data)} bytes, {done.bits_per_dim:.3f} bits/dim")
