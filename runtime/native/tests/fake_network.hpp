// The network of fake_trt_module.cpp, and of the chains that the tests hold against it: no diffusion model, but every
// input makes a difference.
#pragma once

#include <cstdint>
#include <limits>

struct FakeNetwork {
  int64_t channels = 3, pixels = 20, condition = 0;  // pixels: H W
  bool self_condition = false, classes = false, learned = false;
  // What makes its answers depend on more than they should
  bool by_place = false, by_size = false, by_run = false;
  int32_t nan_at = -1;  // at this t the last number of the first image is none
};

struct FakeArrays {
  int64_t batch = 0;
  const float *x = nullptr;
  const int32_t *t = nullptr, *y = nullptr;
  const float *x0_prev = nullptr, *cond = nullptr;
  float *out = nullptr, *var = nullptr;
};

inline void fake_answer(const FakeNetwork &network, const FakeArrays &at, int64_t run = 0) {
  const int64_t elements = network.channels * network.pixels;
  for (int64_t image = 0; image < at.batch; ++image) {
    for (int64_t k = 0; k < elements; ++k) {
      const int64_t here = image * elements + k;
      float answer = 0.25f * at.x[here] + 0.01f * static_cast<float>(at.t[image]);
      if (network.classes) answer = answer + 0.05f * static_cast<float>(at.y[image]);
      if (network.self_condition) answer = answer + 0.125f * at.x0_prev[here];
      if (network.condition) {
        const int64_t told = network.condition * network.pixels;
        answer = answer + 0.5f * at.cond[image * told + k % told];
      }
      if (network.by_place) answer = answer + 0.001f * static_cast<float>(image);
      if (network.by_size) answer = answer + 0.001f * static_cast<float>(at.batch);
      if (network.by_run) answer = answer + 0.001f * static_cast<float>(run % 7);
      at.out[here] = answer;
      if (network.learned) at.var[here] = 0.75f * at.x[here] - 0.125f;
    }
  }
  if (at.t[0] == network.nan_at) at.out[elements - 1] = std::numeric_limits<float>::quiet_NaN();
}
