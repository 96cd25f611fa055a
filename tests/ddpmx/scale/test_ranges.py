"""Cuts of a run: whatever the numbers, the parts are the whole, and fall between batches."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpmx.errors import InputError
from ddpmx.scale.ranges import Range, Shard, cut, joined

RANGES = st.builds(Range, st.integers(0, 1 << 32), st.integers(1, 5000))


def batches(part: Range, size: int) -> set[tuple[int, int]]:
    """The batches that ``generate`` runs for these images."""
    return {(each.first, each.end) for each in cut(part, size)}


@given(RANGES, st.integers(1, 300), st.integers(1, 40))
def test_the_shards_run_the_batches_of_the_single_run(whole, unit, count):
    parts = [Shard(index, count).of(whole, unit) for index in range(count)]
    assert parts[0].first == whole.first
    assert parts[-1].end == whole.end
    assert all(one.end == other.first for one, other in itertools.pairwise(parts))
    assert set().union(*(batches(part, unit) for part in parts)) == batches(whole, unit)
    units = [-(-part.count // unit) for part in parts]
    assert max(units) - min(units) <= 1


def test_equal_shares_that_ignore_batches_would_run_others():  # control
    whole = Range(0, 100)
    thirds = [Range(0, 33), Range(33, 33), Range(66, 34)]
    assert set().union(*(batches(part, 16) for part in thirds)) != batches(whole, 16)


@given(RANGES, st.integers(1, 300), st.integers(1, 5))
def test_neighbours_are_joined_and_gaps_stay(whole, size, most):
    pieces = cut(whole, size)
    found = joined(pieces, size * most)
    assert [each for one in found for each in cut(one, size)] == pieces
    assert max(each.count for each in found) <= size * most
    assert len(found) == -(-len(pieces) // most)
    assert joined(pieces[::2], size * most) == pieces[::2]


@pytest.mark.parametrize(("index", "count"), [(4, 4), (-1, 4), (0, 0)])
def test_there_is_no_such_shard(index, count):
    with pytest.raises(InputError, match=r"there is no shard"):
        Shard(index, count)


def test_ranges_in_words():
    assert [str(Range(5, n)) for n in (0, 1, 2)] == ["no images", "image 5", "images 5…6"]
