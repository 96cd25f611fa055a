// The network of an ONNX file by ONNX Runtime, on the CPU. See runtime/ddpmx/backends/ort.py.
#pragma once

#include <memory>
#include <string>

#include "network.hpp"
#include "spec.hpp"

namespace ddpmx {

// The network of an ONNX file. Its spec and external data have been checked.
//
// library: path of ONNX Runtime's library, or nullptr for $DDPMX_ORT_LIBRARY or the system's. threads: 0 for the default.
// Failure(DDPMX_BACKEND): no ONNX Runtime, or one that is too old; (DDPMX_FILE_FORMAT): it refuses the file.
std::unique_ptr<Network> open_ort(const std::string &path, const Spec &spec, const char *library, int threads);

}  // namespace ddpmx
