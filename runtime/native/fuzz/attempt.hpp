// The condition that fuzzing checks: a reader succeeds, or throws a Failure with a text. Any other exception ends the
// program, and so does an error that the sanitizers find.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <string>

#include "error.hpp"

namespace ddpmx_fuzz {

// Whether `action` succeeded.
template <class Action>
bool attempt(Action action) {
  try {
    action();
    return true;
  } catch (const ddpmx::Failure &failure) {
    const std::string text = failure.what();
    const bool of_files = failure.status == DDPMX_FILE_FORMAT || failure.status == DDPMX_SPEC;
    if (!of_files || failure.fact.empty() || text.size() > 2000) std::abort();
    return false;
  }
}

}  // namespace ddpmx_fuzz
