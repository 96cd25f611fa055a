// The part of the CUDA driver API that a chain needs, opened by dlopen, without a toolkit. See
// runtime/ddpmx/device/driver.py.
//
// Everything that allocates, launches or waits needs the context to be current in the calling thread: do it while a
// Current lives. Callbacks run in Current::aside, where the context is the caller's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "error.hpp"
#include "library.hpp"

namespace ddpmx::cuda {

using Address = uint64_t;  // of the device's memory: a CUdeviceptr
using Stream = void *;     // a CUstream
inline const Stream kLegacyStream = reinterpret_cast<Stream>(1);  // CU_STREAM_LEGACY: the default stream

class Driver;

enum class Kind { memory, pinned, stream, event, module, graph, executable };

// Owns an object of the driver. Freeing reports no errors: they could only be errors of earlier work, which has been
// waited for and reported.
class Handle {
 public:
  Handle() = default;
  Handle(const Driver &driver, Kind kind, uint64_t value) : driver_(&driver), kind_(kind), value_(value) {}
  Handle(Handle &&other) noexcept { *this = static_cast<Handle &&>(other); }
  Handle &operator=(Handle &&other) noexcept;
  ~Handle() { reset(); }

  explicit operator bool() const { return driver_ != nullptr; }
  uint64_t value() const { return value_; }
  void *pointer() const { return reinterpret_cast<void *>(value_); }
  void reset() noexcept;
  // Leaves it allocated until the end of the process, since freeing it would wait for a device that hangs.
  void abandon() noexcept { driver_ = nullptr; }

 private:
  const Driver *driver_ = nullptr;
  Kind kind_ = Kind::memory;
  uint64_t value_ = 0;
};

// Every function that is used, with its parameters, by its exported name, whose meaning never changes.
#define DDPMX_CUDA_FUNCTIONS(X)                                                                               \
  X(cuInit, (unsigned))                                                                                       \
  X(cuDriverGetVersion, (int *))                                                                              \
  X(cuGetErrorName, (int, const char **))                                                                     \
  X(cuGetErrorString, (int, const char **))                                                                   \
  X(cuDeviceGetCount, (int *))                                                                                \
  X(cuDeviceGet, (int *, int))                                                                                \
  X(cuDeviceGetName, (char *, int, int))                                                                      \
  X(cuDeviceGetAttribute, (int *, int, int))                                                                  \
  X(cuDevicePrimaryCtxRetain, (void **, int))                                                                 \
  X(cuDevicePrimaryCtxRelease_v2, (int))                                                                      \
  X(cuCtxPushCurrent_v2, (void *))                                                                            \
  X(cuCtxPopCurrent_v2, (void **))                                                                            \
  X(cuMemAlloc_v2, (uint64_t *, size_t))                                                                      \
  X(cuMemFree_v2, (uint64_t))                                                                                 \
  X(cuMemHostAlloc, (void **, size_t, unsigned))                                                              \
  X(cuMemFreeHost, (void *))                                                                                  \
  X(cuMemHostGetDevicePointer_v2, (uint64_t *, void *, unsigned))                                             \
  X(cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, void *))                                           \
  X(cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, void *))                                                 \
  X(cuMemcpyDtoDAsync_v2, (uint64_t, uint64_t, size_t, void *))                                               \
  X(cuMemsetD32Async, (uint64_t, unsigned, size_t, void *))                                                   \
  X(cuStreamCreate, (void **, unsigned))                                                                      \
  X(cuStreamDestroy_v2, (void *))                                                                             \
  X(cuStreamSynchronize, (void *))                                                                            \
  X(cuStreamWaitEvent, (void *, void *, unsigned))                                                            \
  X(cuStreamBeginCapture_v2, (void *, int))                                                                   \
  X(cuStreamEndCapture, (void *, void **))                                                                    \
  X(cuEventCreate, (void **, unsigned))                                                                       \
  X(cuEventDestroy_v2, (void *))                                                                              \
  X(cuEventRecord, (void *, void *))                                                                          \
  X(cuEventQuery, (void *))                                                                                   \
  X(cuEventSynchronize, (void *))                                                                             \
  X(cuModuleLoadDataEx, (void **, const void *, unsigned, int *, void **))                                    \
  X(cuModuleUnload, (void *))                                                                                 \
  X(cuModuleGetFunction, (void **, void *, const char *))                                                     \
  X(cuFuncGetAttribute, (int *, int, void *))                                                                 \
  X(cuLaunchKernel,                                                                                           \
    (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **)) \
  X(cuGraphDestroy, (void *))                                                                                 \
  X(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long))                                       \
  X(cuGraphExecDestroy, (void *))                                                                             \
  X(cuGraphLaunch, (void *, void *))

// One GPU. Any number of threads may use it, each inside a Current of its own; handles are for one thread at a time.
class Driver {
 public:
  // Finds the driver and the GPU. Failure(DDPMX_BACKEND): there is none, or it does not start. Failure(DDPMX_INPUT): no
  // GPU of this number.
  explicit Driver(int ordinal);
  ~Driver();
  Driver(const Driver &) = delete;
  Driver &operator=(const Driver &) = delete;

  // Retains the primary context, which TensorRT and the CUDA runtime use too. Call it before anything below.
  void start();
  // Keeps the context until the end of the process, as Handle::abandon does.
  void abandon() noexcept { context_ = nullptr; }

  const std::string &name() const { return name_; }  // "NVIDIA GeForce RTX 4090"
  const std::string &sm() const { return sm_; }      // its compute capability, "8.9"
  int multiprocessors() const { return multiprocessors_; }

  // Device memory, 256-byte aligned, not initialised. `what` is for messages.
  Handle allocate(uint64_t size, const char *what) const;
  // Host memory that the device can access, and its device address.
  Handle allocate_pinned(uint64_t size, const char *what, Address *device) const;
  // Copies and fills in the stream; the memory has to stay until they have run.
  void copy_in(Address to, const void *from, uint64_t size, Stream stream) const;
  void copy_out(void *to, Address from, uint64_t size, Stream stream) const;
  void copy(Address to, Address from, uint64_t size, Stream stream) const;
  void zero(Address at, uint64_t size, Stream stream) const;  // size: a multiple of 4

  Handle stream() const;  // which does not wait for other streams, including the default one
  void wait_for_stream(Stream stream, const char *doing) const;
  // Work put into `stream` from now on waits for the work that is now in `other`. The host does not wait.
  void follow(Stream stream, Stream other) const;
  Handle event() const;  // a thread that waits for it sleeps
  void record(const Handle &event, Stream stream) const;
  bool has_come(const Handle &event, const char *doing) const;
  void wait_for(const Handle &event, const char *doing) const;

  // PTX (with a zero at its end), compiled by the driver for this GPU.
  Handle module(const void *ptx, const char *what) const;
  void *function(const Handle &module, const char *name) const;
  // On a one-dimensional grid, with one address as the argument.
  void launch(void *function, unsigned grid, unsigned block, Stream stream, Address argument, const char *what) const;

  // The graph of what `work` puts into the stream, which is not run. Other threads do not disturb the capture.
  template <class Work>
  Handle capture(Stream stream, Work work) const {
    begin_capture(stream);
    try {
      work();
    } catch (...) {
      try {
        end_capture(stream);
      } catch (const Failure &) {  // the first failure is the one to report
      }
      throw;
    }
    return end_capture(stream);
  }
  Handle instantiate(const Handle &graph, const char *what) const;
  void launch_graph(const Handle &executable, Stream stream, const char *what) const;

 private:
  friend class Current;
  friend class Handle;
#define DDPMX_CUDA_FIELD(name, parameters) int(*name) parameters = nullptr;
  struct Functions {
    DDPMX_CUDA_FUNCTIONS(DDPMX_CUDA_FIELD)
  };
#undef DDPMX_CUDA_FIELD

  void load();
  void find_gpu(int ordinal);
  void begin_capture(Stream stream) const;
  Handle end_capture(Stream stream) const;
  void free(Kind kind, uint64_t value) const noexcept;
  std::string error_name(int code) const;
  // Throws if code is not 0. doing: for the message, as in "while …".
  void check(int code, const char *function, const char *doing) const;
  [[noreturn]] void fail(int code, const char *function, const std::string &doing, const std::string &log = "") const;

  Library library_;
  Functions cuda_;
  int device_ = 0, multiprocessors_ = 0;
  std::string name_, sm_;
  void *context_ = nullptr;
};

// While it lives the driver's context is current in this thread; afterwards the previous one is.
class Current {
 public:
  explicit Current(const Driver &driver) : driver_(driver) { enter(); }
  ~Current();
  Current(const Current &) = delete;
  Current &operator=(const Current &) = delete;

  // Runs the caller's code in the caller's own context; it may use another GPU meanwhile.
  template <class Work>
  void aside(Work work) {
    leave();
    try {
      work();
    } catch (...) {
      try {
        enter();
      } catch (const Failure &) {  // the failure of `work` is the one to report
      }
      throw;
    }
    enter();
  }

 private:
  void enter();
  void leave();

  const Driver &driver_;
  bool inside_ = false;
};

}  // namespace ddpmx::cuda
