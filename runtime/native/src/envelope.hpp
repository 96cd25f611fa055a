// An envelope: a short JSON object inside a file of another format, "PREFIX LENGTH CRC32 {…}". See
// runtime/ddpmx/formats/envelope.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "json.hpp"

namespace ddpmx {

// The CRC32 of zlib, PNG and zip.
uint32_t crc32(const void *data, size_t size);

// The value in an envelope. Failure(DDPMX_SPEC): not an envelope, truncated or changed.
Json unwrap(std::string_view prefix, std::string_view text);

// Finds the intact envelopes in any bytes, one after the other. Damaged ones are skipped.
class EnvelopeSearch {
 public:
  // budget: how many candidates are checked; each costs a checksum of up to 9999 bytes.
  EnvelopeSearch(std::string_view prefix, std::string_view data, size_t &budget);

  // The next one, a part of `data`; nothing if there are no more, or the budget is spent.
  std::optional<std::string_view> next();

  // Where the last one ended.
  size_t end() const { return end_; }

 private:
  const std::string start_;
  const std::string_view data_;
  size_t &budget_;
  size_t at_ = 0, end_ = 0;
};

// The position of `what` in `bytes`, from `from` on, or npos: std::string_view::find at the speed of memchr with any
// standard library. memmem would do, but AddressSanitizer makes it read all of `bytes` on each call.
size_t find(std::string_view bytes, std::string_view what, size_t from);

// The bytes of a base64 text. Failure(DDPMX_SPEC): not base64.
std::string base64_decode(std::string_view text);

}  // namespace ddpmx
