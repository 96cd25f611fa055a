// Short JSON that travels inside files of other formats: "PREFIX LENGTH CRC32 {…}". See runtime/ddpmx/formats/envelope.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "json.hpp"

namespace ddpmx {

// Of zlib, PNG and zip.
uint32_t crc32(const void *data, size_t size);

// The value in an envelope. Failure(DDPMX_SPEC): foreign, shortened or changed.
Json unwrap(std::string_view prefix, std::string_view text);

// Finds whole envelopes in any bytes, one after the other. Damaged ones are passed over.
class SealedTexts {
 public:
  // budget: how many places that look like one are looked at; each costs a checksum of up to 9999 bytes.
  SealedTexts(std::string_view prefix, std::string_view data, size_t &budget);

  // The next one, a part of `data`; nothing where there is no more, or the budget is spent.
  std::optional<std::string_view> next();

  // Where the last one ended.
  size_t end() const { return end_; }

 private:
  const std::string start_;
  const std::string_view data_;
  size_t &budget_;
  size_t at_ = 0, end_ = 0;
};

// Where `what` stands in `bytes`, from `from` on, or npos: std::string_view::find at the speed of memchr, whatever the
// standard library. memmem would do, but AddressSanitizer makes it look at all of `bytes` on each call.
size_t find(std::string_view bytes, std::string_view what, size_t from);

// The bytes of a base64 text. Failure(DDPMX_SPEC): it is none.
std::string base64_decode(std::string_view text);

}  // namespace ddpmx
