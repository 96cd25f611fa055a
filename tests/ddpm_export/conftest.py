"""What the tests of ddpm_export share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _traced_anew(request, monkeypatch, _traced_once):
    """For tests of the tracing itself: they are marked ``traces``."""
    if request.node.get_closest_marker("traces") is not None:
        monkeypatch.setattr("ddpm_export.graph.onnx_export._trace", _traced_once)
