"""`ddpmx`: puts the commands together, and turns every DdpmxError into a message and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ddpmx.errors import DdpmxError
from ddpmx_cli import export, generate, train
from ddpmx_cli.console import complain, say

app = typer.Typer(
    name="ddpmx",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=generate.EXAMPLES)(generate.generate)


def _version(wanted: bool) -> None:
    if wanted:
        import ddpmx

        say(f"ddpmx {ddpmx.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """DDPMs that leave the notebook: train one, export it to ONNX, run the whole reverse chain without torch."""


def run() -> None:
    """The entry point. Exit codes: 0 done, 2 a bad input or an output that failed, 130 stopped by Ctrl-C."""
    try:
        app()
    except DdpmxError as error:
        complain(error)
        sys.exit(2)


if __name__ == "__main__":
    run()
