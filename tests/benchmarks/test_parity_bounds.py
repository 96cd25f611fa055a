"""A few right models and planted mistakes of the benchmark of the parity bounds."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="not verified here: the bounds for random models (no torch)")

from benchmarks.parity_bounds import MISTAKES, finds, host, make, right

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    "fixed",
    [
        {"schedule": "cosine", "prediction": "eps", "clip": None, "precision": "fp32", "data_range": (-1.0, 1.0)},
        {"schedule": "cosine", "prediction": "eps", "clip": None, "precision": "fp16", "data_range": (-1.0, 1.0)},
        {"schedule": "linear", "prediction": "x0", "clip": 1.0, "precision": "fp32", "data_range": (0.0, 255.0)},
        {"schedule": "sigmoid_beta", "prediction": "v", "clip": 1.5, "precision": "fp32", "data_range": (0.0, 255.0)},
        {"schedule": "quad", "prediction": "v", "clip": None, "precision": "bf16", "data_range": (-1.0, 1.0)},
    ],
    ids=["cosine", "cosine fp16", "x0 of 0…255", "v of 0…255", "bf16"],
)
def test_a_right_file_passes_whatever_its_table_amplifies(fixed):
    report = right(make(5, **{"variance": "fixed_large", "timesteps": 400, "classes": None} | fixed))
    assert report.passed, report.verdict


@pytest.mark.parametrize(("number", "mistake"), [(i % 4, mistake) for i, mistake in enumerate(MISTAKES)])
def test_a_quarter_of_a_mistake_is_found_by_its_check(number, mistake):
    model = host(number, mistake)
    assert right(model).passed
    assert finds(model, mistake, 0.25)
