"""Compresses and decompresses on the machine where it runs: ``codec_jobs.py MODEL FOLDER JOB…``.

The job ``here`` encodes FOLDER's ``images.npy`` to ``here.ddpm`` and ``here.npy``; ``eps`` writes ``eps.npz``, ε as the
file is computed and in float32; any other one, ``x``, decodes ``x.ddpm`` to ``x.npy``. It prints the machine's architecture
and the backend.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np

from ddpmx import Pipeline, load
from ddpmx.tasks.codec import compress, decompress


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    with load(model, threads=1) as pipeline:
        for job in sys.argv[3:]:
            file = folder / f"{job}.ddpm"
            if job == "here":
                done = compress(pipeline, np.load(folder / "images.npy"), stop=60, book=8, steps=3, batch=1)
                file.write_bytes(done.data)
                pixels = done.pixels
            elif job == "eps":
                save_eps(pipeline, folder)
                continue
            else:
                pixels = decompress(pipeline, file.read_bytes(), batch=1).pixels
            np.save(folder / f"{job}.npy", pixels)
        print(platform.machine(), pipeline.backend)


def save_eps(pipeline: Pipeline, folder: Path) -> None:
    """ε of the images as if they were x_t, at t = 300."""
    x = np.load(folder / "images.npy").transpose(0, 3, 1, 2).astype(np.float32) / 64 - 2
    with pipeline.in_float32() as wide:
        found = {name: one.evaluate(x, 300, batch=1).eps for name, one in (("as_it_is", pipeline), ("float32", wide))}
    np.savez(folder / "eps.npz", **found)


if __name__ == "__main__":
    main()
