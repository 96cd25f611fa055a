// The network of fake_trt_module.cpp, and of the chains that the tests compare with it: not a diffusion model, but its
// output depends on every input.
#pragma once

#include <cstdint>
#include <limits>

struct FakeNetwork {
  int64_t channels = 3, pixels = 20, condition = 0;  // pixels: H W
  bool self_condition = false, classes = false, learned = false;
  // Its outputs depend on more than they should: on the place in the batch, its size, or the number of the run
  bool by_place = false, by_size = false, by_run = false;
  int32_t nan_at = -1;  // at this t the last number of the first image is NaN
};

struct FakeArrays {
  int64_t batch = 0;
  const float *x = nullptr;
  const int32_t *t = nullptr, *y = nullptr;
  const float *x0_prev = nullptr, *cond = nullptr;
  float *out = nullptr, *var = nullptr;
};

inline void fake_output(const FakeNetwork &network, const FakeArrays &at, int64_t run = 0) {
  const int64_t elements = network.channels * network.pixels;
  for (int64_t image = 0; image < at.batch; ++image) {
    for (int64_t k = 0; k < elements; ++k) {
      const int64_t here = image * elements + k;
      float output = 0.25f * at.x[here] + 0.01f * static_cast<float>(at.t[image]);
      if (network.classes) output = output + 0.05f * static_cast<float>(at.y[image]);
      if (network.self_condition) output = output + 0.125f * at.x0_prev[here];
      if (network.condition) {
        const int64_t size = network.condition * network.pixels;
        output = output + 0.5f * at.cond[image * size + k % size];
      }
      if (network.by_place) output = output + 0.001f * static_cast<float>(image);
      if (network.by_size) output = output + 0.001f * static_cast<float>(at.batch);
      if (network.by_run) output = output + 0.001f * static_cast<float>(run % 7);
      at.out[here] = output;
      if (network.learned) at.var[here] = 0.75f * at.x[here] - 0.125f;
    }
  }
  if (at.t[0] == network.nan_at) at.out[elements - 1] = std::numeric_limits<float>::quiet_NaN();
}
