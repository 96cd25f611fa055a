// A CUDA driver without a GPU: a library with the functions of libcuda.so.1 that src/cuda/driver.hpp names.
//
// "Device memory" is host memory, and the kernels are step.cu, compiled for the host: each block has one thread here, the
// blocks run one after the other, and the kernels take any grid. (Other orders are tested in
// tests/ddpmx/cuda/test_kernels.py.) Work in a stream runs when it is waited for and not before, one kernel for each query
// of an event, so that a missing wait is noticed. It is strict where CUDA is: a context has to be current, a capture must
// not be disturbed, nothing is freed twice or while it may be used. Time, weak memory order and compilation are not
// modelled: it tests control flow only.
#include "fake_cuda_world.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT FakeCuda *fake_cuda() {
  if (!world->panel.reset) reset();
  return &world->panel;
}

// --- the functions ---

EXPORT int cuInit(unsigned) {
  return called("cuInit", [] {});
}

EXPORT int cuDriverGetVersion(int *version) {
  return called("cuDriverGetVersion", [&] { *version = 12060; });
}

static int error_text(int code, const char **text, int which) {
  for (size_t i = 0; i < sizeof kCodes / sizeof *kCodes; ++i) {
    if (kCodes[i] == code) return *text = kErrors[i][which], 0;
  }
  return 1;
}
EXPORT int cuGetErrorName(int code, const char **text) { return error_text(code, text, 0); }
EXPORT int cuGetErrorString(int code, const char **text) { return error_text(code, text, 1); }

EXPORT int cuDeviceGetCount(int *count) {
  return called("cuDeviceGetCount", [&] { *count = world->panel.devices; });
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
  return called("cuDeviceGet", [&] { *device = ordinal; });
}

EXPORT int cuDeviceGetName(char *name, int size, int) {
  return called("cuDeviceGetName", [&] {
    if (size < 16) throw Refused{1};
    std::strcpy(name, "Fake GPU");
  });
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int) {
  return called("cuDeviceGetAttribute", [&] {
    const std::map<int, int> known{{16, 2}, {75, world->panel.major}, {76, world->panel.minor}};
    if (!known.count(attribute)) throw Refused{1};
    *value = known.at(attribute);
  });
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int) {
  return called("cuDevicePrimaryCtxRetain", [&] { *context = kContext, ++world->panel.retained; });
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  return called("cuDevicePrimaryCtxRelease_v2", [] {
    if (--world->panel.retained < 0) fault("the context is released once too often");
  });
}

EXPORT int cuCtxPushCurrent_v2(void *context) {
  return called("cuCtxPushCurrent_v2", [&] {
    if (context != kContext || world->panel.retained < 1) {
      fault("no context");
      throw Refused{201};
    }
    contexts.push_back(context);
  });
}

EXPORT int cuCtxPopCurrent_v2(void **context) {
  return called("cuCtxPopCurrent_v2", [&] {
    if (contexts.empty()) {
      fault("no context to pop");
      throw Refused{201};
    }
    *context = contexts.back();
    contexts.pop_back();
  });
}

EXPORT int cuMemAlloc_v2(uint64_t *address, size_t size) {
  return called("cuMemAlloc_v2", [&] {
    undisturbed();
    if (size == 0) throw Refused{1};
    void *base = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(base, 0xFF, size);
    *address = reinterpret_cast<uint64_t>(base);
    world->memory[*address] = {base, size};
    ++world->panel.alive["memory"];
  });
}

EXPORT int cuMemFree_v2(uint64_t address) {
  return called("cuMemFree_v2", [&] {
    const auto found = world->memory.find(address);
    if (found == world->memory.end()) {
      fault("no memory, or freed already");
      throw Refused{1};
    }
    for (Stream *stream : world->streams) {
      if (!stream->queue.empty()) fault("memory is freed while kernels may use it");
    }
    std::free(found->second.base);
    world->memory.erase(found);
    --world->panel.alive["memory"];
  });
}

EXPORT int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
  return called("cuMemHostAlloc", [&] {
    if (flags != 3) throw Refused{1};
    *address = std::calloc(1, size);
    world->pinned.insert(*address);
    ++world->panel.alive["pinned"];
  });
}

EXPORT int cuMemFreeHost(void *address) {
  return called("cuMemFreeHost", [&] {
    known(world->pinned, address, "pinned memory");
    world->pinned.erase(address);
    std::free(address);
    --world->panel.alive["pinned"];
  });
}

EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *device, void *address, unsigned) {
  return called("cuMemHostGetDevicePointer_v2",
                [&] { *device = reinterpret_cast<uint64_t>(known(world->pinned, address, "pinned memory")); });
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
  return called("cuMemcpyHtoDAsync_v2", [&] { move(stream, reinterpret_cast<void *>(to), from, size, to); });
}

EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  return called("cuMemcpyDtoHAsync_v2", [&] { move(stream, to, reinterpret_cast<void *>(from), size, from); });
}

EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *stream) {
  return called("cuMemcpyDtoDAsync_v2", [&] {
    if (to < from + size && from < to + size) fault("a copy onto itself");
    move(stream, reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), size, to);
  });
}

EXPORT int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void *stream) {
  return called("cuMemsetD32Async", [&] {
    if (value != 0) throw Refused{1};
    const auto zeros = std::make_shared<std::vector<char>>(4 * count);
    move(stream, reinterpret_cast<void *>(to), zeros->data(), zeros->size(), to);
    put(stream, {[zeros] {}});  // keeps them alive until then
  });
}

EXPORT int cuStreamCreate(void **stream, unsigned flags) {
  return called("cuStreamCreate", [&] {
    if (flags != 1) throw Refused{1};
    auto *made = new Stream;
    world->streams.insert(made);
    *stream = made;
    ++world->panel.alive["stream"];
  });
}

EXPORT int cuStreamDestroy_v2(void *handle) {
  return called("cuStreamDestroy_v2", [&] {
    Stream *stream = stream_of(handle);
    if (stream->capturing || !stream->queue.empty()) fault("a stream is freed while it is at work");
    world->streams.erase(stream);
    for (Event *event : world->events) {
      if (event->stream == stream) event->came.reset(), event->stream = nullptr;
    }
    delete stream;
    --world->panel.alive["stream"];
  });
}

EXPORT int cuStreamSynchronize(void *handle) {
  return called("cuStreamSynchronize", [&] {
    undisturbed();
    Stream *stream = stream_of(handle);
    advance(stream, kNever, kAll);
    if (stream->queue.empty()) return;
    fault("a wait that never ends");
    throw Refused{700};
  });
}

EXPORT int cuStreamWaitEvent(void *stream, void *handle, unsigned) {
  return called("cuStreamWaitEvent", [&] {
    const Event event = *known(world->events, static_cast<Event *>(handle), "event");
    put(stream, {[event] {
          if (event.came) advance(event.stream, [&] { return *event.came; }, kAll);
        }});
  });
}

EXPORT int cuStreamBeginCapture_v2(void *handle, int mode) {
  return called("cuStreamBeginCapture_v2", [&] {
    Stream *stream = stream_of(handle);
    if (mode != 1 || stream->capturing) throw Refused{1};
    stream->capturing = true, stream->spoilt = false;
    stream->captured.clear();
  });
}

EXPORT int cuStreamEndCapture(void *handle, void **graph) {
  std::vector<Entry> nodes;
  bool spoilt = false;
  *graph = nullptr;
  {
    const std::lock_guard<std::recursive_mutex> lock(world->mutex);  // it ends, whatever the result is
    auto *stream = static_cast<Stream *>(handle);
    if (world->streams.count(stream)) {
      spoilt = stream->spoilt || !stream->capturing;
      nodes.swap(stream->captured);
      stream->capturing = false;
    }
  }
  return called("cuStreamEndCapture", [&] {
    if (spoilt) throw Refused{901};
    *graph = new char;
    world->graphs[*graph] = nodes;
    ++world->panel.alive["graph"];
  });
}

EXPORT int cuEventCreate(void **event, unsigned) {
  return called("cuEventCreate", [&] {
    auto *made = new Event;
    world->events.insert(made);
    *event = made;
    ++world->panel.alive["event"];
  });
}

EXPORT int cuEventDestroy_v2(void *handle) {
  return called("cuEventDestroy_v2", [&] {
    Event *event = known(world->events, static_cast<Event *>(handle), "event");
    world->events.erase(event);
    delete event;
    --world->panel.alive["event"];
  });
}

EXPORT int cuEventRecord(void *handle, void *stream) {
  return called("cuEventRecord", [&] {
    Event *event = known(world->events, static_cast<Event *>(handle), "event");
    const auto came = std::make_shared<bool>(false);
    event->came = came, event->stream = stream_of(stream);
    put(stream, {[came] { *came = true; }});
  });
}

EXPORT int cuEventQuery(void *handle) {
  return called("cuEventQuery", [&] {
    undisturbed();
    const Event event = *known(world->events, static_cast<Event *>(handle), "event");
    if (!event.came) return;
    advance(event.stream, [&] { return *event.came; }, 1);
    if (!*event.came) throw Refused{600};
  });
}

EXPORT int cuEventSynchronize(void *handle) {
  return called("cuEventSynchronize", [&] {
    undisturbed();
    const Event event = *known(world->events, static_cast<Event *>(handle), "event");
    if (!event.came) return;
    advance(event.stream, [&] { return *event.came; }, kAll);
    if (*event.came) return;
    fault("a wait that never ends");
    throw Refused{700};
  });
}

EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values) {
  return called("cuModuleLoadDataEx", [&] {
    if (count != 2 || options[0] != 5 || options[1] != 6 || reinterpret_cast<uintptr_t>(values[1]) < 64)
      throw Refused{1};
    if (!std::strstr(static_cast<const char *>(image), ".entry ddpmx_step(")) {
      std::strcpy(static_cast<char *>(values[0]), "ptxas fatal");
      throw Refused{222};
    }
    *module = new char;
    world->modules.insert(*module);
    ++world->panel.alive["module"];
  });
}

EXPORT int cuModuleUnload(void *module) {
  return called("cuModuleUnload", [&] {
    known(world->modules, module, "module");
    world->modules.erase(module);
    delete static_cast<char *>(module);
    --world->panel.alive["module"];
  });
}

EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  return called("cuModuleGetFunction", [&] {
    known(world->modules, module, "module");
    world->functions.push_back(std::make_unique<Function>(Function{name}));
    *function = world->functions.back().get();
  });
}

EXPORT int cuFuncGetAttribute(int *value, int attribute, void *) {
  return called("cuFuncGetAttribute", [&] {
    undisturbed();  // it loads
    if (attribute != 4) throw Refused{1};
    *value = 64;
  });
}

EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **arguments, void **extra) {
  return called("cuLaunchKernel", [&] {
    if (gx < 1 || bx < 1 || bx > DDPMX_THREADS || gy * gz * by * bz != 1 || shared || extra) {
      fault("invalid launch parameters");
      throw Refused{1};
    }
    const std::string name = static_cast<Function *>(function)->name;
    const uint64_t argument = *static_cast<uint64_t *>(arguments[0]);  // read now: the caller's arguments do not stay
    put_kernel(stream, name, [=] { run_kernel(name, argument, gx); });
  });
}

EXPORT int cuGraphDestroy(void *graph) {
  return called("cuGraphDestroy", [&] {
    if (!world->graphs.erase(graph)) fault("no graph, or freed already");
    delete static_cast<char *>(graph);
    --world->panel.alive["graph"];
  });
}

EXPORT int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
  return called("cuGraphInstantiateWithFlags", [&] {
    if (!world->graphs.count(graph)) fault("no graph");
    *executable = new char;
    world->executables[*executable] = world->graphs[graph];
    ++world->panel.alive["executable"];
  });
}

EXPORT int cuGraphExecDestroy(void *executable) {
  return called("cuGraphExecDestroy", [&] {
    if (!world->executables.erase(executable)) fault("no executable, or freed already");
    delete static_cast<char *>(executable);
    --world->panel.alive["executable"];
  });
}

EXPORT int cuGraphLaunch(void *executable, void *stream) {
  return called("cuGraphLaunch", [&] {
    const auto found = world->executables.find(executable);
    if (found == world->executables.end()) {
      fault("no executable");
      throw Refused{400};
    }
    for (Entry entry : found->second) {
      entry.is_stuck = world->panel.graphs_hang;
      put(stream, std::move(entry));
    }
  });
}
