"""The share of the first weights in the average, and what is said of it."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch", reason="not verified here: training (no torch)")

from ddpm_export.training.average import decay_at, share_of_first
from ddpm_export.training.settings import TrainSettings


def test_by_default_a_short_run_s_average_holds_none_of_the_first_weights():
    default = TrainSettings()
    assert share_of_first(150, default.ema, default.ema_ramp) < 1e-10
    assert share_of_first(150, default.ema, False) == pytest.approx(0.9999**150)


def test_the_ramp_s_share_in_closed_form():
    """Π_{s<n} (1 + s)/(10 + s) = 9!·n!/(n + 9)!."""
    for n in (1, 2, 10, 100):
        exact = math.factorial(9) * math.factorial(n) / math.factorial(n + 9)
        assert share_of_first(n, 1.0, True) == pytest.approx(exact)


def test_the_ramp_ends_at_the_decay():
    assert decay_at(0, 0.9999, True) == 0.1
    assert decay_at(89_980, 0.9999, True) < 0.9999 == decay_at(90_000, 0.9999, True)
    assert decay_at(0, 0.9999, False) == 0.9999
    assert share_of_first(10, 0.0, False) == 0
    assert share_of_first(0, 0.9, True) == 1
