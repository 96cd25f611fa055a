#include "json.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "error.hpp"
#include "utf8.hpp"

namespace ddpmx {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxDigits = 4300;  // of a whole number, as in Python: text to number takes longer than linear time

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    if (text_.substr(0, 3) == "\xEF\xBB\xBF") at_ = 3;  // a byte order mark
    Json value = parse(0);
    skip_space();
    if (at_ < text_.size()) refuse("text after the end");
    return value;
  }

 private:
  [[noreturn]] void refuse(const std::string &what) const {
    throw Failure(DDPMX_SPEC, "not valid JSON", what + " at byte " + std::to_string(at_));
  }

  bool more() const { return at_ < text_.size(); }
  char peek() const { return more() ? text_[at_] : '\0'; }

  void skip_space() {
    while (more() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  // The value that begins here; depth: how many objects and arrays it lies in.
  Json parse(int depth) {
    if (depth >= kMaxDepth) refuse("nested deeper than " + std::to_string(kMaxDepth));
    skip_space();
    Json json;
    if (take("{")) {
      json.value = object(depth);
    } else if (take("[")) {
      json.value = array(depth);
    } else if (take("\"")) {
      json.value = string();
    } else if (take("true")) {
      json.value = true;
    } else if (take("false")) {
      json.value = false;
    } else if (!take("null")) {
      return number();
    }
    return json;
  }

  Json::Object object(int depth) {
    Json::Object members;
    skip_space();
    if (take("}")) return members;
    do {
      skip_space();
      if (!take("\"")) refuse("a member without a name");
      std::string name = string();
      skip_space();
      if (!take(":")) refuse("no ':'");
      members.insert_or_assign(std::move(name), parse(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("}")) refuse("no '}'");
    return members;
  }

  Json::Array array(int depth) {
    Json::Array items;
    skip_space();
    if (take("]")) return items;
    do {
      items.push_back(parse(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("]")) refuse("no ']'");
    return items;
  }

  std::string string() {
    std::string out;
    while (!take("\"")) {
      if (!more()) refuse("a text that does not end");
      if (take("\\")) {
        escape(out);
        continue;
      }
      const CodePoint point = code_point(text_, at_);
      if (point.value == kNoCodePoint) refuse("not UTF-8");
      if (point.value < 0x20) refuse("a control character");
      out += text_.substr(at_, point.size);
      at_ += point.size;
    }
    return out;
  }

  void escape(std::string &out) {
    constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
    if (take("u")) {
      uint32_t value = hexadecimal();
      const size_t after = at_;
      if (value >= 0xD800 && value <= 0xDBFF && take("\\u")) {
        const uint32_t low = hexadecimal();
        if (low >= 0xDC00 && low <= 0xDFFF) {
          value = 0x10000 + ((value & 0x3FF) << 10 | (low & 0x3FF));
        } else {
          at_ = after;
        }
      }
      append_utf8(out, value);
      return;
    }
    const size_t which = more() ? names.find(text_[at_]) : names.npos;
    if (which == names.npos) refuse("an escape that is not in JSON");
    out += values[which];
    ++at_;
  }

  uint32_t hexadecimal() {
    uint32_t value = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) refuse("not four hexadecimal digits");
    at_ += 4;
    return value;
  }

  size_t digits() {
    const size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ - start;
  }

  // Takes ".5" or "e-5". Without digits nothing is taken: the number ends before it, and the rest is refused later.
  bool take_with_digits(std::string_view start) {
    const size_t before = at_;
    if (!take(start)) return false;
    if (start != "." && !take("-")) take("+");
    if (digits() > 0) return true;
    at_ = before;
    return false;
  }

  Json number() {
    const size_t start = at_;
    take("-");
    const bool zero = peek() == '0';
    if (zero) ++at_;
    const size_t whole_digits = zero ? 1 : digits();
    if (whole_digits == 0) {
      at_ = start;
      refuse("no value");
    }
    const bool has_point = take_with_digits("."), has_exponent = take_with_digits("e") || take_with_digits("E");
    const std::string_view text = text_.substr(start, at_ - start);
    Json json;
    if (!has_point && !has_exponent) {
      if (whole_digits > kMaxDigits) refuse("a whole number of more than " + std::to_string(kMaxDigits) + " digits");
      int64_t value = 0;
      if (std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc()) {
        json.value = value;
        return json;
      }
    }
    json.value = real(text);
    return json;
  }

  double real(std::string_view text) const {
    double value = 0;
    const std::errc error = std::from_chars(text.data(), text.data() + text.size(), value).ec;
    if (error == std::errc()) return value;
    if (error == std::errc::result_out_of_range && is_tiny(text)) return text[0] == '-' ? -0.0 : 0.0;
    refuse("a number that does not fit into a double");
  }

  // Whether the number is out of range because it is near zero. It is too small or too large by hundreds of powers of ten.
  static bool is_tiny(std::string_view text) {
    const size_t e = std::min(text.find_first_of("eE"), text.size());
    const size_t first = text.find_first_of("123456789");  // there is one: zero is not out of range
    const size_t point = std::min(text.find('.'), e);
    int64_t exponent = 0;
    if (e < text.size()) {
      const bool negative = text[e + 1] == '-';
      const char *digits = text.data() + e + (text.find_first_of("+-", e) == e + 1 ? 2 : 1);
      if (std::from_chars(digits, text.data() + text.size(), exponent).ec != std::errc()) return negative;
      if (negative) exponent = -exponent;
    }
    const int64_t to_first = static_cast<int64_t>(point) - static_cast<int64_t>(first);
    return exponent < -to_first;  // a number of that many digits before the point
  }

  const std::string_view text_;
  size_t at_ = 0;
};

void show(const Json &json, size_t most, std::string &out);

void show_text(std::string_view text, size_t most, std::string &out) {
  out += '"';
  for (size_t at = 0; at < text.size() && out.size() <= most;) {
    const CodePoint point = code_point(text, at);
    const uint32_t value = point.value == kNoCodePoint ? 0xFFFD : point.value;
    at += point.size;
    char buffer[16];
    if (value == '"' || value == '\\') {
      out += '\\';
      out += static_cast<char>(value);
    } else if (value >= 0x20 && value < 0x7F) {
      out += static_cast<char>(value);
    } else if (value < 0x10000) {
      std::snprintf(buffer, sizeof buffer, "\\u%04x", static_cast<unsigned>(value));
      out += buffer;
    } else {
      std::snprintf(buffer, sizeof buffer, "\\u%04x\\u%04x", static_cast<unsigned>(0xD7C0 + (value >> 10)),
                    static_cast<unsigned>(0xDC00 | (value & 0x3FF)));
      out += buffer;
    }
  }
  out += '"';
}

void show_real(double value, std::string &out) {
  char buffer[40];
  const char *end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  const std::string_view digits(buffer, static_cast<size_t>(end - buffer));
  out += digits;
  if (digits.find_first_of(".e") == digits.npos) out += ".0";
}

// Appends; stops soon after `out` has more than `most` bytes.
struct Show {
  size_t most;
  std::string &out;

  void operator()(std::nullptr_t) const { out += "null"; }
  void operator()(bool value) const { out += value ? "true" : "false"; }
  void operator()(int64_t value) const { out += std::to_string(value); }
  void operator()(double value) const { show_real(value, out); }
  void operator()(const std::string &value) const { show_text(value, most, out); }

  void operator()(const Json::Array &items) const {
    const char *separator = "[";
    if (items.empty()) out += separator;
    for (const Json &item : items) {
      if (out.size() > most) return;
      out += separator;
      show(item, most, out);
      separator = ",";
    }
    out += ']';
  }

  void operator()(const Json::Object &members) const {
    const char *separator = "{";
    if (members.empty()) out += separator;
    for (const auto &[name, value] : members) {
      if (out.size() > most) return;
      out += separator;
      show_text(name, most, out);
      out += ':';
      show(value, most, out);
      separator = ",";
    }
    out += '}';
  }
};

void show(const Json &json, size_t most, std::string &out) { std::visit(Show{most, out}, json.value); }

}  // namespace

const Json *Json::get(const std::string &key) const {
  const Object *members = as<Object>();
  if (members == nullptr) return nullptr;
  const auto found = members->find(key);
  return found == members->end() ? nullptr : &found->second;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

std::string shown(const Json &value, size_t most) {
  std::string out;
  show(value, most, out);
  if (out.size() > most) out.resize(most);
  return out;
}

}  // namespace ddpmx
