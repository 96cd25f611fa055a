// Chains of one plan on its GPU. See runtime/ddpmx/cuda/device_runner.py.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "device_chain.hpp"
#include "driver.hpp"
#include "model_file.hpp"
#include "runner.hpp"
#include "trt_engine.hpp"

namespace ddpmx {

// A plan, ready to run. options: checked and complete; a null text means the default.
// Failure: (DDPMX_BACKEND) no GPU, no module, no TensorRT, or it fails; (DDPMX_PLAN_MISMATCH) built for another machine;
// (DDPMX_FILE_FORMAT) it does not keep the contract; (DDPMX_INPUT) no such device.
std::unique_ptr<Runner> open_plan(const std::string &path, const MappedFile &file, const PlanInfo &info,
                                  const ddpmx_open_options &options);

namespace cuda {

// Runs one chain at a time; others wait. The memory of the last chain is kept for the next one of the same kind.
class DeviceRunner : public Runner {
 public:
  // driver: started. executor: "auto", "graph" or "plain". patience: seconds after which a captured step is
  // abandoned.
  DeviceRunner(std::unique_ptr<Driver> driver, std::unique_ptr<TrtEngine> engine, const Spec &spec,
               const std::string &executor, double patience = 120);
  ~DeviceRunner() override;

  // Library, device and, once a chain has been prepared, its executor.
  std::string description() const override;
  std::vector<std::pair<uint64_t, uint64_t>> batches() const override { return engine_->batches(); }
  bool on_device() const override { return true; }
  void run(const Job &job) override;

 private:
  void run_alone_or_together(const Job &job);
  bool is_alone(const Job &job);
  int64_t batch_of(const Job &job, bool with_x0);
  uint64_t measured(uint64_t n, uint64_t batch, const std::optional<Guidance> &guidance);
  Ranges batches_of(const std::optional<Guidance> &guidance) const;
  DeviceChain &prepared(const Job &job, int64_t batch, bool with_x0);
  bool fits(const Job &job, int64_t batch, bool with_x0) const;
  void release() noexcept;

  const std::unique_ptr<Driver> driver_;
  const std::unique_ptr<TrtEngine> engine_;
  const Spec spec_;
  const std::string executor_;
  const double patience_;

  std::mutex mutex_;  // for all members below, except those with their own
  std::atomic<std::thread::id> running_{std::thread::id()};
  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<DeviceChain> chain_;
  std::unique_ptr<TrtContext> context_;  // the chain's network; destroyed before it
  Table table_;                          // of the chain
  std::optional<Guidance> guidance_;     // of the chain
  int64_t batch_ = 0;
  bool with_x0_ = false, lost_ = false;
  std::map<std::tuple<uint64_t, uint64_t, bool>, uint64_t> executed_;

  mutable std::mutex executor_mutex_;
  std::string executor_text_;  // "executor graph", for description()
};

}  // namespace cuda
}  // namespace ddpmx
