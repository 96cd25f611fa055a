"""Gaussian noise as a pure function of (seed, image, t, purpose, element): the same on every machine and in any batch.

Philox4x32-10 (Salmon et al. 2011) turns a key and a counter into four 32-bit words; a Box–Muller transform made of
IEEE + − × √ alone turns them into four normals. No libm, no fused multiply-add, a fixed order: NumPy here and C in
``cuda/step.h`` agree bit for bit, on a CPU as on a GPU.

    key     = seed (low word, high word)
    counter = (element // 4, image, t, purpose << 24 | repeat)
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import InputError

Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]

MAX_SEED = 2**64 - 1
MAX_IMAGE = 2**32 - 1


class Purpose(IntEnum):
    """What a draw is for. Two draws for different purposes never share a number."""

    INITIAL = 0
    """x_T ~ N(0, I), where the chain starts."""
    STEP = 1
    """z of one reverse step, p(x_{t−1} | x_t)."""
    DIFFUSE = 2
    """ε of q(x_t | x_0)."""
    CONDITION = 3
    """A random condition image, with which a network is tried out."""
    LIKELIHOOD = 4
    """ε of x_t where the bound on the likelihood is computed, and which t that is."""
    BACK = 5
    """ε of q(x_t | x_s), s < t, by which inpainting goes back in the chain."""
    LANGEVIN = 8
    """z of one Langevin step, which corrects a state x_t."""
    PROBE = 9
    """Signs by which a divergence is estimated, and the place of an image within its levels of uint8."""
    PATCH = 10
    """Where patches of images are taken, and the directions along which they are compared."""
    CODEC = 11
    """What coder and decoder of a compressed file have in common before anything is sent."""


def check_seed(seed: int) -> int:
    """``seed`` as an int, checked.

    Raises:
        InputError: not a whole number of 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
    return int(seed)


_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32_10(counter: NDArray[np.uint64], key: tuple[int, int]) -> UInt32:
    """Ten rounds of Philox4x32.

    Args:
        counter: [4, …], each element below 2³².
        key: two 32-bit words.

    Returns:
        uint32 [4, …], the random words.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _32) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _32) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


# ln(1+f) ≈ f − f²/2 + f³·P(f) on √½ ≤ 1+f < √2; ln 2 in two parts; sin and cos of (π/2)·x on |x| ≤ ½. Each constant
# is a float32, so writing it in decimal or hexadecimal makes no difference to the bits.
_LN_POLY = np.array(
    [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ],
    np.float32,
)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SIN_POLY = np.array(
    [
        float.fromhex(x)
        for x in ("0x1.921fb6p+0", "-0x1.4abbcep-1", "0x1.466bbap-4", "-0x1.32ca9ep-8", "0x1.4bc85cp-13")
    ],
    np.float32,
)
_COS_POLY = np.array(
    [float.fromhex(x) for x in ("0x1p+0", "-0x1.3bd3ccp+0", "0x1.03c1dcp-2", "-0x1.55c57ap-6", "0x1.d9c2e8p-11")],
    np.float32,
)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)


def _minus_two_ln(word: UInt32) -> Float32:
    """−2·ln u for u = (word + ½)/2³², float32."""
    u = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = u.view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1)
    e = exponent.astype(np.float32)
    square = f * f
    y = np.full_like(f, _LN_POLY[0])
    for coefficient in _LN_POLY[1:]:
        y = y * f + coefficient
    y = y * f * square
    y = y + e * _LN2_LOW
    y = y - np.float32(0.5) * square
    ln_u = f + y
    ln_u = ln_u + e * _LN2_HIGH
    doubled: Float32 = np.float32(-2) * ln_u
    return doubled


def _cos_sin(word: UInt32) -> tuple[Float32, Float32]:
    """cos and sin of 2π·word/2³², float32. The quadrant is split off in integers, so the rest is exact."""
    quadrant = (word + np.uint32(0x20000000)) >> np.uint32(30)
    x = (word - (quadrant << np.uint32(30))).view(np.int32).astype(np.float32) * np.float32(2.0**-30)
    square = x * x
    sin, cos = np.full_like(x, _SIN_POLY[-1]), np.full_like(x, _COS_POLY[-1])
    for s, c in zip(_SIN_POLY[-2::-1], _COS_POLY[-2::-1], strict=True):
        sin = sin * square + s
        cos = cos * square + c
    sin = sin * x
    odd = (quadrant & np.uint32(1)).astype(bool)
    cos, sin = np.where(odd, sin, cos), np.where(odd, cos, sin)
    cos = np.where(((quadrant + np.uint32(1)) & np.uint32(2)).astype(bool), -cos, cos)
    sin = np.where((quadrant & np.uint32(2)).astype(bool), -sin, sin)
    return cos, sin


def normal(
    seed: int,
    images: NDArray[np.integer] | range | list[int],
    t: int | NDArray[np.integer],
    purpose: Purpose,
    elements: int,
    *,
    repeat: int = 0,
    each: bool = False,
) -> Float32:
    """Draw from N(0, 1).

    Args:
        seed: 0…2⁶⁴−1.
        images: [n], the index of each image, 0…2³²−1. The noise of an image does not depend on the others.
        t: the timestep, 0…T−1, or [k] of them at once; with ``each`` [n], one for each image.
        purpose: what the draw is for.
        elements: numbers per image, C·H·W.
        repeat: 0…2²⁴−1, a further draw for the same purpose.
        each: whether every image has a timestep of its own.

    Returns:
        float32 [n, elements], or [k, n, elements] with several timesteps for all images.

    Raises:
        InputError: a number outside its range.
    """
    blocks = -(-elements // 4)
    w0, w1, w2, w3 = _words(seed, images, t, purpose, blocks, repeat, each=each)
    z = np.empty((*w0.shape, 4), np.float32)
    for pair, (radius_word, angle_word) in enumerate(((w0, w1), (w2, w3))):
        radius = np.sqrt(np.maximum(_minus_two_ln(radius_word), np.float32(0)))
        cos, sin = _cos_sin(angle_word)
        z[..., 2 * pair] = radius * cos
        z[..., 2 * pair + 1] = radius * sin
    drawn: Float32 = z.reshape(*z.shape[:-2], 4 * blocks)[..., :elements]
    return drawn


def integers(
    seed: int,
    images: NDArray[np.integer] | range | list[int],
    purpose: Purpose,
    below: NDArray[np.integer],
    *,
    repeat: int = 0,
) -> NDArray[np.int64]:
    """Draw whole numbers 0…m−1, each as likely as the others to within m·2⁻³².

    Args:
        seed, images, purpose, repeat: as for :func:`normal`, at t = 0. A ``repeat`` must not be that of a normal draw.
        below: [k], the m of each number of an image, 1…2³².

    Returns:
        int64 [n, k].

    Raises:
        InputError: a number outside its range.
    """
    bounds = np.asarray(below, np.uint64)
    words = _words(seed, images, 0, purpose, -(-len(bounds) // 4), repeat, each=False)
    words = np.moveaxis(words, 0, -1).reshape(words.shape[1], -1)[:, : len(bounds)]
    return (words.astype(np.uint64) * bounds >> _32).astype(np.int64)


def words(
    seed: int,
    images: NDArray[np.integer] | range | list[int],
    t: int | NDArray[np.integer],
    purpose: Purpose,
    count: int,
    *,
    repeat: int = 0,
) -> UInt32:
    """Draw random words of 32 bits.

    Args:
        seed, images, t, purpose, repeat: as for :func:`normal`. A ``repeat`` must not be that of a normal draw.
        count: words per image.

    Returns:
        uint32 [n, count], or [k, n, count] with several timesteps.

    Raises:
        InputError: a number outside its range.
    """
    drawn = np.moveaxis(_words(seed, images, t, purpose, -(-count // 4), repeat, each=False), 0, -1)
    found: UInt32 = drawn.reshape(*drawn.shape[:-2], -1)[..., :count]
    return found


def _words(
    seed: int,
    images: NDArray[np.integer] | range | list[int],
    t: int | NDArray[np.integer],
    purpose: Purpose,
    blocks: int,
    repeat: int,
    *,
    each: bool,
) -> UInt32:
    """The random words of a draw, four for each block: uint32 [4, n, blocks], or [4, k, n, blocks] with several t."""
    seed = check_seed(seed)
    try:
        indices = np.asarray(images, np.int64)
    except OverflowError:
        indices = np.array([-1])
    if indices.size and not (indices.min() >= 0 and indices.max() <= MAX_IMAGE):
        raise InputError("image indices run from 0 to 2**32 - 1")
    steps = np.asarray(t, np.int64)
    if (steps.size and not 0 <= steps.min() <= steps.max() < 2**32) or not 0 <= repeat < 2**24:
        raise InputError(f"noise is defined for t below 2**32 and repeat below 2**24, not t = {t}, repeat = {repeat}")
    if each and steps.shape != indices.shape:
        raise InputError(f"there are {len(indices)} images, and timesteps of the shape {list(steps.shape)}")
    counter = np.empty((4, *(() if each else steps.shape), len(indices), blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = indices.astype(np.uint64)[:, None]
    counter[2] = steps.astype(np.uint64)[..., None] if each else steps.astype(np.uint64)[..., None, None]
    counter[3] = int(purpose) << 24 | repeat
    return philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
