// A fake ONNX Runtime: a library with the few functions that ort.cpp calls, and a network that is a formula. It can be
// compiled with any sanitizer and for any processor. The name of the model file selects a fault:
//
//   fail-open  creating the session fails      fail-run  the third run fails
//   nan        the third output holds a NaN    var-nan   the third variance does
//   place      an image's output depends on its place in the batch
//   size       … on the size of the batch      flaky     … on the number of the run
//
// Its memory is from malloc, since tests let operator new fail.
// out = 0.3 x + t/1024 + 0.1 (y − 1) + 0.25 x0_prev − 0.2 (the last channel of cond),  var = 0.5 x
#include <onnxruntime_c_api.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Malloced {
  static void *operator new(size_t size) { return std::malloc(size); }
  static void operator delete(void *object) { std::free(object); }
};
struct OrtStatus : Malloced {
  char text[160] = "";
};
struct OrtEnv : Malloced {};
struct OrtSessionOptions : Malloced {
  int threads = 0;
  bool is_onnx = false;
};
struct OrtMemoryInfo : Malloced {};
struct OrtSession : Malloced {
  char name[256] = "";
  std::atomic<int> runs{0};
  bool is(const char *kind) const { return std::strstr(name, kind) != nullptr; }
};
struct OrtValue : Malloced {
  float *data = nullptr;
  int64_t dims[8] = {};
  size_t rank = 0;
  bool is_int = false;
};

namespace {

std::atomic<int> live{0};

template <class T>
T *made(T *object) {
  ++live;
  return object;
}

template <class T>
void ORT_API_CALL release(T *object) {
  if (object) --live;
  delete object;
}

OrtStatus *error(const char *text, int number = 0) {
  OrtStatus *status = made(new OrtStatus);
  std::snprintf(status->text, sizeof status->text, text, number);
  return status;
}

const char *ORT_API_CALL message(const OrtStatus *status) noexcept { return status->text; }

OrtStatus *ORT_API_CALL create_env(OrtLoggingLevel, const char *, OrtEnv **out) noexcept {
  *out = made(new OrtEnv);
  return nullptr;
}

OrtStatus *ORT_API_CALL create_options(OrtSessionOptions **out) noexcept {
  *out = made(new OrtSessionOptions);
  return nullptr;
}

OrtStatus *ORT_API_CALL set_threads(OrtSessionOptions *options, int threads) noexcept {
  options->threads = threads;
  return nullptr;
}

OrtStatus *ORT_API_CALL set_severity(OrtSessionOptions *, int) noexcept { return nullptr; }

OrtStatus *ORT_API_CALL configure(OrtSessionOptions *options, const char *key, const char *value) noexcept {
  options->is_onnx = !std::strcmp(key, "session.load_model_format") && !std::strcmp(value, "ONNX");
  return nullptr;
}

OrtStatus *ORT_API_CALL create_memory(OrtAllocatorType, OrtMemType, OrtMemoryInfo **out) noexcept {
  *out = made(new OrtMemoryInfo);
  return nullptr;
}

OrtStatus *ORT_API_CALL create_session(const OrtEnv *, const ORTCHAR_T *path, const OrtSessionOptions *options,
                                       OrtSession **out) noexcept {
  if (!options->is_onnx) return error("the file's name decides its format");
  auto *session = new OrtSession;
  const char *slash = std::strrchr(path, '/');
  std::snprintf(session->name, sizeof session->name, "%s", slash ? slash + 1 : path);
  if (session->is("fail-open")) {
    delete session;
    return error("this session is set to fail, with %d threads", options->threads);
  }
  *out = made(session);
  return nullptr;
}

OrtStatus *ORT_API_CALL create_tensor(const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *dims, size_t rank,
                                      ONNXTensorElementDataType type, OrtValue **out) noexcept {
  size_t size = 4;
  for (size_t axis = 0; axis < rank; ++axis) size *= static_cast<size_t>(dims[axis]);
  const bool is_int = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  if (!data || rank > 8 || size != bytes || !(is_int || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)) {
    return error("no such tensor");
  }
  OrtValue *value = made(new OrtValue);
  value->data = static_cast<float *>(data), value->rank = rank, value->is_int = is_int;
  std::memcpy(value->dims, dims, rank * sizeof *dims);
  *out = value;
  return nullptr;
}

OrtStatus *ORT_API_CALL run(OrtSession *session, const OrtRunOptions *, const char *const *input_names,
                            const OrtValue *const *inputs, size_t inputs_count, const char *const *,
                            size_t outputs_count, OrtValue **outputs) noexcept {
  const int count = ++session->runs;
  if (session->is("fail-run") && count == 3) return error("this run is set to fail");
  const auto input = [&](const char *name) -> const OrtValue * {
    for (size_t i = 0; i < inputs_count; ++i)
      if (!std::strcmp(input_names[i], name)) return inputs[i];
    return nullptr;
  };
  const OrtValue *x = input("x"), *t = input("t"), *y = input("y"), *x0 = input("x0_prev"), *cond = input("cond");
  if (!x || !t || !t->is_int || x->rank != 4 || outputs_count < 1) return error("inputs are missing");
  const int64_t batch = x->dims[0], N = x->dims[1] * x->dims[2] * x->dims[3], pixels = x->dims[2] * x->dims[3];
  const auto *steps = reinterpret_cast<const int32_t *>(t->data);
  const auto *labels = y ? reinterpret_cast<const int32_t *>(y->data) : nullptr;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t k = 0; k < N; ++k) {
      float output = 0.3f * x->data[row * N + k];
      output = output + static_cast<float>(steps[row]) / 1024.0f;
      if (labels) output = output + 0.1f * (static_cast<float>(labels[row]) - 1.0f);
      if (x0) output = output + 0.25f * x0->data[row * N + k];
      if (cond) output = output - 0.2f * cond->data[((row + 1) * cond->dims[1] - 1) * pixels + k % pixels];
      if (session->is("place") && row) output = output * 1.0000001f;
      if (session->is("size") && batch > 2) output = output * 1.0000001f;
      if (session->is("flaky")) output = output + static_cast<float>(count) * 0.001f;
      outputs[0]->data[row * N + k] = output;
      if (outputs_count > 1) outputs[1]->data[row * N + k] = 0.5f * x->data[row * N + k];
    }
  }
  if (count == 3 && session->is("var-nan")) {
    outputs[1]->data[0] = NAN;
  } else if (count == 3 && session->is("nan")) {
    outputs[0]->data[batch * N - 1] = NAN;
  }
  return nullptr;
}

void fill_in(OrtApi &api) {
  api.GetErrorMessage = message;
  api.CreateEnv = create_env;
  api.CreateSession = create_session;
  api.Run = run;
  api.AddSessionConfigEntry = configure;
  api.CreateSessionOptions = create_options;
  api.SetSessionLogSeverityLevel = set_severity;
  api.SetIntraOpNumThreads = set_threads;
  api.CreateTensorWithDataAsOrtValue = create_tensor;
  api.CreateCpuMemoryInfo = create_memory;
  api.ReleaseEnv = release<OrtEnv>;
  api.ReleaseStatus = release<OrtStatus>;
  api.ReleaseMemoryInfo = release<OrtMemoryInfo>;
  api.ReleaseSession = release<OrtSession>;
  api.ReleaseValue = release<OrtValue>;
  api.ReleaseSessionOptions = release<OrtSessionOptions>;
}

const OrtApi *ORT_API_CALL get_api(uint32_t version) noexcept {
  static const OrtApi api = [] {
    OrtApi functions;
    std::memset(static_cast<void *>(&functions), 0, sizeof functions);
    fill_in(functions);
    return functions;
  }();
  return version <= NEWEST_API ? &api : nullptr;
}

const char *ORT_API_CALL get_version() noexcept { return FAKE_VERSION; }

const OrtApiBase base{get_api, get_version};

}  // namespace

extern "C" {
__attribute__((visibility("default"))) const OrtApiBase *ORT_API_CALL OrtGetApiBase(void) noexcept { return &base; }
// The number of objects that have not been released.
__attribute__((visibility("default"))) int fake_ort_live() { return live; }
}
