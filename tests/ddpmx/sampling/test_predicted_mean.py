"""Chains of networks that predict μ, the mean of x_{t−1}, against the chain that simply adds noise to it, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.diffusion.samplers import make_table
from ddpmx.sampling import chain
from oracles import gaussian

T, SEED = 1000, 5
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETA)
BEFORE = np.concatenate([[1.0], ALPHA_BAR[:-1]])
SIZE = int(np.prod(gaussian.SHAPE))


def x0_of(t, x):
    """E[x_0 | x_t] where every pixel of x_0 is N(μ, s²)."""
    a, s2 = ALPHA_BAR[t], gaussian.S**2
    return (np.sqrt(a) * s2 * x + (1 - a) * gaussian.MU) / (a * s2 + 1 - a)


def mean_of(t, x):
    """E[x_{t−1} | x_t], by equation 7."""
    of_x0 = np.sqrt(BEFORE[t]) * BETA[t] / (1 - ALPHA_BAR[t])
    return of_x0 * x0_of(t, x) + np.sqrt(1 - BETA[t]) * (1 - BEFORE[t]) / (1 - ALPHA_BAR[t]) * x


class MeanBackend:
    description = "closed form of μ"

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self):
        self.buffers.out[...] = mean_of(int(self.buffers.t[0]), self.buffers.x.astype(np.float64))

    def close(self):
        pass


def last(backend, n, **sampling):
    table = make_table(gaussian.SPEC.make_schedule(), "mu", "fixed_small", **sampling)
    images = np.arange(n)
    start = chain.initial(SEED, images, gaussian.SHAPE)
    *_, step = chain.run(backend, table, start, seed=SEED, images=images)
    return step.x0


def test_the_whole_chain_adds_noise_to_the_predicted_mean(figure):
    n = 2
    x = chain.initial(SEED, np.arange(n), gaussian.SHAPE).astype(np.float64)
    for t in range(T - 1, -1, -1):
        x = mean_of(t, x)
        if t:
            z = noise.normal(SEED, np.arange(n), t, Purpose.STEP, SIZE).reshape(x.shape)
            x = x + np.sqrt(BETA[t] * (1 - BEFORE[t]) / (1 - ALPHA_BAR[t])) * z
    figure("a chain of 1000 predicted means against float64", np.abs(last(MeanBackend(), n) - x).max(), at_most=1e-4)


@pytest.mark.parametrize("steps", [10, 50])
def test_a_shorter_chain_follows_the_same_x0(steps, figure):
    """DDIM without noise: its states follow from x̂_0, which the mean of a single step gives at every t."""
    tau = [round(i * (T - 1) / (steps - 1)) for i in range(steps)]
    x = chain.initial(SEED, np.arange(2), gaussian.SHAPE).astype(np.float64)
    for at in range(steps - 1, -1, -1):
        x0, now = x0_of(tau[at], x), ALPHA_BAR[tau[at]]
        before = ALPHA_BAR[tau[at - 1]] if at else 1.0
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
    found = last(MeanBackend(), 2, sampler="ddim", steps=steps)
    figure(f"DDIM of {steps} steps with predicted means against float64", np.abs(found - x).max(), at_most=1e-3)
