#include "envelope.hpp"

#include <array>
#include <cstring>

#include "error.hpp"
#include "utf8.hpp"

namespace ddpmx {
namespace {

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    table[byte] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = make_crc_table();

struct Header {
  size_t size;    // of the header itself
  size_t length;  // of the body
  uint32_t crc;
};

// "LENGTH CRC32 " at the beginning of `text`: one to four digits, eight lower hexadecimal ones.
std::optional<Header> header_of(std::string_view text) {
  size_t at = 0, length = 0;
  while (at < text.size() && at < 4 && text[at] >= '0' && text[at] <= '9') {
    length = length * 10 + static_cast<size_t>(text[at++] - '0');
  }
  if (at == 0 || text.size() < at + 10 || text[at] != ' ' || text[at + 9] != ' ') return std::nullopt;
  uint32_t crc = 0;
  for (const char digit : text.substr(at + 1, 8)) {
    const bool decimal = digit >= '0' && digit <= '9';
    if (!decimal && !(digit >= 'a' && digit <= 'f')) return std::nullopt;
    crc = crc << 4 | static_cast<uint32_t>(decimal ? digit - '0' : digit - 'a' + 10);
  }
  return Header{at + 10, length, crc};
}

bool is_text(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = code_point(text, at);
    if (point.value == kNoCodePoint || is_surrogate(point.value)) return false;
    at += point.size;
  }
  return true;
}

}  // namespace

uint32_t crc32(const void *data, size_t size) {
  const uint8_t *bytes = static_cast<const uint8_t *>(data);
  uint32_t crc = 0xFFFFFFFF;
  for (size_t i = 0; i < size; ++i) crc = kCrcTable[(crc ^ bytes[i]) & 0xFF] ^ crc >> 8;
  return ~crc;
}

Json unwrap(std::string_view prefix, std::string_view text) {
  const std::string start = std::string(prefix) + " ";
  const bool begins = text.substr(0, start.size()) == start;
  const std::optional<Header> header = begins ? header_of(text.substr(start.size())) : std::nullopt;
  if (!header) throw Failure(DDPMX_SPEC, "the text is not a ddpmx spec", "it begins with " + in_quotes(text, 24));
  const std::string_view body = text.substr(start.size() + header->size);
  if (body.size() != header->length || crc32(body.data(), body.size()) != header->crc || !is_text(body)) {
    throw Failure(
        DDPMX_SPEC, "the ddpmx spec in the file is damaged",
        std::to_string(body.size()) + " bytes where it says " + std::to_string(header->length) + ", or another CRC",
        "export the model again");
  }
  return parse_json(body);
}

EnvelopeSearch::EnvelopeSearch(std::string_view prefix, std::string_view data, size_t &budget)
    : start_(std::string(prefix) + " "), data_(data), budget_(budget) {}

std::optional<std::string_view> EnvelopeSearch::next() {
  while (budget_ > 0 && at_ < data_.size()) {
    const size_t begin = find(data_, start_, at_);
    if (begin == data_.npos) break;
    at_ = begin + start_.size();
    const std::optional<Header> header = header_of(data_.substr(at_));
    if (!header) continue;
    --budget_;
    at_ += header->size;
    if (header->length > data_.size() - at_ || crc32(data_.data() + at_, header->length) != header->crc) continue;
    end_ = at_ + header->length;
    return data_.substr(begin, end_ - begin);
  }
  at_ = data_.size();
  return std::nullopt;
}

size_t find(std::string_view bytes, std::string_view what, size_t from) {
  while (what.size() <= bytes.size() && from <= bytes.size() - what.size()) {
    const size_t starts = bytes.size() - what.size() - from + 1;
    const void *first = std::memchr(bytes.data() + from, what[0], starts);
    if (first == nullptr) break;
    from = static_cast<size_t>(static_cast<const char *>(first) - bytes.data());
    if (std::memcmp(first, what.data(), what.size()) == 0) return from;
    ++from;
  }
  return bytes.npos;
}

std::string base64_decode(std::string_view text) {
  const size_t digits = text.find_last_not_of('=') + 1, pads = text.size() - digits;
  std::string bytes;
  bytes.reserve(digits / 4 * 3 + 2);
  uint32_t bits = 0;
  bool good = pads <= 2;
  for (size_t i = 0; i < digits && good; ++i) {
    const char c = text[i];
    const int value = c >= 'A' && c <= 'Z'   ? c - 'A'
                      : c >= 'a' && c <= 'z' ? c - 'a' + 26
                      : c >= '0' && c <= '9' ? c - '0' + 52
                      : c == '+'             ? 62
                      : c == '/'             ? 63
                                             : -1;
    good = value >= 0;
    bits = bits << 6 | static_cast<uint32_t>(value & 63);
    if (i % 4 > 0) bytes += static_cast<char>(bits >> (6 - 2 * (i % 4)));
  }
  const size_t rest = digits % 4;
  if (!good || rest == 1 || (rest > 0 && pads < 4 - rest)) {
    throw Failure(DDPMX_SPEC, "not base64", "it begins with " + in_quotes(text, 24));
  }
  return bytes;
}

}  // namespace ddpmx
