// What a test may order of the CUDA driver of fake_cuda.cpp, and see of it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct FakeCuda {
  // orders
  int devices = 1, major = 8, minor = 9;
  int fail_at = 0;           // the number, from 1, of the call that gives CUDA_ERROR_ILLEGAL_ADDRESS
  bool count_frees = false;  // whether calls that free, push and pop are numbered as well
  std::map<std::string, std::pair<int, int>> fail;  // name: which call of it, from 1, 0 for all; which error
  int broken = 0;                                   // the error that everything gives from now on that runs kernels
  bool graphs_hang = false;                         // what a graph launches never ends
  std::function<void(const std::string &kernel)> on_kernel = [](const std::string &) {};

  // seen
  int counted = 0, retained = 0;
  std::vector<std::string> calls, faults, launches;
  std::map<std::string, int> alive;  // how many of each kind are not freed

  // What a library such as TensorRT does: put a kernel of its own into a stream.
  void (*enqueue)(void *stream, const std::string &name, std::function<void()> work) = nullptr;
  // Whether what is put into a stream is recorded instead of run, and whether an address is of the device's memory.
  bool (*capturing)(void *stream) = nullptr;
  bool (*allocated)(uint64_t address) = nullptr;
  // How many contexts are on this thread's stack.
  int (*depth)() = nullptr;
  // Everything as it was at first. Leaks what was alive.
  void (*reset)() = nullptr;

  int count(const std::string &name) const {
    int found = 0;
    for (const std::string &call : calls) found += call == name;
    return found;
  }
};

// What the library exports: "fake_cuda".
using fake_cuda_function = FakeCuda *(*)();
