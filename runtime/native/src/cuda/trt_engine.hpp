// A plan's network by TensorRT, through libddpmx_trt.so. See runtime/ddpmx/backends/trt.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "device_chain.hpp"
#include "driver.hpp"
#include "library.hpp"
#include "model_file.hpp"
#include "trt/module.h"

namespace ddpmx::cuda {

// libddpmx_trt.so, and the TensorRT library that it opened.
class TrtModule {
 public:
  // module, library: paths from the options, or nullptr. Failure(DDPMX_BACKEND): one of them is missing or does not
  // match the plan; the note lists what was tried, and the errors.
  TrtModule(const PlanInfo &info, const char *module, const char *library);

  const ddpmx_trt_module &functions() const { return *functions_; }
  ddpmx_trt_library *library() const { return opened_; }
  const std::string &version() const { return version_; }
  std::string description() const { return std::string(functions_->flavour) + " " + version_; }

 private:
  Library module_;
  const ddpmx_trt_module *functions_ = nullptr;
  ddpmx_trt_library *opened_ = nullptr;
  std::string version_;
};

class TrtContext;

// An opened plan, whose weights are on the device. Destroy its contexts first.
class TrtEngine {
 public:
  // cache: a folder where TensorRT-RTX keeps what it compiles for this GPU, or nullptr.
  // Failure: (DDPMX_FILE_FORMAT) the plan has other inputs or outputs than its spec; (DDPMX_BACKEND) TensorRT refuses it.
  TrtEngine(const Driver &driver, TrtModule module, const std::string &path, std::string_view plan,
            const PlanInfo &info, bool trust_host_code, const char *cache);
  ~TrtEngine();  // writes the cache
  TrtEngine(const TrtEngine &) = delete;
  TrtEngine &operator=(const TrtEngine &) = delete;

  const std::string &description() const { return description_; }
  // Smallest and largest batch of each optimization profile.
  const std::vector<std::pair<uint64_t, uint64_t>> &batches() const { return batches_; }
  // The network for a batch at these addresses. stream: used only to prepare it.
  // Failure: (DDPMX_BACKEND) TensorRT fails; (DDPMX_INPUT) the plan does not take this batch.
  std::unique_ptr<TrtContext> bind(int64_t batch, const Addresses &at, Stream stream);
  // Leaves it until the end of the process, since one of its contexts could not be freed.
  void abandon() noexcept { abandoned_ = true; }

 private:
  friend class TrtContext;
  void check_name(const std::string &plan_name) const;
  void check_io();
  int32_t profile_for(int64_t batch) const;
  void save_cache() const noexcept;

  const Driver &driver_;
  const TrtModule module_;
  const std::string path_;
  const Spec spec_;
  const PlanRecord record_;
  const std::string description_;
  std::string cache_file_;  // or empty
  ddpmx_trt_engine *engine_ = nullptr;
  bool abandoned_ = false;
  std::vector<std::pair<uint64_t, uint64_t>> batches_;
};

// The network bound to a batch and to device memory. Wait for what it has enqueued before it is destroyed.
class TrtContext {
 public:
  TrtContext(TrtEngine &engine, int64_t batch, const Addresses &at, Stream stream);
  ~TrtContext();
  TrtContext(const TrtContext &) = delete;
  TrtContext &operator=(const TrtContext &) = delete;

  void enqueue(Stream stream);
  // Leaves it until the end of the process, and its engine too, which must not be destroyed before it.
  void abandon() noexcept;

 private:
  void prepare(int64_t batch, Addresses at, Stream stream);

  TrtEngine &engine_;
  ddpmx_trt_context *context_ = nullptr;
  Handle unused_;  // memory for a variance that the chain does not use
};

}  // namespace ddpmx::cuda
