"""The noise: Philox by its published test vectors, Box–Muller by its formula, and that a draw depends on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.errors import InputError

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_test_vectors(counter, key, expected):
    words = noise.philox4x32_10(np.array([int(w, 16) for w in counter.split()], np.uint64), _words(key))
    assert [f"{w:08x}" for w in words.tolist()] == expected.split()


def _words(text: str) -> tuple[int, int]:
    low, high = (int(w, 16) for w in text.split())
    return low, high


def test_reference_values():
    """Eight numbers of an independent implementation in C."""
    expected = [1.0128345, 1.0653822, 0.3170975, 0.28629172, -0.8218501, -1.6059003, 0.5512207, 0.2548483]
    np.testing.assert_array_equal(noise.normal(1234, [0], 7, Purpose.INITIAL, 8)[0], np.float32(expected))


def test_an_image_has_its_noise_in_any_batch():
    together = noise.normal(5, range(10, 18), 3, Purpose.STEP, 192)
    for row, image in enumerate(range(10, 18)):
        np.testing.assert_array_equal(noise.normal(5, [image], 3, Purpose.STEP, 192)[0], together[row])
    shuffled = noise.normal(5, [17, 10, 17], 3, Purpose.STEP, 192)
    np.testing.assert_array_equal(shuffled, together[[7, 0, 7]])


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 191])
def test_a_smaller_image_has_the_beginning_of_a_larger_ones_noise(elements):
    short, long = (noise.normal(5, [1], 3, Purpose.STEP, n) for n in (elements, 192))
    assert short.shape == (1, elements)
    np.testing.assert_array_equal(short, long[:, :elements])


BASE = {"seed": 1, "images": [2], "t": 3, "purpose": Purpose.STEP, "elements": 64}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 0},
        {"seed": 1 + 2**32},  # both words of the key count
        {"seed": 2**64 - 1},
        {"images": [3]},
        {"images": [2**32 - 1]},
        {"t": 2},
        {"t": 1000},
        {"purpose": Purpose.INITIAL},
        {"purpose": Purpose.DIFFUSE},
        {"purpose": Purpose.LIKELIHOOD},
        {"repeat": 1},
        {"images": [3], "t": 2},
    ],
)
def test_whatever_differs_makes_another_draw(change):
    here, there = noise.normal(**BASE), noise.normal(**{**BASE, **change})
    assert not np.any(here == there)


def test_moments_of_a_million(figure):
    z = noise.normal(2026, range(1000), 500, Purpose.STEP, 1000).astype(np.float64)
    n = z.size
    # each in standard errors of its estimate from n independent normals
    figure("mean of 10⁶ normals, in standard errors", abs(z.mean()) * n**0.5, at_most=4)
    figure("variance of 10⁶ normals, in standard errors", abs((z**2).mean() - 1) * (n / 2) ** 0.5, at_most=4)
    figure("skewness of 10⁶ normals, in standard errors", abs((z**3).mean()) * (n / 15) ** 0.5, at_most=4)
    figure("kurtosis of 10⁶ normals, in standard errors", abs((z**4).mean() - 3) * (n / 96) ** 0.5, at_most=4)


@pytest.mark.parametrize("what", ["elements", "images", "pair"])
def test_neighbours_are_uncorrelated(what, figure):
    z = noise.normal(7, range(1000), 0, Purpose.INITIAL, 1000).astype(np.float64)
    a, b = {
        "elements": (z[:, :-1], z[:, 1:]),
        "images": (z[:-1], z[1:]),
        "pair": (z[:, ::2] ** 2 - 1, z[:, 1::2] ** 2 - 1),  # cosine and sine of one angle share a radius
    }[what]
    scale = 1.0 if what != "pair" else 2.0
    figure(
        f"correlation of neighbouring {what}, in standard errors", abs((a * b).mean()) * a.size**0.5 / scale, at_most=4
    )


def test_other_steps_are_uncorrelated(figure):
    a, b = (noise.normal(7, range(500), t, Purpose.STEP, 1000).astype(np.float64) for t in (499, 500))
    figure("correlation of neighbouring timesteps, in standard errors", abs((a * b).mean()) * a.size**0.5, at_most=4)


def test_tails_are_those_of_a_normal():
    z = np.abs(noise.normal(11, range(1000), 1, Purpose.STEP, 1000))
    for limit, share in ((1, 0.317311), (2, 0.045500), (3, 0.0026998), (4, 6.334e-5)):
        expected = share * MILLION
        assert abs((z > limit).sum() - expected) < 4 * expected**0.5
    assert z.max() <= 6.77  # √(2·ln 2³³)


def test_accuracy_against_box_muller_in_float64(figure):
    blocks = MILLION // 4
    counter = np.zeros((4, blocks), np.uint64)
    counter[0] = np.arange(blocks)
    counter[1], counter[2], counter[3] = 3, 42, int(Purpose.STEP) << 24
    w = noise.philox4x32_10(counter, (9, 0)).astype(np.float64)
    exact = np.empty((blocks, 4))
    for pair in (0, 1):
        radius = np.sqrt(-2 * np.log((w[2 * pair] + 0.5) / 2**32))
        angle = 2 * np.pi * w[2 * pair + 1] / 2**32
        exact[:, 2 * pair], exact[:, 2 * pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    drawn = noise.normal(9, [3], 42, Purpose.STEP, MILLION)[0]
    figure("noise against exact Box–Muller, absolute", np.abs(drawn - exact.ravel()).max(), at_most=3e-5)


def test_the_extreme_words_give_numbers():
    """u rounds to 1 for the largest words: −2·ln u must not come out negative enough to make a NaN."""
    words = np.array([0, 1, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1], np.uint32)
    squared = noise._minus_two_ln(words)
    exact = -2 * np.log((words.astype(np.float64) + 0.5) / 2**32)
    np.testing.assert_allclose(squared, exact, rtol=1e-6, atol=2e-7)
    quarter_turns = np.array([0, 2**30, 2**31, 3 * 2**30], np.uint32)
    cos, sin = noise._cos_sin(quarter_turns)
    np.testing.assert_array_equal(cos, [1, 0, -1, 0])
    np.testing.assert_array_equal(sin, [0, 1, 0, -1])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        noise.normal(seed, [0], 0, Purpose.STEP, 4)


@pytest.mark.parametrize(
    "change",
    [{"images": [-1]}, {"images": [0, 2**32]}, {"images": [2**64]}, {"t": -1}, {"t": 2**32}, {"repeat": 2**24}],
)
def test_numbers_outside_the_counter_are_refused(change):
    with pytest.raises(InputError):
        noise.normal(**{**BASE, **change})


def test_the_largest_numbers_are_not():
    z = noise.normal(2**64 - 1, [2**32 - 1], 2**32 - 1, Purpose.DIFFUSE, 8, repeat=2**24 - 1)
    assert np.all(np.isfinite(z))


def test_draws_of_several_timesteps_at_once_are_those_of_each():
    ts = np.array([999, 3, 0, 2**32 - 1])
    together = noise.normal(11, [5, 0], ts, Purpose.STEP, 30)
    assert together.shape == (4, 2, 30)
    for t, drawn in zip(ts, together, strict=True):
        np.testing.assert_array_equal(drawn, noise.normal(11, [5, 0], int(t), Purpose.STEP, 30))
    with pytest.raises(InputError, match="t below"):
        noise.normal(0, [0], np.array([0, 2**32]), Purpose.STEP, 4)


def test_each_image_may_have_its_own_t():
    each = noise.normal(11, [5, 0, 5], np.array([3, 999, 4]), Purpose.STEP, 30, each=True)
    assert each.shape == (3, 30)
    for row, (image, t) in enumerate([(5, 3), (0, 999), (5, 4)]):
        np.testing.assert_array_equal(each[row], noise.normal(11, [image], t, Purpose.STEP, 30)[0])
    with pytest.raises(InputError, match="there are 2 images"):
        noise.normal(11, [5, 0], np.array([1, 2, 3]), Purpose.STEP, 30, each=True)


def test_whole_numbers_are_even_and_an_image_s_own():
    below = np.array([1, 2, 10, 1000, 2**32])
    drawn = noise.integers(3, range(4000), Purpose.LIKELIHOOD, below, repeat=1)
    assert drawn.shape == (4000, 5)
    assert (drawn >= 0).all()
    assert (drawn < below).all()
    assert not drawn[:, 0].any()
    expected = 400
    chi_squared = np.sum((np.bincount(drawn[:, 2], minlength=10) - expected) ** 2) / expected
    assert chi_squared < 27.9  # 9 degrees of freedom, one in a thousand
    assert abs(drawn[:, 4].mean() / 2**32 - 0.5) < 3 * math.sqrt(1 / 12 / 4000)
    np.testing.assert_array_equal(noise.integers(3, [7, 3999], Purpose.LIKELIHOOD, below, repeat=1), drawn[[7, 3999]])
    words = noise.philox4x32_10(np.array([0, 7, 0, Purpose.LIKELIHOOD << 24 | 1], np.uint64), (3, 0))
    assert drawn[7, 3] == int(words[3]) * 1000 >> 32
    assert np.any(noise.integers(4, range(9), Purpose.LIKELIHOOD, below) != drawn[:9])
