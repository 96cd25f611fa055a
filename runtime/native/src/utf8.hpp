// UTF-8, one code point at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ddpmx {

inline bool is_continuation(char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; }

// The value for a byte that is not part of a valid sequence.
constexpr uint32_t kNoCodePoint = 0xFFFFFFFF;

struct CodePoint {
  uint32_t value;  // or kNoCodePoint
  size_t size;     // in bytes, 1…4
};

inline bool is_surrogate(uint32_t value) { return value >= 0xD800 && value <= 0xDFFF; }

// The code point at `at`, which is within `text`. Surrogates are decoded although they are not text: JSON can spell them.
// Overlong sequences and values beyond U+10FFFF are not code points.
inline CodePoint code_point(std::string_view text, size_t at) {
  const uint8_t lead = static_cast<uint8_t>(text[at]);
  if (lead < 0x80) return {lead, 1};
  const size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || size > text.size() - at) return {kNoCodePoint, 1};
  uint32_t value = lead & (0x7F >> size);
  for (size_t i = 1; i < size; ++i) {
    if (!is_continuation(text[at + i])) return {kNoCodePoint, 1};
    value = value << 6 | (static_cast<uint8_t>(text[at + i]) & 0x3F);
  }
  const uint32_t least = size == 4 ? 0x10000 : size == 3 ? 0x800 : 0x80;
  return value < least || value > 0x10FFFF ? CodePoint{kNoCodePoint, 1} : CodePoint{value, size};
}

inline void append_utf8(std::string &out, uint32_t value) {
  if (value < 0x80) {
    out += static_cast<char>(value);
    return;
  }
  const int more = value >= 0x10000 ? 3 : value >= 0x800 ? 2 : 1;
  out += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | value >> 6 * more);
  for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (value >> 6 * i & 0x3F));
}

// Whether a code point is printable: not a control or format character, separator (but for the space), surrogate or of
// private use. These are Unicode's general categories C and Z, as in str.isprintable(); unassigned ones count as printable.
inline bool is_printable(uint32_t value) {
  constexpr struct {
    uint32_t first, last;
  } hidden[] = {{0x00, 0x1F},       {0x7F, 0xA0},           {0xAD, 0xAD},       {0x600, 0x605},     {0x61C, 0x61C},
                {0x6DD, 0x6DD},     {0x70F, 0x70F},         {0x890, 0x891},     {0x8E2, 0x8E2},     {0x1680, 0x1680},
                {0x180E, 0x180E},   {0x2000, 0x200F},       {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},
                {0xD800, 0xF8FF},   {0xFDD0, 0xFDEF},       {0xFEFF, 0xFEFF},   {0xFFF0, 0xFFFB},   {0xFFFE, 0xFFFF},
                {0x110BD, 0x110BD}, {0x110CD, 0x110CD},     {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
                {0xE0000, 0xE00FF}, {0xE01F0, kNoCodePoint}};
  for (const auto &range : hidden) {
    if (value <= range.last) return value < range.first;
  }
  return false;
}

}  // namespace ddpmx
