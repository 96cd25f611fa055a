// A library with the name of TensorRT's that cannot create a runtime: for what the module does before it has one.
#include <NvInferRuntime.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fake_runtime, fake_major;
int fake_runtime = 0;  // what createInferRuntime returns
int fake_major = NV_TENSORRT_MAJOR;

EXPORT void *createInferRuntime_INTERNAL(void *logger, int32_t) noexcept {
  using nvinfer1::ILogger;
  auto &log = *static_cast<ILogger *>(logger);
  log.log(ILogger::Severity::kVERBOSE, "chatter");
  log.log(ILogger::Severity::kWARNING, "a warning");
  if (fake_runtime == 0) log.log(ILogger::Severity::kERROR, "no driver");
  if (fake_runtime == 0) log.log(ILogger::Severity::kERROR, "no driver");
  if (fake_runtime == 0) log.log(ILogger::Severity::kINTERNAL_ERROR, "and so on");
  return reinterpret_cast<void *>(static_cast<intptr_t>(fake_runtime));
}
EXPORT int32_t getInferLibMajorVersion() noexcept { return fake_major; }
EXPORT int32_t getInferLibMinorVersion() noexcept { return 9; }
EXPORT int32_t getInferLibPatchVersion() noexcept { return 8; }
EXPORT int32_t getInferLibBuildVersion() noexcept { return 7; }
