// The floating-point environment in which everything here is computed.
#pragma once

#include <cfenv>

namespace ddpmx {

// Sets the default environment as long as it lives: rounding to nearest, with subnormal numbers. A program may have set
// another one, which would change every image.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats &) = delete;
  DefaultFloats &operator=(const DefaultFloats &) = delete;

  // The result of `action` in the program's own environment.
  template <class Action>
  auto aside(Action action) const {
    std::fesetenv(&saved_);
    struct Back {
      ~Back() { std::fesetenv(FE_DFL_ENV); }
    } back;
    return action();
  }

 private:
  std::fenv_t saved_;
};

}  // namespace ddpmx
