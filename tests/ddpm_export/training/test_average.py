"""The share of the first weights in the average, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

pytest.importorskip("torch", reason="not verified here: training (no torch)")

from ddpm_export.training import advice
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


@pytest.mark.parametrize("ema", [0.0, 0.05, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("ramp", [False, True])
def test_the_share_is_the_product_of_the_decays(ema, ramp):
    for n in (1, 5, 9, 80, 81, 82, 200):
        product = math.prod(decay_at(s, ema, ramp) for s in range(n))
        assert share_of_first(n, ema, ramp) == pytest.approx(product, rel=1e-9)
    assert share_of_first(10**12, ema, ramp) == (1 if ema == 1 and not ramp else pytest.approx(0, abs=1e-90))


def test_the_ramp_ends_at_the_decay():
    assert decay_at(0, 0.9999, True) == 0.1
    assert decay_at(89_980, 0.9999, True) < 0.9999 == decay_at(90_000, 0.9999, True)
    assert decay_at(0, 0.9999, False) == 0.9999
    assert share_of_first(10, 0.0, False) == 0
    assert share_of_first(0, 0.9, True) == 1


@pytest.mark.parametrize(
    ("ramp", "steps", "says"), [(False, 100, "holds 99%"), (True, 100, None), (False, 40_000, None)]
)
def test_an_export_of_such_an_average_is_warned_of(tmp_path, ramp, steps, says):
    train = dataclasses.asdict(TrainSettings(ema_ramp=ramp))
    (tmp_path / "training.json").write_text(json.dumps({"step": steps, "settings": {"train": train}}))
    note = advice.note_of_checkpoint(tmp_path)
    assert note is None if says is None else says in note and "--weights raw" in note


def test_of_an_imported_network_nothing_is_said(tmp_path):
    assert advice.note_of_checkpoint(tmp_path) is None
    (tmp_path / "training.json").write_text(json.dumps({"step": 0, "settings": {"imported": {}}}))
    assert advice.note_of_checkpoint(tmp_path) is None
