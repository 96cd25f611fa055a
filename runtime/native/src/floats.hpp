// The floating-point environment in which everything here is computed.
#pragma once

#include <cfenv>

namespace ddpmx {

// The usual one as long as it lives: rounding to nearest, subnormal numbers as they are. A program may have set another
// for itself, in which every image would be another too.
class UsualFloats {
 public:
  UsualFloats() {
    std::fegetenv(&theirs_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~UsualFloats() { std::fesetenv(&theirs_); }
  UsualFloats(const UsualFloats &) = delete;
  UsualFloats &operator=(const UsualFloats &) = delete;

  // What `action` gives in the program's own environment.
  template <class Action>
  auto aside(Action action) const {
    std::fesetenv(&theirs_);
    struct Back {
      ~Back() { std::fesetenv(FE_DFL_ENV); }
    } back;
    return action();
  }

 private:
  std::fenv_t theirs_;
};

}  // namespace ddpmx
