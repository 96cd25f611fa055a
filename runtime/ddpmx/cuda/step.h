/* The noise and the update of one reverse step, the only C version of them.
 *
 * Compiles as C99, C++ and CUDA (NVRTC included: no header is needed there). noise.py and chain.py do the same in
 * NumPy, and a test demands that every bit is equal. So: IEEE + - * sqrt alone, in this order, and no fused
 * multiply-add. A host compiler needs -ffp-contract=off; on the device the _rn intrinsics prevent it.
 */
#ifndef DDPMX_STEP_H
#define DDPMX_STEP_H

#ifdef __CUDACC__
#define DDPMX_FN static __device__ __forceinline__
#define DDPMX_MUL(a, b) __fmul_rn((a), (b))
#define DDPMX_ADD(a, b) __fadd_rn((a), (b))
#define DDPMX_SQRT(a) __fsqrt_rn(a)
typedef int ddpmx_i32;
typedef unsigned int ddpmx_u32;
typedef unsigned long long ddpmx_u64;
DDPMX_FN ddpmx_i32 ddpmx_bits(float x) { return __float_as_int(x); }
DDPMX_FN float ddpmx_float(ddpmx_i32 bits) { return __int_as_float(bits); }
DDPMX_FN ddpmx_u32 ddpmx_mulhi(ddpmx_u32 a, ddpmx_u32 b) { return __umulhi(a, b); }
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#define DDPMX_FN static inline
#define DDPMX_MUL(a, b) ((a) * (b))
#define DDPMX_ADD(a, b) ((a) + (b))
#define DDPMX_SQRT(a) sqrtf(a)
typedef int32_t ddpmx_i32;
typedef uint32_t ddpmx_u32;
typedef uint64_t ddpmx_u64;
DDPMX_FN ddpmx_i32 ddpmx_bits(float x) {
  ddpmx_i32 bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
DDPMX_FN float ddpmx_float(ddpmx_i32 bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
DDPMX_FN ddpmx_u32 ddpmx_mulhi(ddpmx_u32 a, ddpmx_u32 b) { return (ddpmx_u32)(((ddpmx_u64)a * b) >> 32); }
#endif

/* ---- noise ------------------------------------------------------------------------------------------------------ */

enum { DDPMX_PURPOSE_INITIAL = 0, DDPMX_PURPOSE_STEP = 1, DDPMX_PURPOSE_DIFFUSE = 2 };

/* Philox4x32-10: ten rounds over c[4] with the key (k0, k1), in place. */
DDPMX_FN void ddpmx_philox(ddpmx_u32 c[4], ddpmx_u32 k0, ddpmx_u32 k1) {
  for (int round = 0; round < 10; ++round) {
    const ddpmx_u32 high0 = ddpmx_mulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const ddpmx_u32 high1 = ddpmx_mulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/* -2 ln u for u = (word + 1/2) / 2^32. ln(1+f) = f - f^2/2 + f^3 P(f) on sqrt(1/2) <= 1+f < sqrt(2). */
DDPMX_FN float ddpmx_minus_two_ln(ddpmx_u32 word) {
  const float poly[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const float u = DDPMX_ADD(DDPMX_MUL((float)word, 0x1p-32f), 0x1p-33f);
  const ddpmx_i32 bits = ddpmx_bits(u);
  const ddpmx_i32 exponent = (bits - 0x3F3504F3) >> 23;
  const float f = DDPMX_ADD(ddpmx_float(bits - (ddpmx_i32)((ddpmx_u32)exponent << 23)), -1.0f);
  const float e = (float)exponent;
  const float square = DDPMX_MUL(f, f);
  float y = poly[0];
  for (int i = 1; i < 9; ++i) y = DDPMX_ADD(DDPMX_MUL(y, f), poly[i]);
  y = DDPMX_MUL(DDPMX_MUL(y, f), square);
  y = DDPMX_ADD(y, DDPMX_MUL(e, -2.12194440e-4f));
  y = DDPMX_ADD(y, -DDPMX_MUL(0.5f, square));
  return DDPMX_MUL(-2.0f, DDPMX_ADD(DDPMX_ADD(f, y), DDPMX_MUL(e, 0.693359375f)));
}

/* cos and sin of 2 pi word / 2^32. The quadrant is split off in integers, so the remainder is exact. */
DDPMX_FN void ddpmx_cos_sin(ddpmx_u32 word, float *cosine, float *sine) {
  const float sin_poly[5] = {0x1.921fb6p+0f, -0x1.4abbcep-1f, 0x1.466bbap-4f, -0x1.32ca9ep-8f, 0x1.4bc85cp-13f};
  const float cos_poly[5] = {0x1p+0f, -0x1.3bd3ccp+0f, 0x1.03c1dcp-2f, -0x1.55c57ap-6f, 0x1.d9c2e8p-11f};
  const ddpmx_u32 quadrant = (word + 0x20000000u) >> 30;
  const float x = DDPMX_MUL((float)(ddpmx_i32)(word - (quadrant << 30)), 0x1p-30f);
  const float square = DDPMX_MUL(x, x);
  float s = sin_poly[4], c = cos_poly[4];
  for (int i = 3; i >= 0; --i) {
    s = DDPMX_ADD(DDPMX_MUL(s, square), sin_poly[i]);
    c = DDPMX_ADD(DDPMX_MUL(c, square), cos_poly[i]);
  }
  s = DDPMX_MUL(s, x);
  const float turned_cos = quadrant & 1 ? s : c, turned_sin = quadrant & 1 ? c : s;
  *cosine = (quadrant + 1) & 2 ? -turned_cos : turned_cos;
  *sine = quadrant & 2 ? -turned_sin : turned_sin;
}

/* Elements 4*block .. 4*block+3 of one image's noise. */
DDPMX_FN void ddpmx_normal4(ddpmx_u64 seed, ddpmx_u32 block, ddpmx_u32 image, ddpmx_u32 t, ddpmx_u32 purpose,
                            ddpmx_u32 repeat, float z[4]) {
  ddpmx_u32 words[4];
  words[0] = block;
  words[1] = image;
  words[2] = t;
  words[3] = purpose << 24 | repeat;
  ddpmx_philox(words, (ddpmx_u32)seed, (ddpmx_u32)(seed >> 32));
  for (int pair = 0; pair < 2; ++pair) {
    const float squared = ddpmx_minus_two_ln(words[2 * pair]);
    const float radius = DDPMX_SQRT(squared > 0.0f ? squared : 0.0f);
    float cosine, sine;
    ddpmx_cos_sin(words[2 * pair + 1], &cosine, &sine);
    z[2 * pair] = DDPMX_MUL(radius, cosine);
    z[2 * pair + 1] = DDPMX_MUL(radius, sine);
  }
}

/* ---- update ----------------------------------------------------------------------------------------------------- */

/* One row of a sampler's table. x0 = clip(p x + q out);  x' = a x0 + b x + sigma z. */
typedef struct {
  float p, q, a, b, sigma;
} ddpmx_row;

/* The coefficients beside a row where the variance is learned: sigma = exp(c + d v), v the network's output var. */
typedef struct {
  float c, d;
} ddpmx_learned;

/* The coefficients beside a row where the sampler remembers: those of x0 one step ago and two steps ago. */
typedef struct {
  float c, d;
} ddpmx_memory;

/* e^x. x is clamped to -87..88, where the result is a normal number. x = k ln 2 + r, and e^x = 2^k (1 + r + r^2 P(r)).
 * For NaN the result is meaningless, but nothing is undefined behaviour. */
DDPMX_FN float ddpmx_exp(float x) {
  const float poly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
  /* adding 1.5 2^23 rounds to an integer, which is then in the lowest bits */
  const float rounded = DDPMX_ADD(DDPMX_MUL(x, 1.44269504f), 0x1.8p+23f), k = DDPMX_ADD(rounded, -0x1.8p+23f);
  float r = DDPMX_ADD(x, -DDPMX_MUL(k, 0.693359375f));
  r = DDPMX_ADD(r, -DDPMX_MUL(k, -2.12194440e-4f));
  float y = poly[0];
  for (int i = 1; i < 6; ++i) y = DDPMX_ADD(DDPMX_MUL(y, r), poly[i]);
  y = DDPMX_ADD(DDPMX_ADD(DDPMX_MUL(y, DDPMX_MUL(r, r)), r), 1.0f);
  const ddpmx_u32 power = ((ddpmx_u32)ddpmx_bits(rounded) + 127u) << 23; /* 2^k */
  return DDPMX_MUL(y, ddpmx_float((ddpmx_i32)power));
}

/* The row of one element whose sigma is learned. A sigma of 0 stays 0: that step adds no noise. */
DDPMX_FN ddpmx_row ddpmx_learn(ddpmx_row row, ddpmx_learned learned, float v) {
  if (row.sigma != 0.0f) row.sigma = ddpmx_exp(DDPMX_ADD(learned.c, DDPMX_MUL(learned.d, v)));
  return row;
}

/* Classifier-free guidance: the outputs with and without a class as one. Not finite where one of them is not. */
DDPMX_FN float ddpmx_guide(float scale, float with_class, float without) {
  return DDPMX_ADD(without, DDPMX_MUL(scale, DDPMX_ADD(with_class, -without)));
}

/* NaN passes through: whether the network's output is finite is checked before. */
DDPMX_FN float ddpmx_clip(float x, float limit) { return x > limit ? limit : (x < -limit ? -limit : x); }

/* limit: the largest |x0|, or infinity for no clipping. z is not used where sigma is 0. */
DDPMX_FN float ddpmx_update(ddpmx_row row, float limit, float x, float out, float z, float *x0) {
  *x0 = ddpmx_clip(DDPMX_ADD(DDPMX_MUL(row.p, x), DDPMX_MUL(row.q, out)), limit);
  const float mean = DDPMX_ADD(DDPMX_MUL(row.a, *x0), DDPMX_MUL(row.b, x));
  return row.sigma != 0.0f ? DDPMX_ADD(mean, DDPMX_MUL(row.sigma, z)) : mean;
}

/* What a sampler with memory adds to x': c x0' + d x0'', x0 of one and of two steps ago, each not used where its
 * coefficient is 0. */
DDPMX_FN float ddpmx_recall(ddpmx_memory memory, float x, float one_ago, float two_ago) {
  if (memory.c != 0.0f) x = DDPMX_ADD(x, DDPMX_MUL(memory.c, one_ago));
  return memory.d != 0.0f ? DDPMX_ADD(x, DDPMX_MUL(memory.d, two_ago)) : x;
}

/* [-1, 1] to 0..255: floor(127.5 x + 128), clipped. Each of the 256 levels round-trips. NaN gives 0. */
DDPMX_FN unsigned char ddpmx_uint8(float x) {
  const float scaled = DDPMX_ADD(DDPMX_MUL(x, 127.5f), 128.0f);
  return (unsigned char)(scaled >= 255.0f ? 255.0f : (scaled > 0.0f ? scaled : 0.0f));
}

#endif
