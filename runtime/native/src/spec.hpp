// ModelSpec: the description of a model. It makes the checks of runtime/ddpmx/formats/spec.py.
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

enum class Prediction { eps, x0, v, mu };
enum class Variance { fixed_small, fixed_large, learned_range, learned };

// Whether the variance is a second output of the network.
constexpr bool is_learned(Variance variance) {
  return variance == Variance::learned_range || variance == Variance::learned;
}

// An input of the network: its name in the graph, whether it is int32 (else float32), and its dimensions for one image.
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
  std::string ddpmx;  // the version that wrote the spec
  std::optional<int64_t> classes, condition;
  bool self_condition = false;
  bool null_class = false;  // whether y = classes stands for "no class", which guidance needs
  std::vector<std::string> class_names;  // one for each class, or none
  std::vector<double> betas;  // only with the schedule "betas"
  Schedule schedule;

  int64_t elements() const { return channels * height * width; }  // N
  std::vector<Input> inputs() const;                              // x and t, then y, x0_prev and cond if it takes them
  int64_t label_count() const { return classes ? *classes + (null_class ? 1 : 0) : 0; }  // the values that y may have
  bool learns_variance() const { return is_learned(variance); }  // whether the network has a second output, "var"
  std::vector<std::string> outputs() const;                       // its prediction, and "var" with a learned variance
};

// Whether two specs describe the same network: everything is equal but its origin (ddpmx, weights).
bool same_model(const Spec &a, const Spec &b);

std::string_view name_of(Prediction prediction);
std::string_view name_of(Variance variance);
std::optional<Variance> variance_named(std::string_view name);

// The spec in a JSON object. betas: the array of the schedule "betas", if the object holds only its checksum, or nullptr;
// where: the place where that array should be, for the message. DDPMX_SPEC for everything that ModelSpec.from_json refuses.
Spec spec_from_json(const Json &values, const std::vector<double> *betas, const std::string &where);

// The spec in an envelope, "ddpmx1 LENGTH CRC32 {…}".
Spec spec_from_text(std::string_view text, const std::vector<double> *betas, const std::string &where);

// The array of β in a JSON array.
std::vector<double> betas_from_json(const Json &value);

// The array of β in "betas1 LENGTH CRC32 BASE64".
std::vector<double> betas_from_text(std::string_view text);

}  // namespace ddpmx
