// A fake libddpmx_trt.so: its network is that of fake_network.hpp, put into the streams of fake_cuda.cpp, which
// DDPMX_CUDA_LIBRARY names. It tests control flow only.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>

#include "fake_cuda.hpp"
#include "fake_trt.hpp"

struct ddpmx_trt_library {};
struct ddpmx_trt_engine {
  int contexts = 0;
};

struct ddpmx_trt_context {
  ddpmx_trt_engine *engine = nullptr;
  std::map<std::string, uint64_t> addresses;
  std::map<std::string, std::vector<int64_t>> shapes;
  int32_t profile = 0;
  std::shared_ptr<int> pending = std::make_shared<int>(0);  // runs in a stream; -1 when it is closed
};

namespace {

FakeTrt *panel = new FakeTrt;  // never deleted: the library stays in the process
ddpmx_trt_library the_library;
// where leak checkers find objects that are left on purpose
std::set<void *> &alive = *new std::set<void *>;

FakeCuda &cuda() {
  void *const library = dlopen(std::getenv("DDPMX_CUDA_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  return *reinterpret_cast<fake_cuda_function>(dlsym(library, "fake_cuda"))();
}

// 1 with an error if a test has set this function to fail, else 0.
int32_t result_of(const std::string &function, char *error, size_t size) {
  if (cuda().depth() == 0 && function != "open_library") cuda().faults.push_back(function + " without a context");
  if (!panel->refuse.count(function)) return 0;
  std::snprintf(error, size, "[%s] refused\x01", function.c_str());
  return 1;
}

int32_t open_library(const char *path, ddpmx_trt_library **library, char *version, char *error, size_t size) {
  panel->library = path ? path : "the usual";
  if (result_of("open_library", error, size)) return 1;
  std::snprintf(version, 32, "%s", panel->version.c_str());
  *library = &the_library;
  return 0;
}

int32_t open_engine(ddpmx_trt_library *, const void *plan, size_t plan_size, int32_t trust, const void *cache,
                    size_t cache_size, int32_t keep_cache, ddpmx_trt_engine **engine, char *error, size_t size) {
  panel->plan.assign(static_cast<const char *>(plan), plan_size);
  panel->cache = cache_size   ? std::string(static_cast<const char *>(cache), cache_size)
                : keep_cache ? "none yet"
                             : "none wanted";
  panel->trusted = trust != 0;
  if (result_of("open_engine", error, size)) return 1;
  ++panel->engines;
  *engine = new ddpmx_trt_engine;
  alive.insert(*engine);
  return 0;
}

void close_engine(ddpmx_trt_engine *engine) {
  if (!engine) return;
  if (cuda().depth() == 0) cuda().faults.push_back("close_engine without a context");
  if (engine->contexts) cuda().faults.push_back("an engine is closed before its contexts");
  --panel->engines;
  alive.erase(engine);
  delete engine;
}

const char *name(const ddpmx_trt_engine *) { return panel->name.c_str(); }
int32_t tensors(const ddpmx_trt_engine *) { return static_cast<int32_t>(panel->tensors.size()); }

int32_t tensor(const ddpmx_trt_engine *, int32_t index, ddpmx_trt_tensor *tensor) {
  *tensor = panel->tensors.at(static_cast<size_t>(index));
  return panel->refuse.count("tensor") != 0;
}

int32_t profiles(const ddpmx_trt_engine *) { return static_cast<int32_t>(panel->profiles.size()); }

int32_t batches(const ddpmx_trt_engine *, int32_t profile, const char *, int64_t *low, int64_t *high) {
  *low = panel->profiles.at(static_cast<size_t>(profile)).first;
  *high = panel->profiles.at(static_cast<size_t>(profile)).second;
  return panel->refuse.count("batches") != 0;
}

void save_cache(const ddpmx_trt_engine *, void (*take)(const void *, size_t, void *), void *user) {
  if (!panel->saved.empty()) take(panel->saved.data(), panel->saved.size(), user);
}

int32_t open_context(ddpmx_trt_engine *engine, int32_t profile, void *stream, ddpmx_trt_context **context, char *error,
                     size_t size) {
  if (result_of("open_context", error, size)) return 1;
  auto *made = new ddpmx_trt_context;
  made->engine = engine, made->profile = profile;
  const std::shared_ptr<int> pending = made->pending;
  ++*pending;
  cuda().enqueue(stream, "profile", [pending] { --*pending; });
  ++panel->contexts, ++engine->contexts;
  *context = made;
  alive.insert(made);
  return 0;
}

void close_context(ddpmx_trt_context *context) {
  if (!context) return;
  if (cuda().depth() == 0) cuda().faults.push_back("close_context without a context");
  if (*context->pending && !cuda().broken) cuda().faults.push_back("a context is closed while it is at work");
  for (const auto &[tensor, address] : context->addresses) {
    if (!cuda().allocated(address)) cuda().faults.push_back("memory is freed before the context that uses it");
  }
  *context->pending = -1000;
  --panel->contexts, --context->engine->contexts;
  alive.erase(context);
  delete context;
}

int32_t bind(ddpmx_trt_context *context, const char *tensor, const int64_t *dims, int32_t rank, uint64_t address,
             char *error, size_t size) {
  if (*context->pending) cuda().faults.push_back("a context is bound before its profile is there");
  context->addresses[tensor] = address;
  if (rank) context->shapes[tensor] = std::vector<int64_t>(dims, dims + rank);
  if (!address) cuda().faults.push_back(std::string("no address for ") + tensor);
  return result_of("bind", error, size);
}

int32_t check(ddpmx_trt_context *context, char *error, size_t size) {
  const int64_t batch = context->shapes["x"][0];
  panel->batches.push_back(batch);
  panel->chosen.push_back(context->profile);
  const auto [low, high] = panel->profiles.at(static_cast<size_t>(context->profile));
  if (batch < low || batch > high) cuda().faults.push_back("a batch beyond the profile");
  for (const ddpmx_trt_tensor &tensor : panel->tensors) {
    if (!context->addresses.count(tensor.name)) cuda().faults.push_back(std::string(tensor.name) + " is not bound");
    if (!tensor.is_input) continue;
    std::vector<int64_t> wanted(tensor.dims, tensor.dims + tensor.rank);
    wanted[0] = batch;
    if (context->shapes[tensor.name] != wanted) cuda().faults.push_back(std::string("the shape of ") + tensor.name);
  }
  return result_of("check", error, size);
}

int32_t enqueue(ddpmx_trt_context *context, void *stream, char *error, size_t size) {
  if (result_of("enqueue", error, size)) return 1;
  if (++panel->enqueued == panel->refuse_at) {
    std::snprintf(error, size, "its error message");
    return 1;
  }
  const auto at = [context](const char *tensor) {
    const auto found = context->addresses.find(tensor);
    return reinterpret_cast<void *>(found == context->addresses.end() ? 0 : found->second);
  };
  FakeArrays arrays;
  arrays.batch = context->shapes["x"][0];
  arrays.x = static_cast<float *>(at("x")), arrays.t = static_cast<int32_t *>(at("t")),
  arrays.y = static_cast<int32_t *>(at("y"));
  arrays.x0_prev = static_cast<float *>(at("x0_prev")), arrays.cond = static_cast<float *>(at("cond"));
  for (const ddpmx_trt_tensor &tensor : panel->tensors) {
    const bool is_var = std::string(tensor.name) == "var";
    if (!tensor.is_input) (is_var ? arrays.var : arrays.out) = static_cast<float *>(at(tensor.name));
  }
  if (panel->skips_captures && cuda().capturing(stream)) return 0;
  if (panel->on_the_host) {  // the stream has not run yet: the output is that of the arrays as they are now
    const int64_t count = arrays.batch * panel->network.channels * panel->network.pixels;
    const auto out = std::make_shared<std::vector<float>>(static_cast<size_t>(count));
    FakeArrays now = arrays;
    now.out = out->data();
    fake_output(panel->network, now);
    cuda().enqueue(stream, "network", [out, arrays] { std::copy(out->begin(), out->end(), arrays.out); });
    return 0;
  }
  const std::shared_ptr<int> pending = context->pending;
  cuda().enqueue(stream, "network", [pending, arrays] {
    if (*pending < 0) cuda().faults.push_back("a closed context runs");
    fake_output(panel->network, arrays, ++panel->runs);
  });
  return 0;
}

ddpmx_trt_module functions;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT FakeTrt *fake_trt() {
  panel->reset = [] {
    *panel = FakeTrt();
    fake_trt();
  };
  return panel;
}

EXPORT const ddpmx_trt_module *ddpmx_trt_get(uint32_t) {
  functions = {panel->abi,
               sizeof functions,
               panel->flavour.c_str(),
               panel->version.c_str(),
               "libfake.so.1",
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
               enqueue};
  return &functions;
}
