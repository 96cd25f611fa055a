// The control panel of fake_trt_module.cpp: what tests set, and what they observe.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fake_network.hpp"
#include "trt/module.h"

struct FakeTrt {
  // set by tests
  std::string flavour = "TensorRT", version = "10.3.0.26";
  uint32_t abi = DDPMX_TRT_ABI;
  std::string name;                       // of the engine
  std::vector<ddpmx_trt_tensor> tensors;  // its inputs and outputs
  std::vector<std::pair<int64_t, int64_t>> profiles{{1, 8}};
  FakeNetwork network;
  std::set<std::string> refuse;  // names of functions that fail
  int refuse_at = 0;             // the enqueue, from 1, that fails
  bool on_the_host = false;      // the network is computed while it is enqueued, not in the stream
  bool skips_captures = false;   // nothing is put into a stream that captures

  // observed
  int engines = 0, contexts = 0, enqueued = 0, runs = 0;
  std::string library;             // the path that was to be opened
  std::string plan, cache, saved;  // the plan's bytes; the cache that was passed; set by tests: the cache to save
  bool trusted = false;
  std::vector<int64_t> batches;  // of the contexts that were bound
  std::vector<int32_t> chosen;   // and their profiles

  void (*reset)() = nullptr;
};

// What the library exports: "fake_trt".
using fake_trt_function = FakeTrt *(*)();
