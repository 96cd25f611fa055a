// Runs a plan's network on host arrays: inputs are copied to the device, and outputs back. For executed_batch.
#pragma once

#include <memory>
#include <vector>

#include "host_runner.hpp"
#include "trt_engine.hpp"

namespace ddpmx::cuda {

class Trial {
 public:
  Trial(const Driver &driver, TrtEngine &engine, const Spec &spec);
  ~Trial();

  // Computes the outputs, and waits for them. Device memory is reallocated only for another number of images.
  void evaluate(Example &example);
  // The guided outputs, of twice as many rows.
  void evaluate_guided(Example &example, const Guidance &guidance);

 private:
  void prepare(int64_t batch);
  void release() noexcept;
  Address allocate(uint64_t numbers, const char *what);

  const Driver &driver_;
  TrtEngine &engine_;
  const Spec spec_;
  Handle stream_;
  std::vector<Handle> memory_;
  Addresses at_;
  std::unique_ptr<TrtContext> context_;
  int64_t batch_ = 0;
};

}  // namespace ddpmx::cuda
