"""Interpolation, shared latents and progressive generation, on Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx import ModelSpec, Sampling
from ddpmx.errors import Cancelled, InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.interpolate import interpolate
from ddpmx.tasks.progressive import Progress
from ddpmx.tasks.shared import share_from
from ddpmx.tasks.variations import begin
from oracles.conditioning import KINDS
from oracles.correlated import Correlated, smooth

SHAPE = (1, 3, 4)
SPEC = ModelSpec(SHAPE, timesteps=60, schedule="cosine", clip=None, variance="fixed_small")
MEAN = np.linspace(-0.2, 0.2, 12).reshape(SHAPE)
COVARIANCE = smooth(SHAPE, deviation=0.25)
RNG = np.random.default_rng(0)
A, B = RNG.integers(90, 165, (2, 3, 4, 1), dtype=np.uint8)
DDIM = Sampling(sampler="ddim")


def model(spec=SPEC, **faults):
    return Pipeline(spec, Correlated(spec, MEAN, COVARIANCE, **faults))


def by_hand(sampling_steps, x, covariance, mean):
    """DDIM of a perfect network, written out in float64: x_t of Gaussian data along its own axes."""
    alpha_bar = SPEC.make_schedule().alpha_bar
    values, vectors = np.linalg.eigh(covariance)
    for t, after in zip(sampling_steps, [*sampling_steps[1:], None], strict=True):
        kept = alpha_bar[t]
        centred = (x - np.sqrt(kept) * mean) @ vectors
        eps = (np.sqrt(1 - kept) * centred / (kept * values + 1 - kept)) @ vectors.T
        x0 = (x - np.sqrt(1 - kept) * eps) / np.sqrt(kept)
        if after is None:
            return x0
        x = np.sqrt(alpha_bar[after]) * x0 + np.sqrt(1 - alpha_bar[after]) * eps
    raise AssertionError


# --- interpolation ---------------------------------------------------------------------------------------------------


def test_between_two_images_is_the_chain_of_their_mixture(figure):
    """Every step is linear in x, so the images lie on the line between the ends; where its ends lie, is written out."""
    t = 30
    with model() as pipeline:
        got = interpolate(pipeline, A, B, t, 5, sampling=DDIM, seed=3)
        noised = begin(pipeline, np.stack([A]), 31 / 60, seed=3).x
    assert got.t == t
    flat = got.x0.reshape(5, -1).astype(float)
    for i, weight in enumerate(np.linspace(0, 1, 5)):
        figure(f"λ = {weight}", np.abs(flat[i] - ((1 - weight) * flat[0] + weight * flat[4])).max(), at_most=2e-6)
    end = by_hand(range(t, -1, -1), noised.reshape(1, -1).astype(float), COVARIANCE, MEAN.reshape(-1))
    figure("λ = 0 is the first image, varied", np.abs(flat[0] - end[0]).max(), at_most=5e-6)
    assert np.abs(flat[0] - flat[4]).max() > 0.05
    assert np.array_equal(got.pixels, to_nhwc(got.x0))


def test_the_ends_are_variations_of_the_images_with_one_noise():
    """λ = 0 and 1 are what the chain makes of either image alone, with its noise in the steps too."""
    with model() as pipeline:
        got = interpolate(pipeline, A, B, 30, [0.0, 1.0, 0.0], seed=3, index=4)
        for image, end in ((A, 0), (B, 1)):
            begun = begin(pipeline, image[None], 31 / 60, seed=3, first=4)
            alone = pipeline.generate(1, x=begun.x, sampling=begun.sampling, seed=3, first=4)
            assert np.array_equal(got.pixels[end], alone[0])
        assert np.array_equal(got.pixels[0], got.pixels[2]), "the noise is the same for every λ"


def test_at_the_images_themselves_the_ends_are_given_back():
    with model() as pipeline:
        got = interpolate(pipeline, A, B, -1, 3)
        assert got.t == -1
        assert np.array_equal(got.pixels[0], A)
        assert np.array_equal(got.pixels[2], B)
        middle = (A.astype(float) + B) / 2
        assert np.abs(got.pixels[1] - middle).max() <= 0.5
        near = interpolate(pipeline, A, B, 0, 2).pixels  # one step of little noise: nearly
        alpha_bar = SPEC.make_schedule().alpha_bar[0]
        assert np.abs(near[0].astype(int) - A).max() <= 3.5 * 127.5 * np.sqrt(1 / alpha_bar - 1)


@pytest.mark.parametrize("sways", [None, "size"])
def test_the_batch_makes_no_difference(sways):
    spec = SPEC.replace(classes=5, null_class=True)
    with model(spec, sways=sways) as pipeline:
        whole = interpolate(pipeline, A, B, 20, 5, labels=2, guidance=2, batch=5).x0
        if sways is None:
            assert np.array_equal(whole, interpolate(pipeline, A, B, 20, 5, labels=2, guidance=2, batch=2).x0)
        some = interpolate(pipeline, A, B, 20, [0.25, 0.75], labels=2, guidance=2, batch=5).x0
        assert np.array_equal(some, whole[[1, 3]])


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({"variance": "learned_range"}, Sampling()),
        (KINDS["itself"], Sampling()),
        ({}, Sampling(sampler="unipc", steps=13)),
        ({}, Sampling(sampler="dpmpp_2m", steps=13)),
    ],
)
def test_other_networks_and_samplers(changes, sampling):
    spec = SPEC.replace(**changes)
    with model(spec, v=0.3) as pipeline:
        got = interpolate(pipeline, A, B, 30, 2, seed=3, sampling=sampling)
        begun = begin(pipeline, A[None], 31 / 60, seed=3, sampling=sampling)
        assert np.array_equal(got.pixels[:1], pipeline.generate(1, x=begun.x, sampling=begun.sampling, seed=3))


def test_progress_cancel_and_the_nearest_timestep():
    seen = []
    with model() as pipeline:
        got = interpolate(pipeline, A, B, 31, 3, sampling=Sampling(steps=7), progress=lambda *now: seen.append(now))
        assert got.t == 30, "the chain visits 0, 10, 20, 30, 39, …"
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert interpolate(pipeline, A, B, lambdas=2).t == 30
        with pytest.raises(Cancelled):
            interpolate(pipeline, A, B, cancel=lambda: True)


WRONG = {
    "t": ({"t": 60}, "t must be from -1 to 59, not 60"),
    "half a t": ({"t": 1.5}, "t must be from -1"),
    "one λ": ({"lambdas": 1}, "lambdas must be 2 or more"),
    "no λ": ({"lambdas": []}, "lambdas must be how many, or numbers"),
    "words": ({"lambdas": ["x"]}, "lambdas must be how many, or numbers"),
    "NaN": ({"lambdas": [0, np.nan]}, "lambdas must be how many, or numbers"),
    "another size": ({"b": B[:2]}, r"b must be uint8 \[n, 3, 4, 1\]"),
    "a start": ({"sampling": Sampling(start=3)}, "start and t exclude each other"),
    "a seed": ({"seed": -1}, "the seed must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_interpolation_refused(wrong):
    changed, message = WRONG[wrong]
    with model() as pipeline, pytest.raises(InputError, match=message):
        interpolate(pipeline, **{"a": A, "b": B, **changed})


# --- shared latents --------------------------------------------------------------------------------------------------


def test_images_part_where_they_are_asked_to_and_the_first_is_itself():
    with model() as pipeline:
        alone = pipeline.generate(1, seed=5)
        x, sampling = share_from(pipeline, 4, 20, seed=5)
        assert sampling.start == 20
        assert x.shape == (4, *SHAPE)
        assert (x == x[0]).all()
        drawn = pipeline.generate(4, seed=5, x=x, sampling=sampling)
        assert np.array_equal(drawn[:1], alone)
        assert len({image.tobytes() for image in drawn}) == 4
        (step,) = (step for step in pipeline.stream(1, seed=5) if step.t == 20)
        assert np.array_equal(step.x, x[:1])


def test_what_is_shared_is_as_much_as_the_posterior_says(figure):
    """Given x_t the images are draws from p(x_0 | x_t): their variance is that of the posterior, less the lower t is."""
    n, spec = 300, SPEC.replace(timesteps=300)
    found = {}
    with model(spec) as pipeline:
        for t in (250, 40):
            x, sampling = share_from(pipeline, n, t)
            drawn = pipeline.generate(n, x=x, sampling=sampling, batch=n)[..., 0].reshape(n, -1) / 127.5
            kept = spec.make_schedule().alpha_bar[t]
            noise = (1 - kept) / kept * np.eye(12)
            wanted = np.diag(COVARIANCE - COVARIANCE @ np.linalg.inv(COVARIANCE + noise) @ COVARIANCE)
            found[t] = drawn.var(axis=0).mean()
            figure(f"variance of images that part at t = {t}, off by", abs(found[t] / wanted.mean() - 1), at_most=0.15)
    assert found[40] < 0.5 * found[250]


def test_a_timestep_that_is_not_visited_and_one_of_another_image(recwarn):
    with model(SPEC.replace(classes=5)) as pipeline:
        sampling = Sampling(steps=7)
        x, begun = share_from(pipeline, 2, 31, sampling=sampling, source=3, label=2, seed=1)
        assert begun.start == 30
        drawn = pipeline.generate(1, seed=1, first=3, labels=[2], x=x[:1], sampling=begun)
        assert np.array_equal(drawn, pipeline.generate(1, seed=1, first=3, labels=[2], sampling=sampling))
        for t in (-1, 60, 2.5):
            with pytest.raises(InputError, match="t must be from 0 to 59"):
                share_from(pipeline, 2, t, label=2)
        with pytest.raises(InputError, match="draws no noise"):
            share_from(pipeline, 2, 20, sampling=DDIM, label=2)
    assert not recwarn.list


# --- progressive generation ------------------------------------------------------------------------------------------


def test_frames_and_their_distance(figure):
    with model() as pipeline:
        table = pipeline.table()
        progress = Progress(SPEC, table, 5, count=4)
        images = pipeline.generate(5, seed=2, batch=2, preview=progress)
        steps = {step.t: to_nhwc(step.x0) for step in pipeline.stream(5, seed=2)}
    t, pixels, rmse = progress.frames
    assert t.tolist() == [59, 39, 20, 0]
    assert np.array_equal(pixels[-1], images)
    for number, at in enumerate(t):
        assert np.array_equal(pixels[number], steps[at])
        distance = np.sqrt(np.mean((steps[at].astype(float) - images) ** 2))
        figure(f"RMSE at t = {at}", abs(rmse[number] - distance), at_most=1e-9)
    assert rmse[-1] == 0
    assert rmse[0] > rmse[2] > 0
    assert len(Progress(SPEC, table, 1, count=100).frames.t) == 60
    with pytest.raises(InputError, match="2 timesteps or more"):
        Progress(SPEC, table, 1, count=1)
