"""Threads that wait for each other sleep soon, unless the user has said how they wait."""

from __future__ import annotations

import sys

import pytest

from ddpm_export.training.openmp import SPINS, wait_briefly


@pytest.fixture
def untouched(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


def test_it_is_settled_before_torch_is_loaded(untouched):
    import os

    assert wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    untouched.setitem(sys.modules, "torch", object())
    assert not wait_briefly(), "too late"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_user_s_choice_stays(untouched, name):
    import os

    untouched.setenv(name, "PASSIVE")
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before
