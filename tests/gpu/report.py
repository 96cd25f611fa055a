"""Writes the report: one file to paste, and JSON beside it, with no names of users, machines or places."""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.steps import FINE

NAME, JSON = "gpu-report.md", "gpu-report.json"
LARGEST = 60_000
"""The largest size of the file to paste, in bytes."""

_COMMON = {"root", "user", "ubuntu", "nvidia", "admin", "test", "tests", "home", "runner", "jetson", "gpu", "ddpmx"}
_HOME = re.compile(r"(/home|/Users|/var/home|[A-Za-z]:\\+Users)[/\\]+[^/\\\s:;,'\"]+|/root(?=[/\s:;,'\"]|$)")


def write(out: Path, facts: dict[str, Any], *, hidden: Mapping[str, str]) -> Path:
    """Both files, scrubbed.

    Args:
        out: the folder.
        facts: from :func:`gpu.found.gather`.
        hidden: paths, and the names that replace them.

    Returns:
        The file to paste.
    """
    clean = scrubbed(facts, hidden)
    (out / JSON).write_text(json.dumps(clean, indent=1, ensure_ascii=False), encoding="utf-8")
    path = out / NAME
    path.write_text(to_markdown(clean), encoding="utf-8")
    return path


def scrubbed(thing: Any, hidden: Mapping[str, str]) -> Any:
    """``thing`` with no home folders, names of users or name of the machine in any of its strings."""
    if isinstance(thing, str):
        return _scrub(thing, hidden)
    if isinstance(thing, Mapping):
        return {_scrub(str(name), hidden): scrubbed(value, hidden) for name, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [scrubbed(value, hidden) for value in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return None  # JSON has neither NaN nor infinities
    return thing


def _scrub(text: str, hidden: Mapping[str, str]) -> str:
    for path in sorted(hidden, key=len, reverse=True):
        text = text.replace(path, hidden[path])
    with contextlib.suppress(RuntimeError):  # no home folder
        home = str(Path.home())
        if len(home) > 1:
            text = text.replace(home, "~")
    text = _HOME.sub("~", text)
    with contextlib.suppress(OSError, KeyError, ImportError):  # nobody is logged in
        name = re.escape(getpass.getuser())
        if getpass.getuser() not in _COMMON:
            text = re.sub(rf"(?<=[/\\]){name}(?=[/\\\s:]|$)|(?<=pytest-of-){name}|\b{name}(?=@)", "USER", text)
    host = socket.gethostname()
    if len(host) > 3 and host not in _COMMON and host != "localhost":
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text)
    return text


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The file to paste: at most :data:`LARGEST` bytes."""
    parts = [
        _heading(facts),
        _goals(facts["goals"]),
        _steps(facts["steps"]),
        _machine(facts),
        _plans(facts["plans"]),
        _tests(facts["tests"]),
        *(_parity(precision, judged) for precision, judged in facts["parity"].items()),
        *(_bench(precision, bench) for precision, bench in facts["bench"].items()),
        _speed(facts["speed"]),
        _serving(facts["serving"]),
        _peers(facts["peers"]),
        _list("Not verified", facts["not_verified"], most=60),
        _troubles(facts["steps"]),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    data = text.encode()
    if len(data) <= LARGEST:
        return text
    cut = f"\n\n… cut: the whole of it is in {JSON}\n"
    return data[: LARGEST - len(cut.encode())].decode(errors="ignore") + cut


def _heading(facts: Mapping[str, Any]) -> str:
    machine = (facts["doctor"] or {}).get("machine") or {}
    gpu = (machine.get("gpus") or [{}])[0]
    lines = [
        f"# ddpmx on {gpu.get('name', 'a GPU')}: {facts['verdict']}",
        f"- ddpmx {machine.get('ddpmx', '?')}, commit {facts.get('commit') or 'unknown'}"
        + (", **--quick**" if facts.get("quick") else ""),
        f"- network: {facts['network']}",
        f"- it took {facts['seconds'] / 60:.1f} minutes",
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    rows = [[g["what"], g["goal"], _number(g["measured"]), g["state"]] for g in goals]
    return "## Goals of speed\n\n" + _table(["", "goal", "measured", ""], rows)


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            s["name"],
            s["status"] if s["status"] in FINE else f"**{s['status']}**",
            f"{s['seconds']:.0f} s",
            _cell(s["why"][:200]),
        ]
        for s in steps
    ]
    return "## Steps\n\n" + _table(["", "", "", ""], rows)


def _machine(facts: Mapping[str, Any]) -> str:
    doctor, cpu, lines = facts["doctor"] or {}, facts.get("cpu") or {}, []
    machine = doctor.get("machine") or {}
    for gpu in machine.get("gpus", ()):
        lines.append(f"- GPU: {gpu['name']}, SM {gpu['sm']}, {gpu['memory'] / 2**30:.1f} GiB")
    state = facts.get("state") or {}
    driver = (state.get("before") or {}).get("driver")
    lines.append(f"- driver {driver or '?'}, for CUDA {machine.get('driver_cuda', '?')}")
    for when in ("before", "after"):
        if now := state.get(when):
            lines.append(f"- {when}: {_state(now)}")
    if jetson := state.get("jetson"):
        fixed = {True: "clocks fixed", False: "clocks NOT fixed", None: "clocks unknown"}[jetson["clocks_fixed"]]
        lines.append(f"- Jetson: {machine.get('jetson') or '?'}; power mode {jetson['mode'] or '?'}, {fixed}")
    lines.append(f"- CPU: {cpu.get('model', '?')}, {cpu.get('threads', '?')} threads, load {cpu.get('load', '?')}")
    lines.append(f"- {machine.get('platform', '?')}; Python {str(machine.get('python', '?')).split()[0]}")
    for name, found in (doctor.get("libraries") or {}).items():
        if "missing" in found:
            lines.append(f"- ✗ {name}: {str(found['missing'])[:200]}")
            continue
        extras = [f"CUDA {found['cuda'] or 'none'}"] if "cuda" in found else []
        extras += found.get("providers", [])
        extras += [Path(file).name for file in found.get("libraries", [])]
        extras += [f"not while: {found['why_no_while']}"] if found.get("why_no_while") else []
        lines.append(f"- ✓ {name} {found.get('version')}" + (f" ({', '.join(map(str, extras))})" if extras else ""))
    for finding in doctor.get("findings", ()):
        lines.append(f"- {'✓' if finding['works'] else '✗'} {finding['what']}: {str(finding['why'])[:200]}")
    return "## Machine\n\n" + "\n".join(lines)


def _state(state: Mapping[str, Any]) -> str:
    parts = [
        f"{label} {state[name]} of {state[f'{name}_max']} MHz"
        for name, label in (("sm_clock", "SM"), ("memory_clock", "memory"))
        if state.get(name) is not None
    ]
    parts += [f"{state['temperature']:.0f} °C"] if state.get("temperature") is not None else []
    parts += [f"{state['power']:.0f} W of {state['power_limit'] or '?'}"] if state.get("power") is not None else []
    parts += [f"slowed by {', '.join(state['slowed_by'])}"] if state.get("slowed_by") else []
    return ", ".join(parts) or "unknown"


def _plans(plans: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{p['bytes'] / 1e6:.1f} MB",
            _number(p["seconds"]),
            _number(p["layers"]),
            _cell(p["precision"] or "?"),
        ]
        for name, p in plans.items()
    ]
    return "## Plans\n\n" + _table(["", "size", "built in, s", "layers", "precision"], rows) if rows else ""


def _tests(suites: Mapping[str, Any]) -> str:
    parts = ["## tests/gpu"]
    rows = []
    for name, suite in suites.items():
        if suite is None:
            rows.append([name, "?", "?", "?", "its report is damaged"])
            continue
        failed, skipped = len(suite["failed"]), sum(n for _, n in suite["skipped"])
        rows.append([name, str(suite["tests"] - failed - skipped), str(failed), str(skipped), ""])
    parts.append(_table(["", "passed", "failed", "skipped", ""], rows) if rows else "None were run.")
    failures = [f"{name}: {_line(why)}" for suite in suites.values() if suite for name, why in suite["failed"]]
    parts.append(_list("Failed", failures, most=30, level=3))
    measured = [m for suite in suites.values() if suite for m in suite["measured"]]
    if measured:
        parts.append(_table(["measured", "", "bound"], [[_cell(w), _number(v), b] for w, v, b in measured[:60]]))
    return "\n\n".join(part for part in parts if part)


def _parity(precision: str, judged: Mapping[str, Any] | None) -> str:
    if judged is None:
        return f"## Parity, {precision}\n\nNot judged."
    rows = []
    for check in judged["rungs"]:
        state = "not judged" if check["skipped"] else "holds" if check["passed"] else "**FAILS**"
        bound = f"{'≥' if check['at_least'] else '≤'} {check['bound']:g}"
        rows.append(
            [_cell(check["name"]), _number(check["value"]), bound, state, _cell(check["skipped"] or check["worst"])]
        )
    made = (judged.get("reference") or {}).get("made_with", "nothing")
    head = f"{judged['verdict']}. On {judged['ran_on']}, against {made}."
    return f"## Parity, {precision}\n\n{head}\n\n" + _table(["", "measured", "bound", "", ""], rows)


def _bench(precision: str, bench: Mapping[str, Any] | None) -> str:
    if bench is None:
        return f"## Bench, {precision}\n\nNot measured."
    rows, remarks = [], [f"Left out: {each}" for each in bench["left_out"]]
    for cell in bench["cells"]:
        if cell["failed"]:
            remarks.append(f"batch {cell['batch']}, {cell['executor']}: does not work here: {cell['failed'][:300]}")
            continue
        star = "*" if cell["extrapolated"] else ""
        memory = "—" if cell["memory"] is None else f"{cell['memory'] / 2**20:.0f} MiB"
        names = ("p50_ms", "p95_ms", "mean_ms", "bare_ms", "ratio", "host_us")
        rows.append(
            [
                str(cell["batch"]),
                cell["executor"],
                *(_number(cell[name]) for name in names),
                *(_number(cell[name]) + star for name in ("chain_s", "images_per_s")),
                memory,
            ]
        )
        remarks += [f"batch {cell['batch']}, {cell['executor']}: {note}" for note in cell["notes"]]
    head = ["batch", "executor", "P50 ms", "P95 ms", "mean ms", "net ms", "chain ÷ net", "host µs", "chain s"]
    head += ["images/s", "memory"]
    file = bench["file"]
    lines = [f"## Bench, {precision}", f"{file['runs_on']}; loaded in {_number(file['load_s'])} s", _table(head, rows)]
    lines.append("\n".join(f"- {remark}" for remark in [*dict.fromkeys(remarks), *bench["method"]][:40]))
    return "\n\n".join(part for part in lines if part)


def _speed(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    rounds = ", ".join(_number(s) for s in speed["seconds"])
    return (
        f"## Many images\n\n{speed['images']} images of {speed['steps']} steps, batch {speed['batch']}, {speed['plan']} "
        f"on {speed['runs_on']}: {rounds} s; the first time {_number(speed['first_s'])} s. From Python to uint8 on the "
        "host, without loading."
    )


def _serving(serving: Mapping[str, Any] | None) -> str:
    if serving is None:
        return ""
    each, uniform = serving.get("each_us"), serving.get("uniform_us")
    alone = f" The kernels alone: {_number(each)} and {_number(uniform)} µs." if each and uniform else ""
    return (
        f"## Serving\n\n{serving['differing']} of {serving['images']} images at different steps differ from those of "
        f"generate. A step of {serving['plan']}, batch {serving['batch']}, all at one step: the server's batch "
        f"{_number(serving['batcher_ms'])} ms ({serving['batcher_runs_on']}), the chain {_number(serving['chain_ms'])} ms "
        f"({serving['chain_runs_on']}), the host included.{alone}"
    )


def _peers(peers: Mapping[str, Any] | None) -> str:
    if peers is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
    rows = []
    for row in peers["rows"]:
        ratio = "1" if row["ratio"] is None else "{:.2f} ({:.2f} … {:.2f})".format(row["ratio"], *row["ratio_range"])
        gpu = "—" if row["peak_gpu"] is None else f"{row['peak_gpu'] / 1e6:.0f} MB"
        rows.append([row["run"], row["precision"], str(row["batch"]), _number(row["ms_per_step"])])
        rows[-1] += [_number(row["images_per_s"]), gpu, ratio]
    head = ["run", "", "batch", "ms per step", "images/s", "GPU memory", "time ÷ ddpmx"]
    lines = ["## Other libraries", f"{peers['steps']} steps, {peers['rounds']} rounds in turns; {versions}"]
    lines += [peers["same"], _table(head, rows)]
    lines.append("\n".join(f"- not run: {each['run']}: {_line(each['why'])[:300]}" for each in peers["not_run"]))
    return "\n\n".join(part for part in lines if part)


def _troubles(steps: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for step in steps:
        if step["status"] != "ok" and step["tail"]:  # also of what was cut off
            parts.append(f"### {step['name']}: {step['status']}\n\n```\n{step['tail'].replace('```', '´´´')}\n```")
    return "\n\n".join(["## Output of failing steps", *parts]) if parts else ""


def _list(title: str, items: Sequence[str], *, most: int, level: int = 2) -> str:
    if not items:
        return ""
    lines = [f"- {_line(item)[:500]}" for item in items[:most]]
    lines += [f"- … and {len(items) - most} more"] if len(items) > most else []
    return f"{'#' * level} {title}\n\n" + "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(text: str) -> str:
    return _line(text).replace("|", "/")


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
