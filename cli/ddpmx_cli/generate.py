"""`ddpmx generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, cast

from typer import Option

from ddpmx.diffusion.samplers import SAMPLERS, SPACINGS, VARIANCES, Sampler, Spacing, Variance
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx_cli.console import cache_folder, counting, say

_WHERE = "Where it runs"

EXAMPLES = """
Examples:\n
  ddpmx generate --engine model.onnx -n 64 --seed 0 --out samples/ --grid\n
  ddpmx generate --engine model.onnx -n 16 --steps 50 --sampler ddim --grid --animate\n
  ddpmx generate --engine model.onnx -n 32 --first 32          # images 32…63 of the same seed\n
  ddpmx generate --engine model.plan -n 256 --batch 64         # on an NVIDIA GPU, with TensorRT\n
  ddpmx generate --engine model.onnx -n 20 --labels 0,1,2,3,4  # a model with classes: image i has class i mod 5
"""


def generate(
    engine: Annotated[Path, Option(help="The model.onnx or model.plan to run.")],
    n: Annotated[int, Option("-n", "--count", help="How many images.")] = 16,
    seed: Annotated[int, Option(help="0 … 2**64 − 1. Image i of a seed is always the same.")] = 0,
    out: Annotated[Path, Option(help="Folder for 00000.png, 00001.png, …")] = Path("samples"),
    first: Annotated[int, Option(help="Index of the first image.")] = 0,
    label: Annotated[int | None, Option(help="The class of all images, for a model with classes.")] = None,
    labels: Annotated[
        str | None,
        Option(help="The classes of the images, repeated in order of their index: 0,1,2.", metavar="CLASS,…"),
    ] = None,
    steps: Annotated[int | None, Option(help="Use only this many of the T timesteps.  \\[default: all]")] = None,
    sampler: Annotated[str, Option(help=f"{', '.join(SAMPLERS)}.", metavar="NAME")] = "ancestral",
    eta: Annotated[float, Option(help="Noise η of the ddim sampler, 0 … 1.")] = 0.0,
    spacing: Annotated[
        str, Option(help=f"Spacing of the timesteps: {', '.join(SPACINGS)}.", metavar="NAME")
    ] = "linspace",
    variance: Annotated[
        str | None,
        Option(help=f"Variance of the steps: {', '.join(VARIANCES)}.  \\[default: the model's]", metavar="NAME"),
    ] = None,
    batch: Annotated[int | None, Option(help="Images at once.  \\[default: 16, fewer for large images]")] = None,
    grid: Annotated[bool, Option("--grid", help="Also write grid.png: all images on one sheet.")] = False,
    animate: Annotated[
        bool, Option("--animate", help="Also write x0.gif: x̂_0 of the first 64 images through the chain.")
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the images of another run, or of somebody else, in --out.")
    ] = False,
    spec: Annotated[Path | None, Option(help="spec.json, for an ONNX file that does not describe itself.")] = None,
    provider: Annotated[
        str,
        Option(
            help="What runs an ONNX file: cpu, cuda, tensorrt, rtx, or ONNX Runtime's name.",
            metavar="NAME",
            rich_help_panel=_WHERE,
        ),
    ] = "cpu",
    fallback: Annotated[
        bool, Option("--fallback", help="Use the CPU if the provider does not start.", rich_help_panel=_WHERE)
    ] = False,
    threads: Annotated[int, Option(help="CPU threads; 0 for one per core.", rich_help_panel=_WHERE)] = 0,
    executor: Annotated[
        str,
        Option(
            help="How a chain runs on a GPU: while (one launch), graph, plain, or auto for the fastest that works.",
            metavar="NAME",
            rich_help_panel=_WHERE,
        ),
    ] = "auto",
    trust_host_code: Annotated[
        bool,
        Option(
            "--trust-host-code",
            help="Load a plan that contains code for the CPU, which loading runs.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
) -> None:
    """Run the full reverse chain and write PNGs."""
    from ddpmx.formats import model_file
    from ddpmx.formats.atomic import make_folder
    from ddpmx.images.gallery import (
        Animation,
        check_drawable,
        check_one_run,
        check_replaceable,
        earlier_images,
        other_runs,
        save_gallery,
        targets,
    )
    from ddpmx.images.origin import Origin, model_hash
    from ddpmx.pipeline import load
    from ddpmx.sampling.request import Sampling

    description = model_file.read_spec(spec) if spec is not None else None
    with load(
        engine,
        spec=description,
        providers=[provider],
        fallback=fallback,
        threads=threads,
        executor=executor,
        trust_host_code=trust_host_code,
        cache=cache_folder(),
    ) as pipeline:
        check_drawable(pipeline.spec)
        sampling = Sampling(  # the names are checked with everything else
            sampler=cast(Sampler, sampler),
            steps=steps,
            spacing=cast(Spacing, spacing),
            eta=eta,
            variance=cast("Variance | None", variance),
        )
        pipeline.check_request(n, seed=seed, first=first, batch=batch, sampling=sampling)
        classes = _classes(pipeline.spec, label, labels, n, first)
        pipeline.check_request(n, seed=seed, first=first, batch=batch, labels=classes, sampling=sampling)
        if pipeline.spec.condition is not None:
            raise InputError(
                "the model needs a condition image, which this command cannot pass",
                hint="from Python: ddpmx.load(…).generate(n, cond=…)",
            )
        table = pipeline.table(sampling)
        animation = Animation(pipeline.spec, table, n) if animate else None
        model = model_hash(pipeline.spec, engine)
        origin = Origin(model, pipeline.spec.precision, seed, sampling, len(table), first, classes)
        if not overwrite:
            check_replaceable(targets(out, n, first=first, grid=grid, animated=animate), model)
            check_one_run(out, origin, n)
        make_folder(out)
        begun = time.monotonic()
        with counting(f"{n} images", unit="steps") as progress:
            images = pipeline.generate(
                n,
                seed=seed,
                first=first,
                batch=batch,
                labels=classes,
                progress=progress,
                preview=animation,
                sampling=sampling,
            )
        seconds = time.monotonic() - begun
        gone = other_runs(out, origin, n) if overwrite else []
        written = save_gallery(out, images, first=first, grid=grid, animation=animation, origin=origin, instead_of=gone)
        say(f"{n} images, {len(table)} steps of {sampler}, seed {seed}, in {seconds:.1f} s on {pipeline.backend}")
    say(f"{written[0]}" + (f" … {written[n - 1].name}" if n > 1 else ""))
    for extra in written[n:]:
        say(str(extra))
    if gone:
        say(f"Note: {len(gone)} pictures of another run were replaced")
    if others := len(set(earlier_images(out)) - set(written)):
        say(f"Note: {out} also holds {others} images of this run from before")


def _classes(spec: ModelSpec, label: int | None, labels: str | None, n: int, first: int) -> list[int] | None:
    """The class of each image. It depends only on the image's index, not on the other images of the call."""
    if label is not None and labels is not None:
        raise InputError(
            "--label and --labels exclude each other", hint="--label is one class for all images, --labels are several"
        )
    if label is not None:
        turns = [label]
    elif labels is not None:
        try:
            turns = [int(word) for word in labels.split(",")]
        except ValueError as error:
            raise InputError(f"--labels {labels[:40]!r} are not whole numbers", hint="--labels 0,1,2") from error
    elif spec.classes is not None:
        raise InputError(
            f"missing labels: the model has {spec.classes} classes",
            hint=f"--label 0, or --labels 0,1,…: 0…{spec.classes - 1}",
        )
    else:
        return None
    return [turns[i % len(turns)] for i in range(first, first + n)]
