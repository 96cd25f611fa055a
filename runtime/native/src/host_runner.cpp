#include "host_runner.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "error.hpp"
#include "host_noise.hpp"

namespace ddpmx {

namespace {

// float [size], aligned to a cache line, all 0.
class Floats {
 public:
  explicit Floats(int64_t size) : size_(static_cast<size_t>(size)) {
    data_ = static_cast<float *>(::operator new(std::max<size_t>(1, size_) * sizeof(float), std::align_val_t{64}));
    std::memset(data_, 0, size_ * sizeof(float));
  }
  ~Floats() { ::operator delete(data_, std::align_val_t{64}); }
  Floats(const Floats &) = delete;
  Floats &operator=(const Floats &) = delete;
  float *get() const { return size_ ? data_ : nullptr; }

 private:
  float *data_;
  size_t size_;
};

bool all_finite(const float *values, int64_t size) {
  bool finite = true;  // without an early return, so that it is vectorised
  for (int64_t k = 0; k < size; ++k) finite &= std::isfinite(values[k]);
  return finite;
}

// Equal numbers, or both NaN.
bool same(const float *a, const float *b, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    if (!(a[k] == b[k] || (std::isnan(a[k]) && std::isnan(b[k])))) return false;
  }
  return true;
}

// Copies n rows of `elements` numbers, and repeats the last one up to `rows`.
template <class T>
void fill_up(T *to, const T *from, int64_t n, int64_t rows, int64_t elements) {
  std::copy(from, from + n * elements, to);
  for (int64_t row = n; row < rows; ++row) std::copy(from + (n - 1) * elements, from + n * elements, to + row * elements);
}

// Each image from float [C, H, W] to uint8 [H, W, C].
void to_pixels(const float *x, int64_t n, const Spec &spec, uint8_t *to) {
  const int64_t channels = spec.channels, pixels = spec.height * spec.width;
  for (int64_t image = 0; image < n; ++image) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        to[(image * pixels + pixel) * channels + channel] = ddpmx_uint8(x[(image * channels + channel) * pixels + pixel]);
      }
    }
  }
}

// The memory of one chain. rows ≥ n images; the last of the n is repeated.
class Chain {
 public:
  Chain(const Network &network, const Spec &spec, const Job &job, uint64_t executed)
      : spec_(spec),
        job_(job),
        n_(static_cast<int64_t>(job.images.size())),
        rows_(std::max(n_, static_cast<int64_t>(executed))),
        N_(spec.elements()),
        x_(rows_ * N_),
        out_(rows_ * N_),
        x0_(rows_ * N_),
        z_(N_),
        seen_(job.previews ? n_ * N_ : 0),
        var_(job.table.learned.empty() ? 0 : rows_ * N_),
        older_(job.table.remembers_two() ? rows_ * N_ : 0),
        cond_(rows_ * spec.condition.value_or(0) * spec.height * spec.width),
        t_(static_cast<size_t>(rows_)),
        y_(spec.classes ? static_cast<size_t>(rows_) : 0) {
    Buffers all;
    all.batch = rows_;
    all.x = x_.get(), all.t = t_.data(), all.out = out_.get(), all.cond = cond_.get();
    all.x0_prev = spec.self_condition ? x0_.get() : nullptr;  // where each step leaves x0 for the next
    all.y = spec.classes ? y_.data() : nullptr;
    // a network that learns its variance has a second output, used or not
    std::optional<Floats> &unwanted = unwanted_;
    all.var = var_.get();
    if (!all.var && spec.learns_variance()) all.var = unwanted.emplace(rows_ * N_).get();
    if (static_cast<int64_t>(executed) < n_) {
      for (int64_t row = 0; row < rows_; ++row) bound_.push_back(network.bind(row_of(all, row)));
    } else {
      bound_.push_back(network.bind(all));
    }
    begin();
  }

  void run(const std::string &description) {
    const Table &table = job_.table;
    const float limit = spec_.clip ? static_cast<float>(*spec_.clip) : std::numeric_limits<float>::infinity();
    for (size_t step = 0; step < table.rows.size(); ++step) {
      std::fill(t_.begin(), t_.end(), table.timesteps[step]);
      for (const auto &bound : bound_) bound->run();
      if (!all_finite(out_.get(), rows_ * N_) || (var_.get() && !all_finite(var_.get(), rows_ * N_))) {
        throw Failure(DDPMX_NUMERIC, "the network's output at t = " + std::to_string(table.timesteps[step]) + " is not finite",
                      "step " + std::to_string(step + 1) + " of " + std::to_string(table.rows.size()) + "; " + description,
                      "if the file is fp16, try fp32: an activation may exceed 65504");
      }
      if (job_.previews) std::copy(x_.get(), x_.get() + n_ * N_, seen_.get());
      for (int64_t row = 0; row < rows_; ++row) update(step, row, limit);
      if (job_.report && !job_.report(table.timesteps[step], step + 1, seen_.get(), job_.previews ? x0_.get() : nullptr)) {
        throw Failure(DDPMX_CANCELLED, "cancelled before the chain finished",
                      "after " + std::to_string(step + 1) + " of " + std::to_string(table.rows.size()) + " steps");
      }
    }
    // The chain ends at x. At t = 0 that is x0 exactly, since there A = 1 and B = σ = 0; a table that stops short of t = 0
    // ends with the same row, so x0 is the sample there as well.
    if (job_.pixels) to_pixels(x0_.get(), n_, spec_, job_.pixels);
    if (job_.samples) std::copy(x0_.get(), x0_.get() + n_ * N_, job_.samples);
  }

 private:
  void begin() {
    images_ = job_.images;
    images_.resize(static_cast<size_t>(rows_), job_.images.back());
    if (job_.x) {
      fill_up(x_.get(), job_.x, n_, rows_, N_);
    } else {
      for (int64_t row = 0; row < rows_; ++row)
        normal(job_.seed, images_[static_cast<size_t>(row)], 0, DDPMX_PURPOSE_INITIAL, N_, x_.get() + row * N_);
    }
    if (!y_.empty()) fill_up(y_.data(), job_.y, n_, rows_, 1);
    if (spec_.condition) fill_up(cond_.get(), job_.cond, n_, rows_, *spec_.condition * spec_.height * spec_.width);
  }

  Buffers row_of(const Buffers &all, int64_t row) const {
    const auto moved = [row](auto *from, int64_t elements) { return from ? from + row * elements : from; };
    Buffers one;
    one.batch = 1;
    one.x = moved(all.x, N_), one.t = moved(all.t, 1), one.out = moved(all.out, N_), one.var = moved(all.var, N_);
    one.y = moved(all.y, 1), one.x0_prev = moved(all.x0_prev, N_);
    one.cond = moved(all.cond, spec_.condition.value_or(0) * spec_.height * spec_.width);
    return one;
  }

  // x0 = clip(p x + q out);  x' = a x0 + b x + sigma z, in place; and what the sampler remembers, x0 of earlier steps.
  void update(size_t step, int64_t image, float limit) {
    const ddpmx_row row = job_.table.rows[step];
    const int64_t at = image * N_;
    float *x = x_.get() + at, *x0 = x0_.get() + at;
    const float *out = out_.get() + at, *z = z_.get();
    if (row.sigma != 0.0f) {
      normal(job_.seed, images_[static_cast<size_t>(image)], static_cast<uint32_t>(job_.table.timesteps[step]),
             DDPMX_PURPOSE_STEP, N_, z_.get());
    }
    if (!job_.table.memory.empty()) {
      const ddpmx_memory memory = job_.table.memory[step];
      float *older = older_.get() ? older_.get() + at : nullptr;
      for (int64_t k = 0; k < N_; ++k) {
        const float before = x0[k], oldest = older ? older[k] : 0.0f;
        x[k] = ddpmx_recall(memory, ddpmx_update(row, limit, x[k], out[k], 0.0f, x0 + k), before, oldest);
        if (older) older[k] = before;
      }
      return;
    }
    if (!var_.get()) {
      for (int64_t k = 0; k < N_; ++k) x[k] = ddpmx_update(row, limit, x[k], out[k], z[k], x0 + k);
      return;
    }
    const ddpmx_learned learned = job_.table.learned[step];
    const float *v = var_.get() + at;
    for (int64_t k = 0; k < N_; ++k) {
      x[k] = ddpmx_update(ddpmx_learn(row, learned, v[k]), limit, x[k], out[k], z[k], x0 + k);
    }
  }

  const Spec &spec_;
  const Job &job_;
  const int64_t n_, rows_, N_;
  Floats x_, out_, x0_, z_, seen_, var_, older_, cond_;
  std::optional<Floats> unwanted_;
  std::vector<int32_t> t_, y_;
  std::vector<uint32_t> images_;
  std::vector<std::unique_ptr<Bound>> bound_;
};

// The inputs of the images `which` of a batch of `batch`: each has its own t and conditioning.
Example example_of(const Spec &spec, const std::vector<uint64_t> &which, uint64_t batch) {
  const int64_t N = spec.elements(), K = spec.condition.value_or(0) * spec.height * spec.width;
  const auto n = static_cast<int64_t>(which.size());
  Example example;
  example.x.resize(static_cast<size_t>(n * N));
  example.out.resize(example.x.size());
  example.cond.resize(static_cast<size_t>(n * K));
  if (spec.learns_variance()) example.var.resize(example.x.size());
  if (spec.self_condition) example.x0_prev.resize(example.x.size());
  for (int64_t row = 0; row < n; ++row) {
    const auto image = static_cast<uint32_t>(which[static_cast<size_t>(row)]);
    normal(0, image, 0, DDPMX_PURPOSE_INITIAL, N, example.x.data() + row * N);
    if (spec.self_condition) {  // another image than x, as x0 of the step before is
      float *x0 = example.x0_prev.data() + row * N;
      normal(0, static_cast<uint32_t>(batch - 1) - image, 0, DDPMX_PURPOSE_INITIAL, N, x0);
      for (int64_t k = 0; k < N; ++k) x0[k] = ddpmx_clip(x0[k], 1.0f);
    }
    if (K) {
      float *cond = example.cond.data() + row * K;
      normal(0, image, 0, kPurposeCondition, K, cond);
      for (int64_t k = 0; k < K; ++k) cond[k] = ddpmx_clip(cond[k], 1.0f);
    }
    if (spec.classes) example.y.push_back(static_cast<int32_t>(image % spec.label_count()));
    // rint rounds halves to even, as NumPy does
    const double step = static_cast<double>(spec.timesteps - 1) / static_cast<double>(batch - 1);
    example.t.push_back(image == batch - 1 ? static_cast<int32_t>(spec.timesteps - 1)
                                        : static_cast<int32_t>(std::rint(static_cast<double>(image) * step)));
  }
  return example;
}

}  // namespace

uint64_t executed_batch(const Spec &spec, uint64_t n, uint64_t batch, const std::function<void(Example &)> &evaluate) {
  if (batch == 1) return 1;
  const int64_t N = spec.elements();
  std::vector<uint64_t> images(batch);
  for (uint64_t i = 0; i < batch; ++i) images[i] = i;
  // Whether the images `which` get the outputs that they have in `whole`.
  const auto agrees = [&](const std::vector<uint64_t> &which, const Example &whole) {
    Example part = example_of(spec, which, batch);
    evaluate(part);
    for (size_t row = 0; row < which.size(); ++row) {
      const auto here = static_cast<int64_t>(row) * N, there = static_cast<int64_t>(which[row]) * N;
      if (!same(part.out.data() + here, whole.out.data() + there, N)) return false;
      if (!part.var.empty() && !same(part.var.data() + here, whole.var.data() + there, N)) return false;
    }
    return true;
  };
  Example whole = example_of(spec, images, batch);
  evaluate(whole);
  if (!agrees(images, whole)) return batch;  // every run gives other bits, and nothing helps
  std::vector<uint64_t> moved(images);
  std::rotate(moved.begin(), moved.end() - 1, moved.end());
  if (!agrees(moved, whole)) return 1;
  const std::vector<uint64_t> last(images.end() - static_cast<int64_t>(n), images.end());
  return n == batch || agrees(last, whole) ? n : batch;
}

HostRunner::HostRunner(std::unique_ptr<Network> network, const Spec &spec) : network_(std::move(network)), spec_(spec) {}

void HostRunner::run(const Job &job) {
  std::optional<GuidedNetwork> guided;
  if (job.guidance) guided.emplace(*network_, spec_, *job.guidance);
  const Network &network = guided ? static_cast<const Network &>(*guided) : *network_;
  Chain chain(network, spec_, job, measured(network, job.images.size(), job.batch, job.guidance.has_value()));
  chain.run(network_->description());
}

uint64_t HostRunner::measured(const Network &network, uint64_t n, uint64_t batch, bool guided) {
  const auto key = std::make_tuple(n, batch, guided);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = executed_.find(key); found != executed_.end()) return found->second;
  }
  // Not under the mutex: it takes as long as a few steps, and two threads that measure get the same result.
  const uint64_t executed = executed_batch(spec_, n, batch, [&network](Example &example) {
    const auto data = [](auto &array) { return array.empty() ? nullptr : array.data(); };
    Buffers buffers;
    buffers.batch = static_cast<int64_t>(example.t.size());
    buffers.x = data(example.x), buffers.t = data(example.t), buffers.out = data(example.out), buffers.var = data(example.var);
    buffers.y = data(example.y), buffers.x0_prev = data(example.x0_prev), buffers.cond = data(example.cond);
    network.bind(buffers)->run();
  });
  const std::lock_guard<std::mutex> lock(mutex_);
  return executed_.emplace(key, executed).first->second;
}

}  // namespace ddpmx
