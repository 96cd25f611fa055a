// Libraries that are opened at run time, and never linked.
#pragma once

#include <string>
#include <vector>

#include "error.hpp"

namespace ddpmx {

// A library that stays in the process: ONNX Runtime and TensorRT have threads and handlers of their own, so unloading
// them is not safe.
class Library {
 public:
  // One place to look: a path or a name for dlopen, and where it comes from, as in "option ort_library" or "".
  struct Place {
    std::string name, from;
  };

  // The first of `places` that opens. Failure(DDPMX_BACKEND): none does; the note lists what was tried, and the errors.
  Library(const std::string &what, const std::vector<Place> &places, const std::string &hint);

  // The address of a symbol, or nullptr.
  void *find(const char *symbol) const;

  const std::string &name() const { return name_; }

 private:
  void *handle_ = nullptr;
  std::string name_;
};

// Where to look for a library: only at `option` if it is set, else only at the value of the environment variable if it is
// set, else at the default places.
std::vector<Library::Place> places(const char *option, const char *option_name, const char *variable,
                                   const std::vector<std::string> &defaults);

}  // namespace ddpmx
