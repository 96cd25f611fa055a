"""`ddpmx decompress`."""

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
  ddpmx decompress photo.ddpm -o photo.png --model model.onnx\n
  ddpmx decompress photos.ddpm -o photos/ --model model.onnx\n
  ddpmx decompress photos.ddpm -o coarse/ --model model.onnx --stop 100   # sooner\n
"""


@opens_model
def decompress(
    file: Annotated[Path, Argument(help="Compressed images, or the beginning of them.", metavar="FILE")],
    out: flags.Out,
    model: Annotated[
        str,
        Option(help="The model by which they were compressed.", metavar="FILE", show_default=False),
    ],
    stop: Annotated[int | None, Option(help="Decode no further than to this t.", metavar="T")] = None,
    batch: flags.Batch = None,
    overwrite: flags.Overwrite = False,
    *,
    where: Where,
) -> None:
    """Decode compressed images by the model that they were compressed by."""
    from ddpmx.formats.compressed import read_compressed
    from ddpmx.images import pictures
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.tasks import codec

    read = read_compressed(file)
    n = read.header.n
    targets = pictures.targets(out, [f"{index:05d}" for index in range(n)], whole_folder=False)
    pictures.check_replaceable(out, targets, [file], overwrite=overwrite)
    path = shipped.find(model)
    with where.open(path, widen=True) as pipeline:
        begun = time.monotonic()
        with counting(counted(n, "image"), unit="states") as progress:
            done = codec.decompress(
                pipeline, read, stop=stop, model=model_hash(pipeline.spec, path), batch=batch, progress=progress
            )
        known = read.header.weights
        texts = [pictures.text("decompress", model=known, of=file.name, index=i, t=done.t) for i in range(n)]
        pictures.save_pictures(targets, list(done.pixels), texts)
        error = "exact" if done.rmse == 0 else f"RMSE of about {done.rmse:.1f} levels"
        say(
            f"{n} image{'s' * (n > 1)}, states down to t = {done.t}, {error}, "
            f"in {time.monotonic() - begun:.1f} s on {pipeline.backend}"
        )
    if not done.complete:
        say("Note: these are coarser images; " + ("--stop" if read.complete else "the file is the beginning of one"))
    say(f"{targets[0]}" + (f" … {targets[-1].name}" if n > 1 else ""))
