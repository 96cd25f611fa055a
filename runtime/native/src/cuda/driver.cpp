#include "driver.hpp"

#include <cstdlib>
#include <utility>

namespace ddpmx::cuda {

namespace {

// The names of these numbers in cuda.h.
enum {
  CUDA_ERROR_NOT_READY = 600,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_EVENT_BLOCKING_SYNC = 1,
  CU_EVENT_DISABLE_TIMING = 2,
  CU_FUNC_ATTRIBUTE_NUM_REGS = 4,
  CU_JIT_ERROR_LOG_BUFFER = 5,
  CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6,
  CU_MEMHOSTALLOC_PORTABLE = 1,
  CU_MEMHOSTALLOC_DEVICEMAP = 2,
  CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
  CU_STREAM_NON_BLOCKING = 1,
};

constexpr const char *kLost = "the process has lost the GPU: end it and start again; `dmesg` names the fault as an Xid";

std::string hint_for(const std::string &error) {
  if (error == "CUDA_ERROR_OUT_OF_MEMORY") return "a smaller batch, or end what else uses the GPU's memory";
  if (error == "CUDA_ERROR_UNSUPPORTED_PTX_VERSION") return "update the NVIDIA driver";
  if (error == "CUDA_ERROR_DEVICE_UNAVAILABLE") return "another process has the GPU to itself: see nvidia-smi";
  for (const char *name : {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_LAUNCH_TIMEOUT",
                           "CUDA_ERROR_ECC_UNCORRECTABLE"}) {
    if (error == name) return kLost;
  }
  return "";
}

std::vector<Library::Place> driver_places() { return places(nullptr, "", "DDPMX_CUDA_LIBRARY", {"libcuda.so.1"}); }

}  // namespace

Handle &Handle::operator=(Handle &&other) noexcept {
  if (this != &other) {
    reset();
    driver_ = std::exchange(other.driver_, nullptr);
    kind_ = other.kind_, value_ = other.value_;
  }
  return *this;
}

void Handle::reset() noexcept {
  if (const Driver *driver = std::exchange(driver_, nullptr)) driver->free(kind_, value_);
}

Driver::Driver(int ordinal) : library_("NVIDIA driver", driver_places(), "`ddpmx doctor` lists what is here") {
  load();
  find_gpu(ordinal);
}

Driver::~Driver() {
  if (context_) cuda_.cuDevicePrimaryCtxRelease_v2(device_);
}

void Driver::load() {
#define DDPMX_CUDA_LOAD(function, parameters)                                                                         \
  if (!(cuda_.function = reinterpret_cast<decltype(cuda_.function)>(library_.find(#function)))) {                     \
    throw Failure(DDPMX_BACKEND, in_quotes(library_.name()) + " is not an NVIDIA driver, or is an old one",           \
                  std::string("it has no ") + #function, "update the driver");                                        \
  }
  DDPMX_CUDA_FUNCTIONS(DDPMX_CUDA_LOAD)
#undef DDPMX_CUDA_LOAD
}

void Driver::find_gpu(int ordinal) {
  if (const int code = cuda_.cuInit(0)) {
    throw Failure(DDPMX_BACKEND, "the NVIDIA driver does not start: " + error_name(code));
  }
  int count = 0;
  if (const int code = cuda_.cuDeviceGetCount(&count)) {
    throw Failure(DDPMX_BACKEND, "the NVIDIA driver lists no devices: " + error_name(code));
  }
  if (count < 1) throw Failure(DDPMX_BACKEND, "the NVIDIA driver sees no GPU");
  if (ordinal < 0 || ordinal >= count) {
    throw Failure(DDPMX_INPUT, "there is no GPU " + std::to_string(ordinal),
                  "the NVIDIA driver sees " + std::to_string(count) + ", counted from 0",
                  "another device in ddpmx_open_options; CUDA_VISIBLE_DEVICES may hide some");
  }
  check(cuda_.cuDeviceGet(&device_, ordinal), "cuDeviceGet", "looking for the GPU");
  char name[256] = "";
  check(cuda_.cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName", "asking for the GPU's name");
  name_ = name;
  int major = 0, minor = 0;
  const auto get = [this](int *value, int attribute) {
    check(cuda_.cuDeviceGetAttribute(value, attribute, device_), "cuDeviceGetAttribute", "looking at the GPU");
  };
  get(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  get(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  get(&multiprocessors_, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  sm_ = std::to_string(major) + "." + std::to_string(minor);
}

void Driver::start() {
  check(cuda_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain", "starting the GPU");
}

std::string Driver::error_name(int code) const {
  const char *text = nullptr;
  if (cuda_.cuGetErrorName(code, &text) || !text) return "CUDA error " + std::to_string(code);
  return text;
}

void Driver::check(int code, const char *function, const char *doing) const {
  if (code) fail(code, function, doing);
}

void Driver::fail(int code, const char *function, const std::string &doing, const std::string &log) const {
  const std::string name = error_name(code);
  std::string note = function;
  const char *text = nullptr;
  if (!cuda_.cuGetErrorString(code, &text) && text) note += std::string(": ") + text;
  if (!log.empty()) note += ": " + log;
  throw Failure(DDPMX_BACKEND, name + " while " + doing, note, hint_for(name));
}

// --- memory ---

Handle Driver::allocate(uint64_t size, const char *what) const {
  Address address = 0;
  if (const int code = cuda_.cuMemAlloc_v2(&address, size)) {
    fail(code, "cuMemAlloc_v2", "allocating " + std::to_string(size) + " bytes for " + what);
  }
  return Handle(*this, Kind::memory, address);
}

Handle Driver::allocate_pinned(uint64_t size, const char *what, Address *device) const {
  const std::string doing = "allocating " + std::to_string(size) + " bytes of pinned memory for " + what;
  void *address = nullptr;
  if (const int code = cuda_.cuMemHostAlloc(&address, size, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)) {
    fail(code, "cuMemHostAlloc", doing);
  }
  Handle pinned(*this, Kind::pinned, reinterpret_cast<uint64_t>(address));
  if (const int code = cuda_.cuMemHostGetDevicePointer_v2(device, address, 0)) {
    fail(code, "cuMemHostGetDevicePointer_v2", doing);
  }
  return pinned;
}

void Driver::copy_in(Address to, const void *from, uint64_t size, Stream stream) const {
  if (const int code = cuda_.cuMemcpyHtoDAsync_v2(to, from, size, stream)) {
    fail(code, "cuMemcpyHtoDAsync_v2", "copying " + std::to_string(size) + " bytes to the GPU");
  }
}

void Driver::copy_out(void *to, Address from, uint64_t size, Stream stream) const {
  if (const int code = cuda_.cuMemcpyDtoHAsync_v2(to, from, size, stream)) {
    fail(code, "cuMemcpyDtoHAsync_v2", "copying " + std::to_string(size) + " bytes from the GPU");
  }
}

void Driver::copy(Address to, Address from, uint64_t size, Stream stream) const {
  if (const int code = cuda_.cuMemcpyDtoDAsync_v2(to, from, size, stream)) {
    fail(code, "cuMemcpyDtoDAsync_v2", "copying " + std::to_string(size) + " bytes on the GPU");
  }
}

void Driver::zero(Address at, uint64_t size, Stream stream) const {
  if (const int code = cuda_.cuMemsetD32Async(at, 0, size / 4, stream)) {
    fail(code, "cuMemsetD32Async", "zeroing " + std::to_string(size) + " bytes on the GPU");
  }
}

// --- streams and events ---

Handle Driver::stream() const {
  void *made = nullptr;
  check(cuda_.cuStreamCreate(&made, CU_STREAM_NON_BLOCKING), "cuStreamCreate", "making a stream");
  return Handle(*this, Kind::stream, reinterpret_cast<uint64_t>(made));
}

void Driver::wait_for_stream(Stream stream, const char *doing) const {
  check(cuda_.cuStreamSynchronize(stream), "cuStreamSynchronize", doing);
}

void Driver::follow(Stream stream, Stream other) const {
  const Handle event = this->event();  // the driver keeps it while a stream waits for it
  record(event, other);
  check(cuda_.cuStreamWaitEvent(stream, event.pointer(), 0), "cuStreamWaitEvent", "waiting for another stream");
}

Handle Driver::event() const {
  void *made = nullptr;
  check(cuda_.cuEventCreate(&made, CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING), "cuEventCreate",
        "making an event");
  return Handle(*this, Kind::event, reinterpret_cast<uint64_t>(made));
}

void Driver::record(const Handle &event, Stream stream) const {
  check(cuda_.cuEventRecord(event.pointer(), stream), "cuEventRecord", "recording an event");
}

bool Driver::has_come(const Handle &event, const char *doing) const {
  const int code = cuda_.cuEventQuery(event.pointer());
  if (code == CUDA_ERROR_NOT_READY) return false;
  check(code, "cuEventQuery", doing);
  return true;
}

void Driver::wait_for(const Handle &event, const char *doing) const {
  check(cuda_.cuEventSynchronize(event.pointer()), "cuEventSynchronize", doing);
}

// --- kernels and graphs ---

Handle Driver::module(const void *ptx, const char *what) const {
  char log[4096] = "";
  int options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
  void *values[] = {log, reinterpret_cast<void *>(sizeof log)};  // a number is passed as if it were a pointer
  void *made = nullptr;
  if (const int code = cuda_.cuModuleLoadDataEx(&made, ptx, 2, options, values)) {
    log[sizeof log - 1] = '\0';
    fail(code, "cuModuleLoadDataEx", std::string("compiling ") + what + " for this GPU", log);
  }
  return Handle(*this, Kind::module, reinterpret_cast<uint64_t>(made));
}

void *Driver::function(const Handle &module, const char *name) const {
  void *function = nullptr;
  const std::string doing = std::string("loading the kernel ") + name;
  check(cuda_.cuModuleGetFunction(&function, module.pointer(), name), "cuModuleGetFunction", doing.c_str());
  // With lazy loading a kernel may be loaded at its first launch, which may be in a capture, where loading is an error
  int registers = 0;
  check(cuda_.cuFuncGetAttribute(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, function), "cuFuncGetAttribute",
        doing.c_str());
  return function;
}

void Driver::launch(void *function, unsigned grid, unsigned block, Stream stream, Address argument,
                    const char *what) const {
  void *arguments[] = {&argument};  // read before the call returns
  if (const int code = cuda_.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, arguments, nullptr)) {
    fail(code, "cuLaunchKernel", std::string("launching ") + what);
  }
}

void Driver::begin_capture(Stream stream) const {
  check(cuda_.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture_v2",
        "beginning a capture");
}

Handle Driver::end_capture(Stream stream) const {
  void *graph = nullptr;
  check(cuda_.cuStreamEndCapture(stream, &graph), "cuStreamEndCapture", "ending a capture");
  if (!graph) throw Failure(DDPMX_BACKEND, "the capture of a step gave no graph");
  return Handle(*this, Kind::graph, reinterpret_cast<uint64_t>(graph));
}

Handle Driver::instantiate(const Handle &graph, const char *what) const {
  void *made = nullptr;
  if (const int code = cuda_.cuGraphInstantiateWithFlags(&made, graph.pointer(), 0)) {
    fail(code, "cuGraphInstantiateWithFlags", std::string("instantiating ") + what);
  }
  return Handle(*this, Kind::executable, reinterpret_cast<uint64_t>(made));
}

void Driver::launch_graph(const Handle &executable, Stream stream, const char *what) const {
  if (const int code = cuda_.cuGraphLaunch(executable.pointer(), stream)) {
    fail(code, "cuGraphLaunch", std::string("launching ") + what);
  }
}

// --- contexts and freeing ---

void Driver::free(Kind kind, uint64_t value) const noexcept {
  if (cuda_.cuCtxPushCurrent_v2(context_)) return;
  void *const pointer = reinterpret_cast<void *>(value);
  switch (kind) {
    case Kind::memory: cuda_.cuMemFree_v2(value); break;
    case Kind::pinned: cuda_.cuMemFreeHost(pointer); break;
    case Kind::stream: cuda_.cuStreamDestroy_v2(pointer); break;
    case Kind::event: cuda_.cuEventDestroy_v2(pointer); break;
    case Kind::module: cuda_.cuModuleUnload(pointer); break;
    case Kind::graph: cuda_.cuGraphDestroy(pointer); break;
    case Kind::executable: cuda_.cuGraphExecDestroy(pointer); break;
  }
  void *popped = nullptr;
  cuda_.cuCtxPopCurrent_v2(&popped);
}

void Current::enter() {
  driver_.check(driver_.cuda_.cuCtxPushCurrent_v2(driver_.context_), "cuCtxPushCurrent_v2", "entering the GPU's context");
  inside_ = true;
}

void Current::leave() {
  void *popped = nullptr;
  driver_.check(driver_.cuda_.cuCtxPopCurrent_v2(&popped), "cuCtxPopCurrent_v2", "leaving the GPU's context");
  inside_ = false;
}

Current::~Current() {
  void *popped = nullptr;
  if (inside_) driver_.cuda_.cuCtxPopCurrent_v2(&popped);
}

}  // namespace ddpmx::cuda
