"""A parity record of the closed-form model, computed in float64 from the paper's formulas, and networks with faults.

Of ddpmx it uses the noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.parity.check import Check
from ddpmx.parity.ladder import ParityReport
from ddpmx.parity.reference import Reference
from oracles import gaussian
from oracles.toy_backend import ToyBackend

SPEC, SHAPE, SIZE = gaussian.SPEC, gaussian.SHAPE, math.prod(gaussian.SHAPE)
T, STEPS, SEED = 1000, 50, 7
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T))

ROWS, BATCH = "identical rows, largest difference", "batch against one by one, largest difference"
EPS, PIXEL, STEP = "ε, RMS", "ε, largest error", "one step, RMS of x_{t−1}"
BITS = "variational bound, change in bits/dim"
FORCED, FORCED_STEP = "teacher-forced chain, RMS of ε", "teacher-forced chain, RMS of x_{t−1}"
LEVELS = "distortion L_0, change in bits/dim"
FREE = f"free chain of {STEPS} steps, pixels within one level"
LIGHT = "light judge of the chain's images, × 1000"
ALL = [ROWS, BATCH, EPS, PIXEL, STEP, BITS, LEVELS, FORCED, FORCED_STEP, FREE, LIGHT]


def eps_by_hand(x: np.ndarray, t: int) -> np.ndarray:
    kept = ALPHA_BAR[t]
    return np.sqrt(1 - kept) * (x - np.sqrt(kept) * gaussian.MU) / (kept * gaussian.S**2 + 1 - kept)


def chain_by_hand(images: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(timesteps, the state before each step, the samples) of Algorithm 2 with σ² = β over STEPS timesteps."""

    def draw(t: int, purpose: Purpose) -> np.ndarray:
        return normal(SEED, range(images), t, purpose, SIZE).reshape(images, *SHAPE).astype(np.float64)

    grid = np.round(np.linspace(0, T - 1, STEPS)).astype(int)
    kept = ALPHA_BAR[grid]
    before = np.append(1.0, kept[:-1])
    beta = 1 - kept / before
    x, states = draw(0, Purpose.INITIAL), []
    for i in reversed(range(STEPS)):
        states.append(x)
        x0 = (x - np.sqrt(1 - kept[i]) * eps_by_hand(x, grid[i])) / np.sqrt(kept[i])
        x0 = x0.clip(-1, 1)
        x = np.sqrt(before[i]) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - before[i]) * x
        x /= 1 - kept[i]
        if i:
            x += np.sqrt(beta[i]) * draw(int(grid[i]), Purpose.STEP)
    return grid[::-1], states, x


def make_reference(**changes: Any) -> Reference:
    t = np.round(np.linspace(0, T - 1, 32)).astype(np.int32)
    x0 = (gaussian.MU + gaussian.S * np.random.default_rng(0).standard_normal((2, *SHAPE))).clip(-1, 1)
    x0 = np.floor(127.5 * x0 + 128).astype(np.uint8)
    out, losses = [], []
    for step in t.tolist():
        z = normal(SEED, range(2), step, Purpose.DIFFUSE, SIZE).reshape(2, *SHAPE)
        x_t = np.sqrt(ALPHA_BAR[step]) * (x0 / 127.5 - 1) + np.sqrt(1 - ALPHA_BAR[step]) * z
        out.append(eps_by_hand(x_t, step).reshape(2, SIZE))
        losses.append(np.mean((out[-1] - z.reshape(2, SIZE)) ** 2))
    timesteps, states, samples = chain_by_hand(4)
    at = np.unique(np.round(np.linspace(0, STEPS - 1, 32)).astype(np.int64))
    parts: dict[str, Any] = {
        "spec": SPEC,
        "made_with": "NumPy, by hand",
        "seed": SEED,
        "real": True,
        "loss": float(np.median(losses)),
        "t": t,
        "x0": x0,
        "out": np.array(out, np.float32),
        "steps": STEPS,
        "at": at,
        "state": np.array([states[i][0] for i in at], np.float32),
        "state_out": np.array([eps_by_hand(states[i][0], timesteps[i]).reshape(SIZE) for i in at], np.float32),
        "final": np.floor(127.5 * samples + 128).clip(0, 255).astype(np.uint8),
    }
    return Reference(**{**parts, **changes})


T_CHECKED = int(np.round(np.linspace(0, T - 1, 32))[20])
"""Among the t of the first checks, and not on the chain."""
T_CHAIN = int(np.round(np.linspace(0, T - 1, STEPS))[22])
"""The other way round."""
PATTERN = np.random.default_rng(1).standard_normal((T, *SHAPE)).astype(np.float32)
"""Noise that depends on t, and not on the batch."""


class Faulty:
    """The closed form, whose output ``fault(x, t, out)`` then changes in place."""

    description = "toy with a fault"

    def __init__(self, fault: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> None:
        self._inner, self._fault = ToyBackend(), fault

    def bind(self, buffers) -> None:
        self._buffers = buffers
        self._inner.bind(buffers)

    def enqueue(self) -> None:
        self._inner.enqueue()
        self._fault(self._buffers.x, self._buffers.t, self._buffers.out)

    def close(self) -> None:
        pass


def failed(result: ParityReport) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


def check(result: ParityReport, name: str) -> Check:
    (found,) = (check for check in result.checks if check.name == name)
    return found


def noisy(size: float) -> Faulty:
    def fault(x, t, out):
        out += np.float32(size) * PATTERN[t]

    return Faulty(fault)


def biased(size: float) -> Faulty:
    def fault(x, t, out):
        out += np.float32(size)

    return Faulty(fault)


def noise_at_one_t(x, t, out):
    out[t == T_CHECKED] += np.float32(1e-3) * PATTERN[T_CHECKED]


def noise_on_the_chain_only(x, t, out):
    out[t == T_CHAIN] += np.float32(1e-3) * PATTERN[T_CHAIN]


def row_0_alone_is_right(x, t, out):
    out[1:] *= np.float32(1.01)


def neighbours_leak(x, t, out):
    out += np.float32(0.01) * x.mean(axis=0)


def rows_swapped(x, t, out):
    out[...] = out[::-1].copy()


def t_is_one_late(x, t, out):
    for row, step in enumerate(t.tolist()):
        out[row] = eps_by_hand(x[row].astype(np.float64), min(step + 1, T - 1))


def channels_swapped(x, t, out):
    out[...] = out[:, ::-1].copy()


def upside_down(x, t, out):
    out[...] = out[:, :, ::-1].copy()


def a_bias(x, t, out):
    out += np.float32(0.1)


def nothing_at_all(x, t, out):
    out[...] = 0
