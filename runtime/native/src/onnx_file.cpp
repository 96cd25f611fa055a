// The metadata, inputs and outputs of an ONNX file. An ONNX file is a protobuf message: only the few fields that matter
// here are read, names and numbers as in onnx.proto. See runtime/ddpmx/formats/onnx_file.py.
#include <algorithm>
#include <cerrno>
#include <iterator>
#include <set>

#include "error.hpp"
#include "model_file.hpp"
#include "protobuf.hpp"

namespace ddpmx {
namespace {

constexpr char kMetadataKey[] = "ddpmx", kBetasKey[] = "ddpmx.betas";
constexpr uint64_t kFloat = 1, kInt32 = 6;  // ONNX element types
constexpr int kMaxGraphDepth = 32;          // subgraphs within subgraphs; real models have a handful
constexpr size_t kMaxDims = 64;             // more than any library supports
constexpr size_t kMaxNames = 1 << 16;       // inputs, files and so on: each takes more memory than bytes in the file
constexpr size_t kMaxPath = 4096;           // bytes, as Linux has it
constexpr size_t kMaxSpec = 1 << 20;        // bytes of ddpmx_open_options.spec
constexpr size_t kMaxNote = 400;

// The two fields of a message that is a key and a value. If a field is repeated, the last one counts.
std::pair<Field, Field> entry(std::string_view message) {
  std::pair<Field, Field> found;
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number == 1) found.first = field;
    if (field.number == 2) found.second = field;
  }
  return found;
}

// --- the walk through all graphs, for references to other files ------------------------------------------------------

class Walk {
 public:
  // Each location once, in the order in which they were found.
  std::vector<std::string> external() const { return {external_.begin(), external_.end()}; }

  void graph(std::string_view message, int depth) {
    if (depth > kMaxGraphDepth) throw Malformed{"graphs nested deeper than " + std::to_string(kMaxGraphDepth)};
    Fields fields(message);
    for (Field field; fields.next(field);) {
      if (field.number == 1) node(field.as_message(), depth);
      if (field.number == 5) tensor(field.as_message());   // initializer
      if (field.number == 15) sparse(field.as_message());  // sparse_initializer
    }
  }

  void node(std::string_view message, int depth) {
    Fields fields(message);
    for (Field field; fields.next(field);) {
      if (field.number == 5) attribute(field.as_message(), depth);
    }
  }

  void attribute(std::string_view message, int depth) {
    Fields fields(message);
    for (Field field; fields.next(field);) {
      const uint64_t n = field.number;
      if (n == 5 || n == 10) tensor(field.as_message());            // t, tensors
      if (n == 6 || n == 11) graph(field.as_message(), depth + 1);  // g, graphs
      if (n == 22 || n == 23) sparse(field.as_message());           // sparse_tensor, sparse_tensors
    }
  }

 private:
  void sparse(std::string_view message) {
    Fields fields(message);
    for (Field field; fields.next(field);) {
      if (field.number == 1 || field.number == 2) external_data(field.as_message());  // values, indices
    }
  }

  void tensor(std::string_view message) {
    external_data(message);
    Fields fields(message);
    for (Field field; fields.next(field);) {
      if (field.number == 1 && !field.is_number()) {  // dims, packed
        for (std::string_view rest = field.as_message(); !rest.empty();) take_varint(rest);
      }
      if (field.number == 2) field.as_number();  // data_type
    }
  }

  void external_data(std::string_view message) {
    Fields fields(message);
    for (Field field; fields.next(field);) {
      if (field.number != 13) continue;
      const auto [key, value] = entry(field.as_message());
      if (key.as_message() != "location") continue;
      const std::string_view location = value.as_message();
      if (!seen_.insert(location).second) continue;
      if (seen_.size() > kMaxNames) throw Malformed{"weights in more than " + std::to_string(kMaxNames) + " files"};
      external_.push_back(location);
    }
  }

  std::set<std::string_view> seen_;
  std::vector<std::string_view> external_;
};

// --- inputs and outputs ----------------------------------------------------------------------------------------------

Dim dim_of(std::string_view message) {
  Dim dim;
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number == 1) {
      dim.size = static_cast<int64_t>(std::min<uint64_t>(field.as_number(), INT64_MAX));
      break;
    }
    if (field.number == 2) {
      dim.name = field.as_text();
      break;
    }
  }
  return dim;
}

std::vector<Dim> dims_of(std::string_view message) {
  std::vector<Dim> dims;
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number != 1) continue;
    if (dims.size() == kMaxDims) throw Malformed{"a tensor of more than " + std::to_string(kMaxDims) + " dimensions"};
    dims.push_back(dim_of(field.as_message()));
  }
  return dims;
}

// ValueInfoProto.
std::pair<std::string, TensorInfo> value_info(std::string_view message) {
  std::pair<std::string, TensorInfo> info;
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number == 1) info.first = field.as_text();
    if (field.number != 2) continue;
    Fields types(field.as_message());
    for (Field type; types.next(type);) {
      if (type.number != 1) continue;  // tensor_type
      Fields parts(type.as_message());
      for (Field part; parts.next(part);) {
        if (part.number == 1) info.second.element_type = part.as_number();
        if (part.number == 2) info.second.dims = dims_of(part.as_message());
      }
    }
  }
  return info;
}

template <class Map, class Value>
void keep(Map &map, std::string name, Value value) {
  map.insert_or_assign(std::move(name), std::move(value));
  if (map.size() > kMaxNames) throw Malformed{"more than " + std::to_string(kMaxNames) + " names of one kind"};
}

std::string_view tensor_name(std::string_view message) {
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number == 8) return field.as_message();
  }
  return "";
}

// --- the model -------------------------------------------------------------------------------------------------------

void read_graph(std::string_view message, GraphInfo &info) {
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number != 11 && field.number != 12) continue;
    auto [name, tensor] = value_info(field.as_message());
    keep(field.number == 11 ? info.inputs : info.outputs, std::move(name), std::move(tensor));
  }
  // IR versions before 4 demand every initializer among the inputs
  fields = Fields(message);
  for (Field field; fields.next(field);) {
    if (field.number != 5) continue;
    const auto weight = info.inputs.find(tensor_name(field.as_message()));
    if (weight != info.inputs.end()) info.inputs.erase(weight);
  }
}

GraphInfo read_model(std::string_view message) {
  GraphInfo info;
  Walk walk;
  int graphs = 0;
  Fields fields(message);
  for (Field field; fields.next(field);) {
    if (field.number == 7) {  // graph
      if (++graphs > 1) throw Malformed{"more than one graph in the file"};
      read_graph(field.as_message(), info);
      walk.graph(field.as_message(), 0);
    } else if (field.number == 8) {  // opset_import: domain, version
      const auto [domain, version] = entry(field.as_message());
      const std::string_view name = domain.as_message();
      if ((name.empty() || name == "ai.onnx") && version.number != 0) version.as_number();
    } else if (field.number == 14) {  // metadata_props
      const auto [key, value] = entry(field.as_message());
      keep(info.metadata, key.as_text(), value.as_text());
    } else if (field.number == 20) {  // training_info: two graphs
      Fields parts(field.as_message());
      for (Field part; parts.next(part);) {
        if (part.number == 1 || part.number == 2) walk.graph(part.as_message(), 1);
      }
    } else if (field.number == 25) {  // functions
      Fields parts(field.as_message());
      for (Field part; parts.next(part);) {
        if (part.number == 7) walk.node(part.as_message(), 1);
        if (part.number == 11) walk.attribute(part.as_message(), 1);  // an attribute's default
      }
    }
  }
  if (graphs == 0) throw Malformed{"no graph in the file"};
  info.external = walk.external();
  return info;
}

// --- the contract ----------------------------------------------------------------------------------------------------

std::string shape_of(const std::vector<Dim> &dims) {
  std::string out = "[";
  for (const Dim &dim : dims) {
    if (out.size() > 1) out += ", ";
    out += dim.size >= 0 ? std::to_string(dim.size) : dim.name.empty() ? "?" : in_quotes(dim.name);
  }
  return out + "]";
}

std::string wanted_shape(const std::vector<int64_t> &dims) {
  std::string out = "['batch'";
  for (const int64_t dim : dims) out += ", " + std::to_string(dim);
  return out + "]";
}

// Whether a tensor can be [batch, *wanted]: dynamic dimensions fit.
bool fits(const std::vector<Dim> &dims, const std::vector<int64_t> &wanted) {
  if (dims.size() != 1 + wanted.size() || dims[0].size >= 0) return false;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const int64_t size = dims[i + 1].size;
    if (size >= 0 && size != wanted[i]) return false;
  }
  return true;
}

// "x float32 [batch, C, H, W] and t int32 [batch]"
std::string listed(const std::vector<Input> &inputs) {
  std::string out;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string &name = inputs[i].name;
    if (i > 0) out += i + 1 == inputs.size() ? " and " : ", ";
    out += name + (inputs[i].is_int ? " int32 [batch" : " float32 [batch");
    out += name == "cond" ? ", K, H, W]" : name == "t" || name == "y" ? "]" : ", C, H, W]";
  }
  return out;
}

// The name of an ONNX element type.
std::string type_name(uint64_t type) {
  static const char *const kNames[] = {
      "float32", "uint8",   "int8",   "uint16", "int16",     "int32",      "int64",    "string",
      "bool",    "float16", "float64", "uint32", "uint64",    "complex64",  "complex128", "bfloat16",
      "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "uint4", "int4", "float4e2m1"};
  if (type < 1 || type > std::size(kNames)) return "of ONNX's type " + std::to_string(type);
  return kNames[type - 1];
}

// Collects faults, as many as are shown.
class Faults {
 public:
  void add(const std::string &fault) {
    if (note_.size() < kMaxNote) note_ += (note_.empty() ? "" : "; ") + fault;
  }

  // kind: "input" or "output".
  void check(const std::map<std::string, TensorInfo, std::less<>> &tensors, const std::string &kind,
             const std::string &name, bool is_int, const std::vector<int64_t> &dims) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return add("missing " + kind + " '" + name + "'");
    const TensorInfo &tensor = found->second;
    const uint64_t type = is_int ? kInt32 : kFloat;
    if (tensor.element_type != type) {
      add("'" + name + "' is " + type_name(tensor.element_type) + ", not " + type_name(type));
    }
    if (tensor.dims && !fits(*tensor.dims, dims)) {
      add("'" + name + "' has the shape " + shape_of(*tensor.dims) + ", not " + wanted_shape(dims));
    }
  }

  const std::string &note() const { return note_; }

 private:
  std::string note_;
};

// x: float32 [batch, C, H, W], t: int32 [batch] → one output, named by what it predicts, float32 [batch, C, H, W].
//
// With a learned variance there is one more of that shape, var. The spec declares the conditioning inputs:
// y: int32 [batch], x0_prev: float32 [batch, C, H, W], cond: float32 [batch, K, H, W].
void check_contract(const std::string &path, const GraphInfo &info, const Spec &spec) {
  const std::vector<Input> inputs = spec.inputs();
  const std::vector<std::string> outputs = spec.outputs();
  Faults faults;
  for (const auto &[name, tensor] : info.inputs) {
    const auto is_it = [&name = name](const Input &input) { return input.name == name; };
    if (std::none_of(inputs.begin(), inputs.end(), is_it)) faults.add("unexpected input " + in_quotes(name));
  }
  for (const auto &[name, tensor] : info.outputs) {
    if (std::find(outputs.begin(), outputs.end(), name) == outputs.end()) {
      faults.add("unexpected output " + in_quotes(name));
    }
  }
  for (const Input &input : inputs) faults.check(info.inputs, "input", input.name, input.is_int, input.dims);
  for (const std::string &output : outputs) {
    faults.check(info.outputs, "output", output, false, {spec.channels, spec.height, spec.width});
  }
  if (faults.note().empty()) return;
  std::string returns;
  for (const std::string &output : outputs) returns += (returns.empty() ? "'" : " and '") + output + "'";
  throw Failure(DDPMX_SPEC, path + ": the graph does not match the spec", faults.note().substr(0, kMaxNote),
                "export it so that it takes " + listed(inputs) + ", and returns " + returns);
}

// Whether `path` is `folder` or lies within it; neither ends with a slash.
bool within(const std::string &path, const std::string &folder) {
  return path == folder || folder == "/" ||
         (path.size() > folder.size() && path[folder.size()] == '/' && path.compare(0, folder.size(), folder) == 0);
}

}  // namespace

GraphInfo read_onnx(const std::string &path, std::string_view bytes) {
  try {
    return read_model(bytes);
  } catch (const Malformed &error) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": not a valid ONNX file",
                  std::to_string(bytes.size()) + " bytes; " + error.why, "export or download it again");
  }
}

void check_external(const std::string &path, const GraphInfo &info) {
  int error = 0;
  const std::string file = resolved(path, error);
  const std::string folder = file.substr(0, std::max<size_t>(file.rfind('/'), 1));
  for (const std::string &location : info.external) {
    const bool absolute = !location.empty() && location[0] == '/';
    std::string target;
    bool present = false;
    error = location.find('\0') != location.npos ? EINVAL : location.size() >= kMaxPath ? ENAMETOOLONG : 0;
    if (error == 0) target = resolved(absolute ? location : folder + "/" + location, error);
    if (error == 0) present = is_file(target, error);
    if (error != 0) {
      throw Failure(DDPMX_FILE_FORMAT, path + ": invalid path of a weights file",
                    in_quotes(location) + ": " + reason(error));
    }
    // A model that can name any file on the machine could read what its user did not mean to disclose.
    // To ONNX Runtime "*/_ORT_MEM_ADDR_/*" is an address in memory.
    if (location.empty() || absolute || location.find_first_of("\\*") != location.npos || !within(target, folder)) {
      throw Failure(DDPMX_FILE_FORMAT, path + ": weights file outside its own folder",
                    "external data at " + in_quotes(location),
                    "do not run this file unless you know who made it; re-export it otherwise");
    }
    if (!present) {
      throw Failure(DDPMX_FILE_FORMAT, path + ": missing weights file",
                    in_quotes(location) + " should be beside it");
    }
  }
}

// --- the spec --------------------------------------------------------------------------------------------------------

// The numbers of a schedule "betas" may be in the spec itself, or in "betas" beside it.
Spec given_spec(const std::string &text) {
  try {
    if (text.size() > kMaxSpec) {
      throw Failure(DDPMX_SPEC, "too large for a spec", "more than " + std::to_string(kMaxSpec) + " bytes");
    }
    const Json values = parse_json(text);
    if (values.as<Json::Object>() == nullptr) {
      throw Failure(DDPMX_SPEC, "a spec must be a JSON object", "this is " + shown(values, 100));
    }
    const Json *model = values.get("model");
    const Json *beside = model != nullptr ? values.get("betas") : nullptr;
    std::vector<double> betas;
    if (beside != nullptr && beside->as<std::nullptr_t>() == nullptr) betas = betas_from_json(*beside);
    return spec_from_json(model != nullptr ? *model : values, betas.empty() ? nullptr : &betas,
                          "\"betas\": [β, …] of the given spec");
  } catch (const Failure &failure) {
    const bool is_path = text.find('{') == std::string::npos;
    throw Failure(DDPMX_SPEC, "ddpmx_open_options.spec: " + failure.fact, failure.note,
                  is_path ? "pass the JSON itself, not the name of a file" : failure.hint);
  }
}

Spec onnx_spec(const std::string &path, const GraphInfo &info, const std::string &override_json) {
  const auto text = info.metadata.find(kMetadataKey), beside = info.metadata.find(kBetasKey);
  const bool has_own = text != info.metadata.end();
  if (!has_own && override_json.empty()) {
    throw Failure(DDPMX_SPEC, path + ": the file does not say which diffusion model it is",
                  "an ONNX file, but without the metadata 'ddpmx' that `ddpmx export` writes",
                  "if you know its schedule and prediction, pass them in ddpmx_open_options.spec");
  }
  std::optional<Spec> given;
  if (!override_json.empty()) given = given_spec(override_json);
  Spec spec;
  if (has_own) {
    try {
      std::vector<double> betas;
      if (beside != info.metadata.end()) betas = betas_from_text(beside->second);
      spec = spec_from_text(text->second, betas.empty() ? nullptr : &betas, "the file's metadata 'ddpmx.betas'");
    } catch (const Failure &failure) {
      throw at(path, failure);
    }
    if (given && !same_model(*given, spec)) {
      throw Failure(DDPMX_SPEC, path + ": the given spec contradicts the one in the file",
                    "a spec in the file takes precedence", "leave out ddpmx_open_options.spec");
    }
  } else {
    spec = *given;
  }
  check_contract(path, info, spec);
  return spec;
}

}  // namespace ddpmx
