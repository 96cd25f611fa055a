"""eˣ, ln x and cos x in float64, from IEEE + − × ÷ alone, so that a schedule has the same bits on every machine.

A model file carries a checksum of its coefficients. NumPy's own functions differ in the last bit from one processor to
the next, and some coefficients (the logarithm of β over β̃ where they are nearly equal) make that a bit of the float32.
libddpmx has the same operations in C++, and a test demands equality.

Internally a number is the sum of two float64, high and low (Dekker 1971), 106 bits together. The result is within 0.5001
ulp: nearly always the float64 nearest to the true value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Pair = tuple[Float64, Float64]

# In parts whose product with a whole number of 11 or 20 bits is exact, and a last one that is rounded.
_LN2 = tuple(map(float.fromhex, ("0x1.62e42fefa38p-1", "0x1.ef35793c76p-45", "0x1.cc01f97b57a08p-87")))
_HALF_PI = tuple(
    map(float.fromhex, ("0x1.921fb544p+0", "0x1.0b4611a6p-34", "0x1.3198a2ep-69", "0x1.b839a252049c1p-104"))
)
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_MOST_QUADRANTS = 2.0**20


def exp(x: ArrayLike) -> Float64:
    """eˣ = 2ᵏ·eʳ with k = round(x/ln 2), and eʳ − 1 by Taylor's series at r/64, doubled six times: 2p + p²."""
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        bounded = np.where(np.isnan(x), 0.0, np.minimum(np.maximum(x, -800.0), 800.0))
        k = np.rint(bounded / _LN2[0])
        r = _scaled(_without(bounded, k, _LN2), 1 / 64)
        tail = np.zeros_like(bounded)
        for n in range(9, 2, -1):
            tail = (tail * r[0] + 1.0) / n  # 1/n·(1 + r/(n+1)·(1 + …))
        cube = r[0] * r[0] * r[0] * 0.5
        p = _add(_add(r, _scaled(_multiply(r, r), 0.5)), (cube * tail, np.zeros_like(bounded)))
        for _ in range(6):
            p = _add(_scaled(p, 2.0), _multiply(p, p))
        y = _add((np.ones_like(bounded), np.zeros_like(bounded)), p)[0]
        return np.where(np.isnan(x), x, np.ldexp(y, k.astype(np.int32)))


def log(x: ArrayLike) -> Float64:
    """ln x = e·ln 2 + 2·artanh(s) with x = m·2ᵉ, √½ ≤ m < √2, s = (m−1)/(m+1), and s·Σ s²ⁿ/(2n+1) for artanh."""
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        real = (x > 0) & (x < np.inf)
        m, exponent = np.frexp(np.where(real, x, 1.0))
        low = m < _SQRT_HALF
        m, e = np.where(low, 2.0 * m, m), np.where(low, exponent - 1, exponent).astype(np.float64)
        zero = np.zeros_like(m)
        s = _divide((m - 1.0, zero), _two_sum(m, np.ones_like(m)))
        square = _multiply(s, s)
        tail = zero
        for n in range(14, 3, -1):
            tail = tail * square[0] + 1.0 / (2 * n + 1)
        total = (tail, zero)
        for n in range(3, -1, -1):
            total = _add(_multiply(total, square), _one_over(2 * n + 1))
        natural = _multiply(_scaled(s, 2.0), total)
        whole = _add(_add((e * _LN2[0], zero), (e * _LN2[1], zero)), (e * _LN2[2], zero))
        special = np.where(x == 0, -np.inf, np.where(x > 0, x, np.nan))
        return np.where(real, _add(whole, natural)[0], special)


def cos(x: ArrayLike) -> Float64:
    """cos(k·π/2 + r) by Taylor's series of cos r or sin r. NaN where x is past a million quarter turns."""
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        k = np.rint(x / _HALF_PI[0])
        known = np.abs(k) <= _MOST_QUADRANTS
        k = np.where(known, k, 0.0)
        r = _without(np.where(known, x, 0.0), k, _HALF_PI)
        square = _multiply(r, r)
        even = _alternating(square, 0)[0]
        odd = _multiply(r, _alternating(square, 1))[0]
        quadrant = k - 4.0 * np.floor(k / 4.0)
        y = np.where((quadrant == 1) | (quadrant == 3), odd, even)
        return np.where(known, np.where((quadrant == 1) | (quadrant == 2), -y, y), np.nan)


def _alternating(square: Pair, first: int) -> Pair:
    """1 − z/(a·(a+1))·(1 − z/((a+2)·(a+3))·(…)) with a = 1 + ``first``: cos r of z = r², or sin r over r."""
    one, zero = np.ones_like(square[0]), np.zeros_like(square[0])
    tail = one
    for n in range(11, 4, -1):
        tail = 1.0 - square[0] / ((2 * n - 1 + first) * (2 * n + first)) * tail
    total = (tail, zero)
    for n in range(4, 0, -1):
        term = _multiply(_multiply(square, _one_over((2 * n - 1 + first) * (2 * n + first))), total)
        total = _add((one, zero), _scaled(term, -1.0))
    return total


# --- the sum of two float64 ------------------------------------------------------------------------------------------


def _two_sum(a: Float64, b: Float64) -> Pair:
    """a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fast_two_sum(high: Float64, low: Float64) -> Pair:
    """high + low exactly, if |high| ≥ |low| (Dekker)."""
    s = high + low
    return s, low - (s - high)


def _two_product(a: Float64, b: Float64) -> Pair:
    """a·b exactly, with each factor cut into halves of 26 bits (Veltkamp, Dekker)."""
    p = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Float64) -> Pair:
    c = 134217729.0 * a  # 2²⁷ + 1
    high = c - (c - a)
    return high, a - high


def _add(a: Pair, b: Pair) -> Pair:
    s, error = _two_sum(a[0], b[0])
    return _fast_two_sum(s, error + (a[1] + b[1]))


def _multiply(a: Pair, b: Pair) -> Pair:
    p, error = _two_product(a[0], b[0])
    return _fast_two_sum(p, error + (a[0] * b[1] + a[1] * b[0]))


def _divide(a: Pair, b: Pair) -> Pair:
    q = a[0] / b[0]
    p, error = _two_product(q, b[0])
    return _fast_two_sum(q, (((a[0] - p) - error) + (a[1] - q * b[1])) / b[0])


def _one_over(n: int) -> Pair:
    one, zero = np.float64(1.0), np.float64(0.0)
    return _divide((one, zero), (np.float64(n), zero))  # type: ignore[arg-type]


def _scaled(a: Pair, by: float) -> Pair:
    """a·by for a power of 2."""
    return a[0] * by, a[1] * by


def _without(x: Float64, k: Float64, parts: tuple[float, ...]) -> Pair:
    """x − k·Σ parts."""
    rest = (x, np.zeros_like(x))
    for part in parts:
        rest = _add(rest, (-(k * part), np.zeros_like(x)))
    return rest
