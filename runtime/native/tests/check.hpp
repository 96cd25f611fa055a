// The test framework: CHECK prints where it failed and continues, and finish() returns the exit code for ctest.
#pragma once

#include <cstdio>
#include <string>

#include "error.hpp"

namespace ddpmx_test {

inline int failures = 0, checks = 0;

inline void check(bool holds, const char *what, const char *file, int line) {
  ++checks;
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

// Whether action fails with that status and a text that contains `part`. Otherwise the text is printed.
template <class Action>
bool fails(ddpmx_status status, const std::string &part, Action action) {
  try {
    action();
  } catch (const ddpmx::Failure &failure) {
    const bool as_wanted = failure.status == status && std::string(failure.what()).find(part) != std::string::npos;
    if (!as_wanted) std::fprintf(stderr, "status %d, not %d: %s\n", failure.status, status, failure.what());
    return as_wanted;
  }
  std::fprintf(stderr, "no failure where '%s' was expected\n", part.c_str());
  return false;
}

inline int finish() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace ddpmx_test

#define CHECK(condition) ddpmx_test::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
