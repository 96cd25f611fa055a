"""Flags that several commands have, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddpmx.models.shipped import SHIPPED
from ddpmx_cli.console import check_threads

WHERE = "Where it runs"
"""Their place in the help."""

Model = Annotated[
    str,
    Argument(help=f"A model that comes along ({', '.join(SHIPPED)}), a model.onnx, model.plan or model.mnn, or a run."),
]
Out = Annotated[Path, Option("-o", "--out", help="FILE.png for one picture, or a folder.", show_default=False)]
Seed = Annotated[int, Option(help="0 … 2**64 − 1. Image i of a seed is always the same.")]
Label = Annotated[str | None, Option(help="The class of all images, for a model with classes: its number or its name.")]
First = Annotated[int, Option(help="Index of the first image.")]
Guidance = Annotated[
    float,
    Option(help="How much more the images are of their class: 1 is as trained.", metavar="W"),
]
Cond = Annotated[
    Path | None,
    Option(
        help="Conditions, repeated in order of the images' index: pictures, or an .npz with "
        "cond float32 \\[N, K, H, W].",
        metavar="FOLDER|FILE",
    ),
]
Batch = Annotated[int | None, Option(help="Images at once.  \\[default: 16, fewer for large images]")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace pictures that no task of ddpmx has written.")]
Spec = Annotated[Path | None, Option(help="spec.json, for an ONNX file that does not describe itself.")]
Provider = Annotated[
    str,
    Option(
        help="What runs an ONNX file: cpu, cuda, tensorrt, rtx, openvino, webgpu, or ONNX Runtime's name. "
        "Where a run is taken: cpu or cuda.",
        metavar="NAME",
        rich_help_panel=WHERE,
    ),
]
Fallback = Annotated[
    bool, Option("--fallback", help="Use the CPU if the provider does not start.", rich_help_panel=WHERE)
]
Threads = Annotated[int, Option(help="CPU threads; 0 for one per core.", callback=check_threads, rich_help_panel=WHERE)]
TrustHostCode = Annotated[
    bool,
    Option(
        "--trust-host-code",
        help="Load a plan that contains code for the CPU, which loading runs.",
        rich_help_panel=WHERE,
    ),
]
