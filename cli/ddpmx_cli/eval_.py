"""`ddpmx eval`: the commands that judge a model by images."""

from __future__ import annotations

import typer

from ddpmx_cli import fid, nll, swd
from ddpmx_cli.paths import PathCommand

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.command(cls=PathCommand, epilog=nll.EXAMPLES)(nll.nll)
app.command(cls=PathCommand, epilog=swd.EXAMPLES)(swd.swd)
app.command(cls=PathCommand, epilog=fid.EXAMPLES)(fid.fid)


@app.callback()
def _eval() -> None:
    """Judge a model by images: how likely real ones are under it, how far drawn ones are from them."""
