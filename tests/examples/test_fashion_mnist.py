"""The demo walks its whole way, and its judge cannot be fooled by what is no garment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import FASHION
from ddpmx import Sampling, load

pytest.importorskip("sklearn", reason="not verified here: the demo's judge (no scikit-learn)")

pytestmark = pytest.mark.slow
EXAMPLE = FASHION.parent


@pytest.fixture(scope="module")
def judge():
    sys.path.insert(0, str(EXAMPLE))
    try:
        from judge import Judge
    finally:
        sys.path.remove(str(EXAMPLE))
    return Judge()


def test_real_images_pass(judge):
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert judge(judge.real[rng.permutation(len(judge.real))[:256]]).passed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("control", ["pure noise", "Gaussian fit", "averaged pairs", "real + noise 0.2"])
def test_controls_fail(judge, control, seed):
    assert not judge(judge.controls(seed=seed)[control]).passed


def test_a_little_noise_raises_the_total_variation_by_a_quarter(judge):
    noisy = judge.real + np.random.default_rng(0).normal(0, 0.1 * 127.5, judge.real.shape)
    assert judge(np.clip(noisy, 0, 255).astype(np.uint8)).variation == pytest.approx(1.25, abs=0.05)


@pytest.mark.parametrize(("steps", "confident", "variation"), [(20, 0.66, 1.04), (8, 0.62, 1.01)])
def test_the_model_that_comes_along_draws_what_its_readme_says(judge, steps, confident, variation):
    with load("garments") as pipeline:
        drawn = pipeline.generate(256, seed=1, batch=64, sampling=Sampling.chosen(1000, steps=steps))[..., 0]
    verdict = judge(drawn)
    assert verdict.classes == 10
    assert (verdict.confident, verdict.variation) == pytest.approx((confident, variation), abs=0.02)


@pytest.mark.long
@pytest.mark.torch
def test_smoke_walks_the_whole_way(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "demo.py"), "--smoke", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (
        "model.onnx",
        "model-fp16.onnx",
        "samples/grid.png",
        "samples/x0.gif",
        "samples/00008.png",
        "parity/report.md",
    ):
        assert (tmp_path / "out" / path).stat().st_size > 0
    judged = [line.split() for line in done.stdout.splitlines() if line.endswith(("  pass", "  fail"))]
    verdicts = {" ".join(words[:-4]): words[-1] for words in judged}
    assert verdicts.pop("real images") == "pass"
    assert len(verdicts) == 5
    assert set(verdicts.values()) == {"fail"}, "twenty steps of training make no garments, and the controls are none"
