"""`ddpmx page`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx.models.shipped import SHIPPED
from ddpmx_cli import flags
from ddpmx_cli.console import say

EXAMPLES = """
Examples:\n
  ddpmx page garments -o site/     # ONNX Runtime from a public server\n
  ddpmx page model.onnx -o site/ --ort node_modules/onnxruntime-web/dist   # everything in the folder\n
  python -m http.server --directory site 8000                              # look at it: http://localhost:8000
"""


def page(
    file: Annotated[str, Argument(help=f"A model that comes along ({', '.join(SHIPPED)}), or a model.onnx.")],
    out: Annotated[Path, Option("-o", "--out", help="The folder to write; new, or empty.", show_default=False)],
    ort: Annotated[
        Path | None,
        Option(
            help="The folder dist of the npm package onnxruntime-web, of which the page takes what it needs along. "
            "\\[default: it is loaded from cdn.jsdelivr.net]",
            metavar="FOLDER",
        ),
    ] = None,
    name: Annotated[
        str | None, Option(help="The title of the page.  \\[default: the file's name]", metavar="TEXT")
    ] = None,
    spec: flags.Spec = None,
) -> None:
    """Write a static page that runs the whole chain in the visitor's browser; nothing is sent anywhere."""
    from ddpmx.formats import model_file
    from ddpmx.models import shipped
    from ddpmx.page.site import write_site

    path = shipped.find(file)
    described = model_file.read_spec(spec) if spec is not None else None
    written = write_site(path, out, spec=described, name=name, ort=ort)
    size = sum(each.stat().st_size for each in written)
    say(f"{out}: {len(written)} files, {size / 1e6:.1f} MB")
    say(f"look at it: python -m http.server --directory {shlex.quote(str(out))} 8000; then http://localhost:8000")
