"""`ddpmx`: collects the commands, and turns every DdpmxError into a message and exit code 2."""

from __future__ import annotations

import functools
import io
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from ddpmx.errors import DdpmxError
from ddpmx_cli import (
    adopt,
    bench,
    build,
    compress,
    console,
    convert,
    decompress,
    denoise,
    doctor,
    eval_,
    export,
    generate,
    import_,
    info,
    inpaint,
    interpolate,
    page,
    parity,
    plot,
    score_,
    serve,
    signals,
    train,
    triton,
)
from ddpmx_cli.console import complain, say
from ddpmx_cli.paths import PathCommand

_AFTER = {"eval": "parity", "score": "interpolate"}


class _InOrder(TyperGroup):
    """The commands in the order in which they are used; Typer lists groups first."""

    def list_commands(self, ctx: object) -> list[str]:
        """The names, each group after a command that it belongs to."""
        names = [name for name in self.commands if name not in _AFTER]
        for group, command in _AFTER.items():
            names.insert(names.index(command) + 1, group)
        return names


app = typer.Typer(
    name="ddpmx",
    cls=_InOrder,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_command = functools.partial(app.command, cls=PathCommand)
_command(epilog=train.EXAMPLES)(train.train)
_command(epilog=plot.EXAMPLES)(plot.plot)
_command(epilog=export.EXAMPLES)(export.export)
_command(epilog=build.EXAMPLES)(build.build)
_command(epilog=generate.EXAMPLES)(generate.generate)
_command(epilog=denoise.EXAMPLES)(denoise.denoise)
_command(epilog=inpaint.EXAMPLES)(inpaint.inpaint)
_command(epilog=interpolate.EXAMPLES)(interpolate.interpolate)
_command(epilog=compress.EXAMPLES)(compress.compress)
_command(epilog=decompress.EXAMPLES)(decompress.decompress)
_command(epilog=page.EXAMPLES)(page.page)
_command(epilog=serve.EXAMPLES)(serve.serve)
_command(epilog=triton.EXAMPLES)(triton.triton)
_command(epilog=parity.EXAMPLES)(parity.parity)
app.add_typer(eval_.app, name="eval")
app.add_typer(score_.app, name="score")
_command("import", epilog=import_.EXAMPLES)(import_.import_)
_command(epilog=convert.EXAMPLES)(convert.convert)
_command(epilog=adopt.EXAMPLES)(adopt.adopt)
_command(epilog=bench.EXAMPLES)(bench.bench)
_command(epilog=info.EXAMPLES)(info.info)
_command(epilog=doctor.EXAMPLES)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        import ddpmx

        say(f"ddpmx {ddpmx.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """DDPMs that leave the notebook: train one, export it to ONNX, run the whole reverse chain without torch."""


def run() -> None:
    """The entry point.

    Exit codes: 0 done, 1 parity does not hold, 2 an error, 130 and 143 stopped by a signal. After a signal an error has no
    words: it is what foreign code made of the interruption.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on a terminal that cannot show ᾱ
    signals.install()
    code: object = 0
    try:
        app()
    except SystemExit as end:
        code = 2 if console.output_failed and not end.code else end.code
    except BaseException as error:
        if not signals.raised:
            sys.exit(_explain(error))
    sys.exit(code if signals.received is None else 128 + signals.received)  # type: ignore[arg-type]


def _explain(error: BaseException) -> int:
    """Print an error; the exit code. What is nobody's fault but ours is raised again, as a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, MemoryError):
        error = DdpmxError(
            "out of memory", note=str(error) or None, hint="fewer images, or a smaller --batch or network"
        )
    elif isinstance(error, ImportError):
        error = DdpmxError("a package that ddpmx needs is missing", note=str(error), hint="install ddpmx again")
    elif isinstance(error, OSError):
        error = DdpmxError(f"{error.filename or 'a file'}: {error.strerror or error}")
    if not isinstance(error, DdpmxError):
        raise error
    complain(error)
    return 2


if __name__ == "__main__":
    run()
