"""`ddpmx build`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx.errors import InputError
from ddpmx_cli.console import busy, cache_folder, megabytes, parse_numbers, phases, say

EXAMPLES = """
Examples:\n
  ddpmx build model.onnx\n
  ddpmx build model.onnx --batch 1,1,4 --workspace 512   # small Jetson\n
  ddpmx build model.onnx --target 8.6,8.9                # TensorRT-RTX\n
  ddpmx build model.onnx --for mnn                       # model.mnn, for CPUs and ARM boards
"""

_FOR = ("tensorrt", "mnn")
_LIBRARIES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


def build(
    model: Annotated[
        str, Argument(help="The model.onnx that `ddpmx export` wrote, or a model that comes along.", metavar="ONNX")
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", help="The file to write.  \\[default: beside the ONNX file]")
    ] = None,
    made_for: Annotated[
        str,
        Option(
            "--for",
            help="tensorrt: a .plan for NVIDIA GPUs. mnn: an .mnn for CPUs, where MNN is often faster than ONNX Runtime.",
            metavar="NAME",
        ),
    ] = "tensorrt",
    batch: Annotated[
        str | None,
        Option(
            help="Smallest, best and largest batch.  \\[default: 1,16,64; smaller for large images]",
            metavar="MIN,OPT,MAX",
        ),
    ] = None,
    workspace: Annotated[
        int | None, Option(help="Limit of scratch memory, in MB.  \\[default: the library's]", metavar="MB")
    ] = None,
    level: Annotated[int | None, Option(help="The builder's effort, 0 … 5.  \\[default: the library's, 3]")] = None,
    tf32: Annotated[
        bool, Option("--tf32", help="Round float32 products to 10 bits: faster, but no longer fp32.")
    ] = False,
    target: Annotated[
        str | None,
        Option(help="Compute capabilities, TensorRT-RTX only.  \\[default: 8.0 and later]", metavar="8.6,8.9"),
    ] = None,
    refit: Annotated[
        bool, Option("--refit", help="Make a plan whose weights can be replaced later. Needs a GPU.")
    ] = False,
    strip: Annotated[bool, Option("--strip", help="Make a plan without weights. Needs a GPU.")] = False,
    library: Annotated[
        str | None,
        Option(help=f"{' or '.join(_LIBRARIES)}.  \\[default: the one that is installed]", metavar="NAME"),
    ] = None,
    spec: Annotated[Path | None, Option(help="spec.json, for an ONNX file that does not describe itself.")] = None,
    timing_cache: Annotated[
        Path | None, Option(help="Folder for the builder's measurements.  \\[default: in the user's cache]")
    ] = None,
    part: Annotated[
        int | None,
        Option(
            help="Images in one call, 1 … 64, with --for mnn. It decides an image's last bits.  \\[default: by their size]"
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        Option("--low-memory", help="With --for mnn: 60 % of the memory, and a sixth more time."),
    ] = False,
    force: Annotated[bool, Option("--force", help="Build even if the file is up to date.")] = False,
) -> None:
    """Build a TensorRT plan from an ONNX file for the GPU of this machine; TensorRT-RTX builds for RTX cards anywhere.
    With --for mnn, make an .mnn file, which runs on any CPU.

    It needs neither torch nor onnx, so it runs on the device itself. The precision is that of the ONNX file. A plan works
    only with the version of TensorRT that built it and on one GPU architecture; a plan of TensorRT-RTX on all RTX cards.
    """
    from ddpmx.formats import model_file
    from ddpmx.models import shipped
    from ddpmx.trt import build as trt_build
    from ddpmx.trt import library as trt_library

    onnx = shipped.find(model)
    if made_for not in _FOR:
        raise InputError(f"--for {made_for!r}: not one of {' and '.join(_FOR)}")
    if made_for == "mnn":
        plans: dict[str, object] = {
            "--batch": batch,
            "--workspace": workspace,
            "--level": level,
            "--tf32": tf32,
            "--target": target,
        }
        plans |= {"--refit": refit, "--strip": strip, "--library": library, "--timing-cache": timing_cache}
        if used := [flag for flag, value in plans.items() if value not in (None, False)]:
            raise InputError(
                f"{', '.join(used)}: for plans of TensorRT only", hint="leave it out, or leave out --for mnn"
            )
        _build_mnn(onnx, output or shipped.beside(model, ".mnn"), spec, part, low_memory, force)
        return
    if part is not None or low_memory:
        flag = "--part" if part is not None else "--low-memory"
        raise InputError(f"{flag} is for MNN only", hint="--for mnn; a plan has --batch MIN,OPT,MAX and --workspace MB")
    output = output or shipped.beside(model, ".plan")
    if library is not None and library not in _LIBRARIES:
        raise InputError(f"--library {library!r}: not one of {' and '.join(_LIBRARIES)}")
    numbers = None if batch is None else parse_numbers("--batch", batch)
    if numbers is not None and len(numbers) != 3:
        raise InputError(f"--batch {batch!r}: not three numbers (smallest, best, largest)", hint="--batch 1,16,64")
    options = trt_build.BuildOptions(
        batch=None if numbers is None else (numbers[0], numbers[1], numbers[2]),
        targets=tuple(part.strip() for part in target.split(",")) if target else (),
        workspace=None if workspace is None else workspace << 20,
        level=level,
        tf32=tf32,
        refit=refit,
        strip=strip,
        timing_cache=timing_cache or cache_folder(),
    )
    with phases(f"building {onnx.name}") as progress:
        built = trt_build.build(
            onnx,
            output,
            options,
            spec=model_file.read_spec(spec) if spec is not None else None,
            library=trt_library.load(None if library is None else _LIBRARIES[library]),
            force=force,
            progress=progress,
        )
    show(built, onnx, output)


def _build_mnn(onnx: Path, output: Path, spec: Path | None, part: int | None, low_memory: bool, force: bool) -> None:
    from ddpmx.formats import model_file
    from ddpmx.mnn import build as mnn_build

    with busy(f"converting {onnx.name}"):
        built = mnn_build.build(
            onnx,
            output,
            spec=model_file.read_spec(spec) if spec is not None else None,
            part=part,
            low_memory=low_memory,
            force=force,
        )
    if built.reused:
        say(f"{output} is up to date, made from this {onnx.name} with these settings (--force makes it again)")
        return
    record = built.info.record
    together = f"{record.part} images in a call" if record.part > 1 else "one image in a call"
    together += ", in little memory" * (record.memory == "low")
    say(f"{onnx} → {output}: MNN {record.version}, {together}; {megabytes(output)} in {built.seconds:.1f} s")


def show(built: object, onnx: Path, output: Path) -> None:
    """Print the result of a build."""
    from ddpmx.trt.build import Built

    assert isinstance(built, Built)
    record = built.info.engine
    if built.reused:
        say(f"{output} is up to date, built from this {onnx.name} with these settings (--force builds it again)")
        return
    tf32 = "on" if record.options["tf32"] else "off"
    say(
        f"{onnx} → {output}: {record.flavour} {record.version} for SM {', '.join(record.targets)}, batch "
        f"{'…'.join(map(str, (record.batch[0], record.batch[2])))} (best at {record.batch[1]}), TF32 {tf32}; "
        f"{megabytes(output)} in {built.seconds:.1f} s"
    )
    say(f"precision: {built.precision}")


def note_missing(name: str | os.PathLike[str]) -> None:
    """Print how to build a plan elsewhere, if there is no TensorRT."""
    command = f"ddpmx build {shlex.quote(os.fspath(name))}"
    say(f"no plan, since TensorRT is not installed here: `{command}` builds one on the target machine")
