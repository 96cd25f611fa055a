"""Calibration states: of the whole chain, and of real images; and what cannot be calibrated."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import numpy as np
import torch
from torch import nn

from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.quantize.states import IMAGES, TIMESTEPS, calibration_states
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

SPEC = ModelSpec((1, 8, 8), timesteps=200)


class Gaussian(nn.Module):
    """ε of images that are all N(0, 1/4): √(1−ᾱ)·x / (ᾱ/4 + 1 − ᾱ)."""

    def __init__(self, spec=SPEC, size=1.0):
        super().__init__()
        alpha_bar = torch.from_numpy(spec.make_schedule().alpha_bar)
        self.register_buffer("factor", (size * (1 - alpha_bar).sqrt() / (alpha_bar / 4 + 1 - alpha_bar)).float())
        self.seen = []

    def forward(self, x, t, **conditioning):
        self.seen.append(conditioning)
        return x * self.get_buffer("factor")[t.long()][:, None, None, None]


def images(n, size=8):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 1), dtype=np.uint8)


def test_the_chains_states_are_over_all_of_t():
    states = calibration_states(Gaussian(), SPEC)
    t = [int(batch["t"][0]) for batch in states]
    assert len(t) == TIMESTEPS
    assert t[0] == 199
    assert t[-1] == 0
    assert max(np.diff(t)) < 0
    assert min(np.diff(t)) >= -14
    assert all(batch["x"].shape == (IMAGES, 1, 8, 8) for batch in states)
    variance = [float(batch["x"].var()) for batch in states]
    alpha_bar = SPEC.make_schedule().alpha_bar[t]
    assert variance == pytest.approx(alpha_bar / 4 + 1 - alpha_bar, rel=0.25)
    assert states.real == 0
    assert states.final.shape == (IMAGES, 1, 8, 8)


def test_the_same_network_ends_where_it_ended_and_another_does_not():
    states = calibration_states(Gaussian(), SPEC)
    assert states.drift(TorchBackend(Gaussian()), SPEC) == 0
    assert states.drift(TorchBackend(Gaussian(size=0.98)), SPEC) > 0.2


def test_real_images_are_noised_at_the_same_t():
    states = calibration_states(Gaussian(), SPEC, data=images(40))
    assert states.real == len(states.own) == TIMESTEPS
    last = states.batches[-1]
    assert int(last["t"][0]) == 0
    nearest = np.abs(last["x"][:, None] - (images(40).transpose(0, 3, 1, 2) / 127.5 - 1)[None]).mean((2, 3, 4)).min(1)
    assert nearest.max() < 0.02  # at t = 0 they are hardly noised


def test_conditioning_is_that_of_the_chain():
    spec = ModelSpec((1, 8, 8), timesteps=200, classes=3, null_class=True, self_condition=True, condition=2)
    states = calibration_states(Gaussian(), spec, data=images(9))
    for batch in states:
        assert set(batch) == {"x", "t", "y", "x0_prev", "cond"}
        assert set(batch["y"]) == {0, 1, 2, 3}
    assert not states.batches[0]["x0_prev"].any()
    assert states.batches[3]["x0_prev"].any()
    assert set(states.conditioning) == {"y", "cond"}
    assert states.drift(TorchBackend(Gaussian()), spec) == 0


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="takes 8 images or more, and there are 7"):
        calibration_states(Gaussian(), SPEC, data=images(7))


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="the images are"):
        calibration_states(Gaussian(), SPEC, data=images(9, 16))


def test_an_untrained_network_is_refused():
    with pytest.raises(InputError, match="nothing to calibrate 8 bits on"):
        calibration_states(Gaussian(size=1e-5), SPEC)


def test_large_images_are_fewer_in_a_shorter_chain():
    spec = ModelSpec((3, 256, 256), timesteps=200)

    class Once(Gaussian):
        def forward(self, x, t, **conditioning):
            self.seen.append(len(x))
            return super().forward(x, t)

    network = Once(spec)
    states = calibration_states(network, spec)
    assert len(states) == 20
    assert all(len(batch["t"]) == 1 for batch in states)
    assert len(states.final) == 1
