"""`ddpmx parity`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from ddpmx.errors import BackendError, FileFormatError, InputError, NumericError
from ddpmx_cli.console import busy, counting, say
from ddpmx_cli.opened import Where, opens_model

if TYPE_CHECKING:
    from ddpmx.parity.ladder import ParityReport
    from ddpmx.parity.reference import Reference

EXAMPLES = """
Examples:\n
  ddpmx parity model.onnx                              # against model.parity.npz beside it\n
  ddpmx parity model.onnx --against model.parity.npz   # anywhere, without torch\n
  ddpmx parity model.onnx --checkpoint runs/x --full   # the chain of all T steps, against torch itself
"""


@opens_model
def parity(
    model: Annotated[
        str,
        Argument(help="The model.onnx, model.plan or model.mnn to check, or a model that comes along.", metavar="FILE"),
    ],
    against: Annotated[
        Path | None, Option(help="The record of PyTorch's outputs.  \\[default: the .parity.npz beside the file]")
    ] = None,
    checkpoint: Annotated[Path | None, Option(help="Compare with this checkpoint instead. Needs torch.")] = None,
    weights: Annotated[str, Option(help="With --checkpoint: ema (averaged) or raw.", metavar="NAME")] = "ema",
    data: Annotated[
        Path | None, Option(help="With --checkpoint: real images for the record, a folder or an .npz.")
    ] = None,
    full: Annotated[bool, Option("--full", help="With --checkpoint: compare the chain of all T steps.")] = False,
    self_test: Annotated[bool, Option("--self-test", help="Make only the checks that need no record.")] = False,
    report: Annotated[
        Path | None,
        Option(
            "--report",
            "-o",
            help="Folder for report.md, report.json and plots.  \\[default: FILE.report]",
        ),
    ] = None,
    polygraphy: Annotated[
        bool, Option("--polygraphy", help="Compare ε with Polygraphy as well; its results are kept in the report.")
    ] = False,
    *,
    where: Where,
) -> None:
    """Prove that a file is still the PyTorch model: ε over all t, one step, teacher-forced and free chains.

    The exit code is 0 if every bound of the file's precision holds, 1 if one does not, 2 if the checks could not be made.
    """
    from ddpmx.backends.open import open_model
    from ddpmx.models import shipped
    from ddpmx.parity import report as reports
    from ddpmx.parity.ladder import not_finite, run_ladder

    if sum((against is not None, checkpoint is not None, self_test)) > 1:
        raise InputError("--against, --checkpoint and --self-test exclude each other")
    if checkpoint is None and (data is not None or full):
        raise InputError("--data and --full need --checkpoint")
    file = shipped.find(model)
    spec, backend = open_model(file, **where.settings())
    try:
        reference = None
        if checkpoint is not None:
            reference = _record(checkpoint, weights, data, full)
        elif not self_test:
            reference = _load_record(file, against)
        folder = report if report is not None else shipped.beside(model, ".self-test" if self_test else ".report")
        reports.check_folder(folder)
        with counting(f"checking {file.name}", unit="network calls") as progress:
            try:
                result = run_ladder(backend, spec, reference, progress=progress)
            except NumericError as error:
                result = not_finite(backend, spec, reference, error)
        extra: dict[str, Any] = _engine(file) or {}
        attachments = {}
        if polygraphy:
            if reference is None:
                raise InputError("--polygraphy needs a reference, and --self-test has none")
            comparison, runs = _polygraphy(file, reference)
            extra, attachments = extra | {"polygraphy": comparison}, {"polygraphy.json": runs}
        with busy("writing the report"):
            written = reports.write(result, file, folder, extra=extra, attachments=attachments)
    finally:
        backend.close()
    say(f"{file} on {result.ran_on}" + (f", against {summary(reference)}" if reference is not None else ""))
    show(result)
    if "polygraphy" in extra:
        say(f"  Polygraphy on ε: {extra['polygraphy']['verdict']}")
    say(f"report: {written[0]}")
    if not result.judged:
        raise BackendError(
            f"{file}: {result.verdict}",
            note="; ".join(map(str, result.checks)),
            hint="--against FILE.parity.npz, whose checks need neither a larger batch nor a second executor",
        )
    if not result.passed:
        fail(file, result.verdict)
    if "polygraphy" in extra and not extra["polygraphy"]["passed"]:
        fail(file, f"FAILED: by Polygraphy, {extra['polygraphy']['verdict']}")


def _engine(file: Path) -> dict[str, Any] | None:
    """The record and hash of a plan or an .mnn, for the report: two builds of one network differ, and one is judged."""
    from ddpmx.formats import mnn_file, model_file, plan_file

    kind = model_file.identify(file)
    if kind == "mnn":
        return {"mnn": {**mnn_file.read_mnn(file, brief=True).record.to_json(), "sha256": model_file.sha256(file)}}
    if kind != "plan":
        return None
    engine = plan_file.read_plan(file, trust_host_code=True, brief=True).engine
    return {"engine": {**engine.to_json(), "sha256": model_file.sha256(file)}}


def summary(reference: Reference) -> str:
    """A record's content in a few words."""
    images = "real images" if reference.real else "generated images"
    return f"{reference.made_with}, {len(reference.t)} timesteps of {len(reference.x0)} {images}"


def show(report: ParityReport) -> None:
    """Print the result of each check."""
    for check in report.checks:
        say(f"  {'—' if check.skipped else '✓' if check.passed else '✗'} {check}")
    if report.passed:
        say(report.verdict)


def fail(file: Path, verdict: str) -> NoReturn:
    """Print one line on standard error, and exit with code 1."""
    typer.echo(f"{file}: {verdict}", err=True)
    raise typer.Exit(1)


def _load_record(file: Path, against: Path | None) -> Reference:
    from ddpmx.parity.reference import Reference

    path = against if against is not None else file.with_suffix(".parity.npz")
    if not path.exists():
        raise FileFormatError(
            f"{path}: there is no record of PyTorch's outputs",
            hint="--against FILE, or --checkpoint runs/x with torch, or --self-test for the checks that need no record",
        )
    return Reference.load(path)


def _record(checkpoint: Path, weights: str, data: Path | None, full: bool) -> Reference:
    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights!r}: not one of ema and raw")
    try:
        with busy("loading torch"):
            from ddpm_export.proof import proof
    except (ImportError, OSError) as error:
        raise BackendError(
            "--checkpoint needs torch", note=str(error), hint="pip install torch safetensors onnx onnxscript"
        ) from error
    images = None if data is None else proof.images_for(data, checkpoint)
    with counting("running PyTorch", unit="network calls") as progress:
        return proof.record_checkpoint(
            checkpoint, weights="raw" if weights == "raw" else "ema", data=images, full=full, progress=progress
        )


def _polygraphy(file: Path, reference: Reference) -> tuple[dict[str, Any], bytes]:
    try:
        from ddpm_export.proof import polygraphy_check
    except ImportError as error:
        raise BackendError("--polygraphy needs Polygraphy", note=str(error), hint="pip install polygraphy") from error
    with busy("Polygraphy"), tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "polygraphy.json"
        return polygraphy_check.compare(file, reference, results=results), results.read_bytes()
