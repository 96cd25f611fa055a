"""`ddpmx info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ddpmx_cli.console import plain, say

EXAMPLES = """
Examples:\n
  ddpmx info model.plan\n
  ddpmx info runs/photos --json
"""


def info(
    file: Annotated[Path, Argument(help="A run or checkpoint, an ONNX file, or a plan.")],
    as_json: Annotated[bool, Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    """Say what a file is: from its bytes alone, with no library and no GPU."""
    from ddpmx.formats.describe import describe

    told = describe(file)
    if as_json:
        say(json.dumps(told, indent=2))
        return
    say(f"{file}: {_KINDS[told['kind']]}, {told['bytes'] / 1e6:.1f} MB")
    if told["note"]:
        say(f"  Note: {told['note']}")
    for label, value in _lines(told):
        say(f"  {label + ':':<12} {plain(value)}")


def _told(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """What the network is told beside x and t."""
    lines = []
    if (classes := spec.get("classes")) is not None:
        lines.append(("classes", f"{classes}, 0…{classes - 1}"))
    if spec.get("self_condition"):
        lines.append(("conditions", "itself: it is told x̂_0 of the step before"))
    if (channels := spec.get("condition")) is not None:
        lines.append(("condition", f"{channels} channel{'s' if channels > 1 else ''} of the image's size"))
    return lines


_KINDS = {"checkpoint": "a checkpoint", "onnx": "an ONNX file", "plan": "a TensorRT plan"}


def _lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if spec := told["spec"]:
        c, height, width = spec["shape"]
        clipped = "not clipped" if spec["clip"] is None else f"clipped to ±{spec['clip']:g}"
        schedule = f"an array of β (CRC {spec['betas']})" if "betas" in spec else spec["schedule"]
        params = ", ".join(f"{name} {value:g}" for name, value in spec["schedule_params"].items())
        lines += [
            ("image", f"{height}×{width}, {c} channel{'s' if c > 1 else ''}"),
            ("chain", f"T = {spec['timesteps']}, {schedule}{f' ({params})' if params else ''}"),
            ("predicts", f"{spec['prediction']}; variance {spec['variance']}; x̂_0 {clipped}"),
            *_told(spec),
            ("precision", spec["precision"]),
            ("weights", f"sha256 {spec['weights'] or 'not stated'}"),
        ]
    if told["kind"] == "checkpoint":
        lines.append(("checkpoint", told["checkpoint"]))
        lines += [(name.split(".")[0], f"{count:,} numbers") for name, count in told["parameters"].items()]
    elif told["kind"] == "onnx":
        lines.append(("opset", str(told["opset"])))
        lines += [("input", f"{name}: {tensor}") for name, tensor in told["inputs"].items()]
        lines += [("output", f"{name}: {tensor}") for name, tensor in told["outputs"].items()]
        lines += [("stored", f"{size / 1e6:.1f} MB of {kind}") for kind, size in told["weights"].items() if size > 1e4]
        lines += [("beside it", name) for name in told["external"]]
    else:
        lines.append(("built with", f"{told['flavour']} {told['version']}"))
        if engine := told.get("engine"):
            smallest, best, largest = engine["batch"]
            options = ", ".join(f"{name} {value}" for name, value in engine["options"].items() if value)
            lines += [
                ("for", f"SM {', '.join(engine['targets'])}, {engine['platform']}"),
                ("batch", f"{smallest}…{largest}, best at {best}"),
                ("from", f"{engine['source']}, sha256 {engine['onnx']}"),
                ("options", options or "none"),
            ]
    if spec and spec["ddpmx"]:
        lines.append(("written by", f"ddpmx {spec['ddpmx']}"))
    return lines
