// Everything that reads the bytes of an ONNX file before ONNX Runtime opens it.
#include <cstdint>

#include "attempt.hpp"
#include "model_file.hpp"

using ddpmx_fuzz::attempt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char *>(data), size);
  const std::string path = "model.onnx";
  ddpmx::GraphInfo info;
  if (!attempt([&] { info = ddpmx::read_onnx(path, bytes); })) return 0;
  attempt([&] { ddpmx::check_external(path, info); });
  attempt([&] { ddpmx::onnx_spec(path, info, ""); });
  attempt([&] { ddpmx::onnx_spec(path, info, R"({"shape":[3,8,8],"timesteps":20})"); });
  // without metadata, so that the contract is checked even if the CRC is wrong
  info.metadata.clear();
  attempt([&] {
    ddpmx::onnx_spec(path, info,
                     R"({"shape":[1,8,8],"timesteps":20,"classes":5,"condition":2,"variance":"learned_range"})");
  });
  return 0;
}
