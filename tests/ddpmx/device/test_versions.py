"""Versions as numbers: 1.30 is later than 1.4, and builds have names of their own."""

from __future__ import annotations

import pytest

from ddpmx.device.versions import version_numbers


@pytest.mark.parametrize(
    ("version", "count", "numbers"),
    [
        ("1.30.0", 2, (1, 30)),
        ("2.9.0a0+cu130", 2, (2, 9)),
        ("14.0.1", 3, (14, 0, 1)),
        ("2", 2, (2,)),
        ("?", 2, ()),
    ],
)
def test_the_first_numbers_count(version, count, numbers):
    assert version_numbers(version, count) == numbers


def test_they_are_compared_as_numbers():
    ordered = ["?", "1.4.1", "1.29.1", "1.30.0.dev3+cu130", "2.0"]
    assert sorted(ordered, key=version_numbers) == ordered
