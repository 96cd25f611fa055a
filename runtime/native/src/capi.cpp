// The C API: no exception crosses it, and every pointer and size from the caller is checked here.

#include <cxxabi.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "ddpmx/ddpmx.h"
#include "error.hpp"
#include "pipeline.hpp"

using ddpmx::Failure;

struct ddpmx_pipeline {
  std::unique_ptr<ddpmx::Pipeline> inside;
};

namespace {

constexpr size_t kLargestStruct = 4096;  // no version of a struct will be larger

// Of a fixed size, so that reporting a lack of memory needs none; and not a string, whose memory later calls would move.
thread_local char last_error[2048];

void remember(const char *text) {
  size_t size = std::min(std::strlen(text), sizeof last_error - 1);
  if (text[size]) {
    while (size && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;  // do not cut a character
  }
  std::memcpy(last_error, text, size);
  last_error[size] = 0;
}

// Runs `action` and returns its status; what it throws becomes the text of ddpmx_last_error().
template <class Action>
__attribute__((noinline, no_sanitize("null"))) // a forced unwind carries no object to refer to; inlined, it is checked
ddpmx_status guarded(Action action) {
  try {
    action();
    return DDPMX_OK;
  } catch (const abi::__forced_unwind &) {
    throw;  // the thread is cancelled, or ended by the callback: glibc does not allow this to be caught
  } catch (const Failure &failure) {
    remember(failure.what());
    return failure.status;
  } catch (const std::bad_alloc &) {
    remember("out of memory\nHint: a smaller batch, or fewer images at once");
    return DDPMX_MEMORY;
  } catch (const std::exception &error) {
    remember(error.what());
    return DDPMX_INTERNAL;
  } catch (...) {
    remember("an exception of unknown type was thrown");
    return DDPMX_INTERNAL;
  }
}

void check_pointer(const void *pointer, const char *name) {
  if (!pointer) throw Failure(DDPMX_INPUT, std::string(name) + " is NULL");
}

// The bytes of a struct in the first version that had it: programs that were compiled with that header go on.
template <class Struct>
constexpr size_t kFirstSize = sizeof(Struct);
template <>
constexpr size_t kFirstSize<ddpmx_request> = offsetof(ddpmx_request, guidance);
template <>
constexpr size_t kFirstSize<ddpmx_model> = offsetof(ddpmx_model, null_class);

void check_size(size_t size, size_t first, size_t own, const char *name) {
  if ((size < own && size != first) || size > kLargestStruct) {
    throw Failure(DDPMX_INPUT, "no version of " + std::string(name) + " has " + std::to_string(size) + " bytes",
                  "here it has " + std::to_string(own), "use sizeof in the program; an _init function sets struct_size");
  }
}

// The caller's struct as this version knows it. A program that was compiled with a later header may have set fields that
// would be ignored here: that is an error. What an earlier header does not have is 0 here.
template <class Struct>
Struct whole(const Struct *argument, const char *name) {
  check_pointer(argument, name);
  const size_t size = argument->struct_size;
  check_size(size, kFirstSize<Struct>, sizeof(Struct), name);
  const auto *bytes = reinterpret_cast<const unsigned char *>(argument);
  if (size > sizeof(Struct) && std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte != 0; })) {
    throw Failure(DDPMX_INPUT, std::string(name) + " has fields set that this version does not know",
                  "it is libddpmx " DDPMX_VERSION_TEXT, "use a newer libddpmx");
  }
  Struct known{};
  std::memcpy(&known, bytes, std::min(size, sizeof known));
  return known;
}

// Sets the default values, and zeros in what later versions have appended.
template <class Struct>
void initialise(Struct *argument, size_t size, const Struct &defaults, const char *name) {
  check_pointer(argument, name);
  check_size(size, kFirstSize<Struct>, sizeof(Struct), name);
  std::memset(argument, 0, size);
  std::memcpy(argument, &defaults, std::min(size, sizeof defaults));
  argument->struct_size = static_cast<uint32_t>(size);
}

void copy_name(char *to, size_t size, std::string_view name) {
  std::memset(to, 0, size);
  std::memcpy(to, name.data(), std::min(size - 1, name.size()));
}

// Counts a running chain for as long as it lives.
struct Running {
  explicit Running(std::atomic<int> &count) : count(count) { ++count; }
  ~Running() { --count; }
  std::atomic<int> &count;
};

}  // namespace

extern "C" {

const char *ddpmx_status_name(ddpmx_status status) DDPMX_NOEXCEPT {
  switch (status) {
    case DDPMX_OK: return "DDPMX_OK";
    case DDPMX_INPUT: return "DDPMX_INPUT";
    case DDPMX_FILE_FORMAT: return "DDPMX_FILE_FORMAT";
    case DDPMX_SPEC: return "DDPMX_SPEC";
    case DDPMX_BACKEND: return "DDPMX_BACKEND";
    case DDPMX_PLAN_MISMATCH: return "DDPMX_PLAN_MISMATCH";
    case DDPMX_NUMERIC: return "DDPMX_NUMERIC";
    case DDPMX_CANCELLED: return "DDPMX_CANCELLED";
    case DDPMX_MEMORY: return "DDPMX_MEMORY";
    case DDPMX_BUSY: return "DDPMX_BUSY";
    case DDPMX_INTERNAL: return "DDPMX_INTERNAL";
    default: return "DDPMX_?";
  }
}

const char *ddpmx_last_error(void) DDPMX_NOEXCEPT { return last_error; }

uint32_t ddpmx_abi_version(void) DDPMX_NOEXCEPT { return DDPMX_ABI_VERSION; }

const char *ddpmx_version(void) DDPMX_NOEXCEPT { return DDPMX_VERSION_TEXT; }

ddpmx_status ddpmx_open_options_init(ddpmx_open_options *options, size_t size) DDPMX_NOEXCEPT {
  return guarded([&] { initialise(options, size, ddpmx_open_options{}, "ddpmx_open_options"); });
}

ddpmx_status ddpmx_request_init(ddpmx_request *request, size_t size) DDPMX_NOEXCEPT {
  return guarded([&] {
    ddpmx_request defaults{};
    defaults.n = 1;
    defaults.start = -1;
    initialise(request, size, defaults, "ddpmx_request");
  });
}

ddpmx_status ddpmx_open(const char *path, const ddpmx_open_options *options, ddpmx_pipeline **pipeline) DDPMX_NOEXCEPT {
  if (pipeline) *pipeline = nullptr;
  return guarded([&] {
    check_pointer(path, "path");
    if (!*path) throw Failure(DDPMX_INPUT, "path is empty");
    check_pointer(pipeline, "pipeline");
    const ddpmx_open_options checked = options ? whole(options, "ddpmx_open_options") : ddpmx_open_options{};
    auto opened = std::make_unique<ddpmx_pipeline>();
    opened->inside = ddpmx::open_pipeline(path, checked);
    *pipeline = opened.release();
  });
}

ddpmx_status ddpmx_close(ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT {
  return guarded([&] {
    if (pipeline && pipeline->inside->running != 0) {
      throw Failure(DDPMX_BUSY, "the pipeline is running a chain", "", "close it when it is done; the callback ends a chain");
    }
    delete pipeline;
  });
}

ddpmx_status ddpmx_describe(const ddpmx_pipeline *pipeline, ddpmx_model *model, size_t size) DDPMX_NOEXCEPT {
  return guarded([&] {
    check_pointer(pipeline, "pipeline");
    const ddpmx::Spec &spec = pipeline->inside->spec();
    ddpmx_model values{};
    values.channels = static_cast<int32_t>(spec.channels);
    values.height = static_cast<int32_t>(spec.height);
    values.width = static_cast<int32_t>(spec.width);
    values.timesteps = static_cast<int32_t>(spec.timesteps);
    values.classes = static_cast<int32_t>(spec.classes.value_or(0));
    values.condition = static_cast<int32_t>(spec.condition.value_or(0));
    values.self_condition = spec.self_condition;
    values.default_batch = static_cast<int32_t>(pipeline->inside->default_batch());
    values.null_class = spec.null_class;
    copy_name(values.prediction, sizeof values.prediction, name_of(spec.prediction));
    copy_name(values.variance, sizeof values.variance, name_of(spec.variance));
    copy_name(values.precision, sizeof values.precision, spec.precision);
    initialise(model, size, values, "ddpmx_model");
  });
}

const char *ddpmx_class_name(const ddpmx_pipeline *pipeline, int32_t label) DDPMX_NOEXCEPT {
  if (!pipeline) return nullptr;
  const std::vector<std::string> &names = pipeline->inside->spec().class_names;
  return label >= 0 && static_cast<size_t>(label) < names.size() ? names[static_cast<size_t>(label)].c_str() : nullptr;
}

const char *ddpmx_backend(const ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT {
  return pipeline ? pipeline->inside->description().c_str() : "";
}

ddpmx_status ddpmx_output_size(const ddpmx_pipeline *pipeline, const ddpmx_request *request,
                               uint64_t *bytes) DDPMX_NOEXCEPT {
  return guarded([&] {
    check_pointer(pipeline, "pipeline");
    check_pointer(bytes, "bytes");
    *bytes = pipeline->inside->output_size(whole(request, "ddpmx_request").n);
  });
}

ddpmx_status ddpmx_generate(ddpmx_pipeline *pipeline, const ddpmx_request *request, uint8_t *images, uint64_t images_size,
                            float *samples, uint64_t samples_size) {
  return guarded([&] {
    check_pointer(pipeline, "pipeline");
    const ddpmx_request checked = whole(request, "ddpmx_request");
    const Running here(pipeline->inside->running);
    pipeline->inside->generate(checked, images, images_size, samples, samples_size);
  });
}

}  // extern "C"
