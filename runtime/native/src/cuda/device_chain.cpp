#include "device_chain.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "step_ptx.hpp"

namespace ddpmx::cuda {

namespace {

// As many as step.cu is compiled for; each thread then takes several groups of four numbers.
constexpr int64_t kBlocksPerMultiprocessor = 4;

}  // namespace

Kernels::Kernels(const Driver &driver) : module(driver.module(step_ptx, "step.ptx")) {
  begin = driver.function(module, "ddpmx_begin");
  step = driver.function(module, "ddpmx_step");
}

Address Addresses::of(const std::string &tensor) const {
  if (tensor == "x") return x;
  if (tensor == "t") return t;
  if (tensor == "y") return y;
  if (tensor == "x0_prev") return x0_prev;
  if (tensor == "cond") return cond;
  return tensor == "var" ? var : out;
}

DeviceChain::DeviceChain(const Driver &driver, const Kernels &kernels, const Spec &spec, int64_t batch,
                         const Table &table, const std::optional<Guidance> &guidance, bool with_x0,
                         const std::string &description)
    : driver_(driver),
      kernels_(kernels),
      spec_(spec),
      table_(table),
      guidance_(guidance),
      batch_(batch),
      rows_(guidance ? 2 * batch : batch),
      elements_(spec.elements()),
      description_(description) {
  const int64_t fours_per_image = (elements_ + 3) / 4, most = (int64_t{1} << 31) - 1;
  if (batch < 1 || table.rows.empty() || elements_ < 1 || fours_per_image > most / (guidance ? 2 : 1) / batch) {
    throw Failure(DDPMX_INPUT, std::to_string(batch) + " images of " + std::to_string(spec.height) + "×" +
                                   std::to_string(spec.width) + " in " + std::to_string(table.rows.size()) +
                                   " steps cannot run as a chain on a GPU");
  }
  const int64_t blocks = (batch * fours_per_image + DDPMX_THREADS - 1) / DDPMX_THREADS;
  grid_ = static_cast<unsigned>(std::min(blocks, kBlocksPerMultiprocessor * std::max(1, driver.multiprocessors())));
  try {
    const Current current(driver_);
    allocate(with_x0);
    upload(table_);
    driver_.wait_for_stream(stream(), "preparing the chain's memory");
  } catch (...) {
    close();
    throw;
  }
}

void DeviceChain::allocate(bool with_x0) {
  const uint64_t images = static_cast<uint64_t>(rows_), size = images * static_cast<uint64_t>(elements_) * 4;
  stream_ = driver_.stream();
  pinned_ = driver_.allocate_pinned(sizeof(ddpmx_control), "the control block", &chain_.control);
  for (int64_t i = 0; i < kLookAhead; ++i) events_.push_back(driver_.event());
  at_.x = keep(size, "x");
  at_.out = keep(size, "the network's output");
  if (!table_.learned.empty()) at_.var = keep(size, "its variance");
  at_.t = keep(images * 4, "t");
  if (with_x0 || spec_.self_condition || !table_.memory.empty()) x0_ = keep(size, "x0");
  // zeros at first: a class label is an index into the network's tables
  if (spec_.self_condition) driver_.zero(at_.x0_prev = x0_, size, stream());
  if (spec_.classes) driver_.zero(at_.y = keep(images * 4, "y"), images * 4, stream());
  if (spec_.condition) {
    const uint64_t bytes = images * static_cast<uint64_t>(*spec_.condition * spec_.height * spec_.width) * 4;
    driver_.zero(at_.cond = keep(bytes, "cond"), bytes, stream());
  }
  pixels_ = keep(static_cast<uint64_t>(batch_ * elements_), "the images");
}

Address DeviceChain::keep(uint64_t size, const char *what) {
  memory_.push_back(driver_.allocate(size, what));
  return memory_.back().value();
}

void DeviceChain::upload(const Table &table) {
  const auto put = [this](const auto &array, const char *what) {
    const uint64_t size = array.size() * sizeof array[0];
    const Address at = keep(size, what);
    driver_.copy_in(at, array.data(), size, stream());
    return at;
  };
  images_.assign(static_cast<size_t>(batch_), 0);
  chain_.x = at_.x, chain_.out = at_.out, chain_.var = at_.var, chain_.t = at_.t, chain_.x0 = x0_,
  chain_.image_bytes = pixels_;
  chain_.B = static_cast<ddpmx_i32>(batch_), chain_.S = static_cast<ddpmx_i32>(table.rows.size());
  chain_.channels = static_cast<ddpmx_i32>(spec_.channels);
  chain_.pixels = static_cast<ddpmx_i32>(spec_.height * spec_.width);
  chain_.limit = spec_.clip ? static_cast<float>(*spec_.clip) : std::numeric_limits<float>::infinity();
  if (guidance_) chain_.guided = 1, chain_.guidance = guidance_->scale;
  chain_.images = keep(images_.size() * sizeof images_[0], "the images' indices");
  chain_at_ = keep(sizeof chain_, "the chain");
  chain_.rows = put(table.rows, "the table");
  chain_.timesteps = put(table.timesteps, "timesteps");
  if (!table.learned.empty()) chain_.learned = put(table.learned, "the table of variances");
  if (!table.memory.empty()) {
    const uint64_t size = static_cast<uint64_t>(batch_ * elements_) * 4;
    chain_.memory = put(table.memory, "the table of what is remembered");
    chain_.one_ago = keep(size, "the last x0");
    if (table.remembers_two()) chain_.two_ago = keep(size, "the x0 before");
  }
}

void DeviceChain::close() noexcept {
  if (lost_) {  // freeing would wait for the device, perhaps for ever
    for (std::vector<Handle> *handles : {&memory_, &events_}) {
      for (Handle &handle : *handles) handle.abandon();
    }
    for (Handle *handle : {&executable_, &graph_, &pinned_, &stream_}) handle->abandon();
    return;
  }
  if (stream_) settle();
  executable_.reset();
  graph_.reset();
  memory_.clear();
  events_.clear();
  pinned_.reset();
  stream_.reset();
}

// Waits until the device is done with the chain; before that the network's memory must not be freed.
bool DeviceChain::settle() noexcept {
  for (int tries = lost_ ? 0 : 2; tries > 0; --tries) {  // the first try may return an error of earlier work
    try {
      const Current current(driver_);
      driver_.wait_for_stream(stream(), "waiting for the GPU");
      return true;
    } catch (const Failure &) {
    }
  }
  return false;
}

bool DeviceChain::unprepare() noexcept {
  if (!settle()) return false;
  executable_.reset();
  graph_.reset();
  enqueue_ = nullptr;
  executor_.clear();
  return true;
}

// --- putting work into the stream ---

void DeviceChain::set_images(const Run &run) {
  std::copy(run.images, run.images + run.n, images_.begin());
  std::fill(images_.begin() + run.n, images_.end(), run.images[run.n - 1]);
}

// Copies the conditioning of the images, which is constant through the chain, and x.
void DeviceChain::set_inputs(const Run &run) {
  if (at_.y) fill(at_.y, run, run.y, false, 1, "y");
  if (at_.cond) fill(at_.cond, run, run.cond, run.on_device, *spec_.condition * spec_.height * spec_.width, "cond");
  if (run.x) fill(at_.x, run, run.x, run.on_device, elements_, "x");
}

// Copies n images' numbers, of four bytes each; the last image is repeated to fill the batch. Guided, the rows without a
// class get the same, and for the class the label of none.
void DeviceChain::fill(Address to, const Run &run, const void *source, bool on_device, int64_t numbers,
                       const char *what) {
  if (!source) throw Failure(DDPMX_INPUT, std::string("missing model input '") + what + "'");
  const uint64_t image = static_cast<uint64_t>(numbers) * 4;
  const auto n = static_cast<uint64_t>(run.n), all = static_cast<uint64_t>(batch_), rows = static_cast<uint64_t>(rows_);
  if (on_device) {
    const Address from = reinterpret_cast<Address>(source);
    for (uint64_t begin = 0; begin < rows; begin += all) {
      driver_.copy(to + begin * image, from, n * image, stream());
      for (uint64_t left = begin + n; left < begin + all; ++left)
        driver_.copy(to + left * image, from + (n - 1) * image, image, stream());
    }
    return;
  }
  filled_.resize(rows * image);
  std::memcpy(filled_.data(), source, n * image);
  for (uint64_t left = n; left < all; ++left) {
    std::memcpy(filled_.data() + left * image, static_cast<const char *>(source) + (n - 1) * image, image);
  }
  if (guidance_) std::memcpy(filled_.data() + all * image, filled_.data(), all * image);
  if (guidance_ && to == at_.y) {
    for (uint64_t row = all; row < rows; ++row) std::memcpy(filled_.data() + row * image, &guidance_->null, image);
  }
  driver_.copy_in(to, filled_.data(), filled_.size(), stream());
  driver_.wait_for_stream(stream(), "copying the network's inputs");
}

void DeviceChain::begin(uint64_t seed, int stop, bool given) {
  chain_.seed = seed;
  chain_.flags = given ? DDPMX_KEEP_X : 0;
  if (at_.x0_prev) driver_.zero(at_.x0_prev, static_cast<uint64_t>(rows_ * elements_) * 4, stream());
  volatile ddpmx_control &control = this->control();
  control.stop = stop, control.step = 0, control.bad_step = -1, control.done = DDPMX_RUNNING;
  driver_.copy_in(chain_.images, images_.data(), images_.size() * sizeof images_[0], stream());
  driver_.copy_in(chain_at_, &chain_, sizeof chain_, stream());
  driver_.launch(kernels_.begin, grid_, DDPMX_THREADS, stream(), chain_at_, "ddpmx_begin");
}

void DeviceChain::launch_step() {
  driver_.launch(kernels_.step, grid_, DDPMX_THREADS, stream(), chain_at_, "ddpmx_step");
}

void DeviceChain::launch_one() {
  if (executable_) {
    driver_.launch_graph(executable_, stream(), "the graph of a step");
  } else {
    enqueue_(stream());
    launch_step();
  }
}

}  // namespace ddpmx::cuda
