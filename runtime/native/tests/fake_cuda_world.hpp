// The parts of the driver in fake_cuda.cpp: kernels, streams and their queues.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>

#include "fake_cuda.hpp"

// --- the parts of CUDA that step.cu needs ---

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

static void __syncthreads() {}
static void __threadfence() {}
static void __threadfence_system() {}
template <class T>
static T atomicAdd(T *at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
static T atomicOr(T *at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}

#include "step.cu"

namespace {

// --- streams ---

struct Refused {
  int code;
};

struct Entry {
  std::function<void()> work;
  bool is_kernel = false, is_stuck = false;
};

struct Stream {
  std::deque<Entry> queue;
  std::vector<Entry> captured;
  bool capturing = false, spoilt = false;
};

struct Event {
  std::shared_ptr<bool> came;  // of what was recorded last, or nothing
  Stream *stream = nullptr;
};

struct Function {
  std::string name;
};

struct Memory {
  void *base;
  size_t size;
};

const char *const kErrors[][2] = {{"CUDA_ERROR_INVALID_VALUE", "invalid argument"},
                                  {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
                                  {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
                                  {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the PTX is of an unsupported toolchain"},
                                  {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
                                  {"CUDA_ERROR_NOT_READY", "device not ready"},
                                  {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
                                  {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when stream is capturing"},
                                  {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "a capture was disturbed"},
                                  {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}};
const int kCodes[] = {1, 2, 201, 222, 400, 600, 700, 900, 901, 100};

// The state of the driver, for one thread at a time.
struct World {
  FakeCuda panel;
  std::recursive_mutex mutex;
  std::set<Stream *> streams;
  Stream legacy;  // CUDA's default stream, CU_STREAM_LEGACY, which always exists
  std::set<Event *> events;
  std::set<void *> pinned, modules;
  std::map<void *, std::vector<Entry>> graphs, executables;
  std::map<uint64_t, Memory> memory;
  std::vector<std::unique_ptr<Function>> functions;
};

World *world = new World;  // never deleted: the library stays in the process
thread_local std::vector<void *> contexts;
int context_mark;
void *const kContext = &context_mark;

void fault(const std::string &what) { world->panel.faults.push_back(what); }

bool is_free(const std::string &name) {
  for (const char *part : {"Free", "Destroy", "Unload", "Release", "Pop", "Push"}) {
    if (name.find(part) != std::string::npos) return true;
  }
  return false;
}

bool needs_context(const std::string &name) {
  for (const char *part : {"cuInit", "cuDriver", "cuGetError", "cuDevice", "cuCtx"}) {
    if (name.compare(0, std::strlen(part), part) == 0) return false;
  }
  return true;
}

// The return value of a function: 0, the error that a test has set, or the one that work() throws.
template <class Work>
int called(const std::string &name, Work work) {
  const std::lock_guard<std::recursive_mutex> lock(world->mutex);
  FakeCuda &panel = world->panel;
  try {
    panel.calls.push_back(name);
    if (needs_context(name) && contexts.empty()) {
      fault(name + " without a context");
      throw Refused{201};
    }
    if (!is_free(name) || panel.count_frees) {
      if (++panel.counted == panel.fail_at) throw Refused{700};
    }
    if (const auto found = panel.fail.find(name); found != panel.fail.end()) {
      const auto [at, code] = found->second;
      if (at == 0 || at == panel.count(name)) throw Refused{code};
    }
    work();
    return 0;
  } catch (const Refused &refused) {
    return refused.code;
  }
}

template <class Set, class Thing>
Thing *known(const Set &things, Thing *thing, const char *kind) {
  if (things.count(thing)) return thing;
  fault(std::string("no ") + kind + ", or freed already");
  throw Refused{400};
}

Stream *stream_of(void *handle) {
  if (handle == reinterpret_cast<void *>(1)) return &world->legacy;
  return known(world->streams, static_cast<Stream *>(handle), "stream");
}

// Waiting, copying and allocating spoil a capture.
void undisturbed() {
  for (Stream *stream : world->streams) {
    if (!stream->capturing) continue;
    stream->spoilt = true;
    throw Refused{900};
  }
}

void put(void *handle, Entry entry) {
  Stream *stream = stream_of(handle);
  if (stream->capturing) {
    stream->captured.push_back(std::move(entry));
  } else {
    stream->queue.push_back(std::move(entry));
  }
}

// Runs the stream, up to a number of kernels.
void advance(Stream *stream, const std::function<bool()> &until, int kernels) {
  while (!stream->queue.empty() && kernels > 0 && !until()) {
    if (world->panel.broken) throw Refused{world->panel.broken};
    if (stream->queue.front().is_stuck) return;
    const Entry entry = std::move(stream->queue.front());
    stream->queue.pop_front();
    entry.work();
    kernels -= entry.is_kernel;
  }
}

constexpr int kAll = 1 << 30;
const auto kNever = [] { return false; };

void put_kernel(void *stream, const std::string &name, std::function<void()> work) {
  put(stream, {[name, work = std::move(work)] {
                 world->panel.launches.push_back(name);
                 work();
                 world->panel.on_kernel(name);
               },
               true});
}

void enqueue(void *stream, const std::string &name, std::function<void()> work) {
  const std::lock_guard<std::recursive_mutex> lock(world->mutex);
  try {
    put_kernel(stream, name, std::move(work));
  } catch (const Refused &) {
  }
}

void move(void *stream, void *to, const void *from, size_t size, uint64_t device) {
  undisturbed();
  const auto after = world->memory.upper_bound(device);
  const bool inside = after != world->memory.begin() && [&] {
    const auto &[base, memory] = *std::prev(after);
    return device + size <= base + memory.size;
  }();
  if (!inside) {
    fault("a copy beyond what was allocated");
    throw Refused{1};
  }
  put(stream, {[=] { std::memcpy(to, from, size); }});
}

void run_kernel(const std::string &name, uint64_t argument, unsigned grid) {
  auto *chain = reinterpret_cast<ddpmx_chain *>(argument);
  gridDim.x = grid, blockDim.x = 1;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) name == "ddpmx_begin" ? ddpmx_begin(chain) : ddpmx_step(chain);
}

int depth() { return static_cast<int>(contexts.size()); }

// Leftovers are kept where leak checkers find them: they may have been left on purpose.
void reset() {
  static auto *const left = new std::vector<World *>;
  const std::lock_guard<std::recursive_mutex> lock(world->mutex);
  left->push_back(new World);
  World &old = *left->back();
  old.streams.swap(world->streams), old.events.swap(world->events), old.pinned.swap(world->pinned);
  old.modules.swap(world->modules), old.memory.swap(world->memory), old.functions.swap(world->functions);
  old.graphs.swap(world->graphs), old.executables.swap(world->executables);
  for (Stream *stream : old.streams) stream->queue.clear();
  world->legacy.queue.clear();
  world->panel = FakeCuda();
  world->panel.enqueue = enqueue, world->panel.depth = depth, world->panel.reset = reset;
  world->panel.capturing = [](void *stream) { return static_cast<Stream *>(stream)->capturing; };
  world->panel.allocated = [](uint64_t address) { return world->memory.count(address) != 0; };
  contexts.clear();
}

}  // namespace
