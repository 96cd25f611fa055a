// How a plan was built, and whether it can run here. See PlanRecord in runtime/ddpmx/formats/plan_file.py, and
// runtime/ddpmx/trt/compat.py.
#pragma once

#include <string>

#include "json.hpp"
#include "model_file.hpp"

namespace ddpmx {

// The record in a JSON object. path: of the plan, for the command that rebuilds it. Failure(DDPMX_SPEC): not a record.
PlanRecord engine_record(const std::string &path, const Json &values);

// Major, minor and patch of a version. Build numbers are not compared.
std::string release(const std::string &version);

}  // namespace ddpmx
