// The control panel of fake_cuda.cpp: what tests set, and what they observe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct FakeCuda {
  // set by tests
  int devices = 1, major = 8, minor = 9;
  int fail_at = 0;           // the number, from 1, of the call that returns CUDA_ERROR_ILLEGAL_ADDRESS
  bool count_frees = false;  // whether calls that free, push and pop are numbered as well
  std::map<std::string, std::pair<int, int>> fail;  // name: which call of it, from 1, 0 for all; which error
  int broken = 0;                                   // the error of every call that runs kernels from now on
  bool graphs_hang = false;                         // graphs never finish
  std::function<void(const std::string &kernel)> on_kernel = [](const std::string &) {};

  // observed
  int counted = 0, retained = 0;
  std::vector<std::string> calls, faults, launches;
  std::map<std::string, int> alive;  // how many of each kind are not freed

  // Puts a kernel into a stream, as a library such as TensorRT does.
  void (*enqueue)(void *stream, const std::string &name, std::function<void()> work) = nullptr;
  // Whether a stream is capturing, and whether an address is the start of device memory.
  bool (*capturing)(void *stream) = nullptr;
  bool (*allocated)(uint64_t address) = nullptr;
  // The number of contexts on this thread's stack.
  int (*depth)() = nullptr;
  // Resets everything. Leaks what was alive.
  void (*reset)() = nullptr;

  int count(const std::string &name) const {
    int found = 0;
    for (const std::string &call : calls) found += call == name;
    return found;
  }
};

// What the library exports: "fake_cuda".
using fake_cuda_function = FakeCuda *(*)();
