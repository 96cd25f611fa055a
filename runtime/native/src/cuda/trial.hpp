// A plan's network on arrays of the host's: inputs are copied to the device, and the answer back. For measuring.
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

  // Fill in the answer, and wait for it. Memory on the device is taken anew only for another number of images.
  void answer(Example &example);

 private:
  void take(int64_t batch);
  void release() noexcept;
  Address room(uint64_t numbers, const char *what);

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
