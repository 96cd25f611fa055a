#include "error.hpp"

#include <cstdint>
#include <string_view>

#include "utf8.hpp"

namespace ddpmx {
namespace {

// Bytes of a fact, a note or a hint: text from a file may have any length.
constexpr size_t kMaxPart = 600, kEnd = 150, kBeginning = kMaxPart - kEnd - 3;

void append_hexadecimal(std::string &out, std::string_view bytes) {
  for (const char byte : bytes) {
    const char *digits = "0123456789abcdef";
    out += "\\x";
    out += digits[static_cast<uint8_t>(byte) >> 4];
    out += digits[static_cast<uint8_t>(byte) & 15];
  }
}

// The text with control characters and invalid UTF-8, which a path may hold, written as \xNN.
std::string escaped(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = code_point(text, at);
    const std::string_view bytes = text.substr(at, point.size);
    at += point.size;
    if (point.value == kNoCodePoint || point.value < 0x20 || point.value == 0x7F) {
      append_hexadecimal(out, bytes);
    } else {
      out += bytes;
    }
  }
  return out;
}

// The text, or its beginning and its end if it is too long.
std::string shortened(const std::string &given) {
  const std::string text = escaped(given);
  if (text.size() <= kMaxPart) return text;
  size_t beginning = kBeginning, end = text.size() - kEnd;
  while (beginning > 0 && is_continuation(text[beginning])) --beginning;
  while (end < text.size() && is_continuation(text[end])) ++end;
  return text.substr(0, beginning) + " … " + text.substr(end);
}

}  // namespace

Failure::Failure(ddpmx_status status, std::string fact, std::string note, std::string hint)
    : status(status), fact(shortened(fact)), note(shortened(note)), hint(shortened(hint)), text_(this->fact) {
  if (!this->note.empty()) text_ += "\nNote: " + this->note;
  if (!this->hint.empty()) text_ += "\nHint: " + this->hint;
}

Failure at(const std::string &where, const Failure &failure) {
  return Failure(failure.status, where + ": " + failure.fact, failure.note, failure.hint);
}

std::string in_quotes(std::string_view text, size_t most) {
  if (text.size() > most) {
    while (most > 0 && is_continuation(text[most])) --most;
    text = text.substr(0, most);
  }
  const bool single = text.find('\'') == text.npos || text.find('"') != text.npos;
  const char quote = single ? '\'' : '"';
  std::string out(1, quote);
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = code_point(text, at);
    const std::string_view bytes = text.substr(at, point.size);
    at += point.size;
    if (bytes[0] == quote || bytes[0] == '\\') {
      out += '\\';
      out += bytes;
    } else if (is_printable(point.value)) {
      out += bytes;
    } else {
      append_hexadecimal(out, bytes);
    }
  }
  return out += quote;
}

std::string shell_word(const std::string &word) {
  const std::string_view plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+=:,./-";
  if (!word.empty() && word.find_first_not_of(plain) == word.npos) return word;
  std::string out = "'";
  for (const char c : word) out += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
  return out + "'";
}

bool printable(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = code_point(text, at);
    if (!is_printable(point.value)) return false;
    at += point.size;
  }
  return true;
}

}  // namespace ddpmx
