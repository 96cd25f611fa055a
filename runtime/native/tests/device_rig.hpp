// A plan on a fake GPU with a fake TensorRT, and the chain that it has to compute.
#pragma once

#include <dlfcn.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "cuda/device_runner.hpp"
#include "fake_cuda.hpp"
#include "fake_trt.hpp"
#include "host_noise.hpp"
#include "model_file.hpp"
#include "sample_files.hpp"
#include "samplers.hpp"
#include "spec.hpp"

namespace ddpmx_test {

using ddpmx::Failure;

inline const std::string kSmall = R"({"shape":[3,4,5],"timesteps":20,"ddpmx":"0.1.0"})";
inline const std::string kOdd = R"({"shape":[1,3,3],"timesteps":20,"ddpmx":"0.1.0","clip":null})";
inline const std::string kConditioned = R"({"shape":[3,4,5],"timesteps":20,"ddpmx":"0.1.0","prediction":"v",)"
                                 R"("classes":10,"condition":2,"self_condition":true})";
inline const std::string kLearned = R"({"shape":[3,4,5],"timesteps":20,"ddpmx":"0.1.0","variance":"learned_range"})";

inline const std::string kGuided = R"({"shape":[3,4,5],"timesteps":20,"ddpmx":"0.1.0","classes":10,"null_class":true,)"
                            R"("condition":2,"self_condition":true})";
inline const std::string kGuidedLearned = R"({"shape":[1,3,3],"timesteps":20,"ddpmx":"0.1.0","classes":10,)"
                                   R"("null_class":true,"variance":"learned_range"})";

template <class Function>
Function exported(const char *library, const char *name) {
  void *const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) std::fprintf(stderr, "%s\n", dlerror());
  return reinterpret_cast<Function>(dlsym(handle, name));
}

inline FakeCuda &cuda() {
  static FakeCuda &one = *exported<fake_cuda_function>(FAKE_CUDA, "fake_cuda")();
  return one;
}

inline FakeTrt &trt() {
  static FakeTrt &one = *exported<fake_trt_function>(FAKE_TRT, "fake_trt")();
  return one;
}

inline std::string here() {
  utsname names = {};
  uname(&names);
  return std::string("linux ") + names.machine;
}

// A plan's record that fits the fakes, with one member replaced.
inline std::string record_here(const std::string &name = "", const std::string &value = "") {
  std::string text = record("flavour", R"("TensorRT")");
  text.pop_back();
  text += R"(,"version":"10.3.0.26","targets":["8.9"],"platform":")" + here() + '"';
  if (!name.empty()) text += ",\"" + name + "\":" + value;
  return text + "}";
}

// A plan in a file, and the fakes set up for it.
class Rig {
 public:
  explicit Rig(const std::string &spec_json = kSmall, const std::string &engine = record_here()) {
    cuda().reset();
    trt().reset();
    setenv("DDPMX_CUDA_LIBRARY", FAKE_CUDA, 1);
    setenv("DDPMX_TRT_MODULE", FAKE_TRT, 1);
    const std::string name = plan_name(spec_json, engine);
    path = (std::filesystem::temp_directory_path() / ("ddpmx-" + std::to_string(getpid()) + ".plan")).string();
    FILE *const file = std::fopen(path.c_str(), "wb");
    const std::string bytes = plan(name, "", "ftrt", std::string("\12\3\0\32", 4));
    if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file)) std::abort();
    spec = ddpmx::spec_from_json(ddpmx::parse_json(spec_json), nullptr, "");
    table = ddpmx::make_table(spec.schedule, spec.prediction, spec.variance, sampling(7));
    trt().name = name;
    trt().network.channels = spec.channels, trt().network.pixels = spec.height * spec.width;
    trt().network.condition = spec.condition.value_or(0);
    trt().network.classes = spec.classes.has_value(), trt().network.self_condition = spec.self_condition;
    trt().network.learned = spec.learns_variance();
    inputs_ = spec.inputs(), outputs_ = spec.outputs();
    for (const ddpmx::Input &input : inputs_) {
      trt().tensors.push_back(tensor(input.name.c_str(), true, input.is_int, input.dims));
    }
    for (const std::string &output : outputs_) {
      trt().tensors.push_back(tensor(output.c_str(), false, false, {spec.channels, spec.height, spec.width}));
    }
    options.struct_size = sizeof options;
  }
  ~Rig() { std::remove(path.c_str()); }
  Rig(const Rig &) = delete;
  Rig &operator=(const Rig &) = delete;

  static ddpmx::Sampling sampling(int64_t steps) {
    ddpmx::Sampling sampling;
    sampling.steps = steps;
    return sampling;
  }

  std::unique_ptr<ddpmx::Runner> open(const char *executor = nullptr) {
    options.executor = executor;
    const ddpmx::MappedFile file(path);
    return ddpmx::open_plan(path, file, ddpmx::read_plan(path, file.bytes(), false), options);
  }

  // A DeviceRunner, for options that open_plan does not have.
  std::unique_ptr<ddpmx::cuda::DeviceRunner> open_inside(const char *executor, double patience) {
    const ddpmx::MappedFile file(path);
    const ddpmx::PlanInfo info = ddpmx::read_plan(path, file.bytes(), false);
    auto driver = std::make_unique<ddpmx::cuda::Driver>(0);
    driver->start();
    auto engine = std::make_unique<ddpmx::cuda::TrtEngine>(*driver, ddpmx::cuda::TrtModule(info, nullptr, nullptr),
                                                           path, file.bytes(), info, false, nullptr);
    return std::make_unique<ddpmx::cuda::DeviceRunner>(std::move(driver), std::move(engine), info.spec, executor,
                                                       patience);
  }

  int64_t N() const { return spec.elements(); }
  int64_t K() const { return spec.condition.value_or(0) * spec.height * spec.width; }

  std::string path;
  ddpmx::Spec spec;
  ddpmx::Table table;
  ddpmx_open_options options = {};

 private:
  static ddpmx_trt_tensor tensor(const char *name, bool is_input, bool is_int, const std::vector<int64_t> &dims) {
    ddpmx_trt_tensor made = {};
    made.name = name, made.is_input = is_input, made.type = is_int ? DDPMX_TRT_INT32 : DDPMX_TRT_FLOAT,
    made.on_device = 1;
    made.rank = static_cast<int32_t>(dims.size()) + 1, made.dims[0] = -1;
    for (size_t i = 0; i < dims.size(); ++i) made.dims[i + 1] = dims[i];
    return made;
  }

  std::vector<ddpmx::Input> inputs_;
  std::vector<std::string> outputs_;
};

// The results of a chain. x and x0: of each step.
struct Images {
  std::vector<uint8_t> pixels;
  std::vector<float> samples;
  std::vector<std::vector<float>> x, x0;
  std::vector<int32_t> t;
};

template <class T>
bool same(const std::vector<T> &a, const std::vector<T> &b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline bool same(const Images &a, const Images &b) { return same(a.pixels, b.pixels) && same(a.samples, b.samples); }

// The request of a chain, which owns its arrays.
struct Request {
  uint64_t seed = 5, batch = 4;
  std::vector<uint32_t> images{7, 0, 2};
  std::vector<float> x, cond;
  std::vector<int32_t> y;
  std::optional<ddpmx::Guidance> guidance;

  // With a value for every conditioning input of the network.
  static Request of(const Rig &rig) {
    Request request;
    for (size_t i = 0; i < request.images.size(); ++i) {
      if (rig.spec.classes) request.y.push_back(static_cast<int32_t>(3 * i + 1));
      for (int64_t k = 0; k < rig.K(); ++k) request.cond.push_back(static_cast<float>(static_cast<int64_t>(i) + k) / 32);
    }
    return request;
  }

  ddpmx::Job job(const ddpmx::Table &table) const {
    ddpmx::Job job{table, seed, images, batch};
    job.x = x.empty() ? nullptr : x.data();
    job.y = y.empty() ? nullptr : y.data();
    job.cond = cond.empty() ? nullptr : cond.data();
    job.guidance = guidance;
    return job;
  }
};

// The chain, image by image and number by number, by step.h and nothing else of the library.
inline Images expected(const Rig &rig, const Request &request) {
  const ddpmx::Table &table = rig.table;
  const int64_t N = rig.N(), C = rig.spec.channels, pixels = N / C;
  const auto size = request.images.size() * static_cast<size_t>(N);
  FakeNetwork network = trt().network;
  network.by_place = network.by_size = network.by_run = false;
  const float limit = rig.spec.clip ? static_cast<float>(*rig.spec.clip) : std::numeric_limits<float>::infinity();
  Images made;
  made.pixels.resize(size), made.samples.resize(size);
  made.x.assign(table.rows.size(), std::vector<float>(size)), made.x0 = made.x;
  made.t = table.timesteps;
  for (size_t i = 0; i < request.images.size(); ++i) {
    std::vector<float> x(static_cast<size_t>(N)), out(x), var(x), x0(x), one_ago(x), two_ago(x), z(x);
    if (request.x.empty()) {
      ddpmx::normal(request.seed, request.images[i], 0, DDPMX_PURPOSE_INITIAL, N, x.data());
    } else {
      std::memcpy(x.data(), request.x.data() + i * x.size(), x.size() * sizeof(float));
    }
    for (size_t step = 0; step < table.rows.size(); ++step) {
      const int32_t t = table.timesteps[step];
      FakeArrays arrays;
      arrays.batch = 1, arrays.x = x.data(), arrays.t = &t, arrays.out = out.data(), arrays.var = var.data();
      arrays.y = request.y.empty() ? nullptr : request.y.data() + i, arrays.x0_prev = x0.data();
      arrays.cond = request.cond.empty() ? nullptr : request.cond.data() + i * static_cast<size_t>(rig.K());
      fake_output(network, arrays);
      if (request.guidance) {
        std::vector<float> without(out), ignored(var);
        arrays.y = &request.guidance->null, arrays.out = without.data(), arrays.var = ignored.data();
        fake_output(network, arrays);
        for (size_t k = 0; k < x.size(); ++k) out[k] = ddpmx_guide(request.guidance->scale, out[k], without[k]);
      }
      ddpmx::normal(request.seed, request.images[i], static_cast<uint32_t>(t), DDPMX_PURPOSE_STEP, N, z.data());
      std::memcpy(made.x[step].data() + i * x.size(), x.data(), x.size() * sizeof(float));
      for (size_t k = 0; k < x.size(); ++k) {
        ddpmx_row row = table.rows[step];
        if (!table.learned.empty()) row = ddpmx_learn(row, table.learned[step], var[k]);
        x[k] = ddpmx_update(row, limit, x[k], out[k], z[k], &x0[k]);
        if (!table.memory.empty()) x[k] = ddpmx_recall(table.memory[step], x[k], one_ago[k], two_ago[k]);
      }
      two_ago = one_ago;
      one_ago = x0;
      std::memcpy(made.x0[step].data() + i * x.size(), x0.data(), x0.size() * sizeof(float));
    }
    std::memcpy(made.samples.data() + i * x0.size(), x0.data(), x0.size() * sizeof(float));
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        made.pixels[i * x.size() + static_cast<size_t>(pixel * C + c)] =
            ddpmx_uint8(x0[static_cast<size_t>(c * pixels + pixel)]);
      }
    }
  }
  return made;
}

// Runs a chain with its arrays on the host.
inline Images drawn(ddpmx::Runner &runner, const Rig &rig, const Request &request, bool previews = false) {
  Images made;
  made.pixels.assign(request.images.size() * static_cast<size_t>(rig.N()), 0xEE);
  made.samples.assign(made.pixels.size(), -7.0f);
  ddpmx::Job job = request.job(rig.table);
  job.pixels = made.pixels.data(), job.samples = made.samples.data(), job.previews = previews;
  if (previews) {
    job.report = [&](int32_t t, uint64_t, const float *x, const float *x0) {
      made.t.push_back(t);
      made.x.emplace_back(x, x + made.samples.size());
      made.x0.emplace_back(x0, x0 + made.samples.size());
      return true;
    };
  }
  runner.run(job);
  return made;
}

// Whether everything has been freed, and nothing was done that is an error for a real driver. Prints the faults.
inline bool clean() {
  bool good = cuda().faults.empty() && cuda().retained == 0 && cuda().depth() == 0;
  for (const std::string &fault : cuda().faults) std::fprintf(stderr, "fault: %s\n", fault.c_str());
  for (const auto &[kind, count] : cuda().alive) {
    if (count) std::fprintf(stderr, "alive: %d of %s\n", count, kind.c_str()), good = false;
  }
  if (trt().contexts || trt().engines) good = false, std::fprintf(stderr, "TensorRT's objects are left\n");
  if (!good) std::fprintf(stderr, "retained %d, depth %d\n", cuda().retained, cuda().depth());
  return good;
}

}  // namespace ddpmx_test
