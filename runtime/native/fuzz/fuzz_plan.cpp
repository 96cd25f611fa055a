// Everything that reads the bytes of a plan and its sidecar before TensorRT opens it.
//
// The first byte of an input says what the rest is. Bit 0: host code is trusted. Bit 1: not a plan, but the content of a
// plan's two envelopes, and then the sidecar, with a zero byte after each of the first two; the envelopes are made here,
// so that the fuzzer gets past the checksums. Bit 2, of a plan: the sidecar follows its last line break. Bit 3: the length
// in its header is corrected.
#include <cstdint>
#include <optional>

#include "attempt.hpp"
#include "model_file.hpp"
#include "sample_files.hpp"

namespace {

// Takes the text before the first `end`, and the end itself; everything if there is none.
std::string take(std::string_view &rest, char end) {
  const size_t size = rest.find(end);
  const std::string part(rest.substr(0, size));
  rest.remove_prefix(size == rest.npos ? rest.size() : size + 1);
  return part;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size == 0) return 0;
  const uint8_t how = data[0];
  std::string_view rest(reinterpret_cast<const char *>(data) + 1, size - 1);
  std::string bytes;
  std::optional<std::string> sidecar;
  if (how & 2) {
    const std::string spec = take(rest, '\0'), record = take(rest, '\0');
    bytes = ddpmx_test::plan(ddpmx_test::plan_name(spec, record));
    if (!rest.empty()) sidecar = rest;
  } else {
    const size_t end = how & 4 ? rest.rfind('\n') : rest.npos;
    bytes = rest.substr(0, end);
    if (end != rest.npos) sidecar = rest.substr(end + 1);
    if ((how & 8) && bytes.size() >= 24) bytes.replace(16, 8, ddpmx_test::bytes_of(bytes.size(), 8));
  }
  ddpmx_fuzz::attempt([&] { ddpmx::parse_plan("model.plan", bytes, sidecar ? &*sidecar : nullptr, how & 1); });
  return 0;
}
