// Files made byte by byte, good and wrong, as in tests/oracles/{protobuf,plans}.py.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "envelope.hpp"

namespace ddpmx_test {

inline std::string varint(uint64_t number) {
  std::string out;
  for (; number > 0x7F; number >>= 7) out += static_cast<char>(number | 0x80);
  return out += static_cast<char>(number);
}

// One field of a protobuf message: a number, or a text or message.
inline std::string field(uint64_t number, uint64_t value) { return varint(number << 3) + varint(value); }
inline std::string field(uint64_t number, const std::string &value) {
  return varint(number << 3 | 2) + varint(value.size()) + value;
}

// ValueInfoProto. dims: a number, or a name in quotes, or "" for neither.
inline std::string value_info(const std::string &name, uint64_t type, const std::vector<std::string> &dims) {
  std::string shape;
  for (const std::string &dim : dims) {
    const bool named = dim.empty() || dim[0] < '0' || dim[0] > '9';
    shape += field(1, dim.empty() ? "" : named ? field(2, dim) : field(1, std::stoull(dim)));
  }
  return field(1, name) + field(2, field(1, field(1, type) + field(2, shape)));
}

// TensorProto: one float32 whose bytes are in the file `location`.
inline std::string external_tensor(const std::string &location) {
  return field(1, 1) + field(2, 1) + field(8, "w") + field(13, field(1, "location") + field(2, location)) +
         field(14, 1);
}

// NodeProto with one attribute: `part` is 5 for a tensor, 6 for a graph, 10 and 11 for several, 22 and 23 for sparse
// ones.
inline std::string node(uint64_t part, const std::string &value) {
  return field(4, "Constant") + field(5, field(1, "value") + field(part, value));
}

// ModelProto.
inline std::string model(const std::string &graph, const std::string &rest = "") {
  return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 20)) + rest;
}

inline std::string metadata(const std::string &key, const std::string &value) {
  return field(14, field(1, key) + field(2, value));
}

inline std::string envelope(const std::string &prefix, const std::string &body) {
  char header[32];
  std::snprintf(header, sizeof header, " %zu %08x ", body.size(), ddpmx::crc32(body.data(), body.size()));
  return prefix + header + body;
}

inline const std::string kSpec = R"({"shape":[3,8,8],"timesteps":20,"ddpmx":"0.1.0"})";
inline const std::string kOptions = R"({"level":3,"refit":false,"strip":false,"tf32":false,"workspace":null})";

// A record in JSON with one member replaced or added.
inline std::string record(const std::string &name = "", const std::string &value = "") {
  const std::string members[][2] = {{"batch", "[1,4,8]"},
                                    {"flavour", R"("TensorRT-RTX")"},
                                    {"key", '"' + std::string(64, 'b') + '"'},
                                    {"onnx", '"' + std::string(64, 'a') + '"'},
                                    {"options", kOptions},
                                    {"platform", R"("linux x86_64")"},
                                    {"source", R"("model.onnx")"},
                                    {"targets", R"(["8.0+"])"},
                                    {"version", R"("1.7.1.116")"}};
  std::string out;
  for (const auto &[key, member] : members) out += (out.empty() ? "{\"" : ",\"") + key + "\":" + member;
  if (!name.empty()) out += ",\"" + name + "\":" + value;  // of two members with the same name the last counts
  return out + "}";
}

inline std::string plan_name(const std::string &spec = kSpec, const std::string &engine = record()) {
  return envelope("ddpmx1", spec) + " " + envelope("engine1", engine);
}

inline std::string bytes_of(uint64_t number, size_t size) {
  std::string out;
  for (size_t i = 0; i < size; ++i) out += static_cast<char>(number >> 8 * i);
  return out;
}

// A plan: a header, the network's name, and filler; nothing else of it is read.
inline std::string plan(const std::string &name = plan_name(), const std::string &tail = "",
                        const std::string &magic = "vtrt", const std::string &version = std::string("\1\7\1\x74", 4)) {
  const std::string body = std::string(36, '\0') + name + std::string(64, '\0') + tail + std::string(64, '\0');
  return magic + std::string(12, '\0') + bytes_of(28 + body.size(), 8) + version + body;
}

// The head of a shared library for `machine` (e_machine).
inline std::string elf(uint64_t machine) {
  return std::string("\177ELF\2\1\1", 7) + std::string(9, '\0') + bytes_of(3, 2) + bytes_of(machine, 2) +
         std::string(44, '\0');
}

}  // namespace ddpmx_test
