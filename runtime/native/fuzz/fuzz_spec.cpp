// JSON and what it holds: specs of callers, envelopes, and arrays of β.
#include <cstdint>

#include "attempt.hpp"
#include "model_file.hpp"
#include "sample_files.hpp"

using ddpmx_fuzz::attempt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const std::string text(reinterpret_cast<const char *>(data), size);
  attempt([&] { ddpmx::given_spec(text); });
  attempt([&] { ddpmx::betas_from_text(text); });
  attempt([&] { ddpmx::spec_from_text(text, nullptr, "the file"); });
  const std::vector<double> betas(20, 0.5);
  attempt([&] { ddpmx::spec_from_text(ddpmx_test::envelope("ddpmx1", text), &betas, "the file"); });
  ddpmx::Json json;
  if (!attempt([&] { json = ddpmx::parse_json(text); })) return 0;
  // shown() prints what was read, except for half surrogate pairs and the order of members, and its output is stable
  const std::string shown = ddpmx::shown(json, SIZE_MAX);
  if (ddpmx::shown(ddpmx::parse_json(shown), SIZE_MAX) != shown || ddpmx::parse_json(shown) != json) std::abort();
  return 0;
}
