// libddpmx for C++17: ddpmx.h with values, owners and exceptions. Header-only; it needs ddpmx.h and the standard library.
//
//     ddpmx::Pipeline pipeline("model.onnx");
//     ddpmx::Request request;
//     request.n = 4;
//     std::vector<std::uint8_t> images = pipeline.generate(request); // uint8 [n, H, W, C]
//
// What goes wrong is a ddpmx::Error. An exception of a callback does not cross the C code: the chain ends, and generate
// throws that same exception.
//
// Threads: the const functions of a Pipeline may be called by several threads at once, see ddpmx_generate for what then
// runs side by side. Moving, assigning and destroying are for one thread, as ever; they may happen while a chain runs that
// has begun, in its callback for example. That chain goes on, and the model is freed behind it.
#ifndef DDPMX_DDPMX_HPP
#define DDPMX_DDPMX_HPP

#if __cplusplus < 201703L
#error "ddpmx.hpp needs C++17: -std=c++17, or set(CMAKE_CXX_STANDARD 17)"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include "ddpmx.h"

namespace ddpmx {

// what() is ddpmx_last_error(): a fact, and on lines of their own "Note: …" and "Hint: …" where there is more to say.
class Error : public std::runtime_error {
 public:
  Error(ddpmx_status status, const std::string &what) : std::runtime_error(what), status_(status) {}
  ddpmx_status status() const noexcept { return status_; }

 private:
  ddpmx_status status_;
};

// The callback said so.
class Cancelled : public Error {
 public:
  explicit Cancelled(const std::string &what) : Error(DDPMX_CANCELLED, what) {}
};

// Somebody's elements in a row, not owned: of a vector, an array, a std::span; or {pointer, size}.
template <typename T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  // No temporary: what it holds would be gone before it is read.
  template <typename Container, typename = std::enable_if_t<
                                    std::is_convertible_v<decltype(std::declval<Container &>().data()), T *> &&
                                    !std::is_same_v<std::remove_const_t<Container>, Span>>>
  constexpr Span(Container &container) : data_(container.data()), size_(container.size()) {}

  template <typename Container, typename = decltype(std::declval<const Container &>().data())>
  Span(const Container &&) = delete;

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t index) const { return data_[index]; }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

// As ddpmx_open_options, where each is explained. An empty text stands for NULL.
struct OpenOptions {
  bool trust_host_code = false;
  int threads = 0;
  int device = 0;
  std::string spec{};
  std::string ort_library{};
  std::string trt_module{};
  std::string trt_library{};
  std::string executor{};
  std::string cache{};
};

// As ddpmx_model.
struct Model {
  int channels = 0, height = 0, width = 0;
  int timesteps = 0;
  int classes = 0;
  int condition = 0;
  bool self_condition = false;
  int default_batch = 0;
  std::string prediction{};
  std::string variance{};
  std::string precision{};

  // N = channels·height·width.
  std::size_t elements() const noexcept {
    return static_cast<std::size_t>(channels) * static_cast<std::size_t>(height) * static_cast<std::size_t>(width);
  }
};

// As ddpmx_progress. What x and x0 show is gone after the call.
struct Progress {
  int t = 0;
  std::uint64_t done = 0, total = 0;
  std::uint64_t first = 0, n = 0;
  Span<const float> x{}, x0{}; // empty without previews
};

// As ddpmx_request. What x and cond show has to live until generate returns.
struct Request {
  std::uint64_t n = 1;
  std::uint64_t seed = 0;
  std::uint64_t first = 0;
  std::uint64_t batch = 0;
  std::string sampler{}; // an empty text: the usual
  std::string spacing{};
  std::string variance{};
  double eta = 0;
  int steps = 0;
  int start = -1;
  Span<const float> x{};
  std::vector<std::int32_t> labels{};
  Span<const float> cond{};
  bool on_device = false;
  void *stream = nullptr;
  bool previews = false;
  std::function<bool(const Progress &)> callback{}; // true to go on, false to cancel; it may throw
};

namespace detail {

[[noreturn]] inline void fail(ddpmx_status status) {
  const std::string what = ddpmx_last_error();
  if (status == DDPMX_CANCELLED) throw Cancelled(what);
  throw Error(status, what);
}

inline void check(ddpmx_status status) {
  if (status != DDPMX_OK) fail(status);
}

// NULL for what was not said. A zero byte within would cut the text short.
inline const char *text(const std::string &value, const char *name) {
  if (value.find('\0') != std::string::npos) throw Error(DDPMX_INPUT, std::string(name) + " holds a zero byte");
  return value.empty() ? nullptr : value.c_str();
}

template <std::size_t N>
std::string text(const char (&field)[N]) {
  const void *end = std::memchr(field, 0, N);
  return {field, end ? static_cast<std::size_t>(static_cast<const char *>(end) - field) : N};
}

inline const float *floats(Span<const float> given, std::uint64_t n, std::size_t elements, const char *name) {
  if (given.data() == nullptr) return nullptr;
  if (elements == 0 || given.size() % elements != 0 || given.size() / elements != n)
    throw Error(DDPMX_INPUT, std::string(name) + " has " + std::to_string(given.size()) + " elements, and " +
                                 std::to_string(n) + " images need " + std::to_string(elements) + " each");
  return given.data();
}

// What a callback of C is given, so that it can call one of C++.
struct Watch {
  const std::function<bool(const Progress &)> *callback;
  std::size_t elements;
  std::exception_ptr thrown;
};

#ifdef __GLIBCXX__
__attribute__((no_sanitize("null"))) // a forced unwind carries no object to refer to
#endif
inline std::int32_t
watch(const ddpmx_progress *now, void *user) {
  Watch &watch = *static_cast<Watch *>(user);
  try {
    const std::size_t size = static_cast<std::size_t>(now->n) * watch.elements;
    Progress progress;
    progress.t = now->t;
    progress.done = now->done;
    progress.total = now->total;
    progress.first = now->first;
    progress.n = now->n;
    if (now->x) progress.x = {now->x, size};
    if (now->x0) progress.x0 = {now->x0, size};
    return (*watch.callback)(progress) ? 0 : 1;
#ifdef __GLIBCXX__
  } catch (const abi::__forced_unwind &) { // the thread is being ended, which glibc allows nobody to stop
    throw;
#endif
  } catch (...) {
    watch.thrown = std::current_exception();
    return 1;
  }
}

} // namespace detail

// A model file, ready to run.
class Pipeline {
 public:
  // Throws Error, as ddpmx_open, and if the library that was loaded is not the one that this was compiled for.
  explicit Pipeline(const std::string &path, const OpenOptions &options = {}) {
    if (ddpmx_abi_version() != DDPMX_ABI_VERSION)
      throw Error(DDPMX_INPUT, "libddpmx has ABI " + std::to_string(ddpmx_abi_version()) +
                                   ", and this program was compiled for " + std::to_string(DDPMX_ABI_VERSION));
    ddpmx_open_options given;
    detail::check(ddpmx_open_options_init(&given, sizeof given));
    given.flags = options.trust_host_code ? DDPMX_TRUST_HOST_CODE : 0u;
    given.threads = options.threads;
    given.device = options.device;
    given.spec = detail::text(options.spec, "spec");
    given.ort_library = detail::text(options.ort_library, "ort_library");
    given.trt_module = detail::text(options.trt_module, "trt_module");
    given.trt_library = detail::text(options.trt_library, "trt_library");
    given.executor = detail::text(options.executor, "executor");
    given.cache = detail::text(options.cache, "cache");
    const char *name = detail::text(path, "path");
    ddpmx_pipeline *opened = nullptr;
    detail::check(ddpmx_open(name ? name : "", &given, &opened));
    // Every chain holds on to it, so it is never busy here, unless somebody else uses handle() for a chain. Then it is left
    // to the end of the process: what is in use cannot be freed, and a destructor has no one to tell.
    handle_.reset(opened, [](ddpmx_pipeline *last) { static_cast<void>(ddpmx_close(last)); });

    ddpmx_model told;
    detail::check(ddpmx_describe(opened, &told, sizeof told));
    model_ = {told.channels,
              told.height,
              told.width,
              told.timesteps,
              told.classes,
              told.condition,
              told.self_condition != 0,
              told.default_batch,
              detail::text(told.prediction),
              detail::text(told.variance),
              detail::text(told.precision)};
  }

  Pipeline(Pipeline &&) noexcept = default; // the one that was moved from can only be assigned to or destroyed
  Pipeline &operator=(Pipeline &&) noexcept = default;

  const Model &model() const noexcept { return model_; }

  // What really computes the network, for people.
  std::string backend() const { return ddpmx_backend(handle_.get()); }

  // The images, uint8 [n, H, W, C]. Throws Error, as ddpmx_generate; Cancelled; and whatever the callback throws.
  std::vector<std::uint8_t> generate(const Request &request = {}) const {
    refuse_device(request);
    std::vector<std::uint8_t> images(size_of(request));
    generate(request, images);
    return images;
  }

  // The same images before they are rounded, float [n, C, H, W] in [−1, 1].
  std::vector<float> samples(const Request &request = {}) const {
    refuse_device(request);
    std::vector<float> samples(size_of(request));
    generate(request, {}, samples);
    return samples;
  }

  // Into the caller's memory, on the GPU with Request::on_device. One of the two may be empty.
  void generate(const Request &request, Span<std::uint8_t> images, Span<float> samples = {}) const {
    const std::shared_ptr<ddpmx_pipeline> alive = handle_;
    detail::Watch watch{&request.callback, model_.elements(), nullptr};
    ddpmx_request given = lower(request);
    if (request.callback) {
      given.callback = detail::watch;
      given.user = &watch;
    }
    const ddpmx_status status = ddpmx_generate(alive.get(), &given, images.data(), images.size(), samples.data(),
                                               samples.size() * sizeof(float));
    if (watch.thrown) std::rethrow_exception(watch.thrown); // *this may be gone by now
    detail::check(status);
  }

  // For the functions of ddpmx.h. It stays this object's.
  ddpmx_pipeline *handle() const noexcept { return handle_.get(); }

 private:
  static void refuse_device(const Request &request) {
    if (request.on_device)
      throw Error(DDPMX_INPUT, "on_device has results on the GPU, and a vector is on the host\n"
                               "Hint: generate(request, {address, size})");
  }

  std::size_t size_of(const Request &request) const {
    const ddpmx_request given = lower(request);
    std::uint64_t bytes = 0;
    detail::check(ddpmx_output_size(handle_.get(), &given, &bytes));
    return static_cast<std::size_t>(bytes);
  }

  // As C has it, without the callback.
  ddpmx_request lower(const Request &request) const {
    ddpmx_request given;
    detail::check(ddpmx_request_init(&given, sizeof given));
    given.flags = (request.previews ? DDPMX_PREVIEWS : 0u) | (request.on_device ? DDPMX_ON_DEVICE : 0u);
    given.n = request.n;
    given.seed = request.seed;
    given.first = request.first;
    given.batch = request.batch;
    given.sampler = detail::text(request.sampler, "sampler");
    given.spacing = detail::text(request.spacing, "spacing");
    given.variance = detail::text(request.variance, "variance");
    given.eta = request.eta;
    given.steps = request.steps;
    given.start = request.start;
    given.x = detail::floats(request.x, request.n, model_.elements(), "x");
    given.labels = request.labels.empty() ? nullptr : request.labels.data();
    given.labels_count = request.labels.size();
    const std::size_t condition = static_cast<std::size_t>(model_.condition) *
                                  static_cast<std::size_t>(model_.height) * static_cast<std::size_t>(model_.width);
    if (model_.condition == 0)
      given.cond = request.cond.data(); // the library refuses it
    else
      given.cond = detail::floats(request.cond, request.n, condition, "cond");
    given.stream = request.stream;
    return given;
  }

  std::shared_ptr<ddpmx_pipeline> handle_;
  Model model_;
};

} // namespace ddpmx

#endif
