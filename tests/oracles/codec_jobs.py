"""Compresses and decompresses on the machine where it runs: ``codec_jobs.py MODEL FOLDER JOB…``.

The job ``here`` encodes FOLDER's ``images.npy`` to ``here.ddpm`` and ``here.npy``; any other one, ``x``, decodes ``x.ddpm``
to ``x.npy``. It prints the machine's architecture and the backend.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np

from ddpmx import load
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
            else:
                pixels = decompress(pipeline, file.read_bytes(), batch=1).pixels
            np.save(folder / f"{job}.npy", pixels)
        print(platform.machine(), pipeline.backend)


if __name__ == "__main__":
    main()
