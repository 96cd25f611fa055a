"""What the shipped model takes out of noisy images, beside non-local means and BM3D: PSNR and SSIM, and a picture.

    python tests/benchmarks/denoising.py [--data train-images-idx3-ubyte.gz] [--images 200] [--picture denoising.png]

It needs scikit-image (`pip install scikit-image`), and bm3d for that row (`pip install bm3d`); neither is a dependency of
ddpmx. ``--data`` is a split of Fashion-MNIST that the model has not been trained on: see garments.py. Without it the images
are those that it was trained on, and the table says so. Noise is added and neither rounded nor cut off, so that no method
has to guess what lies beyond 0 and 255; every method knows σ, where its row does not say otherwise.

Non-local means takes the best of a few strengths and patches for each σ, chosen on images that are not judged.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_nl_means

import ddpmx
from ddpmx.images.writers import save_png
from ddpmx.tasks.denoise import denoise, estimate_sigma

sys.path.insert(0, str(Path(__file__).parent))
from garments import load_images  # type: ignore[import-not-found]

try:
    from bm3d import bm3d
except ImportError:
    bm3d = None

Images = NDArray[np.float64]
TUNED = 50
"""Images on which non-local means is tuned, behind those that are judged."""


def judged(clean: Images, found: Images) -> tuple[float, float]:
    """Mean PSNR and SSIM, of images cut to 0…255."""
    found = np.clip(found, 0, 255)
    pairs = list(zip(clean, found, strict=True))
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=255, win_size=7) for a, b in pairs]
    return float(np.mean(psnr)), float(np.mean(ssim))


def non_local_means(images: Images, sigma: float, settings: tuple[int, int, float]) -> Images:
    patch, distance, strength = settings
    options: dict[str, Any] = {"patch_size": patch, "patch_distance": distance, "fast_mode": False}
    return np.stack(
        [denoise_nl_means(y, h=strength * sigma, sigma=sigma, preserve_range=True, **options) for y in images]
    )


def tuned(clean: Images, noisy: Images, sigma: float) -> tuple[int, int, float]:
    """The settings of non-local means with the best PSNR: patch, distance, h/σ."""
    choices = itertools.product((3, 5), (5, 8), (0.6, 0.8, 1.0, 1.3, 1.6, 2.0))
    return max(choices, key=lambda choice: judged(clean, non_local_means(noisy, sigma, choice))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train-images-idx3-ubyte.gz of Fashion-MNIST")
    parser.add_argument("--model", default="garments")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[15, 25, 50])
    parser.add_argument(
        "--picture", type=Path, help="a PNG: noisy, BM3D, ddpmx's estimate and draw, and the clean images"
    )
    arguments = parser.parse_args()
    everything = load_images(arguments.data, arguments.images + TUNED)
    clean, other = everything[: arguments.images], everything[arguments.images :]
    print(f"{len(clean)} images of 16×16, {'not trained on' if arguments.data else 'which the model was trained on'}\n")
    print("| σ | method | PSNR, dB | SSIM |\n|---|---|---|---|")
    rows = []
    with ddpmx.load(arguments.model) as pipeline:
        for number, sigma in enumerate(arguments.sigmas):
            rng = np.random.default_rng(number)
            noisy, noisy_other = (images + sigma * rng.standard_normal(images.shape) for images in (clean, other))
            settings = tuned(other, noisy_other, sigma)

            def ours(sigma: float | None, sample: bool = False, noisy: Images = noisy) -> Images:
                return (denoise(pipeline, noisy[..., None], sigma, sample=sample).x0[:, 0] + 1) * 127.5

            name = f"non-local means (patch {settings[0]}, distance {settings[1]}, h = {settings[2]}·σ)"
            methods: dict[str, Callable[[], Images]] = {
                "noisy": lambda noisy=noisy: noisy,
                name: lambda noisy=noisy, sigma=sigma, settings=settings: non_local_means(noisy, sigma, settings),
                "BM3D": lambda noisy=noisy, sigma=sigma: np.stack([bm3d(y, sigma) for y in noisy]),
                "ddpmx denoise --sigma": lambda ours=ours, sigma=sigma: ours(sigma),
                "ddpmx denoise --blind": lambda ours=ours: ours(None),
                "ddpmx denoise --sample": lambda ours=ours, sigma=sigma: ours(sigma, sample=True),
            }
            shown = []
            for method, run in methods.items():
                if method == "BM3D" and bm3d is None:
                    continue
                found = run()
                psnr, ssim = judged(clean, found)
                print(f"| {sigma:g} | {method} | {psnr:.2f} | {ssim:.3f} |", flush=True)
                if method != "ddpmx denoise --blind":
                    shown.append(found[:12])
            measured = np.array([estimate_sigma(y[..., None]) for y in noisy])
            print(f"| {sigma:g} | σ measured: {measured.mean():.1f} ± {measured.std():.1f} | | |")
            rows.append(np.concatenate([np.concatenate(list(row), axis=1) for row in [*shown, clean[:12]]], axis=0))
    if arguments.picture is not None:
        middle = rows[len(rows) // 2]
        save_png(arguments.picture, np.clip(middle + 0.5, 0, 255).astype(np.uint8)[..., None], zoom=3)


if __name__ == "__main__":
    main()
