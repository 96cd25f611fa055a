"""eˣ, ln x and cos x: within half an ulp, and the same everywhere."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from ddpmx.diffusion import elementary

RNG = np.random.default_rng(0)
HALF_PI = Decimal("1.57079632679489661923132169163975144209858469968755291487472296153908203143")
POINTS = {
    "exp": [*RNG.uniform(-10, 10, 300), *RNG.uniform(-700, 700, 100), 1e-9, -1e-20, 0.5, 709.7],
    "log": [
        *RNG.uniform(0, 2, 300),
        *(10 ** RNG.uniform(-300, 300, 100)),
        *(1 - 10 ** RNG.uniform(-15, -1, 50)),
        5e-324,
    ],
    "cos": [*RNG.uniform(0, 1.6, 300), *RNG.uniform(-100, 100, 100), math.pi / 2, 3 * math.pi / 2, 1e-9, 1e5],
}


def exact(function: str, x: float) -> Decimal:
    """By the decimal module, whose exp and ln are correctly rounded, and Taylor's series of the cosine."""
    value = Decimal(float(x))
    if function == "exp":
        return value.exp()
    if function == "log":
        return value.ln()
    value = value.remainder_near(4 * HALF_PI)
    term = total = Decimal(1)
    for n in range(1, 60):
        term *= -value * value / ((2 * n - 1) * 2 * n)
        total += term
    return total


@pytest.mark.parametrize("function", POINTS)
def test_within_half_a_unit_in_the_last_place(function, figure):
    x = np.array(POINTS[function])
    worst = Fraction(0)
    with localcontext() as context:
        context.prec = 70
        for value, found in zip(x, getattr(elementary, function)(x), strict=True):
            error = abs(Fraction(exact(function, value)) - Fraction(float(found)))
            worst = max(worst, error / Fraction(math.ulp(found)))
    figure(f"elementary.{function}: ulp from the true value", float(worst), at_most=0.5001)


def test_special_values():
    inf, nan = math.inf, math.nan
    np.testing.assert_array_equal(elementary.exp([0, -0.0, inf, -inf, nan, 1e308, -1e308]), [1, 1, inf, 0, nan, inf, 0])
    np.testing.assert_array_equal(elementary.log([1, 0, -0.0, -1, inf, -inf, nan]), [0, -inf, -inf, nan, inf, nan, nan])
    np.testing.assert_array_equal(elementary.cos([0, inf, -inf, nan, 1e300]), [1, nan, nan, nan, nan])


@pytest.mark.parametrize("function", POINTS)
def test_a_number_gives_the_same_as_an_array(function):
    whole = getattr(elementary, function)(np.array(POINTS[function]))
    for value, found in zip(POINTS[function][:20], whole, strict=False):
        assert getattr(elementary, function)(value) == found


def test_no_instruction_set_makes_a_difference():
    """NumPy chooses its loops by the processor. These float64 would show a difference."""
    code = """
import sys, zlib, numpy as np
from ddpmx.diffusion import elementary
x = np.random.default_rng(0).uniform(0, 3, 100_000)
print(*(zlib.crc32(getattr(elementary, name)(x).tobytes()) for name in ("exp", "log", "cos")))
"""
    results = set()
    for disabled in ("", "X86_V4", "X86_V4 X86_V3", "AVX512F AVX512_SKX", "AVX512F AVX512_SKX AVX2 FMA3"):
        environ = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True)
        if done.returncode == 0:  # which names there are depends on the version
            results.add(done.stdout)
    assert len(results) == 1
