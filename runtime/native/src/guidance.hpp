// Classifier-free guidance: the network runs with each image's class and without. See runtime/ddpmx/sampling/guidance.py.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "network.hpp"
#include "spec.hpp"

namespace ddpmx {

struct Guidance {
  float scale;   // w of out_∅ + w·(out_y − out_∅), neither 0 nor 1
  int32_t null;  // the label that stands for no class
};

inline bool operator==(const Guidance &a, const Guidance &b) { return a.scale == b.scale && a.null == b.null; }

using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;

// How many images a guided chain may run at once: an image takes two rows of the network's batch.
// Failure(DDPMX_INPUT): the network takes no even number.
Ranges guided_batches(const Ranges &ranges);

// A network whose outputs are the guided ones of another. `var` is that of the image's class.
class GuidedNetwork : public Network {
 public:
  // network and spec must outlive it
  GuidedNetwork(const Network &network, const Spec &spec, const Guidance &guidance)
      : network_(network), spec_(spec), guidance_(guidance) {}
  std::string description() const override { return network_.description(); }
  std::unique_ptr<Bound> bind(const Buffers &buffers) const override;

 private:
  const Network &network_;
  const Spec &spec_;
  const Guidance guidance_;
};

}  // namespace ddpmx
