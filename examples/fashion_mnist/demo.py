"""Train on real images, export in two precisions, generate, judge. Each step is a command that a user could type.

    python examples/fashion_mnist/demo.py [--out demo-output] [--smoke]

Exits with 1 if its samples do not pass the judgement, or one of the controls does. ``--smoke`` runs the same commands in
about a minute, with a network too small to be judged: it prints the figures but does not judge the samples.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from judge import DATA, Judge, Verdict
from PIL import Image

NETWORK = "--width 32 --mult 1,2,2 --blocks 1 --attention 8 --groups 8 --dropout 0"
TINY = "--width 8 --mult 1 --blocks 1 --attention '' --groups 4 --dropout 0"
TRAINING = "--preset tiny --classes --label-dropout 0.1 --prediction v --batch 64 --lr 2e-3 --lr-decay --ema 0.99"
TURNS = "--labels 0,1,2,3,4,5,6,7,8,9"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--smoke", action="store_true", help="about a minute in all; samples are not judged")
    arguments = parser.parse_args()
    out: Path = arguments.out
    steps, judged, shown, shown_steps = (20, 32, 10, 20) if arguments.smoke else (400, 256, 20, 1000)

    begun = time.monotonic()
    if out.exists() and not any((out / mine).exists() for mine in ("run/checkpoints", "shipped")):
        parser.error(f"{out} exists, and was not written by this demo")
    shutil.rmtree(out, ignore_errors=True)

    def at(name: str) -> str:
        """A path as one word of a command line."""
        return shlex.quote(str(out / name))

    ddpmx(f"generate garments -n 16 --steps 20 --grid --out {at('shipped')}")
    print("that is a model that was trained before; now one of your own")
    data, run, fp32, fp16 = shlex.quote(str(DATA)), at("run"), at("model.onnx"), at("model-fp16.onnx")
    network = TINY if arguments.smoke else NETWORK
    ddpmx(
        f"train --data {data} --out {run} --steps {steps} {network} {TRAINING} --warmup {steps // 4} --sample-every {steps}"
    )
    whole = "" if arguments.smoke else " --full"
    ddpmx(f"export {run} -o {fp32} --data {data} --no-plan")
    ddpmx(f"export {run} --fp16 -o {fp16} --data {data} --no-plan{whole}")
    ddpmx(f"parity {fp16} --report {at('parity')}")
    ddpmx(f"generate {fp32} -n {shown} --steps {shown_steps} {TURNS} --out {at('samples')} --batch 64 --grid --animate")
    ddpmx(f"generate {fp16} -n 10 --steps 50 {TURNS} --out {at('samples-fp16')}")
    ddpmx(f"generate {fp32} -n 10 --steps 50 {TURNS} --out {at('samples-fp32')}")
    ddpmx(f"generate {fp32} -n {judged} --steps 20 {TURNS} --seed 1 --out {at('judged')} --batch 64 --grid")

    apart = np.abs(pictures(out / "samples-fp16").astype(int) - pictures(out / "samples-fp32"))
    print(
        f"\nfp16 against fp32, same seed: {(apart <= 1).mean():.2%} of the values within 1 of 255, at most {apart.max()}"
    )
    passed = judge(pictures(out / "judged"))
    print(f"\nlook at {out / 'samples' / 'grid.png'} and {out / 'samples' / 'x0.gif'}")
    print(f"read {out / 'parity' / 'report.md'}")
    if arguments.smoke:
        verdict = "a smoke test: these samples are not meant to pass"
    else:
        verdict = "passed: the samples are garments, and no control is" if passed else "FAILED: look at the table"
    print(f"{verdict} ({time.monotonic() - begun:.0f} s)")
    return 0 if passed or arguments.smoke else 1


def ddpmx(arguments: str) -> None:
    """Run a ddpmx command as a user would."""
    print(f"\n$ ddpmx {arguments}", flush=True)
    subprocess.run([sys.executable, "-m", "ddpmx_cli.main", *shlex.split(arguments)], check=True)


def pictures(folder: Path) -> np.ndarray:
    """The numbered PNGs of a folder, uint8 [n, H, W]."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))])


def judge(samples: np.ndarray) -> bool:
    """Print the judgement of the samples and of the controls. Returns whether all are as expected."""
    judge = Judge()
    print(f"\njudged by a classifier that classifies {judge.accuracy:.0%} of unseen real images correctly")
    print(f"{'':18} confident  classes  variation")
    print(f"{'':18}    ≥ 0.60       10  0.80…1.20")

    def show(name: str, verdict: Verdict) -> bool:
        figures = f"{verdict.confident:10.2f} {verdict.classes:8d} {verdict.variation:10.2f}"
        print(f"{name:18} {figures}  {'pass' if verdict.passed else 'fail'}")
        return verdict.passed

    passed = show("these samples", judge(samples))
    honest = show("real images", judge(judge.real[:256]))
    print("controls, each of which has to fail:")
    fooled = [name for name, images in judge.controls().items() if show(name, judge(images))]
    return passed and honest and not fooled


if __name__ == "__main__":
    sys.exit(main())
