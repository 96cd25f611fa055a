// The whole chain on the device, by one of two executors that give the same bits. See
// runtime/ddpmx/cuda/device_chain.py.
//
// "plain" launches the network and ddpmx_step S times from the host; "graph" captures the two once, and launches that S
// times. The kernels count the steps themselves, so the launch is the same for every step. The host follows the progress,
// and can end the chain, through the control block in pinned memory.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "chain.h"
#include "driver.hpp"
#include "guidance.hpp"
#include "samplers.hpp"
#include "spec.hpp"

namespace ddpmx::cuda {

// Steps that are put into the stream ahead of the one that runs: enough that the device never waits for the host. After a
// stop, so many steps are run in vain.
constexpr int64_t kLookAhead = 8;

// The work on the device did not end in time, and may never end.
class Timeout : public Failure {
 public:
  using Failure::Failure;
};

// The kernels of step.ptx, compiled for the driver's GPU.
struct Kernels {
  explicit Kernels(const Driver &driver);
  Handle module;
  void *begin = nullptr, *step = nullptr;
};

// Device addresses of the inputs and outputs of a network, float [B, …] and int32 [B]; 0 for those that it does not have.
struct Addresses {
  Address x = 0, t = 0, out = 0, var = 0, y = 0, x0_prev = 0, cond = 0;
  Address of(const std::string &tensor) const;  // by its name in the graph; `out` for the prediction
};

// Puts the network, bound to a chain's addresses, into a stream, without waiting. Failure(DDPMX_BACKEND): the library
// fails.
using Enqueue = std::function<void(Stream)>;

// One run of a chain. All arrays belong to the caller.
struct Run {
  uint64_t seed = 0;
  const uint32_t *images = nullptr;  // [n], the index of each
  int64_t n = 0;                     // 1…batch; the last one is repeated to fill the batch
  const float *x = nullptr;          // [n, C, H, W], the state to begin with, or nullptr for noise
  const int32_t *y = nullptr;        // [n], on the host
  const float *cond = nullptr;       // [n, K, H, W]
  bool on_device = false;            // x, cond, pixels and samples are device addresses
  uint8_t *pixels = nullptr;         // [n, H, W, C], or nullptr
  float *samples = nullptr;          // [n, C, H, W], or nullptr
  Stream after = nullptr;            // a stream whose work so far has to finish before the arrays are used, or nullptr
  // Called after a step, in the caller's context: the steps done, which rises to S and may skip some, and in watch() x_t and
  // x0, float [n, C, H, W]. False ends the chain. May be empty.
  std::function<bool(int64_t done, const float *x, const float *x0)> report;
};

// The memory of one chain on the device, for one batch size and one table, which can run many times. Everything is
// allocated in the constructor. For one thread at a time.
class DeviceChain {
 public:
  // guidance: of a guided chain, whose network has two rows for each image, or nothing.
  // with_x0: keep x0 of each step, for watch and for samples. description: of the backend, for messages.
  // Failure(DDPMX_BACKEND): out of memory, or the driver fails.
  DeviceChain(const Driver &driver, const Kernels &kernels, const Spec &spec, int64_t batch, const Table &table,
              const std::optional<Guidance> &guidance, bool with_x0, const std::string &description);
  ~DeviceChain() { close(); }
  DeviceChain(const DeviceChain &) = delete;
  DeviceChain &operator=(const DeviceChain &) = delete;

  const Addresses &at() const { return at_; }
  int64_t rows() const { return rows_; }  // of the network's batch
  Stream stream() const { return stream_.pointer(); }
  const std::string &executor() const { return executor_; }  // or empty
  // Whether it was abandoned while running, and may still run. Then none of its memory can be freed.
  bool lost() const { return lost_; }

  // Prepares to run a network by one executor, "graph" or "plain".
  //
  // The network is run once: the work of its first run (it allocates, compiles and measures) must not be captured. The
  // captured step is then run once as well, and must give the same bits as a plain one. After `seconds` the step is
  // abandoned: Timeout. Failure(DDPMX_BACKEND): the network or the driver fails; another executor may be tried.
  void prepare(const Enqueue &enqueue, const std::string &executor, double seconds);

  // Runs the whole chain, and waits for its end. Failure: DDPMX_NUMERIC, DDPMX_CANCELLED, DDPMX_BACKEND.
  void run(const Run &run);
  // The same step by step, with x and x0 on the host for run.report: the device waits. Needs with_x0.
  void watch(const Run &run);

  // Releases the network once the device is done with it. False: the device does not finish, and the network must stay.
  bool unprepare() noexcept;

 private:
  struct Step {  // the network's output for x_T, and x after the first step
    std::vector<float> out, x;
    bool operator==(const Step &other) const;
  };

  void close() noexcept;
  void allocate(bool with_x0);
  Address keep(uint64_t size, const char *what);
  void upload(const Table &table);
  bool settle() noexcept;
  template <class Work>
  void stopping(Work work);

  void check_capture(const Enqueue &enqueue, double seconds, Step steps[3]);
  void one_step(const std::function<void()> &launch, double seconds, Step *step);

  void ready(const Run &run);
  void set_images(const Run &run);
  void set_inputs(const Run &run);
  void begin(uint64_t seed, int stop, bool given);
  void fill(Address to, const Run &run, const void *source, bool on_device, int64_t numbers, const char *what);
  void launch_step();
  void launch_one();
  void run_steps(const std::function<void()> &look, const std::function<bool()> &goes_on);
  void fetch(const Run &run);
  void judge(bool cancelled, bool given) const;
  volatile ddpmx_control &control() const { return *static_cast<volatile ddpmx_control *>(pinned_.pointer()); }

  const Driver &driver_;
  const Kernels &kernels_;
  const Spec spec_;
  const Table table_;
  const std::optional<Guidance> guidance_;
  const int64_t batch_, rows_, elements_;  // elements: N of one image
  const std::string description_;
  unsigned grid_ = 1;

  Handle stream_, pinned_;
  std::vector<Handle> events_, memory_;
  Addresses at_;
  Address x0_ = 0, pixels_ = 0, chain_at_ = 0;
  // host memory that must stay while copies from it are running
  ddpmx_chain chain_ = {};
  std::vector<uint32_t> images_;
  std::vector<char> filled_;

  Enqueue enqueue_;
  Handle graph_, executable_;
  std::string executor_;
  bool lost_ = false;
};

// Prepares a chain with its network and the requested executor, or, for "auto", the first one that works here. Returns a
// description: "graph", or "plain; not graph: …".
std::string choose_executor(DeviceChain &chain, const Enqueue &enqueue, const std::string &executor, double seconds);

}  // namespace ddpmx::cuda
