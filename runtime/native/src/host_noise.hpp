// Noise on the host, by step.h: the numbers of runtime/ddpmx/diffusion/noise.py.
#pragma once

#include <cstdint>

#include "step.h"

namespace ddpmx {

// A random condition image, with which a network is tried out; the other purposes are in step.h.
constexpr uint32_t kPurposeCondition = 3;

// N(0, 1) for one image, float [elements].
inline void normal(uint64_t seed, uint32_t image, uint32_t t, uint32_t purpose, int64_t elements, float *z) {
  int64_t at = 0;
  for (; at + 4 <= elements; at += 4) ddpmx_normal4(seed, static_cast<uint32_t>(at / 4), image, t, purpose, 0, z + at);
  if (at == elements) return;
  float last[4];
  ddpmx_normal4(seed, static_cast<uint32_t>(at / 4), image, t, purpose, 0, last);
  for (int64_t k = at; k < elements; ++k) z[k] = last[k - at];
}

}  // namespace ddpmx
