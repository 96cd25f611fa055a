"""`ddpmx convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ddpmx.errors import BackendError, InputError
from ddpmx_cli.console import busy, say

if TYPE_CHECKING:
    from ddpm_export.training.checkpoint import Weights

EXAMPLES = """
Examples:\n
  ddpmx convert runs/photos --to diffusers -o photos-diffusers/   # DDPMPipeline.from_pretrained reads it\n
  ddpmx convert runs/cifar --to openai -o cifar-openai/   # a run that was imported from OpenAI's code
"""


def convert(
    run: Annotated[Path, Argument(help="A run, or one of its checkpoints.")],
    to: Annotated[str, Option(help="diffusers, openai or pesser.", metavar="NAME")],
    output: Annotated[Path, Option("--output", "-o", help="The folder to write; new, or empty.")],
    weights: Annotated[str, Option(help="ema (averaged) or raw.", metavar="NAME")] = "ema",
) -> None:
    """Write a checkpoint in another project's format, bit for bit, for its own code to read.

    A network or a chain that the project's code cannot compute is refused.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights!r}: not one of ema and raw")
    try:
        with busy("loading torch"):
            from ddpm_export.importers import registry as importers
            from ddpm_export.training import checkpoint
    except (ImportError, OSError) as error:
        raise BackendError("convert needs torch", note=str(error), hint="pip install torch safetensors") from error
    if to not in importers.WRITERS:
        raise InputError(f"--to {to!r}: not one of {', '.join(importers.WRITERS)}")
    source = checkpoint.resolve(run)
    which: Weights = "raw" if weights == "raw" else "ema"
    with busy(f"converting {source}"):
        network, spec = checkpoint.load_network(source, which)
        importers.convert(importers.Imported("ddpmx", network.config, spec, dict(network.state_dict())), to, output)
    say(f"{source} → {output}")
    for file in sorted(file for file in output.rglob("*") if file.is_file()):
        say(f"  {file.relative_to(output)}")
