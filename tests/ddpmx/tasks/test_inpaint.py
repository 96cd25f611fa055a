"""Inpainting, against Gaussian data with correlations: what belongs into the hole is then a known distribution."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx import ModelSpec
from ddpmx.errors import Cancelled, InputError
from ddpmx.pipeline import Pipeline
from ddpmx.tasks.inpaint import inpaint, walk
from oracles.conditioning import KINDS
from oracles.correlated import Correlated, smooth

SHAPE = (1, 3, 4)
SPEC = ModelSpec(SHAPE, timesteps=50, schedule="cosine", clip=None, variance="fixed_small")
MEAN = np.linspace(-0.2, 0.2, 12).reshape(SHAPE)
COVARIANCE = smooth(SHAPE, deviation=0.25, reach=3.0)
IMAGE = np.random.default_rng(0).integers(90, 200, (3, 4, 1), dtype=np.uint8)
MASK = np.zeros((3, 4), bool)
MASK[1:, 1:3] = True


def model(spec=SPEC, covariance=COVARIANCE, **faults):
    return Pipeline(spec, Correlated(spec, MEAN, covariance, **faults))


def conditional():
    """Mean and covariance of the hole, given the rest: μ_u + Σ_uk·Σ_kk⁻¹·(x_k − μ_k) and Σ_uu − Σ_uk·Σ_kk⁻¹·Σ_ku."""
    hole = MASK.reshape(-1)
    known = IMAGE.reshape(-1)[~hole] / 127.5 - 1
    mean = MEAN.reshape(-1)
    gain = COVARIANCE[np.ix_(hole, ~hole)] @ np.linalg.inv(COVARIANCE[np.ix_(~hole, ~hole)])
    covariance = COVARIANCE[np.ix_(hole, hole)] - gain @ COVARIANCE[np.ix_(~hole, hole)]
    return mean[hole] + gain @ (known - mean[~hole]), covariance


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_hole_has_the_conditional_distribution_nearly(figure):
    """RePaint is no exact sampler: the bounds are what it reaches with its perfect network, plus three standard errors
    (of a mean 0.06 deviations, of a variance 0.08). Without ways back it misses them, and so does the whole data's mean.
    """
    n, (mean, covariance) = 300, conditional()
    deviation = np.sqrt(np.diag(covariance))
    off = {}
    with model() as pipeline:
        for resamplings in (10, 1):
            got = inpaint(pipeline, IMAGE, MASK, n, jump=5, resamplings=resamplings, batch=n).x0[:, 0, MASK]
            off[resamplings] = np.abs(got.mean(0) - mean) / deviation
            if resamplings == 10:
                ratio = np.diag(np.cov(got.T)) / np.diag(covariance)
                found = np.cov(got.T)
    figure("mean of the hole, in deviations", off[10].max(), at_most=0.45)
    figure("variance by the conditional one, least", ratio.min(), at_least=0.6)
    figure("variance by the conditional one, most", ratio.max(), at_most=1.3)
    figure("covariance, by the largest variance", np.abs(found - covariance).max() / covariance.max(), at_most=0.4)
    figure("mean without ways back (control)", off[1].max(), at_least=0.5)
    prior = MEAN[0][MASK]
    assert (np.abs(prior - mean) / deviation).max() > 1.5  # control: what is known matters
    assert COVARIANCE.max() / covariance.max() > 2  # control


def test_where_pixels_are_independent_it_is_exact(figure):
    """The hole then has its own distribution, whatever is around it."""
    n, deviation = 400, 0.25
    with model(covariance=np.eye(12) * deviation**2) as pipeline:
        got = inpaint(pipeline, IMAGE, MASK, n, jump=5, resamplings=3, batch=n).x0[:, 0, MASK]
    off = (got.mean(0) - MEAN[0][MASK]) / deviation * np.sqrt(n)
    figure("mean of independent pixels, in standard errors", np.abs(off).max(), at_most=3.5)
    figure("their variance, off by", np.abs(got.var() / deviation**2 - 1), at_most=0.15)


@pytest.mark.parametrize("changes", [{}, {"variance": "learned_range"}, {"variance": "learned"}, KINDS["itself"]])
@pytest.mark.parametrize("steps", [50, 7])
def test_all_of_an_image_without_ways_back_is_a_chain_with_its_bits(changes, steps):
    spec = SPEC.replace(**changes)
    everything = np.ones((3, 4), bool)
    with model(spec, v=0.3) as pipeline:
        got = inpaint(pipeline, IMAGE, everything, 3, steps=steps, resamplings=1, seed=4, first=2)
        single = {"variance": "fixed_small"} if spec.variance == "learned" and steps < 50 else {}
        assert np.array_equal(got.pixels, pipeline.generate(3, steps=steps, seed=4, first=2, **single))
        again = inpaint(pipeline, IMAGE, everything, 3, steps=steps, jump=2, resamplings=2, seed=4, first=2)
        assert not np.array_equal(again.pixels, got.pixels)


def test_what_is_known_stays_and_every_draw_is_another_one():
    with model() as pipeline:
        got = inpaint(pipeline, IMAGE, MASK, 5, steps=10, resamplings=2)
    assert (got.pixels[:, ~MASK] == IMAGE[~MASK]).all()
    assert len({image.tobytes() for image in got.pixels}) == 5
    assert np.abs(got.x0[:, 0, ~MASK] - (IMAGE[~MASK][:, 0] / 127.5 - 1)).max() < 1e-6


@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_an_image_does_not_depend_on_its_neighbours_nor_on_the_batch(sways):
    spec = SPEC.replace(classes=5, null_class=True)
    labels = np.array([0, 4, 2, 1, 3])
    with model(spec, sways=sways) as pipeline:
        whole = inpaint(pipeline, IMAGE, MASK, 5, steps=6, jump=2, resamplings=2, labels=labels, guidance=2, batch=2)
        for i in (0, 3):
            alone = inpaint(
                pipeline,
                IMAGE,
                MASK,
                1,
                steps=6,
                jump=2,
                resamplings=2,
                labels=labels[i : i + 1],
                guidance=2,
                batch=2,
                first=i,
            )
            assert np.array_equal(alone.x0[0], whole.x0[i])
        none = inpaint(pipeline, IMAGE, MASK, 1, steps=6, jump=2, resamplings=2)
        assert not np.array_equal(none.x0[0], whole.x0[0])  # control: the class matters


def test_a_condition_is_each_image_s_own():
    spec = SPEC.replace(condition=2)
    cond = np.random.default_rng(1).uniform(-1, 1, (3, 2, 3, 4)).astype(np.float32)
    with model(spec) as pipeline:
        whole = inpaint(pipeline, IMAGE, MASK, 3, steps=5, resamplings=1, cond=cond, batch=2)
        alone = inpaint(pipeline, IMAGE, MASK, 1, steps=5, resamplings=1, cond=cond[2:], first=2)
    assert np.array_equal(alone.x0[0], whole.x0[2])


# --- the way ---------------------------------------------------------------------------------------------------------


def test_the_way_down_and_back():
    assert list(walk(4, 10, 10)) == [4, 3, 2, 1], "no way back fits"
    assert list(walk(5, 2, 1)) == [5, 4, 3, 2, 1]
    #       5 4|5 4   3 2|3 2   1: back where 3 and 1 steps are left, two steps up
    assert list(walk(5, 2, 2)) == [5, 4, 5, 4, 3, 2, 3, 2, 1]
    assert list(walk(3, 1, 3)) == [3, 3, 3, 2, 2, 2, 1]


@pytest.mark.parametrize(("steps", "jump", "resamplings"), [(250, 10, 10), (100, 7, 3), (12, 1, 4)])
def test_each_stretch_is_gone_down_as_often_as_asked(steps, jump, resamplings):
    """The paper's 250 steps with jumps of 10 and 10 resamplings: 24 places with 9 ways back of 10 steps each."""
    way = list(walk(steps, jump, resamplings))
    backs = len(range(0, steps - jump, jump)) * (resamplings - 1)
    assert len(way) == steps + backs * jump
    if (steps, jump, resamplings) == (250, 10, 10):
        assert len(way) == 250 + 24 * 9 * 10
    ups = np.diff(way)
    assert set(ups.tolist()) <= {-1, jump - 1}
    assert way[-1] == 1


# --- the rest --------------------------------------------------------------------------------------------------------


def test_progress_and_cancel():
    seen = []
    with model() as pipeline:
        common = {"steps": 6, "jump": 2, "resamplings": 2, "batch": 2}
        inpaint(pipeline, IMAGE, MASK, 3, progress=lambda *now: seen.append(now), **common)
        total = 2 * len(list(walk(6, 2, 2)))
        assert seen == [(done, total) for done in range(1, total + 1)]
        with pytest.raises(Cancelled):
            inpaint(pipeline, IMAGE, MASK, 3, cancel=lambda: len(seen) > 3 or seen.clear(), **common)
        inpaint(pipeline, IMAGE, MASK, 1, **common)  # it goes on


WRONG = {
    "another size": ({"image": IMAGE[:2]}, r"image must be uint8 \[3, 4, 1\]"),
    "floats": ({"image": IMAGE / 255.0}, "image must be uint8"),
    "a list": ({"image": IMAGE.tolist()}, "image must be uint8"),
    "a grey mask": ({"mask": np.full((3, 4), 255, np.uint8)}, r"mask must be bool \[3, 4\]"),
    "no hole": ({"mask": np.zeros((3, 4), bool)}, "the mask leaves nothing to draw"),
    "no jump": ({"jump": 0}, "jump must be a whole number from 1"),
    "half a resampling": ({"resamplings": 1.5}, "resamplings must be a whole number from 1"),
    "no steps": ({"steps": 0}, "steps must be"),
    "too many": ({"steps": 51}, "steps must be"),
    "no images": ({"n": 0}, "n must be"),
    "a class": ({"labels": 1}, "the model has no classes"),
    "a seed": ({"seed": -1}, "the seed must be"),
    "a condition": ({"cond": np.zeros((1, 1, 3, 4), np.float32)}, "the model takes no condition"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(wrong):
    changed, message = WRONG[wrong]
    with model() as pipeline, pytest.raises(InputError, match=message):
        inpaint(pipeline, **{"image": IMAGE, "mask": MASK, "resamplings": 1, **changed})
