// A model file, ready to run: what stands behind ddpmx_pipeline. See runtime/ddpmx/pipeline.py, whose checks these are.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "ddpmx/ddpmx.h"
#include "runner.hpp"
#include "spec.hpp"

namespace ddpmx {

// May be used by several threads.
class Pipeline {
 public:
  Pipeline(Spec spec, std::unique_ptr<Runner> runner);

  const Spec &spec() const { return spec_; }
  // What computes the network, as it was found at the beginning.
  const std::string &description() const { return description_; }
  uint64_t default_batch() const;

  // Bytes of the images of a request. Failure(DDPMX_INPUT): they would not fit into any memory.
  uint64_t output_size(uint64_t n) const;

  // See ddpmx_generate. request: whole, of this version.
  void generate(const ddpmx_request &request, uint8_t *images, uint64_t images_size, float *samples, uint64_t samples_size);

  // How many chains are under way.
  std::atomic<int> at_work{0};

 private:
  struct Numbers;
  Numbers checked(const ddpmx_request &request) const;
  Table table(const ddpmx_request &request) const;

  const Spec spec_;
  const std::unique_ptr<Runner> runner_;
  const std::string description_;
};

// What ddpmx_open opens. options: whole, of this version.
std::unique_ptr<Pipeline> open_pipeline(const std::string &path, const ddpmx_open_options &options);

}  // namespace ddpmx
