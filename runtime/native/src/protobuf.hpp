// Protobuf's wire format, read field by field: nothing is copied, and every length is checked before it is used.
// See runtime/ddpmx/formats/protobuf.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace ddpmx {

// Not a protobuf message.
struct Malformed {
  std::string why;
};

// A number of up to ten bytes with seven bits in each, lowest first; so it can have 70 bits.
struct Varint {
  uint64_t low;  // its lower 64 bits
  bool over;     // whether there are more

  uint64_t saturated() const { return over ? UINT64_MAX : low; }
};

// Takes a number from the beginning of `bytes`.
inline Varint take_varint(std::string_view &bytes) {
  Varint number{0, false};
  for (unsigned shift = 0; shift < 70; shift += 7) {
    if (bytes.empty()) throw Malformed{"the end is inside a number"};
    const uint8_t byte = static_cast<uint8_t>(bytes[0]);
    bytes.remove_prefix(1);
    number.low |= static_cast<uint64_t>(byte & 0x7F) << shift;
    number.over |= shift == 63 && (byte & 0x7E) != 0;
    if (byte < 0x80) return number;
  }
  throw Malformed{"a number of more than ten bytes"};
}

// One field of a message: a number, or bytes.
class Field {
 public:
  uint64_t number = 0;  // of the field

  std::string_view as_message() const {
    if (is_number_) throw Malformed{"a number in place of a message"};
    return bytes_;
  }
  std::string as_text() const { return std::string(as_message()); }

  bool is_number() const { return is_number_; }

  // Capped at the largest uint64.
  uint64_t as_number() const {
    if (!is_number_) throw Malformed{"a message in place of a number"};
    return value_;
  }

 private:
  friend class Fields;
  bool is_number_ = false;
  uint64_t value_ = 0;
  std::string_view bytes_;
};

// The fields of a message, one after the other: for (Field field; fields.next(field);)
class Fields {
 public:
  explicit Fields(std::string_view message) : rest_(message) {}

  // False at the end.
  bool next(Field &field) {
    if (rest_.empty()) return false;
    const Varint key = take_varint(rest_);
    field.number = key.over ? UINT64_MAX : key.low >> 3;
    if (field.number == 0) throw Malformed{"a field numbered 0"};
    // other readers take a key modulo 2^32, and would see a different field
    if (field.number >= uint64_t{1} << 29) throw Malformed{"a field numbered beyond 2^29 - 1"};
    const unsigned wire_type = key.low & 7;
    field.is_number_ = wire_type == 0;
    if (field.is_number_) {
      field.value_ = take_varint(rest_).saturated();
      return true;
    }
    if (wire_type != 1 && wire_type != 2 && wire_type != 5) throw Malformed{"a field of wire type " + std::to_string(wire_type)};
    const uint64_t length = wire_type == 2 ? take_varint(rest_).saturated() : wire_type == 1 ? 8 : 4;
    if (length > rest_.size()) throw Malformed{std::to_string(length - rest_.size()) + " bytes are missing at the end"};
    field.bytes_ = rest_.substr(0, length);
    rest_.remove_prefix(length);
    return true;
  }

 private:
  std::string_view rest_;
};

}  // namespace ddpmx
