"""`ddpmx doctor`."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_doctor_lists_what_is_installed(ddpmx):
    import onnxruntime

    done = ddpmx("doctor")
    assert done.code == 0
    assert f"onnxruntime {onnxruntime.__version__}" in done.out
    assert "TensorRT" in done.out
    report = json.loads(ddpmx("doctor", "--json").out)
    assert report["libraries"]["onnxruntime"]["version"] == onnxruntime.__version__
    assert {"train", "export"} <= {finding["what"] for finding in report["findings"]}
