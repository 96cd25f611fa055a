"""`ddpmx bench`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

from typer import Argument, Option

from ddpmx_cli.console import parse_numbers, phases, plain, say
from ddpmx_cli.opened import Where, opens_model

EXAMPLES = """
Examples:\n
  ddpmx bench model.onnx\n
  ddpmx bench model.plan --batch 1,4,16,64 --executor all -o bench.json\n
  ddpmx bench model.onnx --batch 8 --steps 1000     # the whole chain, nothing extrapolated
"""

_WIDTH = 100


@opens_model
def bench(
    file: Annotated[str, Argument(help="A model.onnx, model.plan or model.mnn, or a model that comes along.")],
    batch: Annotated[
        str | None,
        Option(help="Batch sizes.  \\[default: those of 1,4,16,64 that fit; 1,4 on a CPU]", metavar="N,N,…"),
    ] = None,
    executor: Annotated[
        str, Option(help="For a chain on a GPU: auto, all, plain, graph, while. On a CPU: host.", metavar="NAME")
    ] = "auto",
    steps: Annotated[
        int | None, Option(help="Steps of each measured chain.  \\[default: as many as fit into --seconds]")
    ] = None,
    seconds: Annotated[float, Option(help="Approximate time to measure each line of the table.")] = 5.0,
    out: Annotated[Path | None, Option("-o", "--out", help="Also write all figures to this file, as JSON.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print all figures as JSON instead of the table.")] = False,
    *,
    where: Where,
) -> None:
    """Measure a model file on this machine: ms per step, images per second, and what the chain adds to the network."""
    from ddpmx.bench.measure import bench as measure
    from ddpmx.formats.atomic import atomic_write
    from ddpmx.formats.output_file import check_output, is_report

    batches = None if batch is None else parse_numbers("--batch", batch)
    if out is not None:  # checked before minutes are spent
        check_output(out, [], what="a JSON file of ddpmx", suffix="", is_ours=is_report)
    settings = where.settings()
    with phases("measuring") as progress:
        report = measure(
            file,
            batches=batches,
            executor=executor,
            steps=steps,
            seconds=seconds,
            progress=progress,
            **settings,
        ).to_json()
    text = json.dumps(report, indent=2)
    if out is not None:
        with atomic_write(out) as stream:
            stream.write(f"{text}\n".encode())
    if as_json:
        say(text)
        return
    for line in lines(report):
        say(line)
    if out is not None:
        say(f"\n{out}")


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text, in 100 columns."""
    file, spec = report["file"], report["file"]["spec"]
    c, height, width = spec["shape"]
    size = f"{height}×{width}, {c} channel{'s' if c > 1 else ''}"
    heading = [
        plain(file["name"]),
        size,
        f"T = {spec['timesteps']}",
        spec["precision"],
        _bytes(file["bytes"]),
    ]
    facts = [("runs on", plain(file["runs_on"])), *_machine(report["machine"])]
    loaded = f"{file['load_s']:.2f} s from opening the file to its first output"
    facts.append(("loading", loaded))
    if file["build_s"] is not None:
        facts.append(("building", f"{file['build_s']:.1f} s, when the plan was built"))
    text = [": ".join([heading[0], "; ".join(heading[1:])])]
    for label, value in facts:
        text += wrap(f"{label + ':':<10}{value}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 12)
    text += ["", *_table(report["cells"]), ""]
    remarks = [
        *_busy(report["machine"]["cpu"]),
        *_remarks(report["cells"]),
        *(f"Left out: {each}" for each in report["left_out"]),
        *report["method"],
    ]
    for remark in remarks:
        text += wrap(plain(remark), _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return text


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, gpu, jetson = machine["cpu"], machine["gpu"], machine["jetson"]
    threads = f"{cpu['threads']} thread{'s' if cpu['threads'] > 1 else ''}"
    if cpu["asked_threads"]:
        threads = f"{cpu['asked_threads']} of {threads}"
    busy = "" if cpu["load"] is None else f"; load average {cpu['load']:.1f}, this run included"
    facts = [("CPU", f"{plain(cpu['model'])}, {threads}{busy}")]
    if gpu is not None:
        named = [gpu["name"] or "unknown", f"SM {gpu['sm']}" if gpu["sm"] else "", _driver(gpu)]
        facts.append(("GPU", plain(", ".join(filter(None, named)))))
        facts += [(when, state) for when in ("before", "after") if (state := _state(gpu[when]))]
    if jetson is not None:
        fixed = {True: "clocks fixed", False: "clocks not fixed: sudo jetson_clocks fixes them", None: ""}
        mode = jetson["mode"] and f"power mode {jetson['mode']}"
        facts.append(("Jetson", plain("; ".join(filter(None, (mode, fixed[jetson["clocks_fixed"]]))))))
    return facts


def _driver(gpu: dict[str, Any]) -> str:
    version = (gpu["before"] or {}).get("driver")
    runs = f"for CUDA {gpu['driver_cuda']}" if gpu["driver_cuda"] else ""
    return " ".join(filter(None, ("driver", version, runs))) if version or runs else ""


def _state(state: dict[str, Any] | None) -> str:
    """Clocks, temperature and power in one line."""
    if state is None:
        return ""
    parts = []
    for name, label in (("sm_clock", "SM"), ("memory_clock", "memory")):
        if state[name] is not None:
            most = "" if state[f"{name}_max"] is None else f" of {state[f'{name}_max']}"
            parts.append(f"{label} {state[name]}{most} MHz")
    if state["temperature"] is not None:
        parts.append(f"{state['temperature']:.0f} °C")
    if state["power"] is not None:
        limit = "" if state["power_limit"] is None else f" of {state['power_limit']:.0f}"
        parts.append(f"{state['power']:.0f}{limit} W")
    if state["slowed_by"]:
        parts.append(f"slowed by {', '.join(state['slowed_by'])}")
    return ", ".join(parts)


def _table(cells: list[dict[str, Any]]) -> list[str]:
    rows = [
        ["", "", "ms per step:", "", "", "net", "chain", "host µs", "chain", "images", "", "steps"],
        ["batch", "executor", "P50", "P95", "mean", "alone", "÷ net", "/step", "s", "/s", "memory", "measured"],
        *(_row(cell) for cell in cells if not cell["failed"]),
    ]
    widths = [max(len(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    widths[7], widths[9] = max(widths[7], len(rows[0][7])), max(widths[9], len(rows[0][9]))
    # the heading "ms per step:" spans three columns
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= 100 else " "
    over = sum(widths[2:5]) + 2 * len(gap)
    lines = []
    for number, row in enumerate(rows):
        parts = [row[0].rjust(widths[0]), row[1].ljust(widths[1])]
        if number == 0:
            parts.append(row[2].center(over).rstrip().ljust(over))
        else:
            parts += [text.rjust(width) for text, width in zip(row[2:5], widths[2:5], strict=True)]
        parts += [text.rjust(width) for text, width in zip(row[5:], widths[5:], strict=True)]
        lines.append(gap.join(parts).rstrip())
    return lines


def _row(cell: dict[str, Any]) -> list[str]:
    star = "*" if cell["extrapolated"] else " "
    return [
        str(cell["batch"]),
        cell["executor"],
        *("–" if cell[name] is None else figure(cell[name]) for name in ("p50_ms", "p95_ms", "mean_ms", "bare_ms")),
        f"{cell['ratio']:.3f}" if cell["ratio"] < 10 else figure(cell["ratio"]),
        figure(cell["host_us"]),
        figure(cell["chain_s"]) + star,
        figure(cell["images_per_s"]) + star,
        "–" if cell["memory"] is None else _bytes(cell["memory"]),
        f"{cell['rounds']}×{cell['steps']}",
    ]


def _busy(cpu: dict[str, Any]) -> list[str]:
    """A remark if other processes use the CPU, since that distorts the figures."""
    if cpu["load"] is None or cpu["load"] < cpu["threads"] + 1:
        return []
    return [
        f"Other processes run here as well: the load average is {cpu['load']:.1f} for {cpu['threads']} threads. This slows "
        "down work on the CPU, above all P95 and host µs."
    ]


def _remarks(cells: list[dict[str, Any]]) -> list[str]:
    """Remarks on lines of the table; the same remark on several lines is printed once."""
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        line = f"batch {cell['batch']}, {cell['executor']}"
        for remark in [f"does not work here: {cell['failed']}"] if cell["failed"] else cell["notes"]:
            remarks.setdefault(remark, []).append(line)
    warm_up = sorted({cell["warm_up"] for cell in cells if not cell["failed"]})
    counts = "…".join(map(str, dict.fromkeys((warm_up[0], warm_up[-1]))))
    merged = [f"{'; '.join(where)}: {what}" for what, where in remarks.items()]
    return [*merged, f"Warm-up before each line: {counts} steps."]


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(digits, 9)}f}"


def _bytes(size: int) -> str:
    for unit, length in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= length:
            return f"{figure(size / length)} {unit}"
    return f"{size / 2**10:.0f} KiB"
