// Model files, read from their bytes before any library opens them. See model_file.py, onnx_file.py and plan_file.py in
// runtime/ddpmx/formats.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "spec.hpp"

namespace ddpmx {

// A file's bytes, mapped. Failure(DDPMX_FILE_FORMAT): unreadable, or not a regular file.
class MappedFile {
 public:
  explicit MappedFile(const std::string &path);
  ~MappedFile();
  MappedFile(const MappedFile &) = delete;
  MappedFile &operator=(const MappedFile &) = delete;
  std::string_view bytes() const { return {static_cast<const char *>(data_), size_}; }

 private:
  void *data_ = nullptr;
  size_t size_ = 0;
};

enum class Kind { onnx, plan };

// Failure(DDPMX_FILE_FORMAT): missing, empty, or neither.
Kind identify(const std::string &path);

// A path without links, "." and ".." in it, as far as it exists. error: ELOOP, or 0.
std::string resolved(const std::string &path, int &error);

// Whether there is a regular file. error: of stat(), unless it means that there is none; or 0.
bool is_file(const std::string &path, int &error);

// The text of an error number.
std::string reason(int error);

// --- ONNX (onnx_file.cpp) ---

// A dimension: a number, or -1 where it is dynamic, and then perhaps a name.
struct Dim {
  int64_t size = -1;  // capped at the largest int64
  std::string name;
};

// An ONNX element type (1 = float32, 6 = int32), and dimensions if the file declares them.
struct TensorInfo {
  uint64_t element_type = 0;
  std::optional<std::vector<Dim>> dims;
};

struct GraphInfo {
  std::map<std::string, TensorInfo, std::less<>> inputs, outputs;  // inputs without weights
  std::map<std::string, std::string> metadata;
  std::vector<std::string> external;  // every other file that the model refers to, as written there, each once
};

// Failure(DDPMX_FILE_FORMAT): truncated or damaged. The bytes may be hostile. `path` is for messages.
GraphInfo read_onnx(const std::string &path, std::string_view bytes);

// Checks that the files with its weights exist, and are within the folder of `path`.
void check_external(const std::string &path, const GraphInfo &info);

// The spec of an ONNX file, checked against its graph: its own, or `override_json` (may be empty) for a file without one.
Spec onnx_spec(const std::string &path, const GraphInfo &info, const std::string &override_json);

// The spec in JSON of ddpmx_open_options.spec: the object itself, or its "model" part as in a checkpoint.
Spec given_spec(const std::string &json);

// --- plans (plan_file.cpp, plan_record.cpp) ---

struct PlanRecord {
  std::string flavour, version;       // "TensorRT" or "TensorRT-RTX"; of the library
  std::vector<std::string> targets;   // compute capabilities: "8.6", or "8.0+"
  std::string platform;               // "linux x86_64"
  int64_t batch[3] = {1, 1, 1};       // smallest, optimal, largest
  std::string source;                 // the ONNX file's name
  std::string key;                    // sha256 of everything that distinguishes two plans
  bool stripped = false;              // built without weights
  std::string rebuild;                // the command that rebuilds it: "ddpmx build …"
};

struct PlanInfo {
  std::string flavour, version;  // of the header
  Spec spec;
  PlanRecord engine;
  std::string name;  // of the network: the two envelopes
};

// All metadata of a plan, its parts and its sidecar checked against each other, as read_plan in Python.
PlanInfo read_plan(const std::string &path, std::string_view bytes, bool trust_host_code);

// The same from bytes alone. sidecar: the text of the sidecar, or nullptr for none.
PlanInfo parse_plan(const std::string &path, std::string_view bytes, const std::string *sidecar, bool trust_host_code);

// This machine, for check_fits.
struct Here {
  std::string version;      // of the TensorRT of the plan's flavour, or empty
  std::string platform;     // "linux x86_64"
  std::string gpu, sm;      // name and compute capability ("8.7") of the GPU; empty if there is none
  std::string trouble;      // why there is no GPU
};

// Failure(DDPMX_PLAN_MISMATCH): another platform, version or GPU; (DDPMX_BACKEND): no GPU, or no TensorRT.
void check_fits(const std::string &path, const PlanInfo &info, const Here &here);

}  // namespace ddpmx
