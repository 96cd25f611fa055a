// libddpmx_trt.so itself, as far as it works without a GPU: it loads without TensorRT, and reports what is wrong with a
// library.
#include <dlfcn.h>

#include <cstring>

#include "check.hpp"
#include "trt/module.h"

#ifdef TRT_MODULE

namespace {

const ddpmx_trt_module *trt;

struct Opened {
  explicit Opened(const char *path) { failed = trt->open_library(path, &library, version, message, sizeof message); }
  int32_t failed;
  ddpmx_trt_library *library = nullptr;
  char version[32] = "", message[600] = "";
};

void loading() {
  // with RTLD_NOW, which resolves every symbol: it is not linked to TensorRT
  void *const module = dlopen(TRT_MODULE, RTLD_NOW | RTLD_LOCAL);
  CHECK(module != nullptr);
  if (!module) std::fprintf(stderr, "%s\n", dlerror());
  const auto get = reinterpret_cast<ddpmx_trt_get_function>(dlsym(module, DDPMX_TRT_GET));
  CHECK(get && !get(DDPMX_TRT_ABI + 1));
  trt = get(DDPMX_TRT_ABI);
  CHECK(trt->abi == DDPMX_TRT_ABI && trt->size == sizeof *trt);
  CHECK(std::strncmp(trt->flavour, "TensorRT", 8) == 0);
  CHECK(std::strstr(trt->library, ".so.") && std::strchr(trt->compiled, '.'));
  std::printf("%s, compiled for %s %s\n", TRT_MODULE, trt->flavour, trt->compiled);
}

void libraries() {
  const Opened missing("/nowhere/libnvinfer.so.10");
  CHECK(missing.failed && !missing.library && std::strstr(missing.message, "cannot open"));
  const Opened foreign(FAKE_CUDA);
  CHECK(foreign.failed && std::strstr(foreign.message, "it has no createInferRuntime_INTERNAL"));
  void *const fake = dlopen(FAKE_NVINFER, RTLD_NOW | RTLD_LOCAL);
  int &major = *static_cast<int *>(dlsym(fake, "fake_major")),
      &runtime = *static_cast<int *>(dlsym(fake, "fake_runtime"));
  ++major;
  const Opened newer(FAKE_NVINFER);
  CHECK(newer.failed && !newer.library && std::strstr(newer.message, "and this module was compiled for "));
  --major;
  const Opened good(FAKE_NVINFER);
  CHECK(!good.failed && good.library && std::string(good.version) == std::to_string(major) + ".9.8.7");

  const auto open = [&](char *message, size_t size) {
    ddpmx_trt_engine *engine = nullptr;
    const int32_t failed = trt->open_engine(good.library, "junk", 4, 0, nullptr, 0, 0, &engine, message, size);
    CHECK(failed == 1 && !engine);
    trt->close_engine(engine);
  };
  char message[64] = "";
  open(message, sizeof message);
  CHECK(std::string(message) == "no driver; and so on");  // each error once, and no warnings
  char few[8] = "";
  open(few, sizeof few);
  CHECK(std::string(few) == "no driv");
  open(nullptr, 0);
  runtime = 0x228;  // as the lean runtime's library has returned
  open(message, sizeof message);
  CHECK(std::string(message) == "a warning");
}

}  // namespace

int main() {
  loading();
  libraries();
  trt->close_context(nullptr);
  return ddpmx_test::finish();
}

#else

int main() {
  std::printf("not verified here: libddpmx_trt itself, which is not built (TensorRT's headers were not found)\n");
  return 77;
}

#endif
