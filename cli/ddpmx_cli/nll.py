"""`ddpmx eval nll`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ddpmx.diffusion.samplers import VARIANCES
from ddpmx.errors import InputError
from ddpmx_cli import flags
from ddpmx_cli.console import counted, counting, plain, say
from ddpmx_cli.data import read_data
from ddpmx_cli.opened import Where, opens_model

if TYPE_CHECKING:
    from ddpmx.tasks.likelihood import Likelihood

_SHOWN = 11
"""Lines of the table on the screen."""

EXAMPLES = """
Examples:\n
  ddpmx eval nll model.onnx photos/ --images 200\n
  ddpmx eval nll garments images.npz --images 1000 --terms 50   # 50 of 1000 network calls for each image\n
  ddpmx eval nll model.plan photos/ -o nll.csv --plot nll.png   # the table by t, and Figure 5 of the paper\n
  ddpmx eval nll runs/photos photos/ --variance fixed_small     # a run, where torch is installed
"""


@opens_model
def nll(
    file: Annotated[str, Argument(help="A model.onnx, model.plan or model.mnn, a run, or a model that comes along.")],
    data: Annotated[
        Path,
        Argument(help="The images, best ones that were not trained on: a folder, an .npz or .npy, or .tar shards."),
    ],
    images: Annotated[
        int | None, Option(help="Only so many, spread evenly over the data.  \\[default: all]", metavar="N")
    ] = None,
    terms: Annotated[
        int | None,
        Option(
            help="Compute only so many of the T terms of each image, at timesteps chosen by chance: cheaper, with a "
            "larger standard error.  \\[default: all T]",
            metavar="K",
        ),
    ] = None,
    variance: Annotated[
        str | None,
        Option(help=f"Variance of the steps: {', '.join(VARIANCES)}.  \\[default: the model's]", metavar="NAME"),
    ] = None,
    seed: Annotated[int, Option(help="Of the noise, 0 … 2**64 − 1.")] = 0,
    label: Annotated[
        str | None,
        Option(help="The class of all images, its number or its name, instead of the labels that the data have."),
    ] = None,
    no_labels: Annotated[
        bool, Option("--no-labels", help="Leave labels out, for a model that was also trained without classes.")
    ] = False,
    guidance: Annotated[
        float, Option(help="The likelihood under the guided chain; 1 is as trained.", metavar="W")
    ] = 1.0,
    cond: Annotated[
        Path | None, Option(help="Condition images, one for each image, as for train --condition.", metavar="PATH")
    ] = None,
    resize: Annotated[
        bool, Option("--resize", help="Bring image files to the model's size and channels, as ddpmx train does.")
    ] = False,
    white: Annotated[
        float | None,
        Option(
            help="The number that is white, in an .npz that is no uint8 and in greys of more than 8 bits, as for train.",
            metavar="N",
        ),
    ] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="Write the table by t: FILE.csv, or FILE.json with everything.")
    ] = None,
    plot: Annotated[
        Path | None, Option(help="Draw the terms, rate and distortion as a PNG. Needs matplotlib.", metavar="FILE.png")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
    batch: flags.Batch = None,
    *,
    where: Where,
) -> None:
    """Bits per dimension of images under a model, and its rate and distortion: a bound on −log₂ p, as in papers' tables."""
    from ddpmx import __version__
    from ddpmx.formats.atomic import atomic_write
    from ddpmx.models import shipped
    from ddpmx.tasks import likelihood

    if variance is not None and variance not in VARIANCES:
        raise InputError(f"--variance {variance!r}: there is no such variance", hint=f"one of: {', '.join(VARIANCES)}")
    _check_outputs(out, plot, [data])
    drawn = plot is not None and _can_draw()
    path = shipped.find(file)
    with where.open(path) as pipeline:
        pipeline.table(variance=variance)
        likelihood.groups(pipeline.spec.make_schedule(), terms)
        with counting("reading images") as progress:
            read = read_data(
                data,
                pipeline.spec,
                count=images,
                resize=resize,
                white=white,
                label=label,
                no_labels=no_labels,
                cond=cond,
                progress=progress,
            )
        n = len(read.images)
        with counting(counted(n, "image"), unit="network calls") as progress:
            result = likelihood.nll(
                pipeline,
                read.images,
                indices=read.indices,
                labels=read.labels,
                cond=read.cond,
                guidance=guidance,
                variance=variance,
                terms=terms,
                seed=seed,
                batch=batch,
                progress=progress,
            )
        values = {
            "ddpmx": __version__,
            "file": path.name,
            "runs_on": pipeline.backend,
            "data": str(data),
            "of_images": read.total,
            "indices": read.indices.tolist(),
            **result.to_json(),
        }
    if out is not None:
        text = json.dumps(values, indent=2) + "\n" if out.suffix.lower() == ".json" else table(result)
        with atomic_write(out) as stream:
            stream.write(text.encode())
    if plot is not None and drawn:
        from ddpmx.tasks.likelihood_plot import draw

        picture = draw(result, plain(f"{path.name}, {n} images: {_figure(result)} bits/dim"))
        with atomic_write(plot) as stream:
            stream.write(picture)
    if as_json:
        say(json.dumps(values, indent=2))
        return
    some = f"{n} of {read.total} images" if n < read.total else f"{n} image{'s' * (n > 1)}"
    say(
        f"{file}: {some} of {data}, {result.terms} of {result.T} terms, variance {result.variance}, seed {seed}, "
        f"on {values['runs_on']}"
    )
    for note in read.notes:
        say(f"  {plain(note)}")
    for line in lines(result):
        say(line)
    for written in (out, plot if drawn else None):
        if written is not None:
            say(str(written))


def table(result: Likelihood) -> str:
    """The table by t as CSV."""
    stream, rows = io.StringIO(), list(result.rows())
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if math.isnan(value) else value for name, value in row.items()} for row in rows)
    return stream.getvalue()


def lines(result: Likelihood) -> list[str]:
    """The result as text: the sums, then what the chain knows of an image after some of its steps."""
    text = [
        f"  bits/dim    {_figure(result)}   a bound: −log₂ p is at most that",
        f"  rate        {result.rate:.4f}   for x_t at t = 0; L_T is {result.prior.mean():.1e} of it",
        f"  distortion  {result.distortion:.4f}   for the 256 levels from there, L_0",
        "",
        f"  {'t':>7}  {'rate':>8}  {'RMSE of x̂_0, 0…255':>18}",
    ]
    rows = list(result.rows())
    shown = {round(i * (len(rows) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}
    for number in sorted(shown, reverse=True):
        row = rows[number]
        text.append(f"  {row['t']:>7g}  {row['rate']:>8.5f}  {row['rmse']:>18.2f}")
    return text


def _figure(result: Likelihood) -> str:
    error = result.standard_error
    return f"{result.bits_per_dim:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _check_outputs(out: Path | None, plot: Path | None, inputs: list[Path]) -> None:
    """Check where the results go, before minutes are spent."""
    from ddpmx.formats.output_file import begins_with, check_output, is_plot, is_report

    kinds: list[tuple[Path | None, str, dict[str, Callable[[Path], bool]]]] = [
        (out, "--out", {".csv": partial(begins_with, begins=(b"t,first_t,",)), ".json": is_report}),
        (plot, "--plot", {".png": is_plot}),
    ]
    for path, flag, suffixes in kinds:
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{flag} {path}: not a {' or '.join(suffixes)}", hint=f"{flag} nll{next(iter(suffixes))}")
        suffix = path.suffix.lower()
        files = [each for each in inputs if each.is_file()]
        check_output(
            path,
            files,
            what=f"a {suffix} of ddpmx",
            suffix=suffix,
            is_ours=suffixes[suffix],
        )


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401 - it takes a second, which is spent on drawing anyway
    except ImportError:
        say("Note: there will be no plot, since matplotlib is not installed (pip install matplotlib)")
        return False
    return True
