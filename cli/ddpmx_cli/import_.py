"""`ddpmx import`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ddpmx.diffusion.last_step import signal_warning
from ddpmx.errors import BackendError, InputError
from ddpmx_cli.console import busy, counting, parse_size, plain, say

if TYPE_CHECKING:
    from ddpm_export.importers.registry import CheckpointContents, Imported, Options, Question

EXAMPLES = """
Examples:\n
  ddpmx import hf:google/ddpm-cifar10-32 -o runs/cifar   # downloaded, if huggingface_hub is installed\n
  ddpmx import model-100.pt -o runs/flowers --size 64    # the names of its tensors show the project\n
  ddpmx import ema_0.9999_500000.pt --model cifar10      # a published set of flags\n
  ddpmx import ckpt.pt --probe photos/                   # real images decide open settings
"""

_SETTINGS = "Settings that the file does not have"
FLAGS = ("schedule", "timesteps", "prediction", "variance", "clip", "heads", "head_channels", "size", "model")
"""Settings with a flag of their own; all others are set by --set."""


def import_(
    path: Annotated[str, Argument(help="A checkpoint: a file, a folder, or hf:ORGANISATION/NAME.")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder of the run to write.  \\[default: runs/NAME]")
    ] = None,
    source: Annotated[
        str,
        Option(
            "--from",
            metavar="NAME",
            help="The project it is from: auto, diffusers, lucidrains, openai, ho-tf, pesser, ddim, pytorch-ddpm, "
            "ddpm-torch, score-sde.",
        ),
    ] = "auto",
    weights: Annotated[
        str,
        Option(
            help="ema (averaged) or raw, where the file has both; or the PREFIX of the tensors, where it has more.",
            metavar="ema|raw|PREFIX",
        ),
    ] = "ema",
    probe: Annotated[
        Path | None,
        Option(metavar="FOLDER|NPZ", help="Real images, to decide open settings by the error of ε."),
    ] = None,
    model: Annotated[
        str | None, Option(help="A published model, by name.", metavar="NAME", rich_help_panel=_SETTINGS)
    ] = None,
    schedule: Annotated[
        str | None, Option(help="Noise schedule β_t.", metavar="NAME", rich_help_panel=_SETTINGS)
    ] = None,
    timesteps: Annotated[
        str | None, Option("--timesteps", "-T", help="Number of timesteps, T.", rich_help_panel=_SETTINGS)
    ] = None,
    prediction: Annotated[
        str | None, Option(help="What the network predicts: eps, x0, v.", metavar="NAME", rich_help_panel=_SETTINGS)
    ] = None,
    variance: Annotated[
        str | None, Option(help="Variance σ² of the reverse step.", metavar="NAME", rich_help_panel=_SETTINGS)
    ] = None,
    clip: Annotated[
        str | None, Option(help="Largest |x̂_0|, or none.", metavar="NUMBER|none", rich_help_panel=_SETTINGS)
    ] = None,
    heads: Annotated[str | None, Option(help="Heads of each attention.", rich_help_panel=_SETTINGS)] = None,
    head_channels: Annotated[str | None, Option(help="Width of one head.", rich_help_panel=_SETTINGS)] = None,
    size: Annotated[
        str | None, Option(help="Size of the images: 64, or 64x48 (height first).", rich_help_panel=_SETTINGS)
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", help="Any other setting; may be repeated.", metavar="NAME=VALUE", rich_help_panel=_SETTINGS),
    ] = None,
) -> None:
    """Import another project's checkpoint as a run, which all other commands take.

    Each setting comes from the flags, from the file and those beside it, or from what that project's code always does,
    and the source is printed. What has no source is asked for, or decided on real images;
    what the project's code always does is printed as assumed.
    """
    try:
        with busy("loading torch"):
            from ddpm_export.importers import registry as importers
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError("import needs torch", note=str(error), hint="pip install torch safetensors") from error
    flags = {
        "schedule": schedule,
        "timesteps": timesteps,
        "prediction": prediction,
        "variance": variance,
        "clip": clip,
        "heads": heads,
        "head_channels": head_channels,
        "size": parse_size(size),
        "model": model,
    }
    values: dict[str, object] = {name: value for name, value in flags.items() if value is not None}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set {setting!r} is not a setting", hint="--set NAME=VALUE")
        if name in values:
            raise InputError(f"{name} is set twice")
        values[name] = value
    if source != "auto" and source not in importers.MODULES:
        raise InputError(f"--from {source!r}: not one of auto, {', '.join(importers.MODULES)}")
    options = importers.Options(values, weights)
    run = output if output is not None else Path("runs") / _name(path)
    with busy(f"reading {path}"):
        contents = importers.open_checkpoint(path)
        imported = importers.import_checkpoint(path, options, source=source, contents=contents)
    if probe is not None and imported.questions:
        imported = _probe(contents, options, source, imported, probe)
    _show(imported)
    if imported.questions:
        raise _unknown(imported.questions)
    if warning := signal_warning(imported.spec.make_schedule()):
        say(f"Note: {warning}. Images come out so from the project's own code as well, if these are its settings")
    with busy(f"writing {run}"):
        written = importers.save_run(imported, run)
    say(f"{plain(path)} → {written}")
    say(f"next: ddpmx export {shlex.quote(str(run))}")


def _name(path: str) -> str:
    """The default name of the run for a path or an id."""
    last = path.rstrip("/\\").replace("\\", "/").split("/")[-1]
    return Path(last).stem or "imported"


def _show(imported: Imported) -> None:
    """Print every setting and where it came from."""
    width = max(len(fact.name) for fact in imported.facts)
    for fact in imported.facts:
        why = f"assumed: {fact.source}" if fact.assumed else fact.source
        say(f"  {fact.name:<{width}}  {plain(_text(fact.value))}  ({plain(why)})")


def _unknown(questions: tuple[Question, ...]) -> InputError:
    """The error for open settings: the flag of each, and its candidates."""
    flags = "; ".join(
        f"{flag(question.name)} {'|'.join(_text(value) for value in question.candidates)}".replace("= ", "=", 1)
        + (f" ({question.why})" if question.why else "")
        for question in questions
    )
    probed = [question.name for question in questions if question.probed]
    return InputError(
        f"the file does not have these settings: {', '.join(question.name for question in questions)}",
        note=flags,
        hint="set them" + (f", or let real images decide {', '.join(probed)}: --probe IMAGES" if probed else ""),
    )


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}" if name in FLAGS else f"--set {name}="


def _text(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    return "none" if value is None else str(value)


def _probe(contents: CheckpointContents, options: Options, source: str, imported: Imported, data: Path) -> Imported:
    """Decide the open settings on real images.

    Raises:
        InputError: images cannot decide one of them, or do not fit the network.
    """
    import numpy as np

    from ddpm_export.importers import probe
    from ddpm_export.importers import registry as importers
    from ddpm_export.training.data import are_files, load_dataset

    questions = [question for question in imported.questions if question.probed]
    if len(questions) < len(imported.questions):
        raise _unknown(tuple(question for question in imported.questions if not question.probed))
    channels, *size = imported.spec.shape
    folder = are_files(data)
    images = load_dataset(
        data, size=(size[0], size[1]) if folder else None, channels=channels if folder else None
    ).images
    if images.shape[1:] != (*size, channels):
        raise InputError(
            f"{data}: images of {images.shape[1]}×{images.shape[2]}×{images.shape[3]}",
            note=f"the network takes {size[0]}×{size[1]}×{channels}",
        )

    def read(tried: Options) -> Imported:
        return importers.import_checkpoint(contents.path, tried, source=source, contents=contents)

    with counting("trying candidates", unit="candidates") as progress:
        judged = probe.probe(read, options, questions, lambda _: images, progress)
    say(f"mean square of ε − ε̂ on {min(len(images), 16)} images of {data}, by that of an output of 0; mean, and at ᾱ =")
    names = [question.name for question in questions]
    say("  " + "  ".join(["mean  ", *(f"{level:<6g}" for level in probe.LEVELS), *names]))
    for candidate in judged:
        numbers = [candidate.error, *np.asarray(candidate.errors)]
        values = [f"{_text(candidate.values[name]):<{len(name)}}" for name in names]
        say("  " + "  ".join([*(f"{number:<6.3g}" for number in numbers), *values]))
    winner = probe.decide(judged)
    decided = read(options.with_values(winner.values))
    facts = tuple(
        importers.Fact(fact.name, fact.value, f"the smallest error of ε on {data}") if fact.name in names else fact
        for fact in decided.facts
    )
    return importers.Imported(**{**vars(decided), "facts": facts})
