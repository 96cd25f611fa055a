"""Versions of libraries, to be compared."""

from __future__ import annotations

import re


def version_numbers(version: str, count: int = 2) -> tuple[int, ...]:
    """The first ``count`` numbers of a library's version: "2.9.0a0+cu130" → (2, 9). A text without any is the lowest."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:count])
