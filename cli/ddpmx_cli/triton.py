"""`ddpmx triton`."""

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
  ddpmx triton garments -o repository/                # on the CPU\n
  ddpmx triton model.plan -o repository/ --name cats  # on each GPU, beside other models\n
  tritonserver --model-repository=repository/         # of NVIDIA, with ddpmx installed beside it
"""


def triton(
    file: Annotated[
        str,
        Argument(help=f"A model that comes along ({', '.join(SHIPPED)}), a model.onnx, or a model.plan of TensorRT."),
    ],
    out: Annotated[Path, Option("-o", "--out", help="The repository; it may hold other models.", show_default=False)],
    name: Annotated[
        str | None, Option(help="Of the model there.  \\[default: the file's name]", metavar="TEXT")
    ] = None,
    batch: Annotated[
        int | None, Option(help="Rows of the network's batch.  \\[default: 16, fewer for large images]")
    ] = None,
    instances: Annotated[int, Option(help="Of the chain; for each GPU where it runs on one.", metavar="N")] = 1,
    most_images: Annotated[int, Option(help="Images of one request, at most.", metavar="N")] = 64,
    spec: flags.Spec = None,
    provider: flags.Provider = "cpu",
    threads: flags.Threads = 0,
) -> None:
    """Write a model repository for NVIDIA Triton: the network, and the chain in its Python backend."""
    from ddpmx.models import shipped
    from ddpmx.scale.triton import write_repository

    written = write_repository(
        shipped.find(file),
        out,
        name=name,
        spec=spec,
        provider=provider,
        batch=batch,
        instances=instances,
        threads=threads,
        most_images=most_images,
    )
    folders = sorted({path.relative_to(out).parts[0] for path in written})
    say(f"{out}: {', '.join(folders)}; {sum(path.stat().st_size for path in written) / 1e6:.1f} MB")
    say(f"serve it: tritonserver --model-repository={shlex.quote(str(out))}, where ddpmx is installed for its Python")
