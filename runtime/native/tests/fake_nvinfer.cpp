// A library of TensorRT's name that makes no runtime: for what the module does before it has one.
#include <NvInferRuntime.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fake_answer, fake_major;
int fake_answer = 0;  // what createInferRuntime gives
int fake_major = NV_TENSORRT_MAJOR;

EXPORT void *createInferRuntime_INTERNAL(void *logger, int32_t) noexcept {
  using nvinfer1::ILogger;
  auto &told = *static_cast<ILogger *>(logger);
  told.log(ILogger::Severity::kVERBOSE, "chatter");
  told.log(ILogger::Severity::kWARNING, "a warning");
  if (fake_answer == 0) told.log(ILogger::Severity::kERROR, "no driver");
  if (fake_answer == 0) told.log(ILogger::Severity::kERROR, "no driver");
  if (fake_answer == 0) told.log(ILogger::Severity::kINTERNAL_ERROR, "and so on");
  return reinterpret_cast<void *>(static_cast<intptr_t>(fake_answer));
}
EXPORT int32_t getInferLibMajorVersion() noexcept { return fake_major; }
EXPORT int32_t getInferLibMinorVersion() noexcept { return 9; }
EXPORT int32_t getInferLibPatchVersion() noexcept { return 8; }
EXPORT int32_t getInferLibBuildVersion() noexcept { return 7; }
