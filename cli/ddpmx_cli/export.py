"""`ddpmx export`."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ddpmx.errors import BackendError, DdpmxError, InputError, NumericError
from ddpmx_cli import build, parity
from ddpmx_cli.console import busy, cache_folder, counting, megabytes, phases, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_export.training.checkpoint import Weights
    from ddpmx.formats.spec import ModelSpec, Precision

EXAMPLES = """
Examples:\n
  ddpmx export                                   # the newest run → model.onnx, model.parity.npz, model.plan\n
  ddpmx export runs/photos --fp16 -o photos.onnx\n
  ddpmx export runs/photos --data photos/ --full # checked on real images and with the chain of all T steps\n
  ddpmx export runs/photos --int8 -o small.onnx  # convolutions in 8 bits, calibrated on the model's own chain
"""


def export(
    run: Annotated[
        Path | None, Argument(help="A run, or one of its checkpoints.  \\[default: the newest run under runs/]")
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="The file to write.")] = Path("model.onnx"),
    fp16: Annotated[
        bool, Option("--fp16", help="Half precision inside; norms, softmax and the time path stay float32.")
    ] = False,
    bf16: Annotated[
        bool, Option("--bf16", help="The same with bfloat16, for TensorRT 10.13 and later (not JetPack 6).")
    ] = False,
    int8: Annotated[
        bool, Option("--int8", help="Convolutions in 8 bits by explicit Q/DQ, half precision beside them.")
    ] = False,
    fp8: Annotated[bool, Option("--fp8", help="The same with E4M3, for SM 8.9 and later.")] = False,
    weights: Annotated[str, Option(help="ema (averaged) or raw.", metavar="NAME")] = "ema",
    time_table: Annotated[
        bool, Option("--time-table", help="Store everything that depends only on t as a table instead of computing it.")
    ] = False,
    proof: Annotated[
        bool, Option("--parity/--no-parity", help="Record PyTorch's outputs, and compare the file with them.")
    ] = True,
    full: Annotated[bool, Option("--full", help="Record and compare the chain of all T steps.")] = False,
    data: Annotated[
        Path | None,
        Option(
            help="Real images for the record, and for calibration.  \\[default: images that the network generates]",
            metavar="FOLDER|NPZ",
        ),
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Also replace the file of another model, or one that ddpmx has not written.")
    ] = False,
    plan: Annotated[
        bool | None,
        Option("--plan/--no-plan", help="Build a TensorRT plan as well.  \\[default: if TensorRT can build one here]"),
    ] = None,
) -> None:
    """Export a checkpoint to ONNX, prove that the file is still the PyTorch model, and build a TensorRT plan.

    The file contains its own description. It runs in ONNX Runtime, and TensorRT builds a plan from it. Inputs and outputs
    are float32 and int32 in every precision, so files of different precision are interchangeable.
    """
    from ddpmx.formats import model_file, same_model
    from ddpmx.formats.spec import EIGHT_BITS

    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights!r}: not one of ema and raw")
    flags: dict[Precision, bool] = {"fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    chosen = [name for name, flag in flags.items() if flag]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    precision: Precision = chosen[0] if chosen else "fp32"
    if not proof and (full or (data is not None and precision not in EIGHT_BITS)):
        raise InputError("--no-parity excludes --full and --data")
    same_model.check_output(output)
    try:
        with busy("loading torch"):
            from ddpm_export.graph import onnx_export
            from ddpm_export.training import advice, checkpoint
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError(
            "export needs torch and onnx", note=str(error), hint="pip install torch safetensors onnx onnxscript"
        ) from error

    source = checkpoint.resolve(run if run is not None else checkpoint.newest_run(Path("runs")))
    which: Weights = "raw" if weights == "raw" else "ema"
    images = None
    if data is not None:
        from ddpm_export.proof.proof import images_for

        images = images_for(data, source)
    record = output.with_suffix(".parity.npz")
    for written in (output, record, output.with_suffix(".plan"), output.with_suffix(".plan.json")):
        if data is not None and written.exists() and data.exists() and written.samefile(data):
            raise InputError(f"refusing to overwrite {written}: it holds the images of --data", hint="another -o")
    if proof:
        same_model.check_record(record)
    earlier = record.exists()
    model = model_file.read_spec(source / model_file.SPEC_FILE)
    if which == "raw":
        model = model.replace(weights=None)  # that of the spec is of the averaged weights
    weights_before = None if overwrite else same_model.check_same_model(output, model)
    begun, replaced = time.monotonic(), os.path.exists(output)
    said: list[str] = []
    if precision in EIGHT_BITS:
        spec, said = _quantise(source, output, precision, which, time_table, images)
    else:
        with busy(f"exporting {source}"):
            spec = onnx_export.export(source, output, precision=precision, weights=which, time_table=time_table)
    c, height, width = spec.shape
    say(f"{source} → {output}{' (replaced)' if replaced else ''}")
    if weights_before is not None and weights_before != spec.weights:
        say(f"Note: before, {output} was this model with other weights, sha256 {weights_before[:12]}…")
    say(
        f"{spec.precision}, {height}×{width}×{c}, T = {spec.timesteps}, {spec.schedule}, predicts {spec.prediction}; "
        f"{megabytes(output)} in {time.monotonic() - begun:.1f} s"
    )
    for line in said:
        say(f"  {line}")
    if which == "ema" and (note := advice.note_of_checkpoint(source)):
        say(note)
    if not proof and earlier:
        say(f"Note: {record} is from an earlier export")
    if proof:
        _prove(output, spec, source, which, images, full)
    built = plan is not False and _build(output, must=plan is True)
    if not built and output.with_suffix(".plan").exists():
        say(f"Note: {output.with_suffix('.plan')} is from an earlier export")
    if (report := output.with_suffix(".report")).exists():
        say(f"Note: {report} is from an earlier export")
    if precision != "bf16":
        say(f"next: ddpmx generate {shlex.quote(str(output))} -n 16 --out samples/ --grid")
    elif not built:
        say(f"next, on the target machine: ddpmx build {shlex.quote(str(output))}")


def _quantise(
    source: Path,
    output: Path,
    precision: Precision,
    weights: Weights,
    time_table: bool,
    images: NDArray[np.uint8] | None,
) -> tuple[ModelSpec, list[str]]:
    """Export with 8-bit convolutions. (the spec of the file, what to say of it)"""
    from ddpm_export.quantize import export as quantize

    with phases(f"exporting {source}") as progress:
        done = quantize.export(
            source, output, precision=precision, weights=weights, time_table=time_table, data=images, progress=progress
        )
    return done.spec, done.lines


def _prove(
    output: Path, spec: ModelSpec, source: Path, weights: Weights, images: NDArray[np.uint8] | None, full: bool
) -> None:
    """Record PyTorch's outputs and check the file; exit code 1 if it fails. The file is kept, to find out why."""
    from ddpm_export.proof import proof

    record, saved = output.with_suffix(".parity.npz"), False
    try:
        with counting("running PyTorch", unit="network calls") as progress:
            reference = proof.record_checkpoint(source, weights=weights, data=images, full=full, progress=progress)
        module_report = None
        if spec.precision != "fp32":
            with counting(f"running PyTorch in {spec.precision}", unit="network calls") as progress:
                reference, module_report = proof.judge_reduced(
                    spec, source, reference, weights=weights, progress=progress
                )
        reference.save(record)
        saved = True
        with counting(f"checking {output.name}", unit="network calls") as progress:
            report = proof.check_file(output, spec, reference, module_report, progress=progress)
    except NumericError as error:
        parity.fail(output, f"FAILED: this is not the PyTorch model: {error.fact}; {error.hint}")
    except (InputError, BackendError) as error:  # the network's outputs are zero; there is no ONNX Runtime
        say(f"NOT VERIFIED: {error.fact}" + (f" ({error.note})" if error.note else ""))
        if record.exists() and not saved:
            say(f"Note: {record} is from an earlier export")
        return
    of = "" if images is None else f" (of {len(images):,})"
    say(f"{record}: {parity.summary(reference)}{of}; {megabytes(record)}")
    parity.show(report)
    if "NOT the file" in report.ran_on:
        say(f"Note: checked with {report.ran_on}")
    if not report.passed:
        parity.fail(output, report.verdict)


def _build(output: Path, *, must: bool) -> bool:
    """Build a plan if possible. An obstacle is an error only if --plan was passed (``must``)."""
    from ddpmx.trt import build as trt_build
    from ddpmx.trt import library as trt_library

    plan = output.with_suffix(".plan")
    try:
        library = trt_library.load()
    except BackendError:
        if must:
            raise
        build.note_missing(output)
        return False
    try:
        with phases(f"building {plan.name}") as progress:
            built = trt_build.build(
                output,
                plan,
                trt_build.BuildOptions(timing_cache=cache_folder()),
                library=library,
                progress=progress,
            )
    except DdpmxError as error:
        if must:
            raise
        say(f"no plan: {error.fact}" + (f" ({error.note})" if error.note else ""))
        return False
    build.show(built, output, plan)
    return True
