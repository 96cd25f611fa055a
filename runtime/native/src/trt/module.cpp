// TensorRT or TensorRT-RTX behind the C functions of module.h: the only file that includes TensorRT's headers, and one
// source for TensorRT 10.3 and later. See runtime/ddpmx/backends/trt.py and runtime/ddpmx/trt/library.py.
#include "trt/module.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

// TensorRT-RTX's headers define this, and count its versions from 1
#ifdef TRT_MAJOR_RTX
#define DDPMX_TRT_FLAVOUR "TensorRT-RTX"
#define DDPMX_TRT_LIBRARY "libtensorrt_rtx.so."
#else
#define DDPMX_TRT_FLAVOUR "TensorRT"
#define DDPMX_TRT_LIBRARY "libnvinfer.so."
#endif
#define DDPMX_TEXT_OF(number) #number
#define DDPMX_TEXT(number) DDPMX_TEXT_OF(number)

namespace {

using Severity = nvinfer1::ILogger::Severity;

// Keeps the last lines instead of printing them.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const *text) noexcept override {
    if (severity > Severity::kWARNING || !text) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (lines_.size() == kRemembered) lines_.pop_front();
      lines_.emplace_back(severity, text);
    } catch (const std::exception &) {  // out of memory: only a message is lost
    }
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    lines_.clear();
  }

  // The messages about the last failure; they are then cleared.
  std::string take_messages() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool errors =
        std::any_of(lines_.begin(), lines_.end(), [](const auto &line) { return is_error(line.first); });
    const size_t first = errors || lines_.size() < 3 ? 0 : lines_.size() - 3;  // the last three warnings
    std::string all;
    for (size_t i = first; i < lines_.size(); ++i) {
      const auto &[severity, text] = lines_[i];
      if (errors && !is_error(severity)) continue;
      if (i > first && lines_[i - 1].second == text) continue;
      all += (all.empty() ? "" : "; ") + text;
    }
    lines_.clear();
    if (all.size() > kMost) all = all.substr(0, kMost / 2) + " ... " + all.substr(all.size() - kMost / 2);
    return all;
  }

 private:
  static bool is_error(Severity severity) { return severity <= Severity::kERROR; }

  static constexpr size_t kRemembered = 200, kMost = 600;
  std::mutex mutex_;
  std::deque<std::pair<Severity, std::string>> lines_;
};

// TensorRT takes one logger per process and keeps it; a second one is ignored. So there is one, never destroyed.
Logger &logger() {
  static Logger *const one = new Logger;
  return *one;
}

void write_error(char *error, size_t size, const std::string &text) {
  if (!error || size == 0) return;
  const size_t count = std::min(size - 1, text.size());
  std::memcpy(error, text.data(), count);
  error[count] = '\0';
}

// 0 if work() returns true; else 1, and TensorRT's messages in `error`.
template <class Work>
int32_t attempt(char *error, size_t size, Work work) noexcept {
  try {
    logger().clear();
    if (work()) return 0;
    write_error(error, size, logger().take_messages());
  } catch (const std::exception &failure) {
    write_error(error, size, failure.what());
  }
  return 1;
}

constexpr const char *kCreate = "createInferRuntime_INTERNAL";
using CreateRuntime = void *(*)(void *logger, int32_t version) noexcept;

}  // namespace

struct ddpmx_trt_engine {
  // TensorRT requires that they are destroyed from the last to the first
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config;
  std::unique_ptr<nvinfer1::IRuntimeCache> cache;
#endif
};

struct ddpmx_trt_context {
  std::unique_ptr<nvinfer1::IExecutionContext> context;
#ifdef TRT_MAJOR_RTX
  bool general = true;  // it compiles kernels for this batch at the first run, and promises them only from the next one on
#endif
};

namespace {

// A ddpmx_trt_library is the handle of dlopen.
int32_t open_library(const char *path, ddpmx_trt_library **library, char *version, char *error, size_t size) noexcept
    try {
  *library = nullptr;
  const char *const name = path ? path : DDPMX_TRT_LIBRARY DDPMX_TEXT(NV_TENSORRT_MAJOR);
  // Never unloaded: TensorRT keeps threads, and the logger
  void *const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!handle) {
    const char *const why = dlerror();
    write_error(error, size, why ? why : name);
    return 1;
  }
  const void *const create = dlsym(handle, kCreate);
  int32_t numbers[4] = {};
  const char *const parts[] = {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion",
                               "getInferLibBuildVersion"};
  for (int i = 0; i < 4; ++i) {
    const auto part = reinterpret_cast<int32_t (*)()>(dlsym(handle, parts[i]));
    if (!part || !create) {
      write_error(error, size, std::string(name) + " is not " DDPMX_TRT_FLAVOUR ": it has no " + (create ? parts[i] : kCreate));
      return 1;
    }
    numbers[i] = part();
  }
  std::snprintf(version, 32, "%d.%d.%d.%d", numbers[0], numbers[1], numbers[2], numbers[3]);
  if (numbers[0] != NV_TENSORRT_MAJOR) {  // its classes have another layout
    write_error(error, size,
        std::string(name) + " is " DDPMX_TRT_FLAVOUR " " + version +
            ", and this module was compiled for " DDPMX_TEXT(NV_TENSORRT_MAJOR) ".x");
    return 1;
  }
  *library = static_cast<ddpmx_trt_library *>(handle);
  return 0;
} catch (const std::exception &failure) {
  write_error(error, size, failure.what());
  return 1;
}

#ifdef TRT_MAJOR_RTX
// TensorRT-RTX compiles kernels when it runs. Its own CUDA graphs would conflict with ours, and unless it specialises
// kernels eagerly it would begin with generic kernels for any shape, which our graph would then contain for good.
bool configure(ddpmx_trt_engine &made, const void *cache, size_t cache_size, bool keep_cache) {
  made.config.reset(made.engine->createRuntimeConfig());
  if (!made.config || !made.config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED)) return false;
  made.config->setDynamicShapesKernelSpecializationStrategy(
      nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  if (!keep_cache) return true;
  made.cache.reset(made.config->createRuntimeCache());
  if (!made.cache) return false;
  // false for one of another version or GPU: then the cache starts empty
  if (cache_size) static_cast<void>(made.cache->deserialize(cache, cache_size));
  if (!made.config->setRuntimeCache(*made.cache)) made.cache.reset();
  logger().clear();  // messages about an old cache do not explain a later failure
  return true;
}
#endif

int32_t open_engine(ddpmx_trt_library *library, const void *plan, size_t plan_size, int32_t trust_host_code,
                    const void *cache, size_t cache_size, int32_t keep_cache, ddpmx_trt_engine **engine, char *error,
                    size_t size) noexcept {
  *engine = nullptr;
  return attempt(error, size, [&] {
    auto made = std::make_unique<ddpmx_trt_engine>();
    const auto create = reinterpret_cast<CreateRuntime>(dlsym(library, kCreate));
    void *const runtime = create(&logger(), NV_TENSORRT_VERSION);
    // the lean runtime's library has been observed to return an address close to 0 when it fails
    if (reinterpret_cast<uintptr_t>(runtime) < 65536) return false;
    made->runtime.reset(static_cast<nvinfer1::IRuntime *>(runtime));
    made->runtime->setEngineHostCodeAllowed(trust_host_code != 0);
    made->engine.reset(made->runtime->deserializeCudaEngine(plan, plan_size));
    if (!made->engine) return false;
#ifdef TRT_MAJOR_RTX
    if (!configure(*made, cache, cache_size, keep_cache != 0)) return false;
#else
    static_cast<void>(cache), static_cast<void>(cache_size), static_cast<void>(keep_cache);
#endif
    *engine = made.release();
    return true;
  });
}

void close_engine(ddpmx_trt_engine *engine) noexcept {
  if (!engine) return;
#ifdef TRT_MAJOR_RTX
  engine->cache.reset();
  engine->config.reset();
#endif
  engine->engine.reset();
  engine->runtime.reset();
  delete engine;
}

const char *name(const ddpmx_trt_engine *engine) noexcept { return engine->engine->getName(); }

int32_t tensors(const ddpmx_trt_engine *engine) noexcept { return engine->engine->getNbIOTensors(); }

int32_t tensor(const ddpmx_trt_engine *engine, int32_t index, ddpmx_trt_tensor *tensor) noexcept {
  *tensor = {};
  const nvinfer1::ICudaEngine &cuda_engine = *engine->engine;
  tensor->name = cuda_engine.getIOTensorName(index);
  if (!tensor->name) return 1;
  tensor->is_input = cuda_engine.getTensorIOMode(tensor->name) == nvinfer1::TensorIOMode::kINPUT;
  const nvinfer1::DataType type = cuda_engine.getTensorDataType(tensor->name);
  tensor->type = type == nvinfer1::DataType::kFLOAT   ? DDPMX_TRT_FLOAT
                 : type == nvinfer1::DataType::kINT32 ? DDPMX_TRT_INT32
                                                      : DDPMX_TRT_OTHER;
  tensor->on_device = cuda_engine.getTensorLocation(tensor->name) == nvinfer1::TensorLocation::kDEVICE;
  const nvinfer1::Dims dims = cuda_engine.getTensorShape(tensor->name);
  if (dims.nbDims < 0 || dims.nbDims > DDPMX_TRT_MAX_RANK) return 1;
  tensor->rank = dims.nbDims;
  std::copy(dims.d, dims.d + dims.nbDims, tensor->dims);
  return 0;
}

int32_t profiles(const ddpmx_trt_engine *engine) noexcept { return engine->engine->getNbOptimizationProfiles(); }

int32_t batches(const ddpmx_trt_engine *engine, int32_t profile, const char *input, int64_t *low,
                int64_t *high) noexcept {
  const auto first = [&](nvinfer1::OptProfileSelector which) -> int64_t {
    const nvinfer1::Dims dims = engine->engine->getProfileShape(input, profile, which);
    return dims.nbDims < 1 ? -1 : dims.d[0];
  };
  *low = first(nvinfer1::OptProfileSelector::kMIN), *high = first(nvinfer1::OptProfileSelector::kMAX);
  return *low < 1 || *high < *low;
}

void save_cache(const ddpmx_trt_engine *engine, void (*take)(const void *, size_t, void *), void *user) noexcept {
#ifdef TRT_MAJOR_RTX
  if (!engine->cache) return;
  const std::unique_ptr<nvinfer1::IHostMemory> data(engine->cache->serialize());
  if (data && data->size()) take(data->data(), data->size(), user);
#else
  static_cast<void>(engine), static_cast<void>(take), static_cast<void>(user);
#endif
}

int32_t open_context(ddpmx_trt_engine *engine, int32_t profile, void *stream, ddpmx_trt_context **context, char *error,
                     size_t size) noexcept {
  *context = nullptr;
  return attempt(error, size, [&] {
    auto made = std::make_unique<ddpmx_trt_context>();
#ifdef TRT_MAJOR_RTX
    made->context.reset(engine->engine->createExecutionContext(engine->config.get()));
#else
    made->context.reset(engine->engine->createExecutionContext());
#endif
    if (!made->context) return false;
    if (!made->context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream))) return false;
    *context = made.release();
    return true;
  });
}

void close_context(ddpmx_trt_context *context) noexcept { delete context; }

int32_t bind(ddpmx_trt_context *context, const char *tensor, const int64_t *dims, int32_t rank, uint64_t address,
             char *error, size_t size) noexcept {
  return attempt(error, size, [&] {
    if (rank > 0) {
      nvinfer1::Dims shape = {};
      if (rank > DDPMX_TRT_MAX_RANK) return false;
      shape.nbDims = rank;
      std::copy(dims, dims + rank, shape.d);
      if (!context->context->setInputShape(tensor, shape)) return false;
    }
    return context->context->setTensorAddress(tensor, reinterpret_cast<void *>(address));
  });
}

int32_t check(ddpmx_trt_context *context, char *error, size_t size) noexcept {
  const char *unknown[1] = {};
  const int32_t failed = attempt(error, size, [&] { return context->context->inferShapes(1, unknown) == 0; });
  if (failed && error && size && !*error && unknown[0]) write_error(error, size, std::string("the shape of ") + unknown[0]);
  return failed;
}

int32_t enqueue(ddpmx_trt_context *context, void *stream, char *error, size_t size) noexcept {
  return attempt(error, size, [&] {
#ifdef TRT_MAJOR_RTX
    if (context->general) {
      context->general = false;
      if (!context->context->enqueueV3(static_cast<cudaStream_t>(stream))) return false;
    }
#endif
    return context->context->enqueueV3(static_cast<cudaStream_t>(stream));
  });
}

const ddpmx_trt_module functions = {
    DDPMX_TRT_ABI,
    sizeof(ddpmx_trt_module),
    DDPMX_TRT_FLAVOUR,
    DDPMX_TEXT(NV_TENSORRT_MAJOR) "." DDPMX_TEXT(NV_TENSORRT_MINOR) "." DDPMX_TEXT(NV_TENSORRT_PATCH) "." DDPMX_TEXT(
        NV_TENSORRT_BUILD),
    DDPMX_TRT_LIBRARY DDPMX_TEXT(NV_TENSORRT_MAJOR),
    open_library,
    open_engine,
    close_engine,
    name,
    tensors,
    tensor,
    profiles,
    batches,
    save_cache,
    open_context,
    close_context,
    bind,
    check,
    enqueue,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const ddpmx_trt_module *ddpmx_trt_get(uint32_t abi) {
  return abi == DDPMX_TRT_ABI ? &functions : nullptr;
}
