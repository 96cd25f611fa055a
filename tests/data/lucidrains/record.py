"""Asks denoising-diffusion-pytorch what it computes: python record.py RELEASE, once for each; see README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import denoising_diffusion_pytorch.denoising_diffusion_pytorch as theirs
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2] / "runtime")]

from ddpmx.diffusion import noise  # noqa: E402
from ddpmx.diffusion.noise import Purpose  # noqa: E402
from oracles.lucidrains import FILE, SIZE, TIMESTEPS, numbers, weights  # noqa: E402

BASE = {"dim": 8, "dim_mults": [1, 2, 4], "channels": 3}
SELF = {"self_condition": True}
RECENT = {
    "plain": {},
    "self-conditioning": SELF,
    "gray, four levels": {"channels": 1, "dim_mults": [1, 2, 2, 4]},
    "two levels, threefold": {"dim_mults": [1, 3]},
    "learned variance": {"learned_variance": True},
    "learned Fourier": {"learned_sinusoidal_cond": True},
    "random Fourier": {"random_fourier_features": True, "learned_sinusoidal_dim": 8},
    "heads": {"full_attn": [True, False, True], "attn_heads": [2, 4, 8], "attn_dim_head": [16, 32, 8]},
    "theta": {"sinusoidal_pos_emb_theta": 1000},
}
LAST_FULL = {"full_attn": [False, False, True]}
NETWORKS = {
    "2.3.4": {**RECENT, "flash": {"flash_attn": True}, "stem": {"init_dim": 12, "dropout": 0.3}},
    "2.1.1": RECENT,
    "1.11.1": {"plain": LAST_FULL, "eight heads": {**LAST_FULL, "attn_heads": 8, "attn_dim_head": 16}},
    "1.8.15": {"plain": LAST_FULL, "four groups": {**LAST_FULL, "resnet_block_groups": 4}},
    "1.7.7": {"plain": {}},
    "1.7.3": {"plain": {}},
    "1.7.1": {"plain": {}},
    "1.6.4": {"plain": {}, "self-conditioning": SELF},
    "1.0.0": {"plain": {}},
}
T = 20
CHAINS = {
    "noise, cosine": ({}, {"objective": "pred_noise", "beta_schedule": "cosine"}),
    "x0, sigmoid": ({}, {"objective": "pred_x0", "beta_schedule": "sigmoid"}),
    "v, linear": ({}, {"objective": "pred_v", "beta_schedule": "linear", "timesteps": 50}),
    "v, self-conditioning": (SELF, {"objective": "pred_v", "min_snr_loss_weight": True}),
    "noise, self-conditioning": (SELF, {"objective": "pred_noise", "beta_schedule": "cosine"}),
    "x0, self-conditioning": (SELF, {"objective": "pred_x0", "schedule_fn_kwargs": {"start": -2, "tau": 0.8}}),
    "learned variance": ({"learned_variance": True}, {"objective": "pred_v", "beta_schedule": "cosine"}),
}
BUFFERS = [
    *(
        ("sigmoid", objective, clipped)
        for objective in ("pred_noise", "pred_x0", "pred_v")
        for clipped in (False, True)
    ),
    ("cosine", "pred_v", False),
    ("linear", "pred_noise", False),
]
RELEASES_WITH_CHAINS = ("2.3.4", "2.1.1", "1.6.4")


def network(arguments):
    net = theirs.Unet(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}).eval()
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights(shapes).items()})
    return net, shapes


@torch.no_grad()
def answers(net, channels):
    shape = (len(TIMESTEPS), channels, SIZE, SIZE)
    x, x0_prev = (torch.from_numpy(numbers(name, shape)) for name in ("x", "x0_prev"))
    extra = (x0_prev.clamp(-1, 1),) if net.self_condition else ()
    return net(x, torch.from_numpy(TIMESTEPS), *extra).numpy()


def diffusion(net, arguments):
    kind = theirs.GaussianDiffusion
    if net.out_dim != net.channels:
        from denoising_diffusion_pytorch import learned_gaussian_diffusion

        kind = learned_gaussian_diffusion.LearnedGaussianDiffusion
    return kind(net, image_size=SIZE, **arguments)


def chain(whole):
    """Their chain with ddpmx's noise for two images."""
    shape = (2, whole.channels, SIZE, SIZE)
    elements = int(np.prod(shape[1:]))
    images = np.arange(2)
    steps = iter(range(whole.num_timesteps - 1, 0, -1))

    def draw(t, purpose):
        return torch.from_numpy(noise.normal(0, images, t, purpose, elements).reshape(shape))

    randn, randn_like = torch.randn, torch.randn_like
    torch.randn = lambda *_, **__: draw(0, Purpose.INITIAL)
    torch.randn_like = lambda *_, **__: draw(next(steps), Purpose.STEP)
    whole.unnormalize = lambda x: x
    try:
        seen = whole.p_sample_loop(shape, return_all_timesteps=True)
    finally:
        torch.randn, torch.randn_like = randn, randn_like
    assert next(steps, None) is None, "all noise was used"
    return seen.transpose(0, 1).numpy()


def main(release):
    assert Path(theirs.__file__).parts[-3].endswith(release) or theirs.__version__ == release, theirs.__version__
    arrays = dict(np.load(FILE)) if FILE.exists() else {}
    index = json.loads(str(arrays.pop("index", "{}")))

    def add(name, unet, gaussian, shapes, seen, whole=None):
        buffers = {}
        if whole is not None:
            state = whole.state_dict()
            buffers = {key: state[key].numpy() for key in ("betas", "loss_weight") if key in state}
        index[name] = {"release": release, "unet": unet, "diffusion": gaussian, "shapes": shapes, "buffers": [*buffers]}
        arrays.update({f"{name}/{key}": array for key, array in {**buffers, "answers": seen}.items()})

    for name, more in NETWORKS[release].items():
        arguments = {**BASE, **more}
        net, shapes = network(arguments)
        add(f"{release} {name}", arguments, None, shapes, answers(net, arguments["channels"]))
    for name, (more, how) in CHAINS.items() if release in RELEASES_WITH_CHAINS else ():
        if release != "2.3.4" and "self-conditioning" in name:
            continue
        arguments, how = {**BASE, **more}, {"timesteps": T, **how}
        net, shapes = network(arguments)
        whole = diffusion(net, how)
        seen = chain(whole)
        add(f"chain {release} {name}", arguments, how, shapes, seen[[len(seen) // 2, -1]], whole)
    for schedule, objective, clipped in BUFFERS if release == "2.3.4" else ():
        how = {"beta_schedule": schedule, "objective": objective, "min_snr_loss_weight": clipped}
        whole = diffusion(network(BASE)[0], how)
        name = f"buffers {schedule} {objective}{' min-SNR' * clipped}"
        add(name, BASE, how, {}, np.zeros(0, np.float32), whole)
    np.savez_compressed(FILE, index=json.dumps(index, sort_keys=True), **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
