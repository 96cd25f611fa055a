#include "spec.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "error.hpp"
#include "samplers.hpp"
#include "envelope.hpp"

namespace ddpmx {
namespace {

constexpr std::string_view kPrefix = "ddpmx1";
constexpr std::string_view kBetas = "betas";      // the schedule that is an array of β, not a formula
constexpr int64_t kMaxElements = 1 << 28;         // C·H·W: 1 GiB of float32 for one image
constexpr int64_t kMaxClasses = 1 << 20;          // 50 times what is in use, as kMaxCondition is
constexpr int64_t kMaxCondition = 1 << 12;
constexpr size_t kMaxClassName = 128;             // bytes
constexpr size_t kMaxBetas = 1 << 14;

constexpr std::string_view kPredictions[] = {"eps", "x0", "v", "mu"};
constexpr std::string_view kVariances[] = {"fixed_small", "fixed_large", "learned_range", "learned"};
constexpr std::string_view kPrecisions[] = {"fp32", "fp16", "bf16", "int8", "fp8"};

// The fields of a spec. "coefficients" is not a field of its own, but a checksum of what the others mean.
constexpr std::string_view kFields[] = {"shape",    "timesteps", "schedule",  "schedule_params", "prediction",
                                        "variance", "clip",      "precision", "weights",         "ddpmx",
                                        "classes",  "condition", "betas",     "self_condition",  "null_class",
                                        "class_names", "coefficients"};

[[noreturn]] void refuse(const std::string &fact, const std::string &note = "", const std::string &hint = "") {
  throw Failure(DDPMX_SPEC, fact, note, hint);
}

// --- one field at a time ---------------------------------------------------------------------------------------------

bool is_null(const Json &value) { return value.as<std::nullptr_t>() != nullptr; }

// A finite number; nothing for anything else, also for true.
std::optional<double> number(const Json &value) {
  if (const int64_t *whole = value.as<int64_t>()) return static_cast<double>(*whole);
  const double *real = value.as<double>();
  return real && std::isfinite(*real) ? std::optional<double>(*real) : std::nullopt;
}

void set_shape(Spec &spec, const Json &value) {
  const Json::Array *items = value.as<Json::Array>();
  int64_t dims[3] = {0, 0, 0};
  bool fits = items && items->size() == 3;
  for (size_t i = 0; fits && i < 3; ++i) {
    const int64_t *n = (*items)[i].as<int64_t>();
    fits = n && *n > 0;
    if (fits) dims[i] = *n;
  }
  if (!fits) refuse("shape must be three whole numbers above 0, [C, H, W], not " + shown(value));
  int64_t elements = 1;
  for (const int64_t n : dims) {  // one after the other: neither factor is more than 2²⁸ when they are multiplied
    if (n > kMaxElements || (elements *= n) > kMaxElements) {
      refuse("shape " + shown(value) + " is more than " + std::to_string(kMaxElements) + " numbers for one image");
    }
  }
  spec.channels = dims[0];
  spec.height = dims[1];
  spec.width = dims[2];
}

// Which of the choices the field is.
template <size_t N>
size_t choice(const std::string &name, const Json &value, const std::string_view (&choices)[N]) {
  const std::string *text = value.as<std::string>();
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (text && *text == choices[i]) return i;
    all.append(all.empty() ? "" : ", ").append(choices[i]);
  }
  refuse(name + " must be one of " + all + ", not " + shown(value));
}

void set_clip(Spec &spec, const Json &value) {
  spec.clip = number(value);
  if (is_null(value) || (spec.clip && *spec.clip > 0)) return;
  refuse("clip must be a number above 0, or null for none, not " + shown(value));
}

bool is_sha256(const std::string &text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

void set_weights(Spec &spec, const Json &value) {
  if (is_null(value)) return;
  const std::string *text = value.as<std::string>();
  if (!text || !is_sha256(*text)) refuse("weights must be a sha256 of 64 hexadecimal digits");
  spec.weights = *text;
}

std::optional<int64_t> count(const std::string &name, const Json &value, int64_t most) {
  if (is_null(value)) return std::nullopt;
  const int64_t *n = value.as<int64_t>();
  if (n && *n >= 1 && *n <= most) return *n;
  refuse(name + " must be a whole number from 1 to " + std::to_string(most) + ", or null for none, not " + shown(value));
}

bool is_whole_number(std::string_view text) {
  if (!text.empty() && (text[0] == '+' || text[0] == '-')) text.remove_prefix(1);
  return !text.empty() && text.find_first_not_of("0123456789") == text.npos;
}

bool is_class_name(const std::string &name) {
  return !name.empty() && name.size() <= kMaxClassName && printable(name) && name.front() != ' ' &&
         name.back() != ' ' && name.find(',') == name.npos && !is_whole_number(name);
}

// After the classes.
void set_class_names(Spec &spec, const Json &value) {
  if (is_null(value)) return;
  if (!spec.classes) refuse("class_names are for networks with classes, and this one has none");
  const Json::Array *items = value.as<Json::Array>();
  if (!items || static_cast<int64_t>(items->size()) != *spec.classes) {
    refuse("class_names must be " + std::to_string(*spec.classes) + " names, one for each class");
  }
  for (const Json &item : *items) {
    const std::string *name = item.as<std::string>();
    if (!name || !is_class_name(*name)) {
      refuse("a class cannot have the name " + (name ? in_quotes(*name) : shown(item)),
             "a name is 1 to " + std::to_string(kMaxClassName) +
                 " bytes of printable text without a comma, and no whole number");
    }
    spec.class_names.push_back(*name);
  }
  std::vector<std::string> sorted = spec.class_names;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    refuse("class_names must differ from each other");
  }
}

// --- the schedule ----------------------------------------------------------------------------------------------------

std::vector<double> as_betas(std::vector<double> values) {
  if (values.empty() || values.size() > kMaxBetas) {
    refuse("betas must be 1…" + std::to_string(kMaxBetas) + " numbers, not an array of shape [" +
           std::to_string(values.size()) + "]");
  }
  return values;
}

std::vector<double> as_betas(const Json &value) {
  const Json::Array *items = value.as<Json::Array>();
  if (!items) refuse("betas must be an array of numbers", "these are " + shown(value, 80));
  std::vector<double> betas;
  betas.reserve(items->size());
  for (const Json &item : *items) {
    const std::optional<double> beta = number(item);
    if (!beta) refuse("betas must be an array of numbers", "one is " + shown(item, 80));
    betas.push_back(*beta);
  }
  return as_betas(std::move(betas));
}

// CRC32 of the float64, little-endian, in hexadecimal.
std::string checksum_of(const std::vector<double> &betas) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian");
  char text[9];
  std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(crc32(betas.data(), betas.size() * sizeof(double))));
  return text;
}

std::map<std::string, double> params_of(const std::string &schedule, const Json::Object &given) {
  std::map<std::string, double> params;
  for (const auto &[key, value] : given) {
    const std::optional<double> real = number(value);
    // an unknown parameter is refused first
    if (!real) schedule_params(schedule, {{key, 0.0}});
    if (!real) refuse("schedule " + in_quotes(schedule) + ": " + in_quotes(key) + " is " + shown(value) + ", which is not a number");
    params.emplace(key, *real);
  }
  return schedule_params(schedule, params);
}

// Sets the schedule. betas: of the schedule "betas", or nullptr for none; timesteps: as the spec has it.
void set_schedule(Spec &spec, const std::vector<double> *betas, const Json &timesteps, const Json::Object &params) {
  const int64_t *T = timesteps.as<int64_t>();
  if (spec.schedule_name == kBetas || betas) {
    if (spec.schedule_name != kBetas) {
      refuse("betas belong to the schedule 'betas', and this is " + in_quotes(spec.schedule_name));
    }
    if (!betas) refuse("the schedule 'betas' needs an array of β");
    if (!params.empty()) refuse("the schedule 'betas' has no parameters");
    spec.betas = as_betas(*betas);
    spec.schedule = schedule_from_betas(spec.betas);
    if (!T || *T != static_cast<int64_t>(spec.betas.size())) {
      refuse("there are " + std::to_string(spec.betas.size()) + " β, and timesteps is " + shown(timesteps));
    }
  } else {
    spec.schedule_params = params_of(spec.schedule_name, params);
    if (!T) refuse("T must be a whole number from 1 to 1000000, not " + shown(timesteps));
    spec.schedule = make_schedule(spec.schedule_name, *T, spec.schedule_params);
  }
  spec.timesteps = *T;
}

// --- the spec --------------------------------------------------------------------------------------------------------

void refuse_unknown(const Json::Object &values) {
  std::string unknown;
  for (const auto &[name, value] : values) {
    if (std::find(std::begin(kFields), std::end(kFields), name) != std::end(kFields)) continue;
    unknown += (unknown.empty() ? "" : ", ") + in_quotes(name, 60);
    if (unknown.size() > 200) break;
  }
  if (unknown.empty()) return;
  const auto version = values.find("ddpmx");
  const std::string *by = version == values.end() ? nullptr : version->second.as<std::string>();
  const bool by_ddpmx = by && !by->empty();
  std::string known;
  for (const std::string_view field : kFields) known += (known.empty() ? "it knows: " : ", ") + std::string(field);
  refuse("the spec has fields that this ddpmx does not know: " + unknown,
         "it was written by ddpmx " + (by_ddpmx ? in_quotes(*by, 60) : "of an unstated version"),
         by_ddpmx ? "a newer ddpmx may read it" : known);
}

// Everything but the schedule.
void set_fields(Spec &spec, const Json::Object &values) {
  const auto given = [&values](const char *name) -> const Json * {
    const auto found = values.find(name);
    return found == values.end() ? nullptr : &found->second;
  };
  const Json *shape = given("shape");
  if (!shape) refuse("the spec has no shape of an image", "", "\"shape\": [C, H, W]");
  set_shape(spec, *shape);
  if (const Json *value = given("prediction")) {
    spec.prediction = static_cast<Prediction>(choice("prediction", *value, kPredictions));
  }
  if (const Json *value = given("variance")) {
    spec.variance = static_cast<Variance>(choice("variance", *value, kVariances));
  }
  if (const Json *value = given("precision")) spec.precision = kPrecisions[choice("precision", *value, kPrecisions)];
  if (const Json *value = given("clip")) set_clip(spec, *value);
  if (const Json *value = given("weights")) set_weights(spec, *value);
  for (const auto &[name, text] : {std::pair<const char *, std::string *>{"ddpmx", &spec.ddpmx},
                                   std::pair<const char *, std::string *>{"schedule", &spec.schedule_name}}) {
    const Json *value = given(name);
    if (!value) continue;
    if (!value->as<std::string>()) refuse("ddpmx and schedule must be text");
    *text = *value->as<std::string>();
  }
  if (!printable(spec.ddpmx)) refuse("ddpmx must be a printable version");
  if (const Json *value = given("self_condition")) {
    if (!value->as<bool>()) refuse("self_condition must be true or false, not " + shown(*value));
    spec.self_condition = *value->as<bool>();
  }
  if (const Json *value = given("null_class")) {
    if (!value->as<bool>()) refuse("null_class must be true or false, not " + shown(*value));
    spec.null_class = *value->as<bool>();
  }
  if (spec.null_class && (!given("classes") || is_null(*given("classes")))) {
    refuse("null_class is for networks with classes, and this one has none");
  }
  if (const Json *value = given("classes")) spec.classes = count("classes", *value, kMaxClasses);
  if (const Json *value = given("class_names")) set_class_names(spec, *value);
  if (const Json *value = given("condition")) spec.condition = count("condition", *value, kMaxCondition);
  if (spec.condition.value_or(0) * spec.height * spec.width > kMaxElements) {  // 2¹²·2²⁸ at most
    refuse("condition " + std::to_string(*spec.condition) + " is more than " + std::to_string(kMaxElements) +
           " numbers for one image");
  }
}

}  // namespace

std::vector<Input> Spec::inputs() const {
  std::vector<Input> all = {{"x", false, {channels, height, width}}, {"t", true, {}}};
  if (classes) all.push_back({"y", true, {}});
  if (self_condition) all.push_back({"x0_prev", false, {channels, height, width}});
  if (condition) all.push_back({"cond", false, {*condition, height, width}});
  return all;
}

std::vector<std::string> Spec::outputs() const {
  std::vector<std::string> all = {std::string(name_of(prediction))};
  if (learns_variance()) all.push_back("var");
  return all;
}

bool same_model(const Spec &a, const Spec &b) {
  return a.channels == b.channels && a.height == b.height && a.width == b.width && a.timesteps == b.timesteps &&
         a.schedule_name == b.schedule_name && a.schedule_params == b.schedule_params && a.prediction == b.prediction &&
         a.variance == b.variance && a.clip == b.clip && a.precision == b.precision && a.classes == b.classes &&
         a.condition == b.condition && a.self_condition == b.self_condition &&
         a.null_class == b.null_class && a.class_names == b.class_names && a.betas == b.betas;
}

std::string_view name_of(Prediction prediction) { return kPredictions[static_cast<size_t>(prediction)]; }
std::string_view name_of(Variance variance) { return kVariances[static_cast<size_t>(variance)]; }

std::optional<Variance> variance_named(std::string_view name) {
  const auto found = std::find(std::begin(kVariances), std::end(kVariances), name);
  if (found == std::end(kVariances)) return std::nullopt;
  return static_cast<Variance>(found - std::begin(kVariances));
}

Spec spec_from_json(const Json &values, const std::vector<double> *betas, const std::string &where) {
  const Json::Object *fields = values.as<Json::Object>();
  if (!fields) refuse("a spec must be a JSON object", "this is " + shown(values, 80));
  refuse_unknown(*fields);
  Spec spec;
  set_fields(spec, *fields);

  // the array of β is in the object itself, or beside it with its checksum here, or missing
  const Json *declared = values.get("betas");
  const std::string *declared_checksum = declared ? declared->as<std::string>() : nullptr;
  const bool beside = spec.schedule_name == kBetas && (!declared || is_null(*declared) || declared_checksum);
  if (beside && !betas) {
    refuse("the schedule is an array of β, and the array is missing", "", "it should be in " + where);
  }
  std::vector<double> own;
  if (!beside && declared && !is_null(*declared)) {
    if (spec.schedule_name != kBetas) {
      refuse("betas belong to the schedule 'betas', and this is " + in_quotes(spec.schedule_name));
    }
    own = as_betas(*declared);
  }
  const Json default_timesteps{spec.timesteps}, no_params{Json::Object()};
  const Json *timesteps = values.get("timesteps"), *params = values.get("schedule_params");
  if (!timesteps) timesteps = &default_timesteps;
  if (!params) params = &no_params;
  if (!params->as<Json::Object>()) refuse("schedule_params must be an object");
  try {
    set_schedule(spec, beside ? betas : own.empty() ? nullptr : &own, *timesteps, *params->as<Json::Object>());
  } catch (const Failure &failure) {
    refuse(failure.fact, failure.note, failure.hint);  // DDPMX_SPEC, since it is in a file
  }
  if (declared_checksum && *declared_checksum != checksum_of(spec.betas)) {
    refuse("the array of β in " + where + " does not match the spec",
           "checksum " + in_quotes(*declared_checksum, 40) + " in the spec, '" + checksum_of(spec.betas) + "' there",
           "the file is damaged, or was assembled from two");
  }
  // a schedule that means something else here than where the file was written would give wrong images without an error
  const std::string coefficients = checksum(make_table(spec.schedule, spec.prediction, spec.variance));
  const Json *written = values.get("coefficients");
  if (written && !is_null(*written) && (!written->as<std::string>() || *written->as<std::string>() != coefficients)) {
    refuse("the schedule " + in_quotes(spec.schedule_name) + " gives other coefficients here than in the file",
           "checksum " + shown(*written, 40) + " in the file, '" + coefficients + "' here",
           "the file is damaged, or was edited by hand: then remove \"coefficients\"");
  }
  return spec;
}

Spec spec_from_text(std::string_view text, const std::vector<double> *betas, const std::string &where) {
  return spec_from_json(unwrap(kPrefix, text), betas, where);
}

std::vector<double> betas_from_json(const Json &value) {
  std::vector<double> betas = as_betas(value);
  try {
    schedule_from_betas(betas);
  } catch (const Failure &failure) {
    refuse(failure.fact, failure.note, failure.hint);
  }
  return betas;
}

std::vector<double> betas_from_text(std::string_view text) {
  const auto damaged = [](const std::string &note, const std::string &hint = "") {
    refuse("the array of β is damaged", note, hint);
  };
  // "betas1 LENGTH CRC32 BASE64"
  const std::string_view prefix = "betas1 ", digits = "0123456789", hexadecimal = "0123456789abcdef";
  const size_t after_length = text.find(' ', prefix.size());
  const std::string begins = "it begins with " + in_quotes(text.substr(0, 24));
  if (text.substr(0, prefix.size()) != prefix || after_length == std::string_view::npos) damaged(begins);
  const std::string_view length = text.substr(prefix.size(), after_length - prefix.size());
  const std::string_view rest = text.substr(after_length + 1);
  const auto consists_of = [](std::string_view part, std::string_view letters) {
    return part.find_first_not_of(letters) == std::string_view::npos;
  };
  if (length.empty() || length.size() > 5 || !consists_of(length, digits) || rest.size() < 9 || rest[8] != ' ' ||
      !consists_of(rest.substr(0, 8), hexadecimal)) {
    damaged(begins);
  }
  size_t count = 0;
  for (const char digit : length) count = 10 * count + static_cast<size_t>(digit - '0');
  std::string raw;
  try {
    raw = base64_decode(rest.substr(9));
  } catch (const Failure &failure) {
    damaged(failure.fact);
  }
  char crc[9];
  std::snprintf(crc, sizeof crc, "%08x", static_cast<unsigned>(crc32(raw.data(), raw.size())));
  if (raw.size() != 8 * count || rest.substr(0, 8) != crc) {
    damaged(std::to_string(raw.size()) + " bytes where it says " + std::to_string(count) +
                " numbers of 8, or another CRC",
            "export the model again");
  }
  std::vector<double> betas(count);
  if (count > 0) std::memcpy(betas.data(), raw.data(), raw.size());
  try {
    betas = as_betas(std::move(betas));
    schedule_from_betas(betas);
  } catch (const Failure &failure) {
    refuse("the array of β: " + failure.fact, failure.note);
  }
  return betas;
}

}  // namespace ddpmx
