// A network on the host, which computes ε. See runtime/ddpmx/backends.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace ddpmx {

// The arrays that a network reads and writes, for B images; nullptr for those that it does not have.
struct Buffers {
  int64_t batch = 0;
  float *x = nullptr;        // [B, C, H, W]
  int32_t *t = nullptr;      // [B]
  float *out = nullptr;      // [B, C, H, W]
  float *var = nullptr;      // [B, C, H, W]
  int32_t *y = nullptr;      // [B]
  float *x0_prev = nullptr;  // [B, C, H, W]
  float *cond = nullptr;     // [B, K, H, W]
};

// A network bound to buffers. For one thread at a time.
class Bound {
 public:
  virtual ~Bound() = default;
  // Computes out, and var if there is one, from everything else. Failure(DDPMX_BACKEND): the library failed.
  virtual void run() = 0;
};

// Any number of threads may use it, each with a Bound of its own.
class Network {
 public:
  virtual ~Network() = default;
  virtual std::string description() const = 0;
  virtual std::unique_ptr<Bound> bind(const Buffers &buffers) const = 0;
};

}  // namespace ddpmx
