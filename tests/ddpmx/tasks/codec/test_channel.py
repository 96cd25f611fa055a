"""The sample coder, on Gaussians: what is decoded is a sample of q, and its length is that of the theory."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest

from ddpmx.tasks.codec import channel, draws
from ddpmx.tasks.codec.draws import Book, Place
from ddpmx.tasks.codec.range_coder import Writer

BOOK, D = 12, 40
CASES = {
    (12, 0.3): 300,
    (12, 3.0): 300,
    (12, 8.0): 300,
    (12, 14.0): 300,
    (10, 30.0): 300,
    (14, 18.0): 100,
    (9, 60.0): 100,
}
"""(bits of a book, divergence in bits): how many chunks."""


@cache
def coded(book, bits, trials):
    """Many chunks of a divergence: u − |δ|, what is across δ, classes, and bits per chunk."""
    length = math.sqrt(2 * bits * math.log(2))
    directions = np.random.default_rng(7).standard_normal((trials, D))
    directions /= np.sqrt(np.square(directions).sum(axis=1, keepdims=True))
    writer, u, across, classes = Writer(), [], [], []
    for i, direction in enumerate(directions):
        place = Place(3, i, 11, i % 5)
        number, index = channel.choose(place, book, length * direction)
        assert 0 <= index < 1 << number
        y = draws.draw(place, book, number, index, D)
        u.append(float(y @ direction))
        across.append(y - u[-1] * direction)
        classes.append(number)
        expected = channel.class_eighths(book, round(channel.UNIT * bits))
        writer.put(number, channel.class_odds(book, expected, 12))
        writer.put_bits(index, number)
    return np.array(u) - length, np.array(across), np.array(classes), 8 * len(writer.finish()) / trials


@pytest.mark.parametrize(("book", "bits"), CASES)
def test_samples_are_of_q_and_lengths_of_the_theory(book, bits, figure):
    """300 chunks: a mean that is 0.3 off, or a deviation that is 0.2 off, fails in 19 of 20 runs."""
    n = CASES[book, bits]
    u, across, classes, length = coded(book, bits, n)
    what = f"{bits} bits, books of 2^{book}"
    figure(f"mean of u, {what}", abs(u.mean()), at_most=3.3 / math.sqrt(n))
    figure(f"deviation of u, {what}", abs(u.std() - 1), at_most=3.3 / math.sqrt(2 * n))
    squares = np.square(across).sum(axis=1)  # χ² of d − 1
    figure(f"mean square across, {what}", abs(squares.mean() / (D - 1) - 1), at_most=4 * math.sqrt(2 / (D - 1) / n))
    assert abs(across.mean()) < 4 / math.sqrt(n * D)
    if bits < book - 2:  # Li & El Gamal (2018), with a code for n whose odds do not know δ
        theory = bits + math.log2(bits + 1) + 5
    else:  # the best of 2^b draws is as good as any of 2^b·√(4π·b·ln 2)
        theory = bits * (1 + math.log2(4 * math.pi * book * math.log(2)) / 2 / book) + 0.5 * math.log2(bits) + 6
    figure(f"bits beyond the divergence, {what}", length - bits, at_most=theory - bits)
    assert classes.max() <= draws.max_class(book)


def distance(u):
    """Kolmogorov's, from N(0, 1), by √n: above 1.63 in one of a hundred runs."""
    u = np.sort(u)
    normal = np.array([0.5 * math.erfc(-value * math.sqrt(0.5)) for value in u])
    at = np.arange(len(u) + 1) / len(u)
    return max(np.abs(normal - at[1:]).max(), np.abs(normal - at[:-1]).max()) * math.sqrt(len(u))


def test_u_is_normal_over_all_cases(figure):
    """1400 chunks: a mean that is 0.14 off, or a deviation that is 0.1 off, fails in 19 of 20 runs."""
    u = np.concatenate([coded(*case, n)[0] for case, n in CASES.items()])
    figure("mean of u", abs(u.mean()), at_most=3.3 / math.sqrt(len(u)))
    figure("deviation of u", abs(u.std() - 1), at_most=3.3 / math.sqrt(2 * len(u)))
    figure("Kolmogorov's distance of u", distance(u), at_most=1.63)


def test_without_cells_u_is_too_small(monkeypatch):
    """Control: sums are not independent."""
    monkeypatch.setattr(channel, "_CELL", 4.0)
    u = coded.__wrapped__(9, 20.0, 100)[0]
    assert u.mean() < -3.3 / math.sqrt(100)


def test_samples_of_p_would_fail():
    """Control."""
    u = np.random.default_rng(0).standard_normal(300) - math.sqrt(2 * 0.3 * math.log(2))
    assert abs(u.mean()) > 3.3 / math.sqrt(300)
    assert distance(u) > 1.63


def test_more_than_a_list_can_hold_is_the_nearest_that_it_has():
    delta = np.zeros(40)
    delta[3] = 60.0  # 2600 bits
    number, index = channel.choose(Place(0, 0, 0, 0), 8, delta)
    assert number == draws.max_class(8)
    u = draws.draw(Place(0, 0, 0, 0), 8, number, index, 40)[3]
    assert 12 < u < math.sqrt(2 * 8 * 24 * math.log(2))


def test_every_draw_is_normal_and_no_two_are_alike():
    place = Place(0, 1, 2, 3)
    rng = random.Random(0)
    places = [(number, rng.getrandbits(number)) for number in (9, 12, 13, 20, 30) for _ in range(3)]
    drawn = np.stack([draws.draw(place, BOOK, number, index, 300) for number, index in places])
    assert np.abs(drawn.mean(axis=1)).max() < 4.5 / math.sqrt(300)
    assert np.abs(drawn.std(axis=1) - 1).max() < 4.5 / math.sqrt(600)
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.3
    other = draws.draw(Place(0, 1, 2, 4), BOOK, 12, 5, 300)
    assert abs(np.corrcoef(other, draws.draw(place, BOOK, 12, 5, 300))[0, 1]) < 0.3


@pytest.mark.parametrize(("number", "first", "last"), [(5, 32, 64), (12, 4096, 8192)])
def test_scores_are_those_of_the_draws(number, first, last):
    place, delta = Place(1, 0, 4, 0), np.random.default_rng(0).standard_normal(300).astype(np.float32)
    scores = Book(place, 0, BOOK, 300).scores(delta, first, last)
    for index in (0, 1, last - first - 1):
        assert scores[index] == pytest.approx(delta @ draws.draw(place, BOOK, number, index, 300), rel=1e-4, abs=1e-3)


def test_nothing_to_say_costs_hardly_anything():
    assert channel.choose(Place(0, 0, 0, 0), BOOK, np.zeros(5)) == (0, 0)


@pytest.mark.parametrize("eighths", [1, 8, 100, 5000])
def test_odds_of_classes(eighths):
    odds = channel.class_odds(BOOK, eighths, 12)
    assert len(odds.starts) == draws.max_class(BOOK) + 2
    assert odds.total <= 1 << 16
