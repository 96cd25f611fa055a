"""The range coder: what goes in comes out, and its length is the entropy."""

from __future__ import annotations

import math
import random
from bisect import bisect_right

import pytest

from ddpmx.errors import FileFormatError
from ddpmx.tasks.codec.range_coder import Odds, Reader, Writer


@pytest.mark.parametrize("seed", range(6))
def test_round_trip_and_length(seed):
    rng = random.Random(seed)
    kinds = [Odds([rng.choice((1, 2, 60, 900)) for _ in range(rng.choice((1, 2, 9, 60)))]) for _ in range(4)]
    kinds.append(Odds([65535, 1]))
    writer, put, bits = Writer(), [], 0.0
    for _ in range(rng.choice((0, 1, 5, 3000))):
        if rng.random() < 0.3:
            count = rng.choice((0, 1, 7, 16, 17, 40))
            value = rng.choice((0, (1 << count) - 1, rng.getrandbits(count) if count else 0))
            writer.put_bits(value, count)
            put.append((count, value))
            bits += count
        else:
            odds = rng.choice(kinds)
            symbol = bisect_right(odds.starts, rng.randrange(odds.total)) - 1
            writer.put(symbol, odds)
            put.append((odds, symbol))
            bits += odds.bits(symbol)
    data = writer.finish()
    reader = Reader(data)
    for what, value in put:
        assert (reader.get_bits(what) if isinstance(what, int) else reader.get(what)) == value
    assert len(data) <= bits / 8 * 1.001 + 1.5


def test_a_carry_goes_through_many_bytes():
    odds = Odds([65535, 1])
    writer = Writer()
    symbols = [1] * 3 + [0] * 2000 + [1] * 40
    for symbol in symbols:
        writer.put(symbol, odds)
    reader = Reader(writer.finish())
    assert [reader.get(odds) for _ in symbols] == symbols


@pytest.mark.parametrize("count", [1, 60, 64, 68, 100, 2000])
def test_numbers_may_end_with_zeros(count):
    """As images do whose last rows are what is expected there, and black."""
    odds = Odds([1, 1])
    for symbols in ([0] * count, [1] + [0] * count, [1] * 30 + [0] * count):
        writer = Writer()
        for symbol in symbols:
            writer.put(symbol, odds)
        data = writer.finish()
        reader = Reader(data)
        assert [reader.get(odds) for _ in symbols] == symbols
        assert len(data) <= len(symbols) / 8 + 1.5


def test_the_end_is_noticed():
    reader = Reader(b"\x12\x34")
    for _ in range(3):
        reader.get_bits(16)
    with pytest.raises(FileFormatError, match="end too early"):
        reader.get_bits(160)


@pytest.mark.parametrize("weights", [[], [0, 1], [65536, 1]])
def test_odds_that_are_none(weights):
    with pytest.raises(ValueError, match="odds"):
        Odds(weights)


def test_bits_of_a_symbol():
    assert Odds([1, 3]).bits(0) == pytest.approx(2)
    assert Odds([1, 3]).bits(1) == pytest.approx(math.log2(4 / 3))
