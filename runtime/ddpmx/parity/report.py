"""Writes a parity report: report.json, report.md, and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ddpmx
from ddpmx.errors import OutputError, SpecError
from ddpmx.formats.atomic import exchange, make_folder, staging, sync_folder
from ddpmx.formats.envelope import parse_json
from ddpmx.parity.check import Check
from ddpmx.parity.ladder import ParityReport
from ddpmx.parity.reduced import RANGE

_FILES = ("report.md", "report.json", "error.png", "chain.png", "levels.png", "images.png", "polygraphy.json")

_LAYERS = 10
"""So many layers are listed with their largest activation, in report.md; report.json has all."""

_MEANING = {
    "identical rows": "The same image in every row of a batch: all rows must give the same output.",
    "batch against one by one": "Images together, then each alone: the other images of a batch must not matter.",
    "ε, RMS": "The network's output at noised images x_t over all of 0…T−1, against PyTorch's float32.",
    "ε, largest error": "The same, for the worst single value: a fault in one corner cannot hide in an average.",
    "v, RMS": "The second output, which sets how much noise each step adds: from −1, the least, to 1, the most.",
    "v, largest error": "The same, for the worst single value.",
    "one step": "The error of x_{t−1} that follows from the error of ε.",
    "variational bound": "The change of the likelihood that the model assigns to the images: all terms but L_0.",
    "distortion": "The rest of it, L_0: the bits of an image's 256 levels once x_t at t = 0 is known.",
    "teacher-forced chain, RMS of ε": "Along PyTorch's own chain: every step starts at PyTorch's state.",
    "teacher-forced chain, RMS of v": "The same, for the second output.",
    "teacher-forced chain, RMS of x": "The same, after the step.",
    "executor": "The chain on the GPU against the chain in NumPy, with the same network: every value must be equal.",
    "light judge": "The sliced Wasserstein distance between these images, which is not FID. Against any real images the "
    "two are judged differently by no more than this.",
    "free chain": "From the same x_T and with the same noise, without correction: the pixels of the final images, without "
    "those that are black or white on both sides.",
    RANGE: "Half precision ends at 65504. Found in the module, over every input of these checks.",
    "module in real": "What half precision or bfloat16 does where the hardware computes in it.",
}


def to_json(report: ParityReport, file: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report as plain JSON values, without the images."""
    reference = report.reference
    return {
        "ddpmx": ddpmx.__version__,
        "file": Path(file).name,
        "passed": report.passed,
        "verdict": report.verdict,
        "precision": report.spec.precision,
        "ran_on": report.ran_on,
        "spec": report.spec.to_json(),
        "reference": None
        if reference is None
        else {
            "made_with": reference.made_with,
            "images": "the user's" if reference.real else "the network's own",
            "loss": reference.loss,
            "scale": reference.scale,
            "timesteps": len(reference.t),
            "chain": reference.steps,
            "chain_images": len(reference.final),
            "chain_states": len(reference.at),
            "ignores_time": reference.ignores_time,
        },
        "reduced": None if reference is None or reference.reduced is None else reference.reduced.to_json(),
        "rungs": [_check(check) for check in report.checks],
        "curves": {name: [_number(v) for v in values] for name, values in report.curves.items()},
        **(extra or {}),
    }


def write(
    report: ParityReport,
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    extra: dict[str, Any] | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write the report about ``file`` into ``folder``: all of it, or nothing.

    Args:
        report: the result of :func:`ddpmx.parity.ladder.run_ladder`.
        file: the model file; its name appears in the report.
        folder: see :func:`check_folder`.
        extra: more entries for report.json; ``engine`` and ``polygraphy`` also appear in report.md.
        attachments: more files for the folder, name → content.

    Returns:
        The files written, report.md first. Plots need matplotlib; without it they are left out, and the text says so.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = check_folder(folder)
    with staging(folder, folder) as part:
        pictures = _pictures(report, part)
        (part / "report.json").write_text(json.dumps(to_json(report, file, extra), indent=2, allow_nan=False) + "\n")
        text = to_markdown(report, file, pictures, extra)
        (part / "report.md").write_text(text, encoding="utf-8", errors="replace")  # the file's name may be no Unicode
        for name, content in (attachments or {}).items():
            (part / name).write_bytes(content)
        sync_folder(part)
        names = ["report.md", "report.json", *pictures, *(attachments or {})]
        exchange(folder, part, names, instead_of=_FILES)
    return [folder / name for name in names]


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Create the folder of a report, and check that only an earlier report would be replaced.

    Raises:
        OutputError: it cannot be created or written to, or holds files with a report's names that are not of a report.
    """
    folder = make_folder(folder)
    there = [name for name in _FILES if os.path.lexists(folder / name)]
    if there and not _is_report(folder / "report.json"):
        raise OutputError(
            f"refusing to overwrite {folder / there[0]}: not part of a report",
            hint="choose another folder with --report",
        )
    return folder


def to_markdown(
    report: ParityReport, file: str | os.PathLike[str], pictures: dict[str, str], extra: dict[str, Any] | None = None
) -> str:
    """The report as Markdown. ``pictures``: {file name: caption}."""
    reference, spec = report.reference, report.spec
    c, height, width = spec.shape
    lines = [
        f"# {Path(file).name}: {_title(report)}",
        "",
        report.verdict + ".",
        "",
        f"- file: {spec.precision}, {height}×{width}×{c}, T = {spec.timesteps}, {spec.schedule}, "
        f"predicts {spec.prediction}",
        f"- ran on: {report.ran_on}",
    ]
    if engine := (extra or {}).get("engine"):
        lines.append(
            f"- engine: {engine['flavour']} {engine['version']}, batches {engine['batch'][0]}…{engine['batch'][2]}, "
            f"TF32 {'on' if engine['options'].get('tf32') else 'off'}, plan sha256 {engine['sha256']}"
        )
    if reference is None:
        lines.append("- compared with: **nothing but itself**; whether it is the PyTorch model is NOT VERIFIED")
    else:
        images = "real images" if reference.real else "the network's own images"
        lines += [
            f"- compared with: float32 of {reference.made_with}, on {images}, {len(reference.t)} timesteps from 0 to "
            f"{spec.timesteps - 1}, a chain of {reference.steps} steps",
            f"- unit of error: the RMS of PyTorch's outputs, {reference.scale:.3f}",
        ]
        if reference.ignores_time:
            lines.append("- the network ignores t, on purpose: its export states so")
        if reference.reduced is not None:
            lines.append(f"- also judged, at the export: {reference.reduced.made_with}")
    lines += ["", "| | measured | bound | |", "|---|---|---|---|"]
    for check in report.checks:
        figure = "—" if check.skipped else f"{check.value:.3%}" if check.at_least else f"{check.value:.2e}"
        bound = "—" if check.skipped else f"≥ {check.bound:.1%}" if check.at_least else f"≤ {check.bound:.2e}"
        mark = "not judged" if check.skipped else "holds" if check.passed else "**FAILS**"
        lines.append(f"| {check.title} | {figure} | {bound} | {mark} |")
    if extra is not None and "polygraphy" in extra:
        lines += ["", f"Polygraphy on ε: {extra['polygraphy']['verdict']}; its results are in polygraphy.json."]
    lines += ["", "## What the checks mean", ""]
    for check in report.checks:
        meaning = next((text for start, text in _MEANING.items() if check.name.startswith(start)), "")
        detail = check.skipped or check.worst
        bound = "" if check.skipped or not check.why else f" The bound: {check.why}."
        lines.append(
            f"- **{check.title}.** {meaning}{bound}" + (f" *{detail[0].upper()}{detail[1:]}.*" if detail else "")
        )
    if reference is not None and reference.reduced is not None and reference.reduced.largest:
        lines += ["", "## The largest numbers in half precision", "", "| layer | largest activation |", "|---|---|"]
        if reference.reduced.precision == "bf16":
            lines[-4] = "## The largest numbers in bfloat16"
        lines += [f"| {name} | {value:.4g} |" for name, value in list(reference.reduced.largest.items())[:_LAYERS]]
    for name, caption in pictures.items():
        lines += ["", f"![{caption}]({name})", "", f"*{caption}*"]
    if reference is not None and "error.png" not in pictures:
        lines += ["", "*No plots: matplotlib is not installed (`pip install matplotlib`), or cannot draw here.*"]
    lines += [
        "",
        "## What this does not show",
        "",
        "- Other devices, other batch sizes than those run here, and other builds of the same engine: parity holds for "
        "one file on one machine.",
        "- Whether the images are good: that depends on the training. FID needs thousands of images.",
        "",
        f"*ddpmx {ddpmx.__version__}*",
        "",
    ]
    return "\n".join(lines)


def _is_report(path: Path) -> bool:
    try:
        values = parse_json(path.read_bytes()) if path.is_file() else None
    except (OSError, SpecError):
        return False
    return isinstance(values, dict) and {"ddpmx", "rungs"} <= values.keys()


def _title(report: ParityReport) -> str:
    if not report.judged:
        return "NOT VERIFIED"
    if not report.passed:
        return "FAILED"
    return "passed" if report.reference is not None else "consistent with itself"


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "judged": check.judged,
        "value": _number(check.value),
        "bound": _number(check.bound),
        "bound_follows_from": check.why,
        "at_least": check.at_least,
        "passed": check.passed,
        "worst": check.worst,
        "skipped": check.skipped,
    }


def _number(value: float) -> float | None:
    """``value``, or None for NaN and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _pictures(report: ParityReport, folder: Path) -> dict[str, str]:
    """Draw the pictures that can be drawn here. {file name: caption}"""
    if report.reference is None:
        return {}
    made: dict[str, str] = {}
    if report.finals is not None:
        from ddpmx.images.writers import grid, png, zoom_for

        theirs = report.reference.final.transpose(0, 2, 3, 1)
        apart = np.abs(report.finals.astype(np.int16) - theirs)
        shown = np.clip(apart * 64, 0, 255).astype(np.uint8)
        if theirs.shape[-1] in (1, 3, 4):
            if theirs.shape[-1] == 4:
                shown[..., 3] = 255  # opaque: differences of transparency are not shown
            sheet = grid(np.concatenate([theirs, report.finals, shown]), columns=len(theirs))
            (folder / "images.png").write_bytes(png(sheet, zoom=zoom_for(min(sheet.shape[:2]), at_least=256)))
            made["images.png"] = (
                "The images of the free chain: PyTorch's above, the file's in the middle, their difference below, "
                "64 times brighter. Black is equal."
            )
    try:
        from ddpmx.parity import plots

        return {**plots.draw(report, folder), **made}
    except OSError:
        raise
    except Exception:  # matplotlib is missing or cannot draw: the report is valid without plots
        return made
