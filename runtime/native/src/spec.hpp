// ModelSpec: all that a model file says about itself. See runtime/ddpmx/formats/spec.py, whose checks these are.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"
#include "schedule.hpp"

namespace ddpmx {

enum class Prediction { eps, x0, v };
enum class Variance { fixed_small, fixed_large, learned_range };

// An input of the network: its name in the graph, whether it holds int32 (else float32), and its dimensions for one image.
struct Input {
  std::string name;
  bool is_int;
  std::vector<int64_t> dims;
};

struct Spec {
  int64_t channels = 0, height = 0, width = 0;
  int64_t timesteps = 1000;  // T
  std::string schedule_name = "linear";
  std::map<std::string, double> schedule_params;  // defaults filled in
  Prediction prediction = Prediction::eps;
  Variance variance = Variance::fixed_large;
  std::optional<double> clip = 1.0;  // the largest |x0|
  std::string precision = "fp32";
  std::optional<std::string> weights;
  std::string ddpmx;  // the version that wrote it
  std::optional<int64_t> classes, condition;
  bool self_condition = false;
  std::vector<double> betas;  // of the schedule "betas" alone
  Schedule schedule;

  int64_t elements() const { return channels * height * width; }  // N
  std::vector<Input> inputs() const;                              // x, t, and then y, x0_prev, cond where there are any
  std::vector<std::string> outputs() const;                       // what it predicts, and "var" if it learns that
};

// The two say the same network: everything is equal but where it comes from (ddpmx, weights).
bool same_model(const Spec &a, const Spec &b);

std::string_view name_of(Prediction prediction);
std::string_view name_of(Variance variance);
std::optional<Variance> variance_named(std::string_view name);

// The spec in a JSON object. betas: the array of the schedule "betas", where the object holds its checksum alone, or
// nullptr; where: in what place that array should lie, for people. DDPMX_SPEC for whatever ModelSpec.from_json refuses.
Spec spec_from_json(const Json &values, const std::vector<double> *betas, const std::string &where);

// The spec in a envelope line of text, "ddpmx1 LENGTH CRC32 {…}".
Spec spec_from_text(std::string_view text, const std::vector<double> *betas, const std::string &where);

// The array of β in a JSON array.
std::vector<double> betas_from_json(const Json &value);

// The array of β in "betas1 LENGTH CRC32 BASE64".
std::vector<double> betas_from_text(std::string_view text);

}  // namespace ddpmx
