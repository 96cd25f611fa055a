// libddpmx for C++17: ddpmx.h with values, RAII and exceptions. Header-only; it needs ddpmx.h and the standard library.
//
//     ddpmx::Pipeline pipeline("model.onnx");
//     ddpmx::Request request;
//     request.n = 4;
//     std::vector<std::uint8_t> images = pipeline.generate(request); // uint8 [n, H, W, C]
//
// Errors are thrown as ddpmx::Error. An exception in a callback does not cross the C code: the chain ends, and generate
// rethrows it.
//
// Threads: several threads may call the const functions of a Pipeline at once; see ddpmx_generate for which chains run in
// parallel. Only one thread at a time may move, assign or destroy a Pipeline; it may do so while a chain runs, for example
// in its callback. That chain continues, and the model is freed after it.
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

// what() is ddpmx_last_error(): a line with the fact, then perhaps lines with "Note: …" and "Hint: …".
class Error : public std::runtime_error {
 public:
  Error(ddpmx_status status, const std::string &what) : std::runtime_error(what), status_(status) {}
  ddpmx_status status() const noexcept { return status_; }

 private:
  ddpmx_status status_;
};

// The callback cancelled the chain.
class Cancelled : public Error {
 public:
  explicit Cancelled(const std::string &what) : Error(DDPMX_CANCELLED, what) {}
};

// A non-owning view of contiguous elements: of a vector, an array, a std::span; or {pointer, size}.
template <typename T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  // Not of a temporary, which would be destroyed before it is read.
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

// As ddpmx_open_options, which documents the fields. An empty text means NULL.
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

// As ddpmx_progress. x and x0 are valid during the call.
struct Progress {
  int t = 0;
  std::uint64_t done = 0, total = 0;
  std::uint64_t first = 0, n = 0;
  Span<const float> x{}, x0{}; // empty without previews
};

// As ddpmx_request. The elements of x and cond have to live until generate returns.
struct Request {
  std::uint64_t n = 1;
  std::uint64_t seed = 0;
  std::uint64_t first = 0;
  std::uint64_t batch = 0;
  std::string sampler{}; // an empty text: the default
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
  std::function<bool(const Progress &)> callback{}; // true to continue, false to cancel; it may throw
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

// NULL for an empty text. A zero byte inside would truncate the text.
inline const char *text(const std::string &value, const char *name) {
  if (value.find('\0') != std::string::npos) throw Error(DDPMX_INPUT, std::string(name) + " holds a zero byte");
  return value.empty() ? nullptr : value.c_str();
}

template <std::size_t N>
std::string text(const char (&field)[N]) {
  const void *end = std::memchr(field, 0, N);
  return {field, end ? static_cast<std::size_t>(static_cast<const char *>(end) - field) : N};
}

inline const float *floats(Span<const float> values, std::uint64_t n, std::size_t elements, const char *name) {
  if (values.data() == nullptr) return nullptr;
  if (elements == 0 || values.size() % elements != 0 || values.size() / elements != n)
    throw Error(DDPMX_INPUT, std::string(name) + " has " + std::to_string(values.size()) + " elements, and " +
                                 std::to_string(n) + " images need " + std::to_string(elements) + " each");
  return values.data();
}

// The `user` pointer of the C callback, which calls the C++ one.
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
  } catch (const abi::__forced_unwind &) { // the thread is being ended: glibc does not allow this to be caught
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
  // Throws Error, as ddpmx_open, and if the loaded library has another ABI than this header.
  explicit Pipeline(const std::string &path, const OpenOptions &options = {}) {
    if (ddpmx_abi_version() != DDPMX_ABI_VERSION)
      throw Error(DDPMX_INPUT, "libddpmx has ABI " + std::to_string(ddpmx_abi_version()) +
                                   ", and this program was compiled for " + std::to_string(DDPMX_ABI_VERSION));
    ddpmx_open_options c_options;
    detail::check(ddpmx_open_options_init(&c_options, sizeof c_options));
    c_options.flags = options.trust_host_code ? DDPMX_TRUST_HOST_CODE : 0u;
    c_options.threads = options.threads;
    c_options.device = options.device;
    c_options.spec = detail::text(options.spec, "spec");
    c_options.ort_library = detail::text(options.ort_library, "ort_library");
    c_options.trt_module = detail::text(options.trt_module, "trt_module");
    c_options.trt_library = detail::text(options.trt_library, "trt_library");
    c_options.executor = detail::text(options.executor, "executor");
    c_options.cache = detail::text(options.cache, "cache");
    const char *name = detail::text(path, "path");
    ddpmx_pipeline *opened = nullptr;
    detail::check(ddpmx_open(name ? name : "", &c_options, &opened));
    // Every chain keeps a reference, so it is never busy here, unless handle() is used for a chain elsewhere. Then it stays
    // until the end of the process: it cannot be freed while in use, and a destructor cannot report errors.
    handle_.reset(opened, [](ddpmx_pipeline *last) { static_cast<void>(ddpmx_close(last)); });

    ddpmx_model c_model;
    detail::check(ddpmx_describe(opened, &c_model, sizeof c_model));
    model_ = {c_model.channels,
              c_model.height,
              c_model.width,
              c_model.timesteps,
              c_model.classes,
              c_model.condition,
              c_model.self_condition != 0,
              c_model.default_batch,
              detail::text(c_model.prediction),
              detail::text(c_model.variance),
              detail::text(c_model.precision)};
  }

  Pipeline(Pipeline &&) noexcept = default; // a moved-from Pipeline can only be assigned to or destroyed
  Pipeline &operator=(Pipeline &&) noexcept = default;

  const Model &model() const noexcept { return model_; }

  // The name of a class, in UTF-8; empty where the model names none, or has no such class.
  std::string class_name(std::int32_t label) const {
    const char *name = ddpmx_class_name(handle_.get(), label);
    return name ? name : "";
  }

  // The library, version and device that compute the network, for display.
  std::string backend() const { return ddpmx_backend(handle_.get()); }

  // The images, uint8 [n, H, W, C]. Throws Error, as ddpmx_generate; Cancelled; and whatever the callback throws.
  std::vector<std::uint8_t> generate(const Request &request = {}) const {
    refuse_device(request);
    std::vector<std::uint8_t> images(size_of(request));
    generate(request, images);
    return images;
  }

  // The same images before rounding, float [n, C, H, W] in [−1, 1].
  std::vector<float> samples(const Request &request = {}) const {
    refuse_device(request);
    std::vector<float> samples(size_of(request));
    generate(request, {}, samples);
    return samples;
  }

  // Generates into the caller's memory, on the GPU with Request::on_device. One of the two may be empty.
  void generate(const Request &request, Span<std::uint8_t> images, Span<float> samples = {}) const {
    const std::shared_ptr<ddpmx_pipeline> alive = handle_;
    detail::Watch watch{&request.callback, model_.elements(), nullptr};
    ddpmx_request c_request = lower(request);
    if (request.callback) {
      c_request.callback = detail::watch;
      c_request.user = &watch;
    }
    const ddpmx_status status = ddpmx_generate(alive.get(), &c_request, images.data(), images.size(), samples.data(),
                                               samples.size() * sizeof(float));
    if (watch.thrown) std::rethrow_exception(watch.thrown); // *this may be gone by now
    detail::check(status);
  }

  // For the functions of ddpmx.h. It remains owned by this object.
  ddpmx_pipeline *handle() const noexcept { return handle_.get(); }

 private:
  static void refuse_device(const Request &request) {
    if (request.on_device)
      throw Error(DDPMX_INPUT, "on_device has results on the GPU, and a vector is on the host\n"
                               "Hint: generate(request, {address, size})");
  }

  std::size_t size_of(const Request &request) const {
    const ddpmx_request c_request = lower(request);
    std::uint64_t bytes = 0;
    detail::check(ddpmx_output_size(handle_.get(), &c_request, &bytes));
    return static_cast<std::size_t>(bytes);
  }

  // The request as a C struct, without the callback.
  ddpmx_request lower(const Request &request) const {
    ddpmx_request c_request;
    detail::check(ddpmx_request_init(&c_request, sizeof c_request));
    c_request.flags = (request.previews ? DDPMX_PREVIEWS : 0u) | (request.on_device ? DDPMX_ON_DEVICE : 0u);
    c_request.n = request.n;
    c_request.seed = request.seed;
    c_request.first = request.first;
    c_request.batch = request.batch;
    c_request.sampler = detail::text(request.sampler, "sampler");
    c_request.spacing = detail::text(request.spacing, "spacing");
    c_request.variance = detail::text(request.variance, "variance");
    c_request.eta = request.eta;
    c_request.steps = request.steps;
    c_request.start = request.start;
    c_request.x = detail::floats(request.x, request.n, model_.elements(), "x");
    c_request.labels = request.labels.empty() ? nullptr : request.labels.data();
    c_request.labels_count = request.labels.size();
    const std::size_t condition = static_cast<std::size_t>(model_.condition) *
                                  static_cast<std::size_t>(model_.height) * static_cast<std::size_t>(model_.width);
    if (model_.condition == 0)
      c_request.cond = request.cond.data(); // the library refuses it
    else
      c_request.cond = detail::floats(request.cond, request.n, condition, "cond");
    c_request.stream = request.stream;
    return c_request;
  }

  std::shared_ptr<ddpmx_pipeline> handle_;
  Model model_;
};

} // namespace ddpmx

#endif
