"""Parity checks of conditioned networks on a device, through fakes of TensorRT and the driver."""

from __future__ import annotations

import pytest

from ddpmx import pipeline
from ddpmx.parity import on_device
from oracles.conditioning import KINDS, spec_of


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_on_the_device_is_checked(conditioned_plan, kind):
    spec = spec_of(kind)
    with pipeline.load(conditioned_plan(spec)) as p:
        checks = on_device.checks(p._runner._backend, spec)
    assert [(check.value, check.skipped) for check in checks] == [(0.0, None)] * 3
