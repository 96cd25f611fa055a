"""A diffusion whose forward process masks one coordinate after the other is an autoregressive model (Ho et al. 2020, §4.3).

    q(x_t | x_{t−1}) masks coordinate t,   T = D,   p(x_T) is the blank image,
    p(x_{t−1} | x_t) copies the coordinates that are there and draws coordinate t.

Code counts t = 0…D−1, as everywhere in ddpmx: at t the coordinates 0…t are blank, and number t is what the network has to
know. The images are garments of 8×8 pixels with a few grey levels, one channel for each level.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.data import Dataset
from ddpm_export.training.images.source import Source
from ddpm_export.training.learner import Learner
from ddpm_export.training.objective import Losses
from ddpm_export.training.settings import TrainSettings
from ddpmx import ModelSpec
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.images.writers import grid, save_png

GARMENTS = Path(__file__).parents[1] / "fashion_mnist" / "fashion_mnist_16x16_10k.npz"
HELD_OUT = 320


class Masking(nn.Module):
    """What ddpmx's trainer minimises in place of a Gaussian diffusion's loss: L_t in bits, at one t for each image.

    There are D terms of one coordinate each, so their mean over t is the bound L in bits per dimension.
    """

    def forward(
        self, network: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Losses:
        """For one-hot images x0 [B, K, H, W] in −1…1 and t int64 [B]. No noise is added, so ε is not used."""
        out = network(masked(x0, t), t)
        bits = terms(out, x0, t)
        return Losses(bits, bits.detach(), out.detach())


def masked(x0: Tensor, t: Tensor) -> Tensor:
    """x_t: all channels are 0 at the coordinates 0…t, counted row by row."""
    place = torch.arange(x0[0, 0].numel(), device=x0.device).view(x0.shape[2:])
    return x0 * (place > t[:, None, None])[:, None]


def terms(out: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """L_t = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) in bits, [B].

    q puts all of its mass on the level that coordinate t has, so the divergence is −log p of that level; the coordinates
    that are copied add nothing.
    """
    here = torch.arange(len(t), device=t.device)
    logits, levels = out.flatten(2)[here, :, t], x0.flatten(2)[here, :, t].argmax(1)
    return nn.functional.cross_entropy(logits, levels, reduction="none") / math.log(2)


@torch.no_grad()
def bits_by_t(network: nn.Module, x0: Tensor) -> Tensor:
    """All terms of one-hot images, float32 [n, D]. L_T is 0, so an image's sum is −log₂ p(x_0) itself and no bound."""
    D = x0[0, 0].numel()
    every = [terms(network(masked(x0, t), t), x0, t) for t in torch.arange(D)[:, None].expand(D, len(x0))]
    return torch.stack(every, dim=1)


@torch.no_grad()
def draw(network: nn.Module, shape: tuple[int, int, int], n: int, seed: int = 0) -> NDArray[np.int64]:
    """The reverse process, from the blank image to x_0: levels, int64 [n, H, W].

    Image i of a seed is always the same, as in ddpmx's chains: the noise is its own, a function of (seed, i, t).
    """
    K, H, W = shape
    x = torch.zeros(n, K, H, W)
    for t in reversed(range(H * W)):
        logits = network(x, torch.full((n,), t)).flatten(2)[:, :, t].double()
        # the largest of logits + Gumbel noise is a draw of their softmax; Φ of a Gaussian is uniform
        uniform = torch.special.ndtr(torch.from_numpy(normal(seed, range(n), t, Purpose.STEP, K)).double())
        level = (logits - torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))).argmax(1)
        x[:, :, t // W, t % W] = 2.0 * nn.functional.one_hot(level, K) - 1
    return x.argmax(1).numpy()


def garments(levels: int) -> NDArray[np.int64]:
    """Fashion-MNIST at 8×8: the mean of 2×2 pixels, rounded to a few levels. int64 [10000, 8, 8]."""
    with np.load(GARMENTS) as data:
        means = data["images"].reshape(-1, 8, 2, 8, 2).mean((2, 4))
    return np.minimum(means * levels // 256, levels - 1).astype(np.int64)


def one_hot(images: NDArray[np.int64], levels: int) -> NDArray[np.uint8]:
    """Uint8 [N, H, W, K], 255 in the channel of the pixel's level."""
    return (255 * np.eye(levels, dtype=np.uint8))[images]


def as_input(images: NDArray[np.int64], levels: int) -> Tensor:
    """Float32 [N, K, H, W] in −1…1, as the trainer has them."""
    return torch.from_numpy(one_hot(images, levels).transpose(0, 3, 1, 2) / np.float32(127.5) - 1)


def train(images: NDArray[np.int64], levels: int, steps: int, *, width: int = 32, batch: int = 128) -> nn.Module:
    """Train a U-Net with ddpmx's trainer: its batches, Adam, averaged weights and clipping, with the loss above."""
    _, height, wide = images.shape
    multipliers = (1, 2) if height % 2 == wide % 2 == 0 and height > 2 else (1,)
    network = UNetConfig(
        levels, levels, (height, wide), width, multipliers, blocks=1, attention=(height,), dropout=0.0, groups=4
    )
    settings = TrainSettings(batch=batch, lr=2e-3, warmup=min(100, steps // 4), ema=0.995, lr_decay=steps)
    # of the spec a masking diffusion needs the shape and T; its β_t are not used
    spec = ModelSpec((levels, height, wide), timesteps=height * wide, prediction="x0")
    learner = Learner(Dataset(one_hot(images, levels), Source(GARMENTS)), spec, network, settings, device="cpu")
    learner.objective = Masking()  # type: ignore[assignment]
    for step in range(steps):
        learner.train_step()
        learner.check(1)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: {learner.loss:.3f} bits/dim", flush=True)
    return learner.average


def by_counting(train: NDArray[np.int64], test: NDArray[np.int64], levels: int, *, context: bool) -> float:
    """Bits/dim of test images by the shares of levels at each place; ``context``: given the pixels right and below."""

    def keys(images: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.broadcast_to(np.arange(images[0].size).reshape(images[0].shape), images.shape)
        if not context:
            return place
        wide = np.pad(images, ((0, 0), (0, 1), (0, 1)))
        return (place * levels + wide[:, :-1, 1:]) * levels + wide[:, 1:, :-1]

    counts = np.full((test[0].size * levels**2, levels), 0.5)
    np.add.at(counts, (keys(train), train), 1)
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(shares[keys(test), test]).mean())


def main() -> None:
    """Train, say bits/dim of images that were not trained on, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--levels", type=int, default=4, help="grey levels of a pixel")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("drawn.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    levels = arguments.levels
    images = garments(levels)
    test, rest = images[:HELD_OUT], images[HELD_OUT:]
    network = train(rest, levels, arguments.steps, width=arguments.width)
    bits = bits_by_t(network, as_input(test, levels))
    each = bits.mean(1)
    print(f"{HELD_OUT} images that were not trained on, in bits/dim:")
    print(f"  all levels alike         {math.log2(levels):.3f}")
    print(f"  each pixel by itself     {by_counting(rest, test, levels, context=False):.3f}")
    print(f"  given right and below    {by_counting(rest, test, levels, context=True):.3f}")
    print(f"  the masking diffusion    {each.mean():.3f} ± {each.std() / math.sqrt(len(each)):.3f}")
    rows = bits.mean(0).view(8, 8).mean(1)
    print("by rows, from the last, which is drawn first:", " ".join(f"{row:.2f}" for row in rows.flip(0)))
    drawn = draw(network, (levels, 8, 8), 64, arguments.seed)
    both = np.concatenate([drawn, test[:: HELD_OUT // 32]])[..., None] * 255 // (levels - 1)
    save_png(arguments.out, grid(both.astype(np.uint8), columns=16), zoom=4)
    print(f"{arguments.out}: four rows drawn, two of real images")


if __name__ == "__main__":
    main()
