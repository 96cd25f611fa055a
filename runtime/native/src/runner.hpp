// The interface that runs the chain of one batch, on the host (host_runner.cpp) or on a GPU (cuda/device_runner.cpp). See
// runtime/ddpmx/sampling/runner.py.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "guidance.hpp"
#include "samplers.hpp"

namespace ddpmx {

// Called after a step with t, the steps done in this chain, and with previews x_t and x0, float [n, C, H, W] (else
// nullptr). False ends the chain.
using Report = std::function<bool(int32_t t, uint64_t done, const float *x, const float *x0)>;

// One chain. All arrays belong to the caller and outlive the call.
struct Job {
  const Table &table;
  uint64_t seed;
  std::vector<uint32_t> images;  // [n], the index of each
  uint64_t batch;                // batch size of the network where its outputs depend on it; n or more
  const float *x = nullptr;      // [n, C, H, W], the state to begin with, or nullptr for noise
  const int32_t *y = nullptr;    // [n], on the host, for models with classes
  const float *cond = nullptr;   // [n, K, H, W], for models with a condition
  std::optional<Guidance> guidance = {};  // of a guided chain
  uint8_t *pixels = nullptr;     // [n, H, W, C], or nullptr
  float *samples = nullptr;      // [n, C, H, W], or nullptr
  bool on_device = false;        // x, cond, pixels and samples are addresses on the GPU
  bool previews = false;         // report wants x and x0
  void *after = nullptr;         // a stream whose work has to finish before the caller's arrays are read or written
  Report report = {};            // or empty
};

class Runner {
 public:
  virtual ~Runner() = default;
  // The library and device that compute, for display.
  virtual std::string description() const = 0;
  // The smallest and the largest batch of each range that the network takes.
  virtual std::vector<std::pair<uint64_t, uint64_t>> batches() const = 0;
  // Whether Job::on_device is possible.
  virtual bool on_device() const = 0;
  // Runs a chain to its end. An image does not depend on the others in the batch. May be called by several threads.
  // Failures: DDPMX_NUMERIC, DDPMX_CANCELLED, DDPMX_BACKEND.
  virtual void run(const Job &job) = 0;
};

}  // namespace ddpmx
