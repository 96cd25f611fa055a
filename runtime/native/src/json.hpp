// A JSON reader for specs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace ddpmx {

// A value. Numbers that are written without a point and fit are int64; all others are finite doubles, rounded correctly
// in every locale.
struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value = nullptr;

  template <class T>
  const T *as() const { return std::get_if<T>(&value); }
  const Json *get(const std::string &key) const;  // of an object, or nullptr
  bool operator==(const Json &other) const { return value == other.value; }
  bool operator!=(const Json &other) const { return !(*this == other); }
};

// The one value in a text. Failure(DDPMX_SPEC): not JSON, NaN or an infinity, or nested deeper than 64. Of two members with
// one name the last counts, as in Python.
Json parse_json(std::string_view text);

// For messages: compact JSON, printable ASCII, at most `most` bytes.
std::string shown(const Json &value, size_t most = 200);

}  // namespace ddpmx
