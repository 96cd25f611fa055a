"""Measures how fast batches of training images are read: from memory, out of an .npy, out of a run's file, and from tars.

python tests/benchmarks/data_rate.py [--images 20000] [--size 64] [--batch 128] [--seconds 3] [--folder /tmp]

Each place is asked for batches in a shuffled order, for the same time. The .npy is twice as large as the limit given to
``load_dataset``, so that it stays on disk; the limit is ddpmx's own and not the system's, so the system may still keep the
file in its cache. Where the system allows it (posix_fadvise), its cache is emptied of the file before, and the first pass
over the file is measured on its own. Tars hold JPEGs of twice the size, which are decoded and resized by threads.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_export.training.data import Dataset, load_dataset
from ddpm_export.training.prefetch import Prefetch
from ddpmx.device.cores import usable_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--folder", help="where the files are made, some gigabytes; by default the system's")
    args = parser.parse_args()
    n, side = args.images, args.size
    rng = np.random.default_rng(0)
    print(f"{usable_cores()} cores; batches of {args.batch} images of {side}×{side}×3, images/s of `take`")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        np.save(folder / "a.npy", rng.integers(0, 256, (n, side, side, 3), np.uint8))
        bytes_of = n * side * side * 3

        def measured(what: str, dataset: Dataset) -> None:
            row(what, rate(dataset.take, len(dataset), args.batch, args.seconds))

        measured("memory", load_dataset(folder / "a.npy", memory_limit=bytes_of))
        dataset = load_dataset(folder / "a.npy", memory_limit=bytes_of // 2)
        if forget(folder / "a.npy"):
            begun = time.perf_counter()
            for indices in shuffled(n, args.batch)():
                dataset.take(indices)
            row(".npy, twice the limit, first pass, not in the cache", n / (time.perf_counter() - begun))
        measured(".npy, twice the limit, in the system's cache", dataset)
        shards = max(1, min(n, 4000) // 1000)
        for shard in range(shards):
            with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
                for key in range(min(n, 4000) // shards):
                    tile = rng.integers(0, 256, (16, 16, 3), np.uint8)  # enlarged: as smooth as a photo, not noise
                    stream = io.BytesIO()
                    Image.fromarray(tile).resize((2 * side, 2 * side)).save(stream, "JPEG", quality=90)
                    info = tarfile.TarInfo(f"{shard:03}{key:05}.jpg")
                    info.size = stream.tell()
                    stream.seek(0)
                    tar.addfile(info, stream)
        tars = folder / f"{{000..{shards - 1:03}}}.tar"
        decoded = load_dataset(tars, size=(side, side), memory_limit=0)
        measured("tar, JPEGs decoded whenever they are taken", decoded)
        kept = load_dataset(tars, size=(side, side), memory_limit=0, keep=folder / "run")
        measured("tar, decoded once into the run", kept)
        # a trainer that computes for as long as a batch takes to decode: reading ahead hides the one behind the other
        alone = args.batch / rate(decoded.take, len(decoded), args.batch, args.seconds)
        order = shuffled(len(decoded), args.batch)
        batches = max(2, int(args.seconds / alone))
        for ahead in (False, True):
            indices = [one for _ in range(1 + batches * args.batch // len(decoded)) for one in order()][:batches]
            begun = time.perf_counter()
            for _ in Prefetch(decoded.take, indices) if ahead else map(decoded.take, indices):
                time.sleep(alone)  # a GPU's time: the cores are free
            took = batches * args.batch / (time.perf_counter() - begun)
            row(f"the same with a GPU as slow as it, {'read ahead' if ahead else 'one after the other'}", took)


def row(what: str, images_per_second: float) -> None:
    print(f"{what:<58} {images_per_second:>10,.0f}", flush=True)


def shuffled(n: int, batch: int) -> Callable[[], list[np.ndarray]]:
    """An epoch's batches."""
    rng = np.random.default_rng(0)
    return lambda: [part for part in np.split(rng.permutation(n), range(batch, n, batch)) if len(part) == batch]


def rate(take: Callable[[np.ndarray], np.ndarray], n: int, batch: int, seconds: float) -> float:
    """Images per second over at least so many seconds."""
    epoch = shuffled(n, min(batch, n))
    take(epoch()[0])
    count, begun = 0, time.perf_counter()
    while True:
        for indices in epoch():
            take(indices)
            count += len(indices)
            if (passed := time.perf_counter() - begun) > seconds:
                return count / passed


def forget(path: Path) -> bool:
    """Empty the system's cache of a file."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


if __name__ == "__main__":
    main()
