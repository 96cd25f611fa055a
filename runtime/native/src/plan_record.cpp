#include "plan_record.hpp"

#include <algorithm>
#include <charconv>

#include "error.hpp"

namespace ddpmx {
namespace {

constexpr int64_t kMaxBatch = 1 << 16;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Takes `least` to `most` digits from the beginning of `text`.
bool take_digits(std::string_view &text, size_t least, size_t most) {
  size_t count = 0;
  while (count < most && count < text.size() && is_digit(text[count])) ++count;
  text.remove_prefix(count);
  return count >= least;
}

bool take(std::string_view &text, char c) {
  const bool there = !text.empty() && text[0] == c;
  if (there) text.remove_prefix(1);
  return there;
}

// Two to four numbers with points between them, such as 10.3.0.26.
bool is_version(std::string_view text) {
  if (!take_digits(text, 1, 4)) return false;
  int parts = 0;
  while (take(text, '.')) {
    if (!take_digits(text, 1, 6)) return false;
    ++parts;
  }
  return text.empty() && parts >= 1 && parts <= 3;
}

// "8.7", or "8.0+" for 8.0 and later.
bool is_target(std::string_view text) {
  if (!take_digits(text, 1, 2) || !take(text, '.') || !take_digits(text, 1, 1)) return false;
  take(text, '+');
  return text.empty();
}

bool is_sha256(std::string_view text) {
  return text.size() == 64 &&
         std::all_of(text.begin(), text.end(), [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); });
}

bool is_letter(char c) { return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

bool is_identifier(std::string_view text) {
  return !text.empty() && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) { return is_letter(c) || is_digit(c); });
}

// Whether a file's name is safe to show and to put into a command: printable, without slashes, no leading hyphen.
bool is_plain_name(std::string_view name) {
  return !name.empty() && printable(name) && name[0] != '-' && name.find_first_of("/\\") == name.npos;
}

// --- the fields ------------------------------------------------------------------------------------------------------

// The text of a member if it `fits`, else nullptr.
template <class Fits>
const std::string *text_of(const Json &values, const char *name, Fits fits) {
  const std::string *text = values.get(name)->as<std::string>();
  return text != nullptr && fits(*text) ? text : nullptr;
}

bool read_batch(const Json &values, int64_t (&batch)[3]) {
  const Json::Array *items = values.get("batch")->as<Json::Array>();
  if (items == nullptr || items->size() != 3) return false;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t *number = (*items)[i].as<int64_t>();
    if (number == nullptr) return false;
    batch[i] = *number;
  }
  return 1 <= batch[0] && batch[0] <= batch[1] && batch[1] <= batch[2] && batch[2] <= kMaxBatch;
}

bool read_targets(const Json &values, std::vector<std::string> &targets) {
  const Json::Array *items = values.get("targets")->as<Json::Array>();
  if (items == nullptr || items->empty()) return false;
  for (const Json &item : *items) {
    const std::string *text = item.as<std::string>();
    if (text == nullptr || !is_target(*text)) return false;
    targets.push_back(*text);
  }
  return true;
}

bool are_options(const Json &values) {
  const Json::Object *options = values.get("options")->as<Json::Object>();
  if (options == nullptr) return false;
  return std::all_of(options->begin(), options->end(), [](const auto &option) {
    const Json &value = option.second;
    return is_identifier(option.first) && (value.as<std::nullptr_t>() || value.as<bool>() || value.as<int64_t>());
  });
}

// The command that rebuilds this plan on this machine, for its GPU and library.
std::string rebuild_command(const std::string &path, const PlanRecord &engine, const Json::Object &options) {
  std::string out = "ddpmx build " + shell_word(engine.source) + " -o " + shell_word(path) + " --batch ";
  for (size_t i = 0; i < 3; ++i) out += (i > 0 ? "," : "") + std::to_string(engine.batch[i]);
  for (const auto &[name, value] : options) {
    const bool *flag = value.as<bool>();
    const int64_t *number = value.as<int64_t>();
    if (name == "workspace" && flag != nullptr && *flag) {  // one byte is no MiB
      out += " --workspace 0";
    } else if (flag != nullptr && *flag) {
      out += " --" + name;
    } else if (number != nullptr) {
      out += " --" + name + " " + std::to_string(name == "workspace" ? *number >> 20 : *number);
    }
  }
  return out;
}

int number_of(std::string_view digits) {
  int number = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), number);
  return number;
}

// (major, minor) of a compute capability.
std::pair<int, int> capability(std::string_view sm) {
  const size_t point = std::min(sm.find('.'), sm.size());
  return {number_of(sm.substr(0, point)), number_of(sm.substr(std::min(point + 1, sm.size())))};
}

bool covers(const std::string &target, const std::string &sm) {
  return target.back() == '+' ? capability(target) <= capability(sm) : target == sm;
}

std::string install_hint(const std::string &flavour) {
  if (flavour == "TensorRT-RTX") return "pip install tensorrt-rtx-cu13, or name its library with $DDPMX_TRT_LIBRARY";
  return "install the TensorRT of your CUDA, or name its library with $DDPMX_TRT_LIBRARY; on a Jetson it is part of "
         "the system";
}

}  // namespace

PlanRecord engine_record(const std::string &path, const Json &values) {
  const Json::Object *members = values.as<Json::Object>();
  constexpr const char *names[] = {"batch",    "flavour", "key",     "onnx",   "options",
                                   "platform", "source",  "targets", "version"};
  const auto is_it = [](const auto &member, const char *name) { return member.first == name; };
  if (!members || !std::equal(members->begin(), members->end(), std::begin(names), std::end(names), is_it)) {
    throw Failure(DDPMX_SPEC, "the plan's record has missing or unknown fields", shown(values));
  }
  const auto is_flavour = [](const std::string &text) { return text == "TensorRT" || text == "TensorRT-RTX"; };
  const std::string *flavour = text_of(values, "flavour", is_flavour);
  const std::string *version = text_of(values, "version", is_version);
  const std::string *platform = text_of(values, "platform", printable);
  const std::string *source = text_of(values, "source", is_plain_name);
  const std::string *onnx = text_of(values, "onnx", is_sha256), *key = text_of(values, "key", is_sha256);
  PlanRecord engine;
  if (!flavour || !version || !platform || !source || !onnx || !key || !read_batch(values, engine.batch) ||
      !read_targets(values, engine.targets) || !are_options(values)) {
    throw Failure(DDPMX_SPEC, "the plan's record is damaged", shown(values));
  }
  engine.flavour = *flavour;
  engine.version = *version;
  engine.platform = *platform;
  engine.source = *source;
  engine.key = *key;
  const Json *options = values.get("options"), *strip = options->get("strip");
  engine.stripped = strip != nullptr && strip->as<bool>() != nullptr && *strip->as<bool>();
  engine.rebuild = rebuild_command(path, engine, *options->as<Json::Object>());
  return engine;
}

std::string release(const std::string &version) {
  size_t end = 0;
  for (int points = 0; end < version.size(); ++end) {
    if (version[end] == '.' && ++points == 3) break;
  }
  return version.substr(0, end);
}

void check_fits(const std::string &path, const PlanInfo &info, const Here &here) {
  const PlanRecord &engine = info.engine;
  std::string targets;
  for (const std::string &target : engine.targets) targets += (targets.empty() ? "" : ", ") + target;
  const std::string flavour = info.flavour, with = flavour + " " + info.version;
  const std::string built = with + " for SM " + targets + " on " + engine.platform;
  const std::string gpu = "this GPU is " + here.gpu + ", SM " + here.sm;
  if (here.gpu.empty()) {
    throw Failure(DDPMX_BACKEND, path + ": a plan runs on an NVIDIA GPU, and there is none here",
                  here.trouble + "; the plan was built with " + built,
                  info.spec.precision == "bf16"
                      ? "it is bfloat16, which no CPU runs: export with --fp16 for a file that runs here"
                      : "the ONNX file runs on the CPU: " + shell_word(engine.source) + " in its place");
  }
  if (engine.platform != here.platform) {
    throw Failure(DDPMX_PLAN_MISMATCH,
                  path + ": the plan was built on " + engine.platform + ", and this is " + here.platform,
                  "plans do not cross operating systems or processors", engine.rebuild);
  }
  if (here.version.empty()) {
    throw Failure(DDPMX_BACKEND, path + ": the plan needs " + flavour + ", which is not installed here",
                  "it was built with " + built + "; " + gpu,
                  install_hint(flavour) + "; or, for what is installed: " + engine.rebuild);
  }
  if (release(here.version) != release(info.version)) {
    throw Failure(DDPMX_PLAN_MISMATCH,
                  path + ": the plan was built with " + with + ", and here is " + flavour + " " + here.version,
                  "plans do not cross versions", engine.rebuild);
  }
  const auto fits = [&](const std::string &target) { return covers(target, here.sm); };
  if (std::none_of(engine.targets.begin(), engine.targets.end(), fits)) {
    throw Failure(DDPMX_PLAN_MISMATCH, path + ": the plan was built for SM " + targets + ", and " + gpu,
                  "plans do not cross GPU architectures", engine.rebuild);
  }
}

}  // namespace ddpmx
