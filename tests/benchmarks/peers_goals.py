"""ddpmx on MNN beside the other runs of ``peers.py``: how many times as fast it is, its memory, and what the goals are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers_measure import ratios

BESIDE: Mapping[str, tuple[str, ...]] = {
    "mnn": ("ddpmx", "diffusers", "compile", "ort", "mnn1", "openvino", "ncnn"),
    "mnn-low": ("ddpmx", "mnn"),
}
"""MNN's kinds, and the kinds that each is compared with."""

PAPER, SMALL = "the paper's for CIFAR-10", "a small one"

SPEED: Mapping[tuple[str, int, int, str], float] = {
    (PAPER, 1, 1, "ddpmx"): 1.5,
    (PAPER, 1, 16, "ddpmx"): 1.65,
    (PAPER, 2, 1, "ddpmx"): 1.0,
    (PAPER, 2, 16, "ddpmx"): 1.9,
    (PAPER, 1, 1, "diffusers"): 2.5,
    (PAPER, 1, 16, "diffusers"): 1.95,
    (SMALL, 1, 16, "ddpmx"): 1.25,
    (SMALL, 2, 16, "ddpmx"): 1.25,
}
"""(network, threads, batch, other run) → its time ÷ MNN's, at least: fp32, on an idle machine."""

BUSY = 1.0
"""MNN in one thread: its time ÷ MNN's in all threads, at least, where other processes keep all cores busy."""

MEMORY = 1.0
"""MNN's peak RSS ÷ that of ddpmx on ONNX Runtime, at most."""


def network_of(parameters: int) -> str:
    """The network's name in :data:`SPEED`, by its size; "" for one without goals."""
    if parameters == 35_746_307:
        return PAPER
    return SMALL if parameters < 2_000_000 else ""


def speed_goal(row: Mapping[str, Any], other: Mapping[str, Any], network: str, threads: int, busy: int) -> float | None:
    """How many times as fast as ``other`` the run of ``row`` is to be; None if there is no such goal."""
    if other["kind"] == "mnn1":
        return BUSY if row["kind"] == "mnn" and busy >= threads else None
    if busy or row["precision"] != "fp32":
        return None
    return SPEED.get((network, threads, row["batch"], other["kind"]))


def beside(rows: Sequence[Mapping[str, Any]], network: str, threads: int, busy: int) -> list[dict[str, Any]]:
    """Each of MNN's rows beside others of its precision and batch, see :data:`BESIDE`.

    Args:
        rows: as :func:`benchmarks.peers_measure.rows` makes them.
        network: see :func:`network_of`.
        threads: of every run.
        busy: how many other processes computed without pause.
    """
    found = []
    for row in rows:
        for other in rows:
            same = (other["precision"], other["batch"]) == (row["precision"], row["batch"])
            if not same or other["kind"] not in BESIDE.get(row["kind"], ()):
                continue
            times, low, high = ratios(other["seconds"], row["seconds"])
            found.append(
                {
                    "run": row["run"],
                    "precision": row["precision"],
                    "batch": row["batch"],
                    "beside": other["run"],
                    "times": times,
                    "times_range": [low, high],
                    "goal": speed_goal(row, other, network, threads, busy),
                    "memory": row["peak_rss"] / other["peak_rss"],
                    "memory_goal": MEMORY if other["kind"] == "ddpmx" else None,
                }
            )
    return found


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what :func:`beside` found. A missed goal is no failure."""
    if not found:
        return
    print("\nMNN beside each of the others (above 1 is faster; less memory is below 1):\n")
    print("| run | | batch | beside | times as fast | goal | peak RSS ÷ its | goal |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        low, high = row["times_range"]
        speed = memory = ""
        if row["goal"] is not None:
            speed = f"≥ {row['goal']:g}, {'met' if row['times'] >= row['goal'] else 'missed'}"
        if row["memory_goal"] is not None:
            memory = f"≤ {row['memory_goal']:g}, {'met' if row['memory'] <= row['memory_goal'] else 'missed'}"
        print(
            f"| {row['run']} | {row['precision']} | {row['batch']} | {row['beside']} | "
            f"**{row['times']:.2f}** ({low:.2f} … {high:.2f}) | {speed} | {row['memory']:.2f} | {memory} |"
        )
