#include "ort.hpp"

#include <onnxruntime_c_api.h>

#include <cstdio>
#include <vector>

#include "error.hpp"
#include "library.hpp"

namespace ddpmx {

namespace {

// Every function that is used here has had its place in OrtApi since long before ONNX Runtime 1.16, and keeps it.
constexpr uint32_t kApi = 16;
static_assert(ORT_API_VERSION >= kApi, "onnxruntime_c_api.h is older than ONNX Runtime 1.16");

// The end of an error message is the most useful part: the beginning names source files of ONNX Runtime.
std::string end_of(const std::string &text) {
  const size_t most = 300;
  return in_quotes(text.size() > most ? text.substr(text.size() - most) : text, most);
}

struct Runtime {
  Library library;
  const OrtApi *api = nullptr;
  std::string version = "";
  bool rounds_halves = false;  // where float16 becomes int8

  // Failure(kind) with ONNX Runtime's message, if there was an error. Frees the OrtStatus.
  void check(OrtStatus *status, ddpmx_status kind, const std::string &fact, const std::string &hint = "") const {
    if (!status) return;
    std::string text;
    try {
      text = end_of(api->GetErrorMessage(status));
    } catch (...) {
      api->ReleaseStatus(status);
      throw;
    }
    api->ReleaseStatus(status);
    throw Failure(kind, fact, text, hint);
  }
};

// One of ONNX Runtime's objects, freed by `release`.
template <class T>
class Owned {
 public:
  explicit Owned(void (*release)(T *)) : release_(release) {}
  ~Owned() {
    if (object_) release_(object_);
  }
  Owned(Owned &&other) noexcept : release_(other.release_), object_(other.object_) { other.object_ = nullptr; }
  Owned(const Owned &) = delete;
  Owned &operator=(const Owned &) = delete;
  T **out() { return &object_; }
  T *get() const { return object_; }

 private:
  void (*release_)(T *);
  T *object_ = nullptr;
};

Runtime open_runtime(const char *option) {
  Runtime runtime{Library("ONNX Runtime",
                          places(option, "ort_library", "DDPMX_ORT_LIBRARY", {"libonnxruntime.so.1", "libonnxruntime.so"}),
                          "name its libonnxruntime.so in the option ort_library or in $DDPMX_ORT_LIBRARY; the Python "
                          "package onnxruntime has one in its folder capi")};
  using GetBase = const OrtApiBase *(*)();
  const auto base = reinterpret_cast<GetBase>(runtime.library.find("OrtGetApiBase"));
  const OrtApiBase *found = base ? base() : nullptr;
  if (!found) {
    throw Failure(DDPMX_BACKEND, in_quotes(runtime.library.name()) + " is not ONNX Runtime", "it has no OrtGetApiBase");
  }
  runtime.version = in_quotes(found->GetVersionString(), 40);
  runtime.version = runtime.version.substr(1, runtime.version.size() - 2);
  int major = 0, minor = 0;
  std::sscanf(found->GetVersionString(), "%d.%d", &major, &minor);
  runtime.rounds_halves = major > 1 || (major == 1 && minor >= 30);
  // checked first, since GetApi prints an error if it does not have the version
  if (major > 1 || (major == 1 && minor >= static_cast<int>(kApi))) runtime.api = found->GetApi(kApi);
  if (!runtime.api) {
    throw Failure(DDPMX_BACKEND, "ONNX Runtime " + runtime.version + " is too old", "version 1.16 or later is needed");
  }
  return runtime;
}

class OrtNetwork : public Network {
 public:
  OrtNetwork(const std::string &path, const Spec &spec, const char *library, int threads)
      : runtime_(open_runtime(library)),
        inputs_(spec.inputs()),
        outputs_(spec.outputs()),
        shape_{spec.channels, spec.height, spec.width},
        env_(runtime_.api->ReleaseEnv),
        memory_(runtime_.api->ReleaseMemoryInfo),
        session_(runtime_.api->ReleaseSession) {
    const OrtApi &api = *runtime_.api;
    if (spec.precision == "int8" && !runtime_.rounds_halves) {
      throw Failure(DDPMX_BACKEND, path + ": ONNX Runtime " + runtime_.version + " computes this int8 file wrongly",
                    "before 1.30 its QuantizeLinear cuts float16 off and does not round it",
                    "ONNX Runtime 1.30 or later; the model's fp16 and fp32 files run here");
    }
    const std::string own = "ONNX Runtime " + runtime_.version + " does not start";
    // No logger of our own: it would be global to the process, and outlive this library. Errors are returned anyway.
    runtime_.check(api.CreateEnv(ORT_LOGGING_LEVEL_FATAL, "ddpmx", env_.out()), DDPMX_BACKEND, own);
    runtime_.check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, memory_.out()), DDPMX_BACKEND, own);
    Owned<OrtSessionOptions> options(api.ReleaseSessionOptions);
    runtime_.check(api.CreateSessionOptions(options.out()), DDPMX_BACKEND, own);
    runtime_.check(api.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_FATAL), DDPMX_BACKEND, own);
    // otherwise the file's name decides its format, and a checked ONNX file might be valid in another one too
    runtime_.check(api.AddSessionConfigEntry(options.get(), "session.load_model_format", "ONNX"), DDPMX_BACKEND, own);
    if (threads) runtime_.check(api.SetIntraOpNumThreads(options.get(), threads), DDPMX_BACKEND, own);
    OrtStatus *status = api.CreateSession(env_.get(), path.c_str(), options.get(), session_.out());
    if (spec.precision == "bf16") {
      runtime_.check(status, DDPMX_BACKEND, path + ": ONNX Runtime cannot run this bfloat16 file here",
                     "it is made for TensorRT 10.13 and later: ddpmx build; fp16 and fp32 files run here");
    } else {
      runtime_.check(status, DDPMX_FILE_FORMAT, path + ": ONNX Runtime " + runtime_.version + " refuses this file");
    }
  }

  std::string description() const override { return "onnxruntime " + runtime_.version + ", CPUExecutionProvider"; }

  std::unique_ptr<Bound> bind(const Buffers &buffers) const override;

 private:
  friend class OrtBound;
  Runtime runtime_;
  std::vector<Input> inputs_;
  std::vector<std::string> outputs_;
  std::vector<int64_t> shape_;
  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
};

// The session reads and writes the buffers in place: we neither copy nor allocate in a step.
class OrtBound : public Bound {
 public:
  OrtBound(const OrtNetwork &network, const Buffers &buffers) : network_(network) {
    for (const Input &input : network.inputs_) {
      input_names_.push_back(input.name.c_str());
      add(at(input.name, buffers), input.is_int, input.dims, buffers.batch);
    }
    for (size_t index = 0; index < network.outputs_.size(); ++index) {
      output_names_.push_back(network.outputs_[index].c_str());
      add(index == 0 ? buffers.out : buffers.var, false, network.shape_, buffers.batch);
    }
    for (const auto &value : values_) raw_.push_back(value.get());
  }

  void run() override {
    const size_t inputs = input_names_.size();
    network_.runtime_.check(
        network_.runtime_.api->Run(network_.session_.get(), nullptr, input_names_.data(), raw_.data(), inputs,
                                   output_names_.data(), output_names_.size(), raw_.data() + inputs),
        DDPMX_BACKEND, "ONNX Runtime failed to run the network");
  }

 private:
  static void *at(const std::string &name, const Buffers &buffers) {
    if (name == "x") return buffers.x;
    if (name == "t") return buffers.t;
    if (name == "y") return buffers.y;
    return name == "x0_prev" ? buffers.x0_prev : buffers.cond;
  }

  void add(void *data, bool is_int, std::vector<int64_t> dims, int64_t batch) {
    dims.insert(dims.begin(), batch);
    size_t bytes = 4;
    for (const int64_t dim : dims) bytes *= static_cast<size_t>(dim);
    values_.emplace_back(network_.runtime_.api->ReleaseValue);
    network_.runtime_.check(network_.runtime_.api->CreateTensorWithDataAsOrtValue(
                                network_.memory_.get(), data, bytes, dims.data(), dims.size(),
                                is_int ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                values_.back().out()),
                            DDPMX_BACKEND, "ONNX Runtime refuses these buffers");
  }

  const OrtNetwork &network_;
  std::vector<const char *> input_names_, output_names_;
  std::vector<Owned<OrtValue>> values_;
  std::vector<OrtValue *> raw_;  // inputs, then outputs
};

std::unique_ptr<Bound> OrtNetwork::bind(const Buffers &buffers) const {
  return std::make_unique<OrtBound>(*this, buffers);
}

}  // namespace

std::unique_ptr<Network> open_ort(const std::string &path, const Spec &spec, const char *library, int threads) {
  return std::make_unique<OrtNetwork>(path, spec, library, threads);
}

}  // namespace ddpmx
