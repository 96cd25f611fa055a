// Libraries that are opened at run time, and never linked.
#pragma once

#include <string>
#include <vector>

#include "error.hpp"

namespace ddpmx {

// A library that stays in the process: ONNX Runtime and TensorRT have threads and handlers of their own, and unloading
// them is asking for trouble.
class Library {
 public:
  // One place to look: a path or a name for dlopen, and who says so, as in "option ort_library" or "".
  struct Place {
    std::string name, from;
  };

  // The first of `places` that opens. Failure(DDPMX_BACKEND): none does; its note lists what was tried, and why each failed.
  Library(const std::string &what, const std::vector<Place> &places, const std::string &hint);

  // The address of a symbol, or nullptr.
  void *find(const char *symbol) const;

  const std::string &name() const { return name_; }

 private:
  void *handle_ = nullptr;
  std::string name_;
};

// Where to look for a library: at `option` alone if it is given, else at what the environment variable says alone, else at
// the usual places.
std::vector<Library::Place> places(const char *option, const char *option_name, const char *variable,
                                   const std::vector<std::string> &usual);

}  // namespace ddpmx
