"""`ddpmx info`."""

from __future__ import annotations

import json
from typing import Annotated, Any

from typer import Argument, Option

from ddpmx.sampling.pixels import size_text
from ddpmx_cli.console import plain, say

EXAMPLES = """
Examples:\n
  ddpmx info model.plan\n
  ddpmx info runs/photos --json\n
  ddpmx info samples/00003.png       # which model, seed and sampler drew it
"""


def info(
    file: Annotated[
        str,
        Argument(help="A run or checkpoint, a model.onnx, .plan or .mnn, a PNG of ddpmx, or a model that comes along."),
    ],
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a file is, from its bytes alone: no library or GPU is needed."""
    from ddpmx.formats.describe import describe

    values = describe(file)
    if as_json:
        say(json.dumps(values, indent=2))
        return
    say(f"{file}: {_KINDS[values['kind']]}, {_size(values['bytes'])}")
    if values["note"]:
        say(f"  Note: {values['note']}")
    for label, value in _lines(values):
        say(f"  {label + ':':<12} {plain(value)}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _conditioning(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """The network's conditioning inputs."""
    lines = []
    if (classes := spec.get("classes")) is not None:
        none = f'; {classes} is "no class" (guidance)' if spec.get("null_class") else ""
        names = spec.get("class_names")
        which = ": " + ", ".join(f"{i} {name}" for i, name in enumerate(names)) if names else f", 0…{classes - 1}"
        lines.append(("classes", f"{classes}{which}{none}"))
    if spec.get("self_condition"):
        lines.append(("takes", "x̂_0 of the step before (self-conditioning)"))
    if (channels := spec.get("condition")) is not None:
        lines.append(("condition", f"{channels} channel{'s' if channels > 1 else ''} of the image's size"))
    return lines


def _architecture(network: Any) -> str:
    """The network of a checkpoint in a line: its type, and its numbers where they are not the usual ones."""
    if not isinstance(network, dict):
        return "not stated"
    rest = {
        name: value for name, value in network.items() if name not in ("type", "in_channels", "out_channels", "size")
    }
    shown = []
    for name, value in rest.items():
        if value is True or (isinstance(value, (int, float, str)) and not isinstance(value, bool)):
            shown.append(
                name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            )
        elif isinstance(value, list):
            shown.append(f"{name} {','.join(map(str, value)) or 'none'}")
    return f"{network.get('type', 'unet')}: {'; '.join(shown)}"


def _training(training: dict[str, Any]) -> list[tuple[str, str]]:
    """What a checkpoint says of its training."""
    lines = []
    if "from" in training:
        lines.append(("imported", f"from {training['from']}"))
    if "begun_from" in training:
        lines.append(("begun with", f"the weights of {training['begun_from']}"))
    if training.get("step"):
        batch = f" of {training['batch']} images" if "batch" in training else ""
        lines.append(("trained", f"{training['step']:,} steps{batch}"))
    if "loss" in training:
        lines.append(("loss", f"{training['loss']:.4f}, a running mean"))
    if "data" in training:
        count = f"{training['images']:,} images of " if "images" in training else ""
        mirrored = {True: ", half of them mirrored", False: ", none mirrored", None: ""}[training.get("mirrored")]
        lines.append(("data", f"{count}{training['data']}{mirrored}"))
    return lines


def _compressed(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Compressed images."""
    (height, width), c, n = values["size"], values["channels"], values["images"]
    bits = 8 * values["bytes"] / (n * c * height * width)
    kind = "lossless" if values["lossless"] else "lossy"
    here, steps = values["steps_here"], values["steps"]
    down = "" if values["stop"] is None else f", down to t = {values['stop']}"
    return [
        (
            "images",
            f"{n} of {size_text(height, width)}, {c} channel{'s' if c > 1 else ''}, {kind}, {bits:.3f} bits/dim",
        ),
        ("states", (f"{here} of {steps}" if here < steps else str(steps)) + down),
        ("sections", (", ".join(str(section["bytes"]) for section in values["sections"]) or "0") + " bytes"),
        ("model", f"weights sha256 {values['model']}…, {values['precision']}, computed in {values['arithmetic']}"),
        ("seed", str(values["seed"])),
    ]


def _noise(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The noise of images."""
    (height, width), c, n = values["size"], values["channels"], values["images"]
    way = "the ODE" if values["by"] == "ode" else f"ddim of {values['steps']} steps, {values['spacing']} spacing"
    names = values["names"]
    return [
        ("x_T of", f"{n} image{'s' * (n != 1)} of {size_text(height, width)}, {c} channel{'s' * (c != 1)}, by {way}"),
        ("images", ", ".join(names[:5]) + (f", … and {n - 5} more" if n > 5 else "")),
        *([("class", values["label"])] if values["label"] else []),
        ("model", f"weights sha256 {values['model']}"),
    ]


_KINDS = {
    "checkpoint": "a checkpoint",
    "onnx": "an ONNX file",
    "plan": "a TensorRT plan",
    "mnn": "an MNN model",
    "png": "a PNG",
    "compressed": "compressed images",
    "noise": "the noise of images",
}


def _lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if spec := values["spec"]:
        c, height, width = spec["shape"]
        clipped = "not clipped" if spec["clip"] is None else f"clipped to ±{spec['clip']:g}"
        schedule = f"an array of β (CRC {spec['betas']})" if "betas" in spec else spec["schedule"]
        params = ", ".join(f"{name} {value:g}" for name, value in spec["schedule_params"].items())
        lines += [
            ("image", f"{size_text(height, width)}, {c} channel{'s' if c > 1 else ''}"),
            ("chain", f"T = {spec['timesteps']}, {schedule}{f' ({params})' if params else ''}"),
            ("predicts", f"{spec['prediction']}; variance {spec['variance']}; x̂_0 {clipped}"),
            *_conditioning(spec),
            ("precision", spec["precision"]),
            ("weights", f"sha256 {spec['weights'] or 'not stated'}"),
        ]
    if values["kind"] == "checkpoint":
        lines.append(("checkpoint", values["checkpoint"]))
        lines.append(("network", _architecture(values["network"])))
        for name, count in values["parameters"].items():
            moments = name.startswith("training.")
            lines.append(("Adam", f"{count:,} moments") if moments else (name.split(".")[0], f"{count:,} parameters"))
        lines += _training(values["training"])
    elif values["kind"] == "onnx":
        made_of = values.get("made_of") or {}
        if "network" in made_of:
            lines.append(("network", _architecture(made_of["network"])))
        of = f"{made_of['parameters']:,} weights, " if "parameters" in made_of else ""
        lines.append(("parameters", f"{of}{values['parameters']:,} numbers stored"))
        lines += _training(made_of.get("training", {}))
        lines.append(("opset", str(values["opset"])))
        lines += [("input", f"{name}: {tensor}") for name, tensor in values["inputs"].items()]
        lines += [("output", f"{name}: {tensor}") for name, tensor in values["outputs"].items()]
        lines += [
            ("stored", f"{size / 1e6:.1f} MB of {kind}") for kind, size in values["weights"].items() if size > 1e4
        ]
        lines += [
            ("rounded", f"{one['bytes'] / 1e6:.1f} MB of {one['from']} to {one['to']}, when it is loaded")
            for one in values["rounded"]
            if one["bytes"] > 1e4
        ]
        lines += [("data file", name) for name in values["external"]]
    elif values["kind"] == "png":
        height, width = values["size"]
        lines.append(("image", size_text(height, width)))
        for keyword, text in values["text"].items():
            lines.append(("drawn by", text) if keyword == "Software" else (keyword, text))
    elif values["kind"] == "compressed":
        lines += _compressed(values)
    elif values["kind"] == "noise":
        lines += _noise(values)
    elif values["kind"] == "mnn":
        if record := values.get("record"):
            lines += [
                ("made with", f"MNN {record['version']}"),
                ("memory", record["memory"]),
                ("in a call", f"{record['part']} image{'s' if record['part'] > 1 else ''}, at most"),
                ("from", f"{record['source']}, sha256 {record['onnx']}"),
            ]
    else:
        lines.append(("built with", f"{values['flavour']} {values['version']}"))
        if engine := values.get("engine"):
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
