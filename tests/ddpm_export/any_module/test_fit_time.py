"""Whether t is 0…T−1 or 1…T is found by images: the perfect network of Gaussian images, with both conventions."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: conventions for the time (no torch)")
pytest.importorskip("onnx", reason="not verified here: conventions for the time (no onnx)")

import torch
from torch import nn

from ddpm_export import Adapter, export, fit_time, spec_from_arrays
from ddpmx.errors import InputError

pytestmark = [pytest.mark.torch, pytest.mark.slow]

T, SHAPE, DEVIATION = 50, (1, 8, 8), 0.05


def alpha_bar(u):
    """ᾱ of the paper's t = 1…T as u = t/T."""
    return torch.exp(-0.02 * u - 5 * u**2) if isinstance(u, torch.Tensor) else np.exp(-0.02 * u - 5 * u**2)


SPEC = spec_from_arrays(SHAPE, alpha_bar=alpha_bar(np.arange(1, T + 1) / T), clip=None)


class Perfect(nn.Module):
    """ε of images N(mean, DEVIATION²): E[ε | x_t] = √(1−ᾱ)·(x_t − √ᾱ·mean)/(ᾱ·DEVIATION² + 1 − ᾱ)."""

    def __init__(self, units: float, whole: bool = False) -> None:
        super().__init__()
        self.units, self.whole, self.mean = units, whole, nn.Parameter(torch.tensor(0.2))

    def forward(self, x, time):
        assert time.is_floating_point() != self.whole
        a = alpha_bar(time.float() / self.units)[:, None, None, None]
        return (1 - a).clamp(min=1e-9).sqrt() * (x - a.sqrt() * self.mean) / (a * DEVIATION**2 + 1 - a)


def images(n: int = 32) -> np.ndarray:
    values = 0.2 + DEVIATION * np.random.default_rng(0).standard_normal((n, 8, 8, 1))
    return np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)


CASES = {
    "fraction": (lambda: Perfect(1.0), "fraction", '"fraction1"'),
    "float": (lambda: Perfect(T), "float", '"float1"'),
    "index": (lambda: Perfect(T, whole=True), "index", '"index1"'),
    "scaled": (lambda: Perfect(1.0), (1 / T, 0.0), f"({1 / T:g}, {1 / T:g})"),
    "a function": (lambda: Perfect(1.0), lambda t: t / T, "(t ↦ time(t + 1))"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_convention_that_fits_is_found(name):
    make, time, better = CASES[name]
    fit = fit_time(Adapter(make().eval(), time=time), SPEC, images())
    assert fit.better == better, fit
    assert fit.errors[better] < 0.9 * fit.errors[fit.given]
    assert better in str(fit)


@pytest.mark.parametrize("time", ["fraction1", (1 / T, 1 / T), lambda t: (t + 1) / T])
def test_the_right_convention_is_left_alone(time):
    assert fit_time(Adapter(Perfect(1.0).eval(), time=time), SPEC, images()).better is None


def test_the_errors_are_those_of_the_closed_form(figure):
    """The variance of ε given x_t is ᾱ·s²/(ᾱ·s² + 1 − ᾱ)."""
    fit = fit_time(Adapter(Perfect(1.0).eval(), time="fraction1"), SPEC, images(64))
    a = alpha_bar((np.array([0, 1, 2, 4, 8, 16, 32, 49]) + 1) / T)
    s = DEVIATION**2 + (1 / 127.5) ** 2 / 12
    expected = float(np.mean(a * s / (a * s + 1 - a)))
    # 64 images of 64 pixels: a relative standard error of √(2/4096) at each t, and of no more in the mean
    figure(
        "error of ε against the closed form",
        abs(fit.errors['"fraction1"'] / expected - 1),
        at_most=4 * math.sqrt(2 / 4096),
    )


def test_a_network_that_has_not_learnt_decides_nothing():
    torch.manual_seed(0)

    class Untrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(T, 1)

        def forward(self, x, t):
            return self.conv(x) + self.table(t)[..., None, None]

    fit = fit_time(Adapter(Untrained().eval()), SPEC, images())
    assert fit.better is None
    assert set(fit.errors) == {'"index"'}, "a table of T rows has none for t = T"


def test_an_export_with_images_says_it(tmp_path):
    done = export(Adapter(Perfect(1.0).eval(), time="fraction"), SPEC, tmp_path / "m.onnx", data=images())
    assert 'time="fraction1" fits the images better than time="fraction"' in done.verdict
    assert len(done.notes) == 1
    right = export(Adapter(Perfect(1.0).eval(), time="fraction1"), SPEC, tmp_path / "m.onnx", data=images())
    assert right.notes == ()


@pytest.mark.parametrize("wrong", [(8, 8, 8), (8, 8, 9, 1), (0, 8, 8, 1)], ids=str)
def test_other_images_are_refused(wrong):
    with pytest.raises(InputError):
        fit_time(Adapter(Perfect(1.0).eval(), time="fraction1"), SPEC, np.zeros(wrong, np.uint8))
    with pytest.raises(InputError, match="float32"):
        fit_time(Adapter(Perfect(1.0).eval(), time="fraction1"), SPEC, images(4).astype(np.float32))
