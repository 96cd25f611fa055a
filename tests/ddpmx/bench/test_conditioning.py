"""The benchmark of conditioned networks."""

from __future__ import annotations

import pytest

from ddpmx.bench.figures import Settings
from ddpmx.bench.host import measure_host
from oracles import gaussian
from oracles.conditioning import KINDS
from oracles.toy_backend import ToyBackend


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_runs_conditioned_networks(kind):
    cell = measure_host(ToyBackend(), gaussian.SPEC.replace(**KINDS[kind]), 2, Settings(1e-3, steps=3))
    assert cell.failed is None
