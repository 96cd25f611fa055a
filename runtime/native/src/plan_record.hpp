// How a plan was built, and whether it can run here. See PlanRecord and check_fits in runtime/ddpmx/formats/plan_file.py.
#pragma once

#include <string>

#include "json.hpp"
#include "model_file.hpp"

namespace ddpmx {

// The record in a JSON object. path: of the plan, for the command that builds it anew. Failure(DDPMX_SPEC): it is none.
PlanRecord engine_record(const std::string &path, const Json &values);

// Major, minor and patch of a version. The build number is the library's own business.
std::string release(const std::string &version);

}  // namespace ddpmx
