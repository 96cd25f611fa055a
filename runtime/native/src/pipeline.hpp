// A model file, ready to run: the inside of ddpmx_pipeline. It makes the checks of runtime/ddpmx/pipeline.py.
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
  // The library and device that compute the network, as they were when the file was opened.
  const std::string &description() const { return description_; }
  uint64_t default_batch() const;

  // Bytes of the images of a request. Failure(DDPMX_INPUT): too many for any memory.
  uint64_t output_size(uint64_t n) const;

  // See ddpmx_generate. request: whole, of this version.
  void generate(const ddpmx_request &request, uint8_t *images, uint64_t images_size, float *samples, uint64_t samples_size);

  // The number of chains that are running.
  std::atomic<int> running{0};

 private:
  struct Numbers;
  Numbers checked(const ddpmx_request &request, bool guided) const;
  uint64_t usual_batch(const Ranges &ranges) const;
  Table table(const ddpmx_request &request) const;

  const Spec spec_;
  const std::unique_ptr<Runner> runner_;
  const std::string description_;
};

// What ddpmx_open opens. options: whole, of this version.
std::unique_ptr<Pipeline> open_pipeline(const std::string &path, const ddpmx_open_options &options);

}  // namespace ddpmx
