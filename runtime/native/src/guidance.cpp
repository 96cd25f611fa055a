#include "guidance.hpp"

#include <algorithm>
#include <string>

#include "error.hpp"
#include "step.h"

namespace ddpmx {

namespace {

// The arrays of twice as many rows, and the network bound to them.
class GuidedBound : public Bound {
 public:
  GuidedBound(const Network &network, const Spec &spec, const Guidance &guidance, const Buffers &buffers)
      : guidance_(guidance),
        outer_(buffers),
        N_(spec.elements()),
        K_(spec.condition.value_or(0) * spec.height * spec.width) {
    const auto size = [&](const void *array, int64_t numbers) {
      return array ? static_cast<size_t>(2 * buffers.batch * numbers) : 0;
    };
    x_.resize(size(buffers.x, N_)), out_.resize(size(buffers.out, N_)), var_.resize(size(buffers.var, N_));
    x0_prev_.resize(size(buffers.x0_prev, N_)), cond_.resize(size(buffers.cond, K_));
    t_.resize(size(buffers.t, 1)), y_.resize(size(buffers.y, 1));
    const auto data = [](auto &array) { return array.empty() ? nullptr : array.data(); };
    Buffers both;
    both.batch = 2 * buffers.batch;
    both.x = data(x_), both.t = data(t_), both.out = data(out_), both.var = data(var_), both.y = data(y_);
    both.x0_prev = data(x0_prev_), both.cond = data(cond_);
    bound_ = network.bind(both);
  }

  void run() override {
    const int64_t B = outer_.batch;
    const auto twice = [B](auto &to, const auto *from, int64_t numbers) {
      if (!from) return;
      std::copy(from, from + B * numbers, to.begin());
      std::copy(from, from + B * numbers, to.begin() + B * numbers);
    };
    twice(x_, outer_.x, N_), twice(t_, outer_.t, 1), twice(x0_prev_, outer_.x0_prev, N_), twice(cond_, outer_.cond, K_);
    twice(y_, outer_.y, 1);
    std::fill(y_.begin() + static_cast<std::ptrdiff_t>(y_.size() / 2), y_.end(), guidance_.null);
    bound_->run();
    const float *with_class = out_.data(), *without = out_.data() + B * N_;
    for (int64_t k = 0; k < B * N_; ++k) outer_.out[k] = ddpmx_guide(guidance_.scale, with_class[k], without[k]);
    if (outer_.var) std::copy(var_.begin(), var_.begin() + B * N_, outer_.var);
  }

 private:
  const Guidance guidance_;
  const Buffers outer_;
  const int64_t N_, K_;
  std::vector<float> x_, out_, var_, x0_prev_, cond_;
  std::vector<int32_t> t_, y_;
  std::unique_ptr<Bound> bound_;  // destroyed first
};

}  // namespace

Ranges guided_batches(const Ranges &ranges) {
  Ranges halves;
  for (const auto &[low, high] : ranges) {
    if (low / 2 + low % 2 <= high / 2) halves.emplace_back(low / 2 + low % 2, high / 2);
  }
  if (!halves.empty()) return halves;
  std::string taken;
  for (const auto &[low, high] : ranges) {
    taken += (taken.empty() ? "" : ", ") + std::to_string(low);
    if (low != high) taken += " to " + std::to_string(high);
  }
  throw Failure(DDPMX_INPUT, "guidance runs two rows for each image, and the plan takes no even number of rows",
                "it takes " + taken, "build the plan for a larger batch");
}

std::unique_ptr<Bound> GuidedNetwork::bind(const Buffers &buffers) const {
  return std::make_unique<GuidedBound>(network_, spec_, guidance_, buffers);
}

}  // namespace ddpmx
