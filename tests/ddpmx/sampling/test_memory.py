"""Chains of samplers with memory in NumPy: what they remember, and what they draw."""

from __future__ import annotations

import numpy as np
import pytest

import ddpmx
from ddpmx.backends.base import RowByRow
from ddpmx.diffusion.samplers import make_table
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import Guidance, GuidedBackend
from ddpmx.sampling.pixels import to_uint8
from oracles import conditioning, gaussian
from oracles.toy_backend import ToyBackend

SCHEDULE = gaussian.SPEC.make_schedule()
SAMPLERS = ("dpmpp_2m", "unipc")
IMAGES, SEED = np.array([4, 0, 7]), 9


def table_of(sampler, steps=9, **more):
    return make_table(SCHEDULE, "eps", "fixed_small", sampler=sampler, steps=steps, spacing="logsnr", **more)


def run(table, backend=None, images=IMAGES, **more):
    start = chain.initial(SEED, images, gaussian.SHAPE)
    steps = chain.run(backend or ToyBackend(), table, start, seed=SEED, images=images, **more)
    return [chain.Step(step.t, *(array.copy() for array in step[1:])) for step in steps]


def in_float64(table, outputs, x, clip=1.0):
    """(x̂_0, x_next) of each step. ``outputs(x, t, x0_prev)`` is the network."""
    earlier, found = [np.zeros_like(x)] * 2, []
    for t, (p, q, a, b, _), (c, d) in zip(table.timesteps, table.rows, table.memory, strict=True):
        x0 = np.clip(p * x + q * outputs(x, t, earlier[0]), -clip, clip)
        x = a * x0 + b * x + c * earlier[0] + d * earlier[1]
        earlier = [x0, earlier[0]]
        found.append((x0, x))
    return found


def toy(x, t, x0_prev):
    slope, offset = gaussian.coefficients(SCHEDULE)
    return slope[t] * x - offset[t] * gaussian.MU


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chain_is_the_table_s_recurrence(sampler, clip, figure):
    """What is remembered is clipped: 0.3 is less than the largest |x_0|."""
    table = table_of(sampler)
    start = chain.initial(SEED, IMAGES, gaussian.SHAPE).astype(np.float64)
    worst = 0.0
    for step, (x0, x_next) in zip(run(table, clip=clip), in_float64(table, toy, start, clip), strict=True):
        worst = max(worst, np.abs(step.x0 - x0).max(), np.abs(step.x_next - x_next).max())
    figure(f"{sampler}, clip {clip}: a chain against float64, absolute", worst, at_most=1e-4)
    np.testing.assert_array_equal(step.x0, step.x_next)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_conditions_itself_gets_what_the_sampler_remembers(sampler, figure):
    shapes = gaussian.SPEC.replace(self_condition=True).conditioning_shapes
    table = table_of(sampler)
    start = chain.initial(SEED, IMAGES, gaussian.SHAPE).astype(np.float64)
    expected = in_float64(table, lambda x, t, x0: toy(x, t, x0) + conditioning.BY_ITSELF * x0, start)
    steps = run(table, conditioning_shapes=shapes)
    worst = max(np.abs(step.x_next - x).max() for step, (_, x) in zip(steps, expected, strict=True))
    figure(f"{sampler}, self-conditioned: a chain against float64, absolute", worst, at_most=1e-3)
    assert np.abs(steps[4].x_next - run(table)[4].x_next).max() > 0.05  # control: it makes a difference


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_guided_chain_remembers_the_guided_x0(sampler):
    """Guided halfway between two classes, the toy's output is that of the class between them."""
    spec = gaussian.SPEC.replace(classes=conditioning.CLASSES, null_class=True)
    network = GuidedBackend(ToyBackend(), spec, Guidance(0.5, 5))
    more = {"conditioning_shapes": spec.conditioning_shapes}
    guided = run(table_of(sampler), network, conditioning={"y": np.int32([1, 1, 1])}, **more)
    between = run(table_of(sampler), conditioning={"y": np.int32([3, 3, 3])}, **more)
    for ours, theirs in zip(guided, between, strict=True):
        np.testing.assert_allclose(ours.x_next, theirs.x_next, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_neighbours(sampler):
    together = run(table_of(sampler))
    for number, image in enumerate(IMAGES):
        (alone,) = run(table_of(sampler), RowByRow(ToyBackend()), np.array([image]))[-1].x0
        np.testing.assert_array_equal(alone, together[-1].x0[number])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chain_draws_no_noise_and_uses_no_seed(sampler):
    start = chain.initial(SEED, IMAGES, gaussian.SHAPE)
    first, second = (
        [step.x_next.copy() for step in chain.run(ToyBackend(), table_of(sampler), start, seed=seed, images=IMAGES)]
        for seed in (1, 2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ten_steps_come_as_near_to_the_exact_solution_as_fifty_of_ddim(sampler):
    """The probability-flow ODE keeps (x_t − √ᾱ·μ)/√(ᾱ·s² + 1 − ᾱ); E[x_0 | x_t] at t = 0 is what a chain ends with."""

    def distance(table):
        variance = SCHEDULE.alpha_bar * gaussian.S**2 + SCHEDULE.one_minus_alpha_bar
        first, signal = table.timesteps[0], np.sqrt(SCHEDULE.alpha_bar)
        start = chain.initial(SEED, IMAGES, gaussian.SHAPE).astype(np.float64)
        x = signal[0] * gaussian.MU + np.sqrt(variance[0] / variance[first]) * (start - signal[first] * gaussian.MU)
        exact = (x - np.sqrt(SCHEDULE.one_minus_alpha_bar[0]) * toy(x, 0, None)) / signal[0]
        return np.sqrt(np.mean((run(table)[-1].x0 - exact) ** 2))

    assert distance(table_of(sampler, 10)) < distance(table_of("ddim", 50)) < distance(table_of("ddim", 10))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pipeline_starts_such_a_chain_in_the_middle(sampler):
    """The states at the start are x, and the first step is one of first order, DDIM's."""
    how = {"sampler": sampler, "steps": 9, "spacing": "logsnr"}
    x = chain.initial(SEED, np.arange(2), gaussian.SHAPE)
    with ddpmx.Pipeline(gaussian.SPEC, ToyBackend()) as pipeline:
        start = int(pipeline.table(**how).timesteps[4])
        table = pipeline.table(start=start, **how)
        drawn = pipeline.generate(2, x=x, start=start, **how)
    np.testing.assert_allclose(table.rows[0], table_of("ddim", start=start).rows[0], rtol=1e-12)
    states = in_float64(table, toy, x.astype(np.float64))
    assert len(states) == 5
    expected = to_uint8(states[-1][0].astype(np.float32)).astype(int)
    assert np.abs(drawn.transpose(0, 3, 1, 2).astype(int) - expected).max() <= 1
