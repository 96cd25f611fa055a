"""`ddpmx generate`."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, Option

from ddpmx.diffusion.grids import SPACINGS, Spacing
from ddpmx.diffusion.samplers import SAMPLERS, VARIANCES, Sampler, Variance
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.models.shipped import SHIPPED
from ddpmx_cli import flags, scaled
from ddpmx_cli.console import busy, counted, counting, say
from ddpmx_cli.opened import Where, conditions_of, opens_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpmx.pipeline import Pipeline
    from ddpmx.sampling.chain import Preview
    from ddpmx.sampling.request import Sampling

EXAMPLES = """
Examples:\n
  ddpmx generate garments -n 16 --steps 50 --grid     # a model that comes along\n
  ddpmx generate emoji -n 16 --label Flags --steps 20 --grid --out samples-flags/   # another one, which has classes\n
  ddpmx generate model.onnx -n 64 --seed 0 --out samples/ --grid\n
  ddpmx generate model.onnx --out one.png --steps 20  # one image in one file\n
  ddpmx generate runs/photos -n 16 --grid             # a run, where torch is installed\n
  ddpmx generate model.onnx -n 32 --first 32          # images 32…63 of the same seed\n
  ddpmx generate model.plan -n 256 --batch 64         # on an NVIDIA GPU, with TensorRT\n
  ddpmx generate model.onnx -n 20 --labels 0,1,2,3,4  # a model with classes: image i has class i mod 5\n
  ddpmx generate model.onnx --label 3 --guidance 2    # more clearly of class 3 than the data\n
  ddpmx generate model.onnx --cond photos/            # a model with a condition: image i has picture i\n
  ddpmx generate model.onnx --init photo.png --strength 0.4   # variations of a picture\n
  ddpmx generate model.onnx -n 8 --share-from 500 --grid      # images that are one down to t = 500\n
  ddpmx generate model.onnx -n 1000000 --format tar --out many/ --shard 0/64   # the first of 64 parts
"""


@opens_model
def generate(
    file: Annotated[
        str | None,
        Argument(
            help=f"A model that comes along ({', '.join(SHIPPED)}), a model.onnx, model.plan or model.mnn, or a run.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[str | None, Option(help="The same as FILE.", show_default=False)] = None,
    n: Annotated[
        int | None, Option("-n", "--count", help="How many images.  \\[default: 16, or one with --out FILE.png]")
    ] = None,
    seed: flags.Seed = 0,
    out: Annotated[
        str,
        Option(
            "-o",
            "--out",
            help="Folder for 00000.png, 00001.png, …, or its address (s3://…); or FILE.png for one image, or with --grid "
            "for one sheet.",
            metavar="FOLDER|FILE",
        ),
    ] = "samples",
    first: flags.First = 0,
    label: flags.Label = None,
    labels: Annotated[
        str | None,
        Option(help="The classes of the images, repeated in order of their index: 0,1,2.", metavar="CLASS,…"),
    ] = None,
    guidance: Annotated[
        float,
        Option(
            help="How much more the images are of their class: 1 is as trained, 2 to 4 is usual. For a model that was "
            "also trained without classes.",
            metavar="W",
        ),
    ] = 1.0,
    cond: flags.Cond = None,
    init: Annotated[
        Path | None,
        Option(
            help="Draw variations of pictures of the model's size, repeated in order of the images' index.",
            metavar="FOLDER|FILE",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        Option(
            help="With --init: how much of the chain is run. Near 0 the picture stays, at 1 hardly anything of it does."
            "  \\[default: 0.5]",
            metavar="S",
        ),
    ] = None,
    share_from: Annotated[
        int | None,
        Option(help="All images are one down to this timestep, and part there: the x_t of image 0.", metavar="T"),
    ] = None,
    steps: Annotated[int | None, Option(help="Use only this many of the T timesteps.  \\[default: all]")] = None,
    sampler: Annotated[
        str | None,
        Option(
            help=f"{', '.join(SAMPLERS)}.  \\[default: ancestral; unipc for few steps, without --variance]",
            metavar="NAME",
        ),
    ] = None,
    eta: Annotated[float | None, Option(help="Noise η of the ddim sampler, 0 … 1.  \\[default: 0]")] = None,
    spacing: Annotated[
        str | None,
        Option(
            help=f"Spacing of the timesteps: {', '.join(SPACINGS)}.  \\[default: linspace; trailing "
            "where unipc is the default]",
            metavar="NAME",
        ),
    ] = None,
    variance: Annotated[
        str | None,
        Option(help=f"Variance of the steps: {', '.join(VARIANCES)}.  \\[default: the model's]", metavar="NAME"),
    ] = None,
    batch: flags.Batch = None,
    grid: Annotated[bool, Option("--grid", help="Also write grid.png: all images on one sheet.")] = False,
    animate: Annotated[
        bool, Option("--animate", help="Also write x0.gif: x̂_0 of the first 64 images through the chain.")
    ] = False,
    strip: Annotated[
        bool,
        Option("--strip", help="Also write strip.png: x̂_0 of each image along the chain, and say how far it is off."),
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the images of another run, or of somebody else, in --out.")
    ] = False,
    executor: Annotated[
        str,
        Option(
            help="How a chain runs on a GPU: while (one launch), graph, plain, or auto for the fastest that works.",
            metavar="NAME",
            rich_help_panel=flags.WHERE,
        ),
    ] = "auto",
    shard: scaled.Shard = None,
    form: scaled.Format = None,
    per_file: scaled.PerFile = None,
    ray: scaled.Ray = None,
    workers: scaled.Workers = None,
    *,
    where: Where,
) -> None:
    """Run the full reverse chain and write PNGs."""
    from ddpmx.formats.atomic import locked, make_folder
    from ddpmx.images import gallery
    from ddpmx.images.origin import Origin, model_hash
    from ddpmx.models import shipped
    from ddpmx.sampling.request import Sampling
    from ddpmx.tasks import progressive, shared

    path = shipped.find(_one_model(file, engine))
    many = scaled.Many(shard, form, per_file, ray, workers, out)
    if many.wanted:
        many.check(
            {
                "--grid": grid,
                "--animate": animate,
                "--strip": strip,
                "--init": init is not None,
                "--share-from": share_from is not None,
                "--overwrite": overwrite,
            }
        )
    output = Path(out)
    picture = not many.wanted and gallery.is_picture(output)
    if n is None:
        n = 1 if picture and not grid else 16
    if picture and (animate or strip or (n != 1 and not grid)):
        more = "an animation" if animate else "a strip"
        what = f"{more} is another one" if animate or strip else f"there are {n} images"
        hint = (
            "a folder as --out"
            if animate or strip
            else "-n 1, --grid for all of them on one sheet, or a folder as --out"
        )
        raise InputError(f"--out {out} is one file, and {what}", hint=hint)
    with where.open(path, executor=executor) as pipeline:
        gallery.check_drawable(pipeline.spec)
        sampling = Sampling.chosen(  # the names are checked with everything else
            pipeline.spec.timesteps,
            sampler=cast("Sampler | None", sampler or ("ancestral" if share_from is not None and not eta else None)),
            steps=steps,
            spacing=cast("Spacing | None", spacing),
            eta=eta,
            variance=cast("Variance | None", variance),
        )
        if eta and sampling.sampler != "ddim":
            raise InputError("--eta is for the ddim sampler only", hint="--sampler ddim, or omit --eta")
        chosen = _choice(sampler, spacing, sampling, pipeline.spec.timesteps)
        turns = _class_turns(pipeline.spec, label, labels)
        if init is None and share_from is None:
            _say_where_it_begins(pipeline, sampling)
        if many.wanted:
            if strength is not None:
                raise InputError("--strength is for --init only", hint="--init PICTURE, which is to be varied")
            work, whole = scaled.prepared(
                pipeline,
                path,
                many,
                n=n,
                first=first,
                seed=seed,
                batch=batch,
                sampling=sampling,
                turns=turns,
                guidance=guidance,
                cond=cond,
            )
            if ray is None:
                scaled.draw(pipeline, work, whole, many, chosen)
            else:
                scaled.draw_on_ray(pipeline, path, work, whole, many, where, executor, chosen)
            return
        pipeline.check_request(n, seed=seed, first=first, batch=batch, sampling=sampling)
        classes = None if turns is None else [turns[i % len(turns)] for i in range(first, first + n)]
        pipeline.check_request(
            n, seed=seed, first=first, batch=batch, labels=classes, guidance=guidance, sampling=sampling
        )
        conditions, conditioned_by = conditions_of(pipeline.spec, cond, n, first)
        begun_from, x = None, None
        if init is not None and share_from is not None:
            raise InputError("--init and --share-from exclude each other", hint="both say where the chains begin")
        if init is not None:
            sampling, x, begun_from = _begun(pipeline, init, strength, sampling, seed=seed, first=first, n=n)
        elif strength is not None:
            raise InputError("--strength is for --init only", hint="--init PICTURE, which is to be varied")
        if share_from is not None:
            if len(set(classes or ())) > 1 or len(set(conditioned_by or ())) > 1:
                raise InputError(
                    "images that share a latent have one class and one condition", hint="--label, --cond PICTURE"
                )
            with busy(f"x_t at t = {share_from}"):
                parted = shared.share_from(
                    pipeline,
                    n,
                    share_from,
                    sampling=sampling,
                    seed=seed,
                    batch=batch,
                    label=classes[0] if classes else None,
                    cond=None if conditions is None else conditions[:1],
                    guidance=guidance,
                )
            x, sampling = parted
        table = pipeline.table(sampling)
        animation = gallery.Animation(pipeline.spec, table, n) if animate else None
        frames = progressive.Progress(pipeline.spec, table, n) if strip else None
        watching = [each for each in (animation, frames) if each is not None]

        def watch(at: int, step: Preview) -> None:
            for each in watching:
                each(at, step)

        model = model_hash(pipeline.spec, path)
        origin = Origin(
            model,
            pipeline.spec.precision,
            seed,
            sampling,
            len(table),
            first,
            labels=classes,
            conditions=conditioned_by,
            guidance=guidance,
            begun_from=begun_from,
            shared=None if share_from is None else sampling.start,
        )
        targets = (
            [output] if picture else gallery.targets(output, n, first=first, grid=grid, animated=animate, strip=strip)
        )
        gone: list[Path] = []

        def replaced() -> Iterator[Path]:
            """The pictures of other runs that go; refused without --overwrite."""
            if overwrite and not picture:
                gallery.check_not_in_parts(output)
            if overwrite:
                gone[:] = [] if picture else gallery.other_runs(output, origin, n)
            else:
                gallery.check_free(targets, origin, n, folder=None if picture else output)
            yield from gone

        list(replaced())  # and again when the images are written, since another process may have drawn there meanwhile
        make_folder(output.parent if picture else output)
        begun = time.monotonic()
        with counting(counted(n, "image"), unit="steps") as progress:
            images = pipeline.generate(
                n,
                seed=seed,
                first=first,
                batch=batch,
                labels=classes,
                cond=conditions,
                guidance=guidance,
                x=x,
                progress=progress,
                preview=watch if watching else None,
                sampling=sampling,
            )
        seconds = time.monotonic() - begun
        if picture:
            with locked(output):
                list(replaced())
                written = [gallery.save_picture(output, images, grid=grid, origin=origin)]
        else:
            written = gallery.save_gallery(
                output,
                images,
                first=first,
                grid=grid,
                animation=animation,
                strip=None if frames is None else frames.frames.pixels,
                origin=origin,
                instead_of=replaced(),
            )
        what = "image" if init is None else "variation"
        begin = "" if sampling.start is None else f", from t = {sampling.start}"
        say(
            f"{n} {what}{'s' * (n > 1)}, {len(table)} steps of {sampling.sampler}{chosen}{begin}, seed {seed}, "
            f"in {seconds:.1f} s on {pipeline.backend}"
        )
    if picture:
        say(str(output))
        return
    say(f"{written[0]}" + (f" … {written[n - 1].name}" if n > 1 else ""))
    for extra in written[n:]:
        say(str(extra))
    if frames is not None:
        say("x̂_0 on its way, and its RMSE to the image (0…255):")
        for t, rmse in zip(frames.frames.t, frames.frames.rmse, strict=True):
            say(f"  t = {t:<6} {rmse:6.2f}")
    if gone:
        say(f"Note: {len(gone)} pictures of another run were replaced")
    if others := len(set(gallery.earlier_images(output)) - set(written)):
        say(f"Note: {out} also holds {others} images of this run from before")


def _begun(
    pipeline: Pipeline, init: Path, strength: float | None, sampling: Sampling, *, seed: int, first: int, n: int
) -> tuple[Sampling, NDArray[np.float32], list[str]]:
    """Where the chain begins with --init: its sampling, the states there, and the names of the pictures."""
    import numpy as np

    from ddpmx.images.pictures import read_pictures
    from ddpmx.tasks import variations

    channels, height, width = pipeline.spec.shape
    found = read_pictures(init, channels, size=(height, width))
    turns = [found[index % len(found)] for index in range(first, first + n)]
    begun = variations.begin(
        pipeline,
        np.stack([picture.pixels for picture in turns]),
        variations.STRENGTH if strength is None else strength,
        sampling=sampling,
        seed=seed,
        first=first,
    )
    return begun.sampling, begun.x, [picture.name for picture in turns]


def _one_model(file: str | None, engine: str | None) -> str:
    """FILE, or --engine."""
    name = file if engine is None else engine
    if file is not None and engine is not None:
        raise InputError(
            "FILE and --engine are the same, and both were passed", hint=f"ddpmx generate {shlex.quote(file)}"
        )
    if name is None:
        raise InputError(
            "missing model: which one is to draw?",
            hint=f"ddpmx generate {next(iter(SHIPPED))}, which comes along; or a model.onnx, .plan or .mnn, or a run",
        )
    if name in SHIPPED and os.path.lexists(name):
        say(f"Note: {name} is a model that comes with ddpmx; ./{name} is yours")
    return name


def _say_where_it_begins(pipeline: Pipeline, sampling: Sampling) -> None:
    """Say so if the chain begins with noise where the network expects to see an image."""
    from ddpmx.diffusion.grids import image_expected

    first = int(pipeline.table(sampling).timesteps[0])
    kept = image_expected(pipeline.spec.make_schedule(), first)
    if kept is not None:
        say(
            f"Note: these {sampling.spacing} timesteps begin at t = {first}, where √ᾱ = {kept:.2f}, and x is pure noise "
            f"there; --spacing trailing begins at t = {pipeline.spec.timesteps - 1}"
        )


def _choice(sampler: str | None, spacing: str | None, sampling: object, timesteps: int) -> str:
    """What the result says of a sampler that was not asked for, and of its spacing."""
    from ddpmx.sampling.request import FEW_STEPS, Sampling

    assert isinstance(sampling, Sampling)
    if sampler is not None or sampling.sampler == "ancestral":
        return ""
    default = f" (the default below {min(FEW_STEPS, timesteps)} steps)"
    with_spacing = f" with {sampling.spacing} spacing"
    return with_spacing + default if spacing is None else default + with_spacing


def _class_turns(spec: ModelSpec, label: str | None, labels: str | None) -> list[int] | None:
    """The classes, repeated in order of the images' index: an image's does not depend on the others of the call."""
    if label is not None and labels is not None:
        raise InputError(
            "--label and --labels exclude each other", hint="--label is one class for all images, --labels are several"
        )
    if label is not None:
        return [spec.class_number(label.strip())]
    if labels is not None:
        return [spec.class_number(word.strip()) for word in labels.split(",")]
    if spec.classes is not None and not spec.null_class:
        raise InputError(
            f"missing labels: the model has {spec.classes} classes",
            hint=f"--label {spec.class_names[0]}, or --labels with several: {', '.join(spec.class_names)}"[:300]
            if spec.class_names
            else f"--label 0, or --labels 0,1,…: 0…{spec.classes - 1}",
        )
    return None
