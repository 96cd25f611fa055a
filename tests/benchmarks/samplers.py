"""Judges the samplers by the number of steps: images of the model that comes along, by the judge of the demo.

    python tests/benchmarks/samplers.py -o samplers.json [--chart chart.png] [--quick]

Every chain begins with the same noise. Each one adds a line of JSON to the file, and those that it has are not run again;
the table is printed. An hour on two cores; --quick takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "fashion_mnist"))

import ddpmx

FEW = (8, 10, 12, 16, 20, 25)
SPACINGS = ("trailing", "logsnr", "karras")


@dataclass(frozen=True)
class Chain:
    """One line of the table."""

    sampler: str
    spacing: str
    steps: int


def chains(quick: bool = False) -> Iterator[Chain]:
    """What is run, the slowest last."""
    few = FEW[1:2] if quick else FEW
    for spacing in SPACINGS:
        for sampler in ("dpmpp_2m", "unipc"):
            yield from (Chain(sampler, spacing, steps) for steps in few)
    yield from (Chain("ddim", "trailing", steps) for steps in ((10,) if quick else (10, 12, 16, 20, 25, 50)))
    yield from (Chain("ancestral", "linspace", steps) for steps in ((25,) if quick else (50, 100, 250)))


def measured(wanted: Iterable[Chain], path: Path, *, n: int, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A line for each chain: its own fields, and the judge's numbers for each seed."""
    from judge import Judge

    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["sampler"], line["spacing"], line["steps"], line["n"]): line for line in kept}
    lines: list[dict[str, Any]] = []
    judge = Judge()
    with ddpmx.load("garments", threads=1) as pipeline:
        for chain in wanted:
            line = known.get((*asdict(chain).values(), n))
            if line is None or line["seeds"] != list(seeds):
                drawn = [pipeline.generate(n, seed=seed, batch=64, **asdict(chain)) for seed in seeds]
                verdicts = [asdict(judge(images)) for images in drawn]
                line = {**asdict(chain), "n": n, "seeds": list(seeds), "verdicts": verdicts}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{line['sampler']}, {line['spacing']}, {line['steps']} steps: {cell(line)}",
                    file=sys.stderr,
                    flush=True,
                )
            lines.append(line)
    return lines


def mean(line: dict[str, Any], what: str) -> float:
    return float(np.mean([verdict[what] for verdict in line["verdicts"]]))


def cell(line: dict[str, Any]) -> str:
    """ "confident, variation" of all seeds, and how many classes there are if one is missing."""
    classes = min(verdict["classes"] for verdict in line["verdicts"])
    missing = "" if classes == 10 else f", {classes} classes"
    return f"{mean(line, 'confident'):.2f}, {mean(line, 'variation'):.2f}{missing}"


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each number of steps, a column for each sampler with its spacing."""
    curves = sorted({(line["sampler"], line["spacing"]) for line in lines})
    rows = [["steps", *(f"`{sampler}`, {spacing}" for sampler, spacing in curves)], ["---"] * (len(curves) + 1)]
    for steps in sorted({line["steps"] for line in lines}):
        cells = {(line["sampler"], line["spacing"]): cell(line) for line in lines if line["steps"] == steps}
        rows.append([str(steps), *(cells.get(curve, "") for curve in curves)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """confident and variation against steps, a curve for each sampler with its spacing."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for curve in dict.fromkeys((line["sampler"], line["spacing"]) for line in lines):
        own = sorted((line for line in lines if (line["sampler"], line["spacing"]) == curve), key=lambda a: a["steps"])
        for side, what in zip(sides, ("confident", "variation"), strict=True):
            style = {"ancestral": "k--", "ddim": "k:"}.get(curve[0], "-")
            side.plot(
                [a["steps"] for a in own], [mean(a, what) for a in own], style, marker=".", label=", ".join(curve)
            )
            side.set(xscale="log", xlabel="steps, that is calls of the network", title=f"{what}, real images = 1")
            side.set_xticks([8, 10, 16, 25, 50, 100, 250], labels=["8", "10", "16", "25", "50", "100", "250"])
    sides[1].axhspan(0.8, 1.2, color="0.93", zorder=0)
    sides[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    n, seeds = (64, (1,)) if chosen.quick else (256, (1, 2))
    lines = measured(chains(chosen.quick), chosen.out, n=n, seeds=seeds)
    print(table(lines))
    if chosen.chart is not None:
        draw(lines, chosen.chart)


if __name__ == "__main__":
    main()
