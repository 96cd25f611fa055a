"""Reads the files that the steps have written, judges them, and compares them with the project's goals."""

from __future__ import annotations

import ast
import contextlib
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import ON_TORCH
from gpu.steps import FINE, Result

WHILE_GOAL, IMAGES_GOAL, EACH_GOAL = 1.02, 7.0, 1.01
INT8_GOAL, TRAINING_GOAL = 1.4, 1.3
PEER_GOALS = {
    "diffusers eager ÷ ddpmx, fp16, batch 1": (("diffusers", "fp16", 1), 5.0),
    "diffusers eager ÷ ddpmx, fp16, batch 64": (("diffusers", "fp16", 64), 2.0),
    "diffusers compiled, with CUDA graphs ÷ ddpmx, fp16, batch 1": (("compile", "fp16", 1), 1.3),
}


def gather(out: Path, results: Sequence[Result], *, engines: Path, **facts: Any) -> dict[str, Any]:
    """The results of all steps, as plain JSON values. Missing ones are None.

    Args:
        out: the folder of the steps' files.
        results: how each step has ended.
        engines: the folder of the plans.
        **facts: copied; "network", "doctor", "state", … for :func:`gpu.report.to_markdown`.
    """
    suites = {path.stem.removeprefix("tests-"): read_tests(path) for path in sorted(out.glob("tests-*.xml"))}
    parity = {p: _json(out / f"parity-{p}" / "report.json") for p in ("fp32", "fp16", "int8")}
    parity = {p: judged for p, judged in parity.items() if judged is not None or p != "int8"}
    collected: dict[str, Any] = {
        **facts,
        "steps": [result.to_json() for result in results],
        "tests": suites,
        "plans": {path.name: _plan(path) for path in sorted(engines.rglob("*.plan"))},
        "parity": parity,
        "bench": {p: _json(out / f"bench-{p}.json") for p in ("fp32", "fp16")} | _more_benches(out),
        "peers": _peers(out),
        "eight_bits": {p: _json(out / f"bench-{p}-64.json") for p in ("int8", "fp16")},
        "training": _json(out / "training.json"),
        "speed": _json(out / "speed.json") or _json(out / "speed-torch.json"),
        "serving": _json(out / "serving.json"),
    }
    collected["not_verified"] = not_verified(results, suites, parity)
    collected["verdict"] = verdict(results, suites)
    collected["goals"] = goals(collected)
    return collected


def read_tests(path: Path) -> dict[str, Any] | None:
    """pytest's JUnit report: the number of tests, failures, skips with their reasons, and the figures."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failed, skipped, measured = [], Counter[str](), []
    for case in cases:
        for trouble in (*case.iter("failure"), *case.iter("error")):
            failed.append([case.get("name", "?"), (trouble.get("message") or "").strip()[:400]])
        for skip in case.iter("skipped"):
            skipped[(skip.get("message") or "no reason").strip()[:500]] += 1
        for figure in case.iter("property"):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                what, value, bound = ast.literal_eval(figure.get("value") or "")
                measured.append([str(what), float(value), str(bound)])
    return {
        "tests": len(cases),
        "failed": failed,
        "skipped": sorted(skipped.items()),
        "measured": measured,
    }


def verdict(results: Sequence[Result], suites: Mapping[str, Any]) -> str:
    """One line: HOLDS, INCOMPLETE or FAILED."""
    must = [result for result in results if result.must]
    engines = suites.get("engines")
    no_engine = engines is not None and 0 < engines["tests"] == sum(n for _, n in engines["skipped"])
    unseen = [result for result in must if no_engine and result.engine and result.status not in FINE]
    failed = [result.name for result in must if result.status not in FINE and result not in unseen]
    if failed:
        return f"FAILED: {', '.join(failed)}"
    left_out = [r.name for r in must if r in unseen or (r.must == "always" and r.status == "not run")]
    for result in must:
        suite = suites.get(result.name.removeprefix("tests of ")) if result.name.startswith("tests of ") else None
        if suite and result.must == "always" and sum(n for _, n in suite["skipped"]) == suite["tests"]:
            left_out.append(f"{result.name} (all were skipped)")
    if left_out or not must:
        return f"INCOMPLETE: nothing failed, but not seen: {', '.join(left_out) or 'anything'}"
    return f"HOLDS: {len([result for result in must if result.status == 'ok'])} steps, all that has to hold"


def not_verified(results: Sequence[Result], suites: Mapping[str, Any], parity: Mapping[str, Any]) -> list[str]:
    """Everything that the check could not verify, with the reasons."""
    found = [f"{result.name}: {result.why}" for result in results if result.status == "not run"]
    found += [f"{reason} ({n})" for suite in suites.values() if suite for reason, n in suite["skipped"]]
    for precision, judged in parity.items():
        checks = judged["rungs"] if judged else []
        found += [f"parity {precision}: {check['name']}: {check['skipped']}" for check in checks if check["skipped"]]
    return list(dict.fromkeys(found))


def goals(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The project's goals of speed, with the measured values and whether they are reached. A missed goal is no failure."""
    found: list[dict[str, Any]] = []

    def add(what: str, goal: str, value: float | None, reached: bool | None) -> None:
        state = (
            "not measured" if value is None else "not judged" if reached is None else "reached" if reached else "NOT"
        )
        found.append({"what": what, "goal": goal, "measured": value, "state": state})

    quick = bool(facts.get("quick"))
    for precision, bench in facts["bench"].items():
        cells = (bench or {}).get("cells", ())
        cell = next((c for c in cells if (c["batch"], c["executor"]) == (1, "while") and not c["failed"]), None)
        value = cell["ratio"] if cell else None
        reached = None if quick or value is None else value <= WHILE_GOAL
        add(f"chain ÷ bare engine, while, batch 1, {precision}", f"≤ {WHILE_GOAL}", value, reached)
    rows = {(r["kind"], r["precision"], r["batch"]): r for r in (facts["peers"] or {}).get("rows", ())}
    on_torch = any(str(row.get("run", "")).startswith(ON_TORCH) for row in rows.values())
    for what, (key, goal) in PEER_GOALS.items():
        value = rows[key]["ratio"] if key in rows else None
        add(
            what.replace("ddpmx", ON_TORCH) if on_torch else what,
            f"≥ {goal:g}",
            value,
            None if quick or value is None else value >= goal,
        )
    serving = facts["serving"] or {}
    value = serving.get("kernels_ratio")
    what = f"a step of each image's own ÷ one for all, network included, fp16, batch {serving.get('batch', 16)}"
    add(what, f"≤ {EACH_GOAL}", value, None if quick or value is None else value <= EACH_GOAL)
    cells = {p: next(iter((bench or {}).get("cells", ())), None) for p, bench in facts["eight_bits"].items()}
    value = None
    if all(cell is not None and not cell["failed"] for cell in cells.values()):
        value = cells["fp16"]["chain_s"] / cells["int8"]["chain_s"]
    reached = None if quick or value is None else value >= INT8_GOAL
    add("the chain in fp16 ÷ in int8, batch 64", f"≥ {INT8_GOAL:g}", value, reached)
    others = [
        row["ratio"]
        for row in (facts["training"] or {}).get("rows", ())
        if row["ratio"] is not None and not row["run"].startswith("ddpmx")
    ]
    value = min(others, default=None)
    reached = None if quick or value is None else value >= TRAINING_GOAL
    add("a step of training, the fastest other ÷ ddpmx", f"≥ {TRAINING_GOAL:g}", value, reached)
    speed, gpus = facts["speed"], ((facts["doctor"] or {}).get("machine") or {}).get("gpus") or [{}]
    whole = speed if speed and (speed["images"], speed["steps"]) == (256, 1000) else None
    value = min(whole["seconds"]) if whole else None
    reached = None if quick or value is None or "H200" not in str(gpus[0].get("name")) else value < IMAGES_GOAL
    where = ", on torch" if whole and whole["plan"] == "torch" else ""
    add(f"256 CIFAR images of 1000 steps, fp16{where}, seconds (on an H200)", f"< {IMAGES_GOAL:g}", value, reached)
    return found


def _more_benches(out: Path) -> dict[str, Any]:
    """The figures of a plan for single images, and of a chain whose network is torch's: those that there are."""
    files = {"fp16, for single images alone": "bench-fp16-1.json", "fp16 on torch": "bench-torch.json"}
    found = {name: _json(out / file) for name, file in files.items()}
    return {name: figures for name, figures in found.items() if figures is not None}


def _peers(out: Path) -> Any:
    """The report of peers.py, or of its runs for one batch or one other library each as one."""
    names = ("peers", "peers-1", "peers-64", "peers-compiled", "peers-torch", "compiled-torch")
    reports = [found for name in names if (found := _json(out / f"{name}.json")) is not None]
    if not reports:
        return None
    not_run = {each["run"]: each for found in reports for each in found["not_run"]}
    rows = [row for found in reports for row in found["rows"]]
    return {**reports[0], "rows": rows, "not_run": list(not_run.values())}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _plan(path: Path) -> dict[str, Any]:
    built = (_json(path.with_name(path.name + ".json")) or {}).get("build") or {}
    return {"bytes": path.stat().st_size, **{name: built.get(name) for name in ("seconds", "layers", "precision")}}
