// Computes what tests/native/test_tables.py requests, one JSON object a line, so that it can compare bit for bit:
//
//   {"function": "log", "x": [1.5, …]}                                           float64 [n]
//   {"spec": {…}, "betas": [β…], "sampling": {"steps": 50, "start": 90, …}}      the table of a spec
//
// Each reply is a line "0 SIZE COLUMNS" and SIZE rows: first all timesteps, int32, and then COLUMNS float32 each; or
// "0 n 0" and n float64; or "STATUS SIZE 0" and SIZE bytes of text.
#include <cstdio>
#include <string>
#include <vector>

#include "elementary.hpp"
#include "error.hpp"
#include "samplers.hpp"

namespace {

using ddpmx::Failure;
using ddpmx::Json;

template <class T>
void write(const std::vector<T> &values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

void header(int status, size_t size, int columns) { std::printf("%d %zu %d\n", status, size, columns); }

double number(const Json &value) {
  if (const int64_t *whole = value.as<int64_t>()) return static_cast<double>(*whole);
  if (const double *real = value.as<double>()) return *real;
  throw Failure(DDPMX_INPUT, "not a number: " + shown(value));
}

std::vector<double> numbers(const Json *values) {
  std::vector<double> found;
  if (values && values->as<Json::Array>()) {
    for (const Json &value : *values->as<Json::Array>()) found.push_back(number(value));
  }
  return found;
}

void reply_function(const std::string &name, const Json &request) {
  std::vector<double> x = numbers(request.get("x"));
  for (double &value : x) {
    value = name == "exp"   ? ddpmx::elementary::exp(value)
            : name == "log" ? ddpmx::elementary::log(value)
                            : ddpmx::elementary::cos(value);
  }
  header(0, x.size(), 0);
  write(x);
}

ddpmx::Sampling sampling_of(const Json &values, ddpmx::Variance &variance) {
  ddpmx::Sampling sampling;
  for (const auto &[name, value] : *values.as<Json::Object>()) {
    if (name == "sampler") sampling.sampler = *value.as<std::string>();
    if (name == "spacing") sampling.spacing = *value.as<std::string>();
    if (name == "steps") sampling.steps = *value.as<int64_t>();
    if (name == "start") sampling.start = *value.as<int64_t>();
    if (name == "eta") sampling.eta = number(value);
    if (name == "variance") variance = ddpmx::variance_named(*value.as<std::string>()).value();
  }
  return sampling;
}

void reply_table(const Json &request) {
  const Json *beside = request.get("betas");
  const std::vector<double> betas = numbers(beside);
  const ddpmx::Spec spec = ddpmx::spec_from_json(*request.get("spec"), beside ? &betas : nullptr, "\"betas\"");
  ddpmx::Variance variance = spec.variance;
  ddpmx::Sampling sampling;
  if (const Json *values = request.get("sampling")) sampling = sampling_of(*values, variance);
  const ddpmx::Table table = make_table(spec.schedule, spec.prediction, variance, sampling);
  header(0, table.rows.size(), table.learned.empty() && table.memory.empty() ? 5 : 7);
  write(table.timesteps);
  for (size_t k = 0; k < table.rows.size(); ++k) {
    std::fwrite(&table.rows[k], sizeof table.rows[k], 1, stdout);
    if (!table.learned.empty()) std::fwrite(&table.learned[k], sizeof table.learned[k], 1, stdout);
    if (!table.memory.empty()) std::fwrite(&table.memory[k], sizeof table.memory[k], 1, stdout);
  }
}

bool next_line(std::string &line) {
  line.clear();
  for (int c = std::getchar(); c != EOF; c = std::getchar()) {
    if (c == '\n') return true;
    line += static_cast<char>(c);
  }
  return !line.empty();
}

}  // namespace

int main() {
  for (std::string line; next_line(line);) {
    try {
      const Json request = ddpmx::parse_json(line);
      const Json *function = request.get("function");
      if (function) {
        reply_function(*function->as<std::string>(), request);
      } else {
        reply_table(request);
      }
    } catch (const Failure &failure) {
      const std::string text = failure.what();
      header(failure.status, text.size(), 0);
      std::fwrite(text.data(), 1, text.size(), stdout);
    }
  }
  return std::ferror(stdout) ? 1 : 0;
}
