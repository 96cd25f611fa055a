"""Denoising, against Gaussian data: what is below the noise is then known, as a mean and a covariance."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx import ModelSpec
from ddpmx.errors import Cancelled, InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.denoise import LEVELS, _chain_on_tiles, denoise, estimate_sigma, noise_scale, timestep_of
from ddpmx.tasks.tiles import TiledNetwork, Tiling
from oracles.conditioning import KINDS
from oracles.correlated import Correlated, smooth

SHAPE = (2, 6, 5)
SPEC = ModelSpec(SHAPE, clip=None, variance="fixed_small")
SIGMA = LEVELS * noise_scale(SPEC.make_schedule())  # of each t
MEAN = np.linspace(-0.4, 0.4, 60).reshape(SHAPE)
COVARIANCE = smooth(SHAPE)
FLAT, DEVIATION = 0.1, 0.25


def model(spec=SPEC, **faults):
    return Pipeline(spec, Correlated(spec, MEAN, COVARIANCE, **faults))


def flat(size=(6, 5), **changes):
    """Pixels that are N(0.1, 0.25²), each for itself: the same network on tiles of any place."""
    spec = ModelSpec((1, *size), clip=None, variance="fixed_small", **changes)
    n = size[0] * size[1]
    return Pipeline(spec, Correlated(spec, np.full(spec.shape, FLAT), np.eye(n) * DEVIATION**2))


def noisy(n=3, sigma=40.0, shape=SHAPE, seed=0):
    """float64 [n, H, W, C], on the scale of 0…255."""
    rng = np.random.default_rng(seed)
    images = 127.5 + 30 * rng.standard_normal((n, *shape[1:], shape[0]))
    return images + sigma * rng.standard_normal(images.shape)


def posterior_mean(y, sigma):
    """μ + Σ·(Σ + s²·I)⁻¹·(y − μ), float64 [n, C, H, W]."""
    s = sigma / LEVELS
    centred = (y.transpose(0, 3, 1, 2) / LEVELS - 1 - MEAN).reshape(len(y), -1)
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + s**2 * np.eye(len(COVARIANCE)))
    return MEAN + (centred @ gain.T).reshape(len(y), *SHAPE)


# --- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 30, 200, 500])
def test_the_estimate_is_the_posterior_mean(t, figure):
    y = noisy(sigma=SIGMA[t])
    with model() as pipeline:
        got = denoise(pipeline, y, SIGMA[t])
    assert got.t.tolist() == [t] * 3
    figure(f"x̂_0 against the posterior mean, t = {t}", np.abs(got.x0 - posterior_mean(y, SIGMA[t])).max(), at_most=5e-6)
    assert np.array_equal(got.pixels, to_nhwc(got.x0))
    assert got.pixels.shape == (3, 6, 5, 2)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.2])
def test_below_the_first_timestep_less_is_taken_away(sigma, figure):
    y = noisy(sigma=sigma)
    with model() as pipeline:
        got = denoise(pipeline, y, sigma)
        as_if = denoise(pipeline, y, SIGMA[0])
    assert got.t.tolist() == [0] * 3
    wanted, before = posterior_mean(y, sigma), y.transpose(0, 3, 1, 2) / LEVELS - 1
    error, without, moved = (np.sqrt(np.mean((found - wanted) ** 2)) for found in (got.x0, as_if.x0, before))
    figure(f"RMS error by what is taken away, σ = {sigma}", error / moved, at_most=5e-3)
    assert without > 10 * error  # control


@pytest.mark.parametrize(("sigma", "bound"), [(2.2, 0.05), (37.3, 5e-3), (300.0, 1e-4)])
def test_between_two_timesteps_the_nearest_is_near_enough(sigma, bound, figure):
    y = noisy(sigma=sigma)
    with model() as pipeline:
        got = denoise(pipeline, y, sigma)
    wanted = posterior_mean(y, sigma)
    error = np.sqrt(np.mean((got.x0 - wanted) ** 2)) / (sigma / LEVELS)
    figure(f"RMS error by the noise, σ = {sigma}", error, at_most=bound)


def test_no_noise_gives_the_images_back():
    y = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 2), dtype=np.uint8)
    with model() as pipeline:
        assert np.array_equal(denoise(pipeline, y, 0).pixels, y)


def test_each_image_has_its_own_noise():
    y = noisy(4)
    with model() as pipeline:
        both = denoise(pipeline, y, [10, 20, 40, 10])
        for i, sigma in enumerate([10, 20, 40, 10]):
            assert np.array_equal(both.x0[i], denoise(pipeline, y[i : i + 1], sigma).x0[0])
        measured = denoise(pipeline, y)
    assert measured.sigma.tolist() == [estimate_sigma(image) for image in y]


@pytest.mark.parametrize("sways", [None, "size", "place"])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("size", [(6, 5), (9, 11)])
def test_an_image_does_not_depend_on_its_neighbours_nor_on_the_batch(sways, sample, size):
    y, sigma = noisy(4, shape=(2, *size)), [4, 4, 30, 4]
    with model(sways=sways) as pipeline:
        whole = denoise(pipeline, y, sigma, sample=sample, batch=3)
        for i in (0, 2, 3):
            alone = denoise(pipeline, y[i : i + 1], sigma[i], sample=sample, first=i, batch=3)
            assert np.array_equal(alone.x0[0], whole.x0[i])


# --- a draw ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"clip": 0.5}, {"variance": "learned_range"}, KINDS["itself"], KINDS["classes"]]
)
def test_a_draw_is_the_rest_of_the_chain_with_its_bits(changes):
    spec = SPEC.replace(**changes)
    named = {"labels": [3, 0, 1]} if "classes" in changes else {}
    y, t = noisy(), 40
    with model(spec, v=0.4) as pipeline:
        got = denoise(pipeline, y, SIGMA[t], sample=True, seed=5, first=7, **named)
        kept = np.sqrt(spec.make_schedule().alpha_bar[t])
        x = np.ascontiguousarray(kept * (y.transpose(0, 3, 1, 2) / LEVELS - 1), np.float32)
        assert np.array_equal(got.pixels, pipeline.generate(3, seed=5, first=7, x=x, start=t, **named))
        assert not np.array_equal(got.x0, denoise(pipeline, y, SIGMA[t], sample=True, seed=6, first=7, **named).x0)
        # on tiles the loop is another one, which has to say the same of one tile
        network = TiledNetwork(pipeline, Tiling(SHAPE[1:], SHAPE[1:], 0))
        label = named["labels"][1] if named else None
        assert np.array_equal(_chain_on_tiles(network, x[1], t, label, 5, 8), got.x0[1])


def test_draws_have_the_posterior_s_mean_and_covariance(figure):
    """Σ − Σ·(Σ + s²·I)⁻¹·Σ; 600 draws, whose mean has a standard error of s/√600, their variances one of 6 %."""
    t, n = 60, 600
    y = np.repeat(noisy(1, sigma=SIGMA[t]), n, axis=0)
    spec = SPEC
    with Pipeline(spec, Correlated(spec, MEAN, COVARIANCE)) as pipeline:
        kept = np.sqrt(spec.make_schedule().alpha_bar[t])
        x = np.ascontiguousarray(kept * (y.transpose(0, 3, 1, 2) / LEVELS - 1), np.float32)
        # the same chain, see the test above, in one batch
        draws = pipeline.generate(n, x=x, start=t, batch=n) / LEVELS - 1
    s = SIGMA[t] / LEVELS
    covariance = COVARIANCE - COVARIANCE @ np.linalg.inv(COVARIANCE + s**2 * np.eye(60)) @ COVARIANCE
    draws = draws.transpose(0, 3, 1, 2).reshape(n, -1)
    off = (draws.mean(0) - posterior_mean(y[:1], SIGMA[t]).reshape(-1)) / np.sqrt(np.diag(covariance) / n)
    figure("mean of draws, in standard errors, RMS", np.sqrt(np.mean(off**2)), at_most=1.3)
    error = np.abs(np.cov(draws.T) - covariance).max() / covariance.max()
    figure("covariance of draws, by the largest", error, at_most=0.25)
    assert np.abs(COVARIANCE - covariance).max() / covariance.max() > 1  # control: not that of the data


# --- tiles -----------------------------------------------------------------------------------------------------------


def pointwise(y, sigma):
    """The posterior mean of pixels that are N(0.1, 0.25²), each for itself."""
    s = sigma / LEVELS
    return FLAT + DEVIATION**2 / (DEVIATION**2 + s**2) * (y.transpose(0, 3, 1, 2) / LEVELS - 1 - FLAT)


@pytest.mark.parametrize("size", [(6, 5), (7, 5), (19, 31), (3, 2), (1, 40), (4, 5)])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_any_size(size, overlap, figure):
    t = 150
    y = noisy(2, sigma=SIGMA[t], shape=(1, *size))
    with flat() as pipeline:
        got = denoise(pipeline, y, SIGMA[t], overlap=overlap)
    assert got.pixels.shape == (2, *size, 1)
    figure(f"tiles for {size}", np.abs(got.x0 - pointwise(y, SIGMA[t])).max(), at_most=5e-6)


def test_draws_on_tiles_have_one_variance_everywhere(figure):
    """Averaging finished draws of two tiles would leave half of the variance where they overlap."""
    t, size = 40, (20, 60)
    y = noisy(1, sigma=SIGMA[t], shape=(1, *size))
    with flat() as pipeline:
        got = denoise(pipeline, y, SIGMA[t], sample=True, overlap=4)
    s = SIGMA[t] / LEVELS
    deviation = np.sqrt(DEVIATION**2 * s**2 / (DEVIATION**2 + s**2))
    off = (got.x0 - pointwise(y, SIGMA[t])) / deviation
    figure("variance of draws on tiles by the posterior's, off by", abs(off.var() - 1), at_most=0.12)
    figure("their mean, in standard errors", abs(off.mean()) * np.sqrt(off.size), at_most=3.5)


def test_no_seam_is_seen(figure):
    """Of a network whose results rise from one edge of a tile to the other."""
    spec = ModelSpec((1, 8, 8), clip=None)
    ramp = np.broadcast_to(np.linspace(-0.5, 0.5, 8), spec.shape)
    t = 400
    y = np.full((1, 8, 40, 1), 127.5)
    steps = {}
    with Pipeline(spec, Correlated(spec, ramp.copy(), np.eye(64) * 0.05**2)) as pipeline:
        for overlap in (0, 6):
            x0 = denoise(pipeline, y, SIGMA[t], overlap=overlap).x0
            steps[overlap] = np.abs(np.diff(x0, axis=3)).max()
    figure("largest step between neighbours, overlapping by not overlapping", steps[6] / steps[0], at_most=0.35)


def test_tiles_cover_an_image_evenly_and_overlap_enough():
    for whole in range(8, 60):
        for overlap in (0, 3, 7):
            starts = [column for _, column in Tiling((8, whole), (8, 8), overlap).corners]
            assert starts[0] == 0
            assert starts[-1] == whole - 8
            gaps = np.diff(starts)
            assert all(8 - gaps >= overlap) or len(starts) == 1
            assert len(starts) == 1 or gaps.max() - gaps.min() <= 1
    assert len(Tiling((8, 8), (8, 8), 7)) == 1


# --- how much noise --------------------------------------------------------------------------------------------------


def landscape(size=128):
    y, x = np.mgrid[:size, :size] / size
    return (128 + 60 * np.sin(5 * x) * np.cos(4 * y))[..., None]


@pytest.mark.parametrize("sigma", [2, 10, 40])
def test_noise_is_measured(sigma, figure):
    rng = np.random.default_rng(1)
    image = landscape() + sigma * rng.standard_normal((128, 128, 3))
    figure(f"σ = {sigma}, measured, relative error", abs(estimate_sigma(image) / sigma - 1), at_most=0.03)
    spots = image.copy()
    spots[rng.random((128, 128)) < 0.02] += 20 * sigma  # each is in four details
    details = (spots[:-1, :-1] - spots[1:, :-1] - spots[:-1, 1:] + spots[1:, 1:]) / 2
    figure(f"σ = {sigma} with bright spots", estimate_sigma(spots) / sigma - 1, at_most=0.15)
    assert details.std() / sigma - 1 > 1  # control: a standard deviation feels them


def test_noise_that_ends_at_black_is_measured_where_it_does_not(figure):
    rng = np.random.default_rng(1)
    image = landscape()
    image[:, :50] = 0
    cut = np.clip(np.rint(image + 20 * rng.standard_normal(image.shape)), 0, 255)
    figure("half black, in 8 bits", abs(estimate_sigma(cut.astype(np.uint8)) / 20 - 1), at_most=0.1)
    assert abs(estimate_sigma(cut) / 20 - 1) > 0.15  # control: with all details


def test_an_even_image_has_no_noise():
    assert estimate_sigma(np.full((4, 4, 1), 7, np.uint8)) == 0
    assert estimate_sigma(np.zeros((4, 4, 1), np.uint8)) == 0, "all of it is cut off"


def test_the_nearest_timestep():
    schedule = SPEC.make_schedule()
    assert [timestep_of(schedule, sigma) for sigma in (0, SIGMA[0], SIGMA[7], SIGMA[7] * 1.0001, SIGMA[999])] == [
        *(0, 0, 7, 7, 999)
    ]
    assert timestep_of(schedule, np.sqrt(SIGMA[7] * SIGMA[8]) * 1.0001) == 8
    with pytest.raises(InputError, match="no image with so much noise"):
        timestep_of(schedule, SIGMA[999] * 1.01)


def test_a_schedule_that_ends_in_noise_alone_knows_any_noise():
    schedule = ModelSpec((1, 8, 8), timesteps=10, schedule="jsd", prediction="x0").make_schedule()
    assert timestep_of(schedule, 1e9) == 8
    assert np.isinf(noise_scale(schedule)[9])


# --- the rest --------------------------------------------------------------------------------------------------------


def test_progress_and_cancel():
    seen = []
    with model() as pipeline:
        denoise(pipeline, noisy(3), 20, batch=2, progress=lambda *now: seen.append(now))
        assert seen[-1] == (3, 3)
        seen.clear()
        big = noisy(2, shape=(2, 9, 11))
        denoise(pipeline, big, SIGMA[2], sample=True, progress=lambda *now: seen.append(now))
        assert seen[-1][0] == seen[-1][1] == 2 * 3 * len(Tiling((9, 11), (6, 5), 1))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        with pytest.raises(Cancelled):
            denoise(pipeline, big, 30, sample=True, cancel=lambda: len(seen) > 3 or seen.clear())
        denoise(pipeline, big, 30)  # it goes on


WRONG = {
    "one image": ({"images": np.zeros((6, 5, 2))}, "images must be uint8 or float"),
    "other channels": ({"images": np.zeros((1, 6, 5, 3))}, r"images must be uint8 or float \[n, H, W, 2\]"),
    "no pixels": ({"images": np.zeros((1, 0, 5, 2))}, "images must be uint8 or float"),
    "16 bits": ({"images": np.zeros((1, 6, 5, 2), np.uint16)}, "images must be uint8 or float"),
    "NaN": ({"images": np.full((1, 6, 5, 2), np.nan)}, "holds NaN"),
    "negative noise": ({"sigma": -1}, "must be 0 or more"),
    "no number": ({"sigma": np.nan}, "must be 0 or more"),
    "a word": ({"sigma": "much"}, "sigma must be a number"),
    "two for three": ({"sigma": [1, 2]}, "sigma must be a number, or 3 of them"),
    "too much": ({"sigma": 1e6}, "knows no image with so much noise"),
    "overlap of a tile": ({"overlap": 5}, "overlap must be from 0 to 4 pixels"),
    "half a pixel": ({"overlap": 0.5}, "overlap must be a whole number"),
    "a class of none": ({"labels": 1}, "the model has no classes"),
    "a seed": ({"seed": -1}, "the seed must be"),
    "a batch": ({"batch": 0}, "batch must be"),
    "one pixel, measured": ({"images": np.zeros((1, 1, 5, 2)), "sigma": None}, "noise is measured in an image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(wrong):
    changed, message = WRONG[wrong]
    with model() as pipeline, pytest.raises(InputError, match=message):
        denoise(pipeline, **{"images": noisy(), "sigma": 20, **changed})


def test_a_model_with_a_condition_is_refused():
    with model(SPEC.replace(condition=2)) as pipeline, pytest.raises(InputError, match="condition image"):
        denoise(pipeline, noisy(), 20)
