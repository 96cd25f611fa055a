// Prints what the readers find in each file, as a line of JSON, so that a test can compare it with Python:
//
//     read_model PATH…
//
// {"ok": true, …}, or {"status": …, "text": …}. A file spec.txt holds an envelope, spec.json a value of
// ddpmx_open_options.spec; all others are model files.
#include <cstdio>
#include <string>

#include "error.hpp"
#include "model_file.hpp"

namespace {

using namespace ddpmx;

Json text(std::string_view value) { return Json{std::string(value)}; }

Json facts_of(const Spec &spec) {
  Json::Object params;
  for (const auto &[name, value] : spec.schedule_params) params[name] = Json{value};
  Json::Array betas;
  for (const double beta : spec.betas) betas.emplace_back().value = beta;
  return Json{Json::Object{
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
      {"classes", spec.classes ? Json{*spec.classes} : Json{}},
      {"condition", spec.condition ? Json{*spec.condition} : Json{}},
      {"self_condition", Json{spec.self_condition}},
      {"betas", Json{betas}},
  }};
}

Json facts_of(const PlanRecord &engine) {
  Json::Array targets;
  for (const std::string &target : engine.targets) targets.push_back(text(target));
  const int64_t *batch = engine.batch;
  return Json{Json::Object{
      {"flavour", text(engine.flavour)},
      {"version", text(engine.version)},
      {"targets", Json{targets}},
      {"platform", text(engine.platform)},
      {"batch", Json{Json::Array{Json{batch[0]}, Json{batch[1]}, Json{batch[2]}}}},
      {"source", text(engine.source)},
      {"key", text(engine.key)},
      {"stripped", Json{engine.stripped}},
      {"rebuild", text(engine.rebuild)},
  }};
}

template <class Tensors>
Json facts_of(const Tensors &tensors) {
  Json::Object facts;
  for (const auto &[name, tensor] : tensors) {
    Json dims;
    if (tensor.dims) {
      Json::Array items;
      for (const Dim &dim : *tensor.dims) {
        items.push_back(dim.size >= 0 ? Json{dim.size} : dim.name.empty() ? Json{} : text(dim.name));
      }
      dims = Json{items};
    }
    facts[name] = Json{Json::Array{Json{static_cast<int64_t>(tensor.element_type)}, dims}};
  }
  return Json{facts};
}

bool ends_with(const std::string &path, std::string_view end) {
  return path.size() >= end.size() && path.compare(path.size() - end.size(), end.size(), end) == 0;
}

Json::Object read(const std::string &path) {
  if (ends_with(path, "/spec.txt")) {
    return {{"spec", facts_of(spec_from_text(MappedFile(path).bytes(), nullptr, "\"betas\""))}};
  }
  if (ends_with(path, "/spec.json")) return {{"spec", facts_of(given_spec(std::string(MappedFile(path).bytes())))}};
  const Kind kind = identify(path);
  const MappedFile file(path);
  if (kind == Kind::plan) {
    const PlanInfo info = read_plan(path, file.bytes(), false);
    return {{"flavour", text(info.flavour)},
            {"version", text(info.version)},
            {"spec", facts_of(info.spec)},
            {"engine", facts_of(info.engine)},
            {"name", text(info.name)}};
  }
  const GraphInfo info = read_onnx(path, file.bytes());
  check_external(path, info);
  const Spec spec = onnx_spec(path, info, "");
  Json::Array external;
  for (const std::string &location : info.external) external.push_back(text(location));
  return {{"spec", facts_of(spec)},
          {"inputs", facts_of(info.inputs)},
          {"outputs", facts_of(info.outputs)},
          {"external", Json{external}}};
}

}  // namespace

int main(int count, char **paths) {
  for (int i = 1; i < count; ++i) {
    Json::Object facts;
    try {
      facts = read(paths[i]);
      facts["ok"] = Json{true};
    } catch (const Failure &failure) {
      facts = {{"status", Json{int64_t{failure.status}}}, {"text", text(failure.what())}};
    }
    std::printf("%s\n", shown(Json{facts}, SIZE_MAX).c_str());
  }
  return 0;
}
