// The chain on the host. See runtime/ddpmx/sampling/chain.py and HostRunner in runtime/ddpmx/sampling/runner.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "network.hpp"
#include "runner.hpp"
#include "spec.hpp"

namespace ddpmx {

// Random inputs of a network for n images, and its outputs.
struct Example {
  std::vector<float> x, x0_prev, cond, out, var;
  std::vector<int32_t> t, y;
};

// At which batch size to run n ≤ batch images, so that how images are grouped changes no bit of them: the same as
// ddpmx.sampling.chain.executed_batch.
//
// evaluate: sets `out`, and `var` if there is one, for as many images as there are in t.
uint64_t executed_batch(const Spec &spec, uint64_t n, uint64_t batch, const std::function<void(Example &)> &evaluate);

class HostRunner : public Runner {
 public:
  HostRunner(std::unique_ptr<Network> network, const Spec &spec);

  std::string description() const override { return network_->description(); }
  std::vector<std::pair<uint64_t, uint64_t>> batches() const override { return {{1, uint64_t{1} << 32}}; }
  bool on_device() const override { return false; }
  void run(const Job &job) override;

 private:
  uint64_t measured(const Network &network, uint64_t n, uint64_t batch, bool guided);

  const std::unique_ptr<Network> network_;
  const Spec spec_;
  std::mutex mutex_;
  std::map<std::tuple<uint64_t, uint64_t, bool>, uint64_t> executed_;  // (n, batch, guided); under the mutex
};

}  // namespace ddpmx
