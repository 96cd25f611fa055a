#include "trial.hpp"

#include <algorithm>

namespace ddpmx::cuda {

Trial::Trial(const Driver &driver, TrtEngine &engine, const Spec &spec)
    : driver_(driver), engine_(engine), spec_(spec) {
  const Current current(driver_);
  stream_ = driver_.stream();
}

Trial::~Trial() { release(); }

Address Trial::allocate(uint64_t numbers, const char *what) {
  memory_.push_back(driver_.allocate(numbers * 4, what));
  return memory_.back().value();
}

void Trial::prepare(int64_t batch) {
  if (batch == batch_ && context_) return;
  release();
  const auto images = static_cast<uint64_t>(batch), size = images * static_cast<uint64_t>(spec_.elements());
  try {
    at_ = {};
    at_.x = allocate(size, "x");
    at_.t = allocate(images, "t");
    at_.out = allocate(size, "the network's output");
    if (spec_.learns_variance()) at_.var = allocate(size, "its variance");
    if (spec_.classes) at_.y = allocate(images, "y");
    if (spec_.self_condition) at_.x0_prev = allocate(size, "x0_prev");
    if (spec_.condition) {
      at_.cond = allocate(images * static_cast<uint64_t>(*spec_.condition * spec_.height * spec_.width), "cond");
    }
    context_ = engine_.bind(batch, at_, stream_.pointer());
  } catch (...) {
    release();
    throw;
  }
  batch_ = batch;
}

void Trial::release() noexcept {
  context_.reset();
  memory_.clear();
  batch_ = 0;
}

void Trial::evaluate(Example &example) {
  const Current current(driver_);
  const Stream stream = stream_.pointer();
  prepare(static_cast<int64_t>(example.t.size()));
  const auto in = [&](Address to, const auto &array) {
    if (to) driver_.copy_in(to, array.data(), array.size() * sizeof array[0], stream);
  };
  const auto out = [&](auto &array, Address from) {
    if (from) driver_.copy_out(array.data(), from, array.size() * sizeof array[0], stream);
  };
  try {
    in(at_.x, example.x), in(at_.t, example.t), in(at_.y, example.y);
    in(at_.x0_prev, example.x0_prev), in(at_.cond, example.cond);
    context_->enqueue(stream);
    out(example.out, at_.out), out(example.var, at_.var);
    driver_.wait_for_stream(stream, "running the network");
  } catch (...) {
    try {  // until then the copies may still use the arrays
      driver_.wait_for_stream(stream, "running the network");
    } catch (const Failure &) {
    }
    throw;
  }
}

void Trial::evaluate_guided(Example &example, const Guidance &guidance) {
  Example both = example;
  const auto append = [](auto &to, const auto &from) { to.insert(to.end(), from.begin(), from.end()); };
  append(both.x, example.x), append(both.x0_prev, example.x0_prev), append(both.cond, example.cond);
  append(both.t, example.t), append(both.out, example.out), append(both.var, example.var);
  both.y.resize(2 * example.y.size(), guidance.null);
  evaluate(both);
  const size_t half = example.out.size();
  for (size_t k = 0; k < half; ++k) example.out[k] = ddpmx_guide(guidance.scale, both.out[k], both.out[half + k]);
  std::copy_n(both.var.begin(), example.var.size(), example.var.begin());
}

}  // namespace ddpmx::cuda
