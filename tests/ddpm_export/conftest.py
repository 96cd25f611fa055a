"""What the tests of ddpm_export share."""

from __future__ import annotations

import importlib.util

import pytest

from tracing import trace_once


@pytest.fixture(autouse=True, scope="module")
def _traced_once(tmp_path_factory):
    """Graphs that were traced before in this run. Yields what traces anew."""
    if importlib.util.find_spec("torch") is None:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        yield trace_once(tmp_path_factory, patch)


@pytest.fixture(autouse=True)
def _traced_anew(request, monkeypatch, _traced_once):
    """For tests of the tracing itself: they are marked ``traces``."""
    if request.node.get_closest_marker("traces") is not None:
        monkeypatch.setattr("ddpm_export.graph.onnx_export._trace", _traced_once)
