// The metadata of a TensorRT plan, read from its bytes: no TensorRT, no GPU, nothing deserialised. The format is not
// public. Known are: bytes 0–3, the flavour; bytes 16–23, the length of the file; bytes 24–27, the version; and that the
// file contains the network's name verbatim. See runtime/ddpmx/formats/plan_file.py.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <optional>
#include <sys/stat.h>

#include "error.hpp"
#include "model_file.hpp"
#include "plan_record.hpp"
#include "samplers.hpp"
#include "envelope.hpp"

namespace ddpmx {
namespace {

constexpr char kSpecPrefix[] = "ddpmx1", kRecordPrefix[] = "engine1";
constexpr size_t kSizeAt = 16, kVersionAt = 24, kHeader = 28;
constexpr size_t kMaxSidecar = 1 << 20;
constexpr size_t kStamped = 1 << 20;  // bytes at each end of a plan
constexpr size_t kRecordWithin = 4096;      // bytes behind the spec
constexpr size_t kMaxCandidates = 1 << 14;  // places that look like an envelope; a plan has two

constexpr size_t kElfMachineAt = 18, kCudaMachine = 190;  // e_machine, and its value for GPU code

uint64_t little_endian(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

struct Flavour {
  std::string name, version;
  std::string both() const { return name + " " + version; }
};

Flavour plan_flavour(const std::string &path, std::string_view bytes) {
  const std::string_view magic = bytes.substr(0, 4);
  if (bytes.size() < kHeader || (magic != "ftrt" && magic != "vtrt")) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": not a valid TensorRT plan",
                  std::to_string(std::min(bytes.size(), kHeader)) + " bytes of header");
  }
  const bool rtx = magic == "vtrt";
  const uint64_t declared = little_endian(bytes.substr(kSizeAt, 8)), size = bytes.size();
  // Observed in TensorRT-RTX. TensorRT does not document its field at this place: it is checked only if it can be a length
  if ((declared > size && declared < uint64_t{1} << 40) || (rtx && declared != size)) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": not a valid TensorRT plan",
                  std::to_string(size) + " bytes, and its header declares " + std::to_string(declared),
                  "build or copy it again");
  }
  std::string version;
  for (const char byte : bytes.substr(kVersionAt, 4)) {
    version += (version.empty() ? "" : ".") + std::to_string(static_cast<uint8_t>(byte));
  }
  return {rtx ? "TensorRT-RTX" : "TensorRT", version};
}

struct Texts {
  std::string_view spec, record;
};

// The two envelopes of a plan's name.
Texts texts_of(const std::string &path, std::string_view bytes, const Flavour &flavour) {
  std::optional<Texts> found;
  size_t budget = kMaxCandidates;
  EnvelopeSearch specs(kSpecPrefix, bytes, budget);
  while (const std::optional<std::string_view> spec = specs.next()) {
    const std::optional<std::string_view> record =
        EnvelopeSearch(kRecordPrefix, bytes.substr(specs.end(), kRecordWithin), budget).next();
    if (!record) continue;
    if (found && (found->spec != *spec || found->record != *record)) {
      throw Failure(DDPMX_FILE_FORMAT, path + ": two descriptions in the plan contradict each other");
    }
    found = Texts{*spec, *record};
  }
  if (budget == 0) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": not a TensorRT plan that `ddpmx build` wrote",
                  "more than " + std::to_string(kMaxCandidates) + " places in it look like its description");
  }
  if (found) return *found;
  if (find(bytes, "ddpmx1 ", 0) != bytes.npos) {
    throw Failure(DDPMX_SPEC, path + ": the description in this plan of " + flavour.both() + " is damaged", "",
                  "build or copy it again");
  }
  throw Failure(DDPMX_SPEC, path + ": the plan does not say which diffusion model it is",
                "a plan of " + flavour.both() +
                    "; `ddpmx build` writes a description into the network's name: another program built this plan, or the "
                    "name was lost",
                "ddpmx build model.onnx -o model.plan");
}

// --- host code -------------------------------------------------------------------------------------------------------

std::string machine_name(uint64_t machine) {
  constexpr std::pair<uint64_t, const char *> names[] = {
      {3, "x86"}, {40, "ARM"}, {62, "x86-64"}, {183, "AArch64"}, {243, "RISC-V"}};
  for (const auto &[number, name] : names) {
    if (number == machine) return name;
  }
  return "machine " + std::to_string(machine);
}

// The processor of the first library in `bytes` that is for a CPU, or nothing; GPU code is in the same containers.
std::string host_code(std::string_view bytes) {
  size_t elf = 0, pe = 0;
  std::string machine;
  for (; (elf = find(bytes, "\177ELF", elf)) != bytes.npos; ++elf) {
    const std::string_view ident = bytes.substr(elf + 4, 3);
    if (ident.size() < 3 || (ident[0] != 1 && ident[0] != 2) || ident[1] != 1 || ident[2] != 1) continue;
    const size_t at = std::min(elf + kElfMachineAt, bytes.size());
    const uint64_t number = little_endian(bytes.substr(at, 2));
    if (number == 0 || number == kCudaMachine) continue;
    machine = machine_name(number);
    break;
  }
  for (; (pe = find(bytes, std::string_view("PE\0\0", 4), pe)) != bytes.npos; ++pe) {
    const std::string_view kind = bytes.substr(pe + 4, 2);
    if (kind == "\x64\x86" || kind == "\x64\xaa" || kind == "\x4c\x01") break;
  }
  return pe < elf ? "Windows" : machine;
}

// --- the sidecar -----------------------------------------------------------------------------------------------------

std::string file_name(const std::string &path) { return path.substr(path.rfind('/') + 1); }

// The text of a plan's sidecar, if there is one.
std::optional<std::string> read_sidecar(const std::string &file, const std::string &again) {
  const auto refuse = [&](const std::string &note) -> Failure {
    return Failure(DDPMX_SPEC, file + ": the plan's sidecar cannot be read", note,
                   "remove it, or build again: " + again);
  };
  struct stat info;
  if (lstat(file.c_str(), &info) != 0) return std::nullopt;
  if (stat(file.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) throw refuse("not a file");
  const std::unique_ptr<FILE, int (*)(FILE *)> stream(std::fopen(file.c_str(), "rbe"), std::fclose);
  if (!stream) throw refuse(reason(errno));
  std::string text(kMaxSidecar + 1, '\0');
  text.resize(std::fread(&text[0], 1, text.size(), stream.get()));
  if (std::ferror(stream.get())) throw refuse(reason(EIO));
  if (text.size() > kMaxSidecar) throw refuse("too large");
  return text;
}

// CRC32 of a plan's first and last MiB, which tells two builds of one network apart. See sidecar.py.
std::string stamp_of(std::string_view bytes) {
  std::string ends(bytes.substr(0, bytes.size() <= 2 * kStamped ? bytes.size() : kStamped));
  if (bytes.size() > 2 * kStamped) ends += bytes.substr(bytes.size() - kStamped);
  char text[9];
  std::snprintf(text, sizeof text, "%08x", crc32(ends.data(), ends.size()));
  return text;
}

// The spec as a sidecar holds it: as ModelSpec.to_json() in Python.
Json spec_json(const Spec &spec) {
  const auto text = [](std::string_view value) { return Json{std::string(value)}; };
  Json::Object params;
  for (const auto &[name, value] : spec.schedule_params) params[name] = Json{value};
  Json::Object values = {
      {"shape", Json{Json::Array{Json{spec.channels}, Json{spec.height}, Json{spec.width}}}},
      {"timesteps", Json{spec.timesteps}},
      {"schedule", text(spec.schedule_name)},
      {"schedule_params", Json{params}},
      {"prediction", text(name_of(spec.prediction))},
      {"variance", text(name_of(spec.variance))},
      {"clip", spec.clip ? Json{*spec.clip} : Json{}},
      {"precision", text(spec.precision)},
      {"weights", spec.weights ? text(*spec.weights) : Json{}},
      {"ddpmx", text(spec.ddpmx)},
      {"coefficients", text(checksum(make_table(spec.schedule, spec.prediction, spec.variance)))},
  };
  if (spec.classes) values["classes"] = Json{*spec.classes};
  if (spec.self_condition) values["self_condition"] = Json{true};
  if (spec.condition) values["condition"] = Json{*spec.condition};
  if (!spec.betas.empty()) {
    char crc[9];
    std::snprintf(crc, sizeof crc, "%08x", crc32(spec.betas.data(), spec.betas.size() * sizeof(double)));
    values["betas"] = text(crc);
  }
  return Json{values};
}

// A number, or nothing. As in Python, true is 1.
std::optional<double> real(const Json &json) {
  if (const bool *value = json.as<bool>()) return *value;
  if (const int64_t *value = json.as<int64_t>()) return static_cast<double>(*value);
  if (const double *value = json.as<double>()) return *value;
  return std::nullopt;
}

// Whether two values are equal as in Python, where 1 is 1.0.
bool same(const Json &a, const Json &b) {
  if (a.as<int64_t>() && b.as<int64_t>()) return a == b;
  if (const auto x = real(a), y = real(b); x && y) return *x == *y;
  if (const Json::Array *x = a.as<Json::Array>(), *y = b.as<Json::Array>(); x && y) {
    return std::equal(x->begin(), x->end(), y->begin(), y->end(), same);
  }
  if (const Json::Object *x = a.as<Json::Object>(), *y = b.as<Json::Object>(); x && y) {
    return std::equal(x->begin(), x->end(), y->begin(), y->end(),
                      [](const auto &m, const auto &n) { return m.first == n.first && same(m.second, n.second); });
  }
  return a == b;
}

bool same(const Json *a, const Json *b) { return a == nullptr || b == nullptr ? a == b : same(*a, *b); }

// The first difference of the two. nullptr: missing.
std::string difference(const std::string &name, const Json *theirs, const Json *mine, const std::string &plan) {
  if (theirs && mine && theirs->as<Json::Object>() && mine->as<Json::Object>()) {
    for (const Json *side : {mine, theirs}) {
      for (const auto &[key, value] : *side->as<Json::Object>()) {
        if (same(theirs->get(key), mine->get(key))) continue;
        const std::string member = key.size() <= 120 && printable(key) ? key : in_quotes(key, 120);
        return difference(name + ": " + member, theirs->get(key), mine->get(key), plan);
      }
    }
  }
  const auto text = [](const Json *json) { return json ? shown(*json, 120) : "nothing"; };
  return name + ": " + text(theirs) + " there, " + text(mine) + " in " + plan;
}

// --- the plan --------------------------------------------------------------------------------------------------------

// A plan whose sidecar has not been read yet.
struct Parts {
  Flavour flavour;
  Texts texts;
  Json spec, record;
  PlanRecord engine;
};

Parts parts_of(const std::string &path, std::string_view bytes, bool trust_host_code) {
  Parts parts;
  parts.flavour = plan_flavour(path, bytes);
  parts.texts = texts_of(path, bytes, parts.flavour);
  if (!trust_host_code) {
    const std::string machine = host_code(bytes);
    if (!machine.empty()) {
      throw Failure(DDPMX_FILE_FORMAT, path + ": the plan contains code for the CPU, which loading it would run",
                    "a library for " + machine + "; version-compatible plans contain one",
                    "build your own plan from the ONNX file, or accept this one with DDPMX_TRUST_HOST_CODE");
    }
  }
  try {
    parts.record = unwrap(kRecordPrefix, parts.texts.record);
    parts.engine = engine_record(path, parts.record);
    parts.spec = unwrap(kSpecPrefix, parts.texts.spec);
  } catch (const Failure &failure) {
    throw at(path, failure);
  }
  const PlanRecord &engine = parts.engine;
  const Flavour &flavour = parts.flavour;
  if (engine.flavour != flavour.name || release(engine.version) != release(flavour.version)) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": the plan's header and its record contradict each other",
                  flavour.both() + " and " + engine.flavour + " " + engine.version, engine.rebuild);
  }
  return parts;
}

// What a sidecar says of this plan, or nullptr: if a build was stopped before it put the new plan in place, the sidecar has
// "before", which describes the old one.
const Json *described(const Json &sidecar, const Json &record, const Json &bytes, const Json &stamp) {
  const auto is_of = [&](const Json &values) {
    const Json *theirs = values.get("stamp");
    return same(values.get("engine"), &record) && same(values.get("bytes"), &bytes) && (!theirs || same(*theirs, stamp));
  };
  const Json *before = sidecar.get("before");
  if (before == nullptr || is_of(sidecar)) return &sidecar;
  if (before->as<std::nullptr_t>()) return nullptr;
  return is_of(*before) ? before : &sidecar;
}

// file: the sidecar's path; text: its content, or nullptr.
PlanInfo finish(const std::string &path, std::string_view plan, const Parts &parts, const std::string &file,
                const std::string *text) {
  const std::string &again = parts.engine.rebuild;
  std::optional<Json> content;
  if (text != nullptr) {
    try {
      content = parse_json(*text);
    } catch (const Failure &failure) {
      throw Failure(DDPMX_SPEC, file + ": the plan's sidecar cannot be read", failure.fact + "; " + failure.note,
                    "remove it, or build again: " + again);
    }
  }
  const Json bytes{static_cast<int64_t>(plan.size())}, stamp{stamp_of(plan)};
  const Json *sidecar = content ? described(*content, parts.record, bytes, stamp) : nullptr;
  const Json *beside = sidecar ? sidecar->get("betas") : nullptr;
  PlanInfo info;
  try {
    std::vector<double> betas;
    if (beside != nullptr && !beside->as<std::nullptr_t>()) {
      const std::string *array = beside->as<std::string>();
      if (!array) throw Failure(DDPMX_SPEC, "the array of β is damaged", "it begins with " + shown(*beside, 24));
      betas = betas_from_text(*array);
    }
    info.spec = spec_from_json(parts.spec, betas.empty() ? nullptr : &betas,
                               "the plan's sidecar, " + file_name(file) + ", as \"betas\"");
  } catch (const Failure &failure) {
    throw at(path, failure);
  }
  if (sidecar) {
    const Json spec = spec_json(info.spec);
    for (const auto &[name, mine] :
         {std::pair{"spec", &spec}, {"engine", &parts.record}, {"bytes", &bytes}, {"stamp", &stamp}}) {
      const Json *theirs = sidecar->get(name);
      if (same(theirs, mine) || (mine == &stamp && theirs == nullptr)) continue;  // earlier versions wrote no stamp
      // a plan whose β are in its sidecar is useless without it
      throw Failure(DDPMX_SPEC, file + ": the sidecar contradicts its plan",
                    difference(name, theirs, mine, file_name(path)),
                    (info.spec.betas.empty() ? "remove it, or build again: " : "") + again);
    }
  }
  info.flavour = parts.flavour.name;
  info.version = parts.flavour.version;
  info.engine = parts.engine;
  info.name = std::string(parts.texts.spec) + " " + std::string(parts.texts.record);
  return info;
}

}  // namespace

PlanInfo parse_plan(const std::string &path, std::string_view bytes, const std::string *sidecar, bool trust_host_code) {
  return finish(path, bytes, parts_of(path, bytes, trust_host_code), path + ".json", sidecar);
}

PlanInfo read_plan(const std::string &path, std::string_view bytes, bool trust_host_code) {
  const Parts parts = parts_of(path, bytes, trust_host_code);
  int error = 0;
  const std::string file = resolved(path, error) + ".json";
  const std::optional<std::string> sidecar = read_sidecar(file, parts.engine.rebuild);
  return finish(path, bytes, parts, file, sidecar ? &*sidecar : nullptr);
}

}  // namespace ddpmx
