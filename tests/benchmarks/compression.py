"""What compressing by a model costs, beside its bound, and beside PNG, WebP and JPEG at the same error.

    python tests/benchmarks/compression.py                                                   # the model's own images
    python tests/benchmarks/compression.py --data train-images-idx3-ubyte.gz --picture codec.png    # others

Needs matplotlib for the picture; garments.py says where the images come from. "Bound" is that of the steps that were sent,
"all T" the bound of all T steps down to the same t, on the same images.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import ddpmx
from ddpmx.pipeline import Pipeline
from ddpmx.tasks import codec
from ddpmx.tasks.likelihood import nll

sys.path.insert(0, str(Path(__file__).parent))
from garments import load_images  # type: ignore[import-not-found]

UInt8 = NDArray[np.uint8]

LOSSY = {"WebP": "WEBP", "JPEG": "JPEG"}


def encoded(image: UInt8, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[..., 0]).save(stream, kind, **options)
    return stream.getvalue()


def squares(image: UInt8, data: bytes) -> float:
    found = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(float)
    return float(np.square(found - image[..., 0]).mean())


def sheet(images: UInt8) -> UInt8:
    """All of them as one picture, eight in a row: [1, H, W, 1]."""
    n, height, width, _ = images.shape
    rows = images.reshape(n // 8, 8, height, width).transpose(0, 2, 1, 3)
    return rows.reshape(1, n // 8 * height, 8 * width, 1)


def curve(images: UInt8, kind: str) -> list[tuple[float, float]]:
    """(bits/dim, RMSE) by quality: whole files, headers included."""
    points = []
    for quality in (*range(1, 20, 3), *range(20, 101, 4)):
        files = [encoded(image, kind, quality=quality) for image in images]
        errors = [squares(image, data) for image, data in zip(images, files, strict=True)]
        points.append((8 * sum(map(len, files)) / images.size, float(np.sqrt(np.mean(errors)))))
    return points


def at_error(points: list[tuple[float, float]], rmse: float) -> float:
    """Bits/dim of a codec at an error: the cheapest of its qualities that is as good; NaN if there is none."""
    return min((bits for bits, error in points if error <= rmse), default=math.nan)


def full_bounds(pipeline: Pipeline, images: UInt8, terms: int) -> Iterator[tuple[float, float]]:
    """(t, bits/dim of x_t) of all T steps, with the variance of q."""
    for row in nll(pipeline, images, variance="fixed_small", terms=terms).rows():
        yield float(row["last_t"]), float(row["rate"])


def draw(path: Path, curves: dict[str, list[tuple[float, float]]], rows: list[tuple[str, UInt8]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1, 1.35))
    for name, points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        left.plot(x, y, marker=".", label=name)
    left.set(xlabel="bits per dimension, whole files", ylabel="RMSE, levels of 0…255", xlim=(0, 6), ylim=(0, 25))
    left.legend()
    left.grid(alpha=0.3)
    canvas = np.concatenate([np.concatenate(list(each[:10, ..., 0]), axis=1) for _, each in rows])
    right.imshow(canvas, cmap="gray", vmin=0, vmax=255)
    side = rows[0][1].shape[1]
    right.set_yticks([side * (k + 0.5) for k in range(len(rows))], [name for name, _ in rows])
    right.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train-images-idx3-ubyte.gz of Fashion-MNIST")
    parser.add_argument("--model", default="garments")
    parser.add_argument("--images", type=int, default=32, help="eight, or more of them")
    parser.add_argument("--book", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5])
    parser.add_argument("--terms", type=int, default=100, help="of the full bound")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    images = load_images(arguments.data, arguments.images)[..., None].astype(np.uint8)
    print(
        f"{len(images)} images of 16×16, {'not trained on' if arguments.data else 'which the model was trained on'}\n"
    )
    others = {
        f"{name}, {what}": curve(pictures, kind)
        for what, pictures in (("a file each", images), ("one picture", sheet(images)))
        for name, kind in LOSSY.items()
    }
    with ddpmx.load(arguments.model) as pipeline:
        bounds = sorted(full_bounds(pipeline, images, arguments.terms))
        print(f"| rate | t | states | bits/dim: all T | bound | sent | beyond | file | RMSE | {' | '.join(others)} |")
        print("|" + "---|" * (9 + len(others)))
        points, shown = [], [("images", images)]
        for rate in arguments.rates:
            got = codec.compress(pipeline, images, rate=rate, book=arguments.book)
            bound, sent = (sum(getattr(each, name) for each in got.sent) / images.size for name in ("bits", "spent"))
            t, error = got.header.times[0], got.sent[-1].rmse
            full = float(np.interp(t, *zip(*bounds, strict=True)))
            beside = " | ".join(f"{at_error(others[name], error):.2f}" for name in others)
            print(
                f"| {rate:g} | {t} | {len(got.sent)} | {full:.3f} | {bound:.3f} | {sent:.3f} | {sent / bound - 1:+.0%} "
                f"| {got.bits_per_dim:.3f} | {error:.2f} | {beside} |",
                flush=True,
            )
            points.append((got.bits_per_dim, error))
            shown.append((f"{got.bits_per_dim:.2f} bits/dim", got.pixels))
        exact = codec.compress(pipeline, images, lossless=True, book=arguments.book)
        assert (exact.pixels == images).all()
    print("\n| lossless | bits/dim |\n|---|---|")
    states = sum(each.spent for each in exact.sent) / images.size
    rest = exact.residual / images.size
    print(f"| ddpmx, one file | {exact.bits_per_dim:.3f}: states {states:.3f}, the rest {rest:.3f} |")
    for name, kind, options in (
        ("PNG", "PNG", {"optimize": True}),
        ("WebP", "WEBP", {"lossless": True, "quality": 100, "method": 6}),
    ):
        each = 8 * sum(len(encoded(image, kind, **options)) for image in images) / images.size
        print(f"| {name}, a file each | {each:.3f} |")
        together = 8 * len(encoded(sheet(images)[0], kind, **options)) / images.size
        print(f"| {name}, all images as one picture | {together:.3f} |")
    if arguments.picture is not None:
        draw(
            arguments.picture, {"ddpmx": points} | {k: v for k, v in others.items() if k != "JPEG, a file each"}, shown
        )


if __name__ == "__main__":
    main()
