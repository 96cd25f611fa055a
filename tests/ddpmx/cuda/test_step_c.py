"""step.h and NumPy implement the same arithmetic: here the C is compiled, and every bit must agree."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.sampling import chain
from ddpmx.sampling.guidance import combine
from ddpmx.sampling.pixels import to_uint8

SOURCE = """
#include "step.h"
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif
void fill(uint64_t seed, const uint32_t *image, size_t n, uint32_t t, uint32_t purpose, uint32_t repeat, size_t blocks,
          float *z) {
  for (size_t i = 0; i < n; ++i)
    for (size_t block = 0; block < blocks; ++block)
      ddpmx_normal4(seed, (uint32_t)block, image[i], t, purpose, repeat, z + 4 * (i * blocks + block));
}
void update(const ddpmx_row *row, float limit, size_t n, const float *x, const float *out, const float *z, float *x0,
            float *x_next) {
  for (size_t i = 0; i < n; ++i) x_next[i] = ddpmx_update(*row, limit, x[i], out[i], z[i], x0 + i);
}
void learned(const ddpmx_row *row, const ddpmx_learned *range, float limit, size_t n, const float *x, const float *out,
             const float *v, const float *z, float *x0, float *x_next) {
  for (size_t i = 0; i < n; ++i)
    x_next[i] = ddpmx_update(ddpmx_learn(*row, *range, v[i]), limit, x[i], out[i], z[i], x0 + i);
}
void recalled(const ddpmx_row *row, const ddpmx_memory *memory, float limit, size_t n, const float *x, const float *out,
              const float *one_ago, const float *two_ago, float *x0, float *x_next) {
  for (size_t i = 0; i < n; ++i) {
    x_next[i] = ddpmx_update(*row, limit, x[i], out[i], 0.0f, x0 + i);
    x_next[i] = ddpmx_recall(*memory, x_next[i], one_ago[i], two_ago[i]);
  }
}
void exponential(const float *x, size_t n, float *y) {
  for (size_t i = 0; i < n; ++i) y[i] = ddpmx_exp(x[i]);
}
void guide(float scale, const float *with_class, const float *without, size_t n, float *out) {
  for (size_t i = 0; i < n; ++i) out[i] = ddpmx_guide(scale, with_class[i], without[i]);
}
void pixels(const float *x, size_t n, unsigned char *u) {
  for (size_t i = 0; i < n; ++i) u[i] = ddpmx_uint8(x[i]);
}
void purposes(int *p) {
  p[0] = DDPMX_PURPOSE_INITIAL;
  p[1] = DDPMX_PURPOSE_STEP;
  p[2] = DDPMX_PURPOSE_DIFFUSE;
}
int has_fma(void) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return 1;
#else
  return 0;
#endif
}
#ifdef __cplusplus
}
#endif
"""

STRICT = ["-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
BUILDS = {
    "c99 -O2": ("c", ["-O2", "-std=c99", *STRICT]),
    "c99 -O3 -march=native": ("c", ["-O3", "-march=native", "-std=c99", *STRICT]),
    "c++17 -O2": ("c++", ["-O2", "-std=c++17", *STRICT]),
}
NOT_VERIFIED = "not verified here: that {} of step.h gives the bits of NumPy (no {} compiler)"


def build(folder: Path, language: str, flags: list[str]) -> ctypes.CDLL:
    names = ("cc", "gcc", "clang") if language == "c" else ("c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        pytest.skip(NOT_VERIFIED.format(" ".join(flags), language.upper()))
    source, library = folder / f"step.{'c' if language == 'c' else 'cpp'}", folder / "step.so"
    source.write_text(SOURCE)
    include = Path(ddpmx.__file__).parent / "cuda"
    # linked without the flags: with -ffast-math a library rounds subnormal numbers to 0 in the whole process
    compiling = [compiler, *flags, "-c", "-fPIC", f"-I{include}", str(source), "-o", str(folder / "step.o")]
    linking = [compiler, "-shared", str(folder / "step.o"), "-o", str(library), "-lm"]
    for command in (compiling, linking):
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("step"), *BUILDS[request.param])


def c_normal(library, seed, image, t, purpose, elements, repeat=0):
    assert elements % 4 == 0
    indices = np.array(image, np.uint32)
    z = np.full((len(indices), elements), np.nan, np.float32)
    library.fill(
        ctypes.c_uint64(seed),
        indices.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(len(indices)),
        ctypes.c_uint32(t),
        ctypes.c_uint32(purpose),
        ctypes.c_uint32(repeat),
        ctypes.c_size_t(elements // 4),
        z.ctypes.data_as(ctypes.c_void_p),
    )
    return z


def c_update(library, row, limit, x, out, z):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, out, z, x0, x_next)]
    row = np.ascontiguousarray(row, np.float32)
    library.update(row.ctypes.data_as(ctypes.c_void_p), ctypes.c_float(limit), ctypes.c_size_t(x.size), *pointers)
    return x0, x_next


def c_learned(library, row, learned, limit, x, out, v, z):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, out, v, z, x0, x_next)]
    row, learned = (np.ascontiguousarray(a, np.float32) for a in (row, learned))
    library.learned(
        row.ctypes.data_as(ctypes.c_void_p),
        learned.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_float(limit),
        ctypes.c_size_t(x.size),
        *pointers,
    )
    return x0, x_next


def numpy_learned(row, learned, limit, x, out, v, z):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    noisy = row[4] != 0
    with np.errstate(all="ignore"):
        sigma = chain.learned_sigma(learned, v) if noisy else None
        chain.update(row, limit, x, out, z if noisy else None, x0=x0, x_next=x_next, sigma=sigma)
    return x0, x_next


def c_recalled(library, row, memory, limit, x, out, one_ago, two_ago):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, out, one_ago, two_ago, x0, x_next)]
    row, memory = (np.ascontiguousarray(a, np.float32) for a in (row, memory))
    library.recalled(
        row.ctypes.data_as(ctypes.c_void_p),
        memory.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_float(limit),
        ctypes.c_size_t(x.size),
        *pointers,
    )
    return x0, x_next


def numpy_recalled(row, memory, limit, x, out, one_ago, two_ago):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    used = [(weight, array) for weight, array in zip(memory, (one_ago, two_ago), strict=True) if weight != 0]
    with np.errstate(all="ignore"):
        chain.update(row, limit, x, out, None, x0=x0, x_next=x_next, memory=used)
    return x0, x_next


def c_exp(library, x):
    y = np.empty_like(x)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, y)]
    library.exponential(pointers[0], ctypes.c_size_t(x.size), pointers[1])
    return y


def numpy_update(row, limit, x, out, z):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    with np.errstate(all="ignore"):
        chain.update(row, limit, x, out, z if row[4] != 0 else None, x0=x0, x_next=x_next)
    return x0, x_next


def assert_same_bits(a, b):
    """Equal to the last bit and the sign of zero. Any two NaN are equal: IEEE arithmetic does not fix their bits."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    real = ~np.isnan(a)
    np.testing.assert_array_equal(a[real].view(np.uint32), b[real].view(np.uint32))


DRAWS = [
    # 2²⁰ numbers in all
    (0, range(64), 999, Purpose.STEP, 4096, 0),
    (1234, [0], 0, Purpose.INITIAL, 2**18, 0),
    (2**32 + 5, [7, 2**31, 2**32 - 1], 500, Purpose.STEP, 2**16, 0),
    (2**64 - 1, range(1000, 1064), 1, Purpose.DIFFUSE, 4096, 3),
    (0x0123456789ABCDEF, [2**32 - 1], 2**32 - 1, Purpose.STEP, 2**16, 2**24 - 1),
]


def test_the_draws_are_at_least_a_million_numbers():
    assert sum(len(image) * elements for _, image, _, _, elements, _ in DRAWS) >= 2**20


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: f"seed {draw[0]:#x}")
def test_noise_has_the_same_bits(compiled, draw):
    seed, image, t, purpose, elements, repeat = draw
    expected = noise.normal(seed, image, t, purpose, elements, repeat=repeat)
    np.testing.assert_array_equal(c_normal(compiled, seed, image, t, purpose, elements, repeat), expected)


def test_purposes_have_the_same_numbers(compiled):
    numbers = (ctypes.c_int * 3)()
    compiled.purposes(numbers)
    assert list(numbers) == [Purpose.INITIAL, Purpose.STEP, Purpose.DIFFUSE]


@pytest.mark.parametrize("limit", [1.0, 0.5, 3.0, np.inf])
def test_update_has_the_same_bits(compiled, limit):
    rng = np.random.default_rng(3)
    for draw in range(50):
        row = (rng.standard_normal(5) * 10.0 ** rng.integers(-3, 3, 5)).astype(np.float32)
        if draw % 3 == 0:
            row[4] = 0
        x, out, z = (rng.standard_normal(4096).astype(np.float32) for _ in range(3))
        for a, b in zip(c_update(compiled, row, limit, x, out, z), numpy_update(row, limit, x, out, z), strict=True):
            assert_same_bits(a, b)


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.1754944e-38, 1 + 2**-23],
    np.float32,
)


@pytest.mark.parametrize("limit", [1.0, np.inf])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_update_agrees_on_infinities_and_nan(compiled, limit, sigma):
    x, out, z = (np.ascontiguousarray(a.ravel()) for a in np.meshgrid(SPECIAL, SPECIAL, SPECIAL))
    for row in ([1, -1, 1, 0, sigma], [157.4, -157.4, 1e-4, 0.99, sigma], [0, 1, 0.5, 0.5, sigma]):
        row = np.array(row, np.float32)
        for a, b in zip(c_update(compiled, row, limit, x, out, z), numpy_update(row, limit, x, out, z), strict=True):
            assert_same_bits(a, b)


def test_noise_is_not_used_where_sigma_is_zero(compiled):
    x = np.ones(8, np.float32)
    row = np.array([1, 0, 1, 0, 0], np.float32)
    _, x_next = c_update(compiled, row, 1.0, x, x, np.full_like(x, np.nan))
    np.testing.assert_array_equal(x_next, x)


EXPONENTS = np.concatenate(
    [
        np.linspace(-30, 3, 2**20, dtype=np.float32),
        np.linspace(-90, 90, 2**20, dtype=np.float32),
        np.arange(0, 2**32, 4099, dtype=np.uint32).view(np.float32),  # numbers of every size
        SPECIAL,
        np.float32([-87, 88, np.nextafter(np.float32(-87), -np.inf), np.nextafter(np.float32(88), np.inf)]),
    ]
)
EXPONENTS = EXPONENTS[~np.isnan(EXPONENTS)]


@pytest.mark.parametrize("scale", [2.0, 1.3, -0.7, 1e30])
def test_guidance_has_the_same_bits(compiled, scale):
    rng = np.random.default_rng(5)
    drawn = rng.standard_normal((2, 4096)).astype(np.float32)
    special = np.stack(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)
    with_class, without = np.ascontiguousarray(np.concatenate([drawn, special], axis=1))
    ours, theirs = np.empty_like(with_class), np.empty_like(with_class)
    with np.errstate(all="ignore"):
        combine(np.float32(scale), with_class, without, ours)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (with_class, without, theirs)]
    compiled.guide(ctypes.c_float(scale), *pointers[:2], ctypes.c_size_t(with_class.size), pointers[2])
    assert_same_bits(theirs, ours)
    broken = ~(np.isfinite(with_class) & np.isfinite(without))
    assert not np.isfinite(ours[broken]).any(), "what is not finite has to stay so"


def test_the_exponential_has_the_same_bits(compiled):
    with np.errstate(over="ignore"):
        assert_same_bits(c_exp(compiled, EXPONENTS), chain.exp(EXPONENTS))


def test_the_exponential_of_nan_does_no_harm(compiled):
    """It is computed, and not used, where the network's output is not finite."""
    c_exp(compiled, np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32))


def test_the_update_with_a_learned_sigma_has_the_same_bits(compiled):
    rng = np.random.default_rng(4)
    for draw in range(50):
        row = (rng.standard_normal(5) * 10.0 ** rng.integers(-3, 3, 5)).astype(np.float32)
        row[4] = draw % 3 != 0
        learned = np.float32([-6, 0.5] * rng.standard_normal(2))
        x, out, v, z = (rng.standard_normal(4096).astype(np.float32) for _ in range(4))
        v[:8] = [0, -0.0, 1, -1, 1e6, -1e6, 3.4e38, -3.4e38]
        arguments = (row, learned, [1.0, np.inf][draw % 2], x, out, v, z)
        for a, b in zip(c_learned(compiled, *arguments), numpy_learned(*arguments), strict=True):
            assert_same_bits(a, b)


def test_the_update_with_memory_has_the_same_bits(compiled):
    rng = np.random.default_rng(6)
    for draw in range(50):
        row = np.float32([*(rng.standard_normal(4) * 10.0 ** rng.integers(-3, 3, 4)), 0])
        memory = np.float32(rng.standard_normal(2) * 10.0 ** rng.integers(-3, 2, 2)) * [draw % 4 != 0, draw % 3 != 0]
        x, out, one_ago, two_ago = rng.standard_normal((4, 4096)).astype(np.float32)
        one_ago[: len(SPECIAL)], two_ago[-len(SPECIAL) :] = SPECIAL, SPECIAL
        arguments = (row, memory.astype(np.float32), [1.0, np.inf][draw % 2], x, out, one_ago, two_ago)
        for a, b in zip(c_recalled(compiled, *arguments), numpy_recalled(*arguments), strict=True):
            assert_same_bits(a, b)


def test_what_was_never_remembered_is_not_used(compiled):
    x = np.ones(8, np.float32)
    nan = np.full_like(x, np.nan)
    _, x_next = c_recalled(compiled, [1, 0, 1, 0, 0], [0, 0], 1.0, x, x, nan, nan)
    np.testing.assert_array_equal(x_next, x)


def test_neither_noise_nor_v_is_used_where_sigma_is_zero(compiled):
    x = np.ones(8, np.float32)
    nan = np.full_like(x, np.nan)
    row = np.array([1, 0, 1, 0, 0], np.float32)
    _, x_next = c_learned(compiled, row, [0, 0], 1.0, x, x, nan, nan)
    np.testing.assert_array_equal(x_next, x)


def test_pixels_have_the_same_numbers(compiled):
    edges = ((np.arange(-2, 259) - 128) / 127.5).astype(np.float32)
    near = np.concatenate([np.nextafter(edges, np.float32(-9)), edges, np.nextafter(edges, np.float32(9))])
    dense = np.linspace(-1.3, 1.3, 2**20 + 1, dtype=np.float32)
    x = np.concatenate([near, dense, SPECIAL, np.float32([255, 256, 1e10, -1e10])])
    u = np.empty(x.shape, np.uint8)
    compiled.pixels(x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(x.size), u.ctypes.data_as(ctypes.c_void_p))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(u, to_uint8(x))


@pytest.mark.parametrize(
    "flags", [["-O2", "-march=native", "-ffp-contract=fast"], ["-O3", "-march=native", "-ffast-math"]]
)
def test_the_comparison_notices_other_arithmetic(tmp_path, flags):
    """The control: fused or rearranged operations are the mistakes that the comparison of bits should catch."""
    library = build(tmp_path, "c", flags)
    if not library.has_fma():
        pytest.skip("not verified here: that a fused multiply-add is noticed (the processor has none)")
    drawn = c_normal(library, 0, range(64), 999, Purpose.STEP, 4096)
    expected = noise.normal(0, range(64), 999, Purpose.STEP, 4096)
    assert np.any(drawn != expected)
    np.testing.assert_allclose(drawn, expected, atol=1e-3)  # other rounding, not other numbers
    rng = np.random.default_rng(3)
    x, out, z = (rng.standard_normal(4096).astype(np.float32) for _ in range(3))
    row = np.float32([1.1, -0.3, 0.6, 0.4, 0.1])
    _, fused = c_update(library, row, 1.0, x, out, z)
    _, plain = numpy_update(row, 1.0, x, out, z)
    assert np.any(fused != plain)
    np.testing.assert_allclose(fused, plain, atol=1e-6)
    e = np.linspace(-30, 3, 4096, dtype=np.float32)
    assert np.any(c_exp(library, e) != chain.exp(e))
    if "-ffast-math" not in flags:  # which optimises the rounding to a whole number away
        np.testing.assert_allclose(c_exp(library, e), chain.exp(e), rtol=1e-5)
