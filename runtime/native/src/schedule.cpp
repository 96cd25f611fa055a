#include "schedule.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <string_view>

#include "elementary.hpp"
#include "error.hpp"

namespace ddpmx {
namespace {

using Params = std::map<std::string, double>;

constexpr int64_t kMaxTimesteps = 1'000'000;  // a larger T is a mistake
constexpr double kPi = 0x1.921fb54442d18p+1;

double square(double x) { return x * x; }

double sigmoid(double x) { return 1.0 / (1.0 + elementary::exp(-x)); }

Schedule with(std::vector<double> alpha_bar, std::vector<double> betas, std::vector<int64_t> timesteps) {
  Schedule schedule;
  schedule.alpha_bar = std::move(alpha_bar);
  schedule.betas = std::move(betas);
  schedule.timesteps = std::move(timesteps);
  schedule.one_minus_alpha_bar.resize(schedule.size());
  double sum = 0.0;
  for (size_t t = 0; t < schedule.size(); ++t) {
    sum += schedule.alpha_bar_prev(t) * schedule.betas[t];
    schedule.one_minus_alpha_bar[t] = sum;
  }
  return schedule;
}

// --- the named schedules: β_t, see schedule.py for their sources -----------------------------------------------------

std::vector<double> linear(int64_t T, const Params &p) { return linspace(p.at("beta_start"), p.at("beta_end"), T); }

std::vector<double> quad(int64_t T, const Params &p) {
  std::vector<double> betas = linspace(std::sqrt(p.at("beta_start")), std::sqrt(p.at("beta_end")), T);
  for (double &beta : betas) beta = square(beta);
  return betas;
}

std::vector<double> constant(int64_t T, const Params &p) {
  return std::vector<double>(static_cast<size_t>(T), p.at("beta_end"));
}

std::vector<double> warmup(int64_t T, const Params &p, double fraction) {
  std::vector<double> betas = constant(T, p);
  const auto rising = static_cast<int64_t>(static_cast<double>(T) * fraction);
  const std::vector<double> first = linspace(p.at("beta_start"), p.at("beta_end"), rising);
  std::copy(first.begin(), first.end(), betas.begin());
  return betas;
}

std::vector<double> warmup10(int64_t T, const Params &p) { return warmup(T, p, 0.1); }
std::vector<double> warmup50(int64_t T, const Params &p) { return warmup(T, p, 0.5); }

std::vector<double> jsd(int64_t T, const Params &) {
  std::vector<double> betas(static_cast<size_t>(T));
  for (size_t t = 0; t < betas.size(); ++t) betas[t] = 1.0 / static_cast<double>(T - static_cast<int64_t>(t));
  return betas;
}

// β_t from ᾱ(u) at the T + 1 points u = 0…1, capped so that ᾱ never reaches 0. A NaN stays NaN.
template <class AlphaBar>
std::vector<double> betas_of(int64_t T, AlphaBar alpha_bar, double beta_max) {
  std::vector<double> betas(static_cast<size_t>(T));
  double previous = alpha_bar(0.0);
  for (size_t t = 0; t < betas.size(); ++t) {
    const double now = alpha_bar(static_cast<double>(t + 1) / static_cast<double>(T));
    const double beta = 1.0 - now / previous;
    betas[t] = beta > beta_max ? beta_max : beta;
    previous = now;
  }
  return betas;
}

std::vector<double> cosine(int64_t T, const Params &p) {
  const double s = p.at("s");
  return betas_of(
      T, [s](double u) { return square(elementary::cos((u + s) / (1 + s) * kPi / 2)); }, p.at("beta_max"));
}

std::vector<double> sigmoid_alpha_bar(int64_t T, const Params &p) {
  const double start = p.at("start"), end = p.at("end"), tau = p.at("tau");
  if (tau == 0) throw Failure(DDPMX_INPUT, "schedule 'sigmoid_alpha_bar' cannot be computed with tau = 0");
  const double first = sigmoid(start / tau), last = sigmoid(end / tau);
  return betas_of(
      T, [=](double u) { return (last - sigmoid((u * (end - start) + start) / tau)) / (last - first); },
      p.at("beta_max"));
}

std::vector<double> sigmoid_beta(int64_t T, const Params &p) {
  const double beta_start = p.at("beta_start"), beta_end = p.at("beta_end"), width = p.at("width");
  std::vector<double> betas = linspace(-width, width, T);
  for (double &beta : betas) beta = sigmoid(beta) * (beta_end - beta_start) + beta_start;
  return betas;
}

struct Default {
  std::string_view name;  // empty after the last one
  double value;
};

struct Named {
  std::string_view name;
  std::vector<double> (*betas)(int64_t T, const Params &params);
  Default defaults[5];
};

constexpr Named kSchedules[] = {
    {"linear", linear, {{"beta_start", 1e-4}, {"beta_end", 0.02}}},
    {"quad", quad, {{"beta_start", 1e-4}, {"beta_end", 0.02}}},
    {"const", constant, {{"beta_end", 0.02}}},
    {"warmup10", warmup10, {{"beta_start", 1e-4}, {"beta_end", 0.02}}},
    {"warmup50", warmup50, {{"beta_start", 1e-4}, {"beta_end", 0.02}}},
    {"jsd", jsd, {}},
    {"cosine", cosine, {{"s", 0.008}, {"beta_max", 0.999}}},
    {"sigmoid_alpha_bar", sigmoid_alpha_bar, {{"start", -3.0}, {"end", 3.0}, {"tau", 1.0}, {"beta_max", 0.999}}},
    {"sigmoid_beta", sigmoid_beta, {{"beta_start", 1e-4}, {"beta_end", 0.02}, {"width", 6.0}}},
};

const Named &named(const std::string &name) {
  std::string known;
  for (const Named &schedule : kSchedules) {
    if (schedule.name == name) return schedule;
    known.append(known.empty() ? "" : ", ").append(schedule.name);
  }
  throw Failure(DDPMX_INPUT, "there is no schedule " + in_quotes(name), "", "one of: " + known);
}

}  // namespace

std::string shown(double value) {
  if (std::isnan(value)) return "nan";  // whatever its sign
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::general, 6);
  return std::string(text, end.ptr);
}

std::vector<double> linspace(double start, double stop, int64_t count) {
  std::vector<double> y(static_cast<size_t>(count));
  std::iota(y.begin(), y.end(), 0.0);
  const double delta = stop - start;
  const double gaps = static_cast<double>(count - 1);
  const double step = count > 1 ? delta / gaps : delta;
  const bool vanishes = count > 1 && step == 0;  // delta is 0, or so small that a gap underflows
  for (double &value : y) {
    value = vanishes ? value / gaps * delta : value * step;
    value += start;
  }
  if (count > 1) y.back() = stop;
  return y;
}

double Schedule::posterior_variance(size_t t) const {
  return betas[t] * one_minus_alpha_bar_prev(t) / one_minus_alpha_bar[t];  // β_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t)
}

double Schedule::posterior_mean_coef_x0(size_t t) const {
  return betas[t] * std::sqrt(alpha_bar_prev(t)) / one_minus_alpha_bar[t];  // β_t·√ᾱ_{t−1}/(1 − ᾱ_t)
}

double Schedule::posterior_mean_coef_xt(size_t t) const {
  // √α_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t)
  return std::sqrt(1.0 - betas[t]) * one_minus_alpha_bar_prev(t) / one_minus_alpha_bar[t];
}

double Schedule::log_variance_small(size_t t) const {
  return elementary::log(first_replaced(t, posterior_variance(t)));
}

double Schedule::log_variance_large(size_t t) const { return elementary::log(first_replaced(t, betas[t])); }

double Schedule::first_replaced(size_t t, double variance) const {
  if (t > 0) return variance;
  return size() > 1 ? posterior_variance(1) : betas[0];
}

Schedule schedule_from_betas(std::vector<double> betas) {
  const size_t T = betas.size();
  if (T < 1 || T > static_cast<size_t>(kMaxTimesteps)) {
    throw Failure(DDPMX_INPUT, "a schedule has one β for each of 1…" + std::to_string(kMaxTimesteps) + " steps, not " +
                                   std::to_string(T));
  }
  double least = betas[0], most = betas[0];
  bool within = true;
  for (const double beta : betas) {
    within = within && beta > 0 && beta <= 1;  // a NaN is neither
    if (std::isnan(beta) || beta < least) least = beta;
    if (std::isnan(beta) || beta > most) most = beta;
  }
  if (!within) {
    throw Failure(DDPMX_INPUT, "β_t must lie in (0, 1] at every t",
                  "it runs from " + shown(least) + " to " + shown(most));
  }
  std::vector<double> alpha_bar(T);
  double product = 1.0;
  for (size_t t = 0; t < T; ++t) alpha_bar[t] = product *= 1.0 - betas[t];
  std::vector<int64_t> timesteps(T);
  std::iota(timesteps.begin(), timesteps.end(), 0);
  return with(std::move(alpha_bar), std::move(betas), std::move(timesteps));
}

Params schedule_params(const std::string &name, const Params &given) {
  Params filled;
  std::string known;
  for (const Default &parameter : named(name).defaults) {
    if (parameter.name.empty()) break;
    filled.emplace(parameter.name, parameter.value);
    known.append(known.empty() ? "" : ", ").append(parameter.name);
  }
  for (const auto &[key, value] : given) {
    const auto found = filled.find(key);
    if (found == filled.end()) {
      throw Failure(DDPMX_INPUT, "schedule " + in_quotes(name) + " has no parameter " + in_quotes(key), "",
                    "it has: " + (known.empty() ? "-" : known));
    }
    if (!std::isfinite(value)) {
      throw Failure(DDPMX_INPUT,
                    "schedule " + in_quotes(name) + ": " + key + " is " + shown(value) + ", which is not a number");
    }
    found->second = value;
  }
  return filled;
}

Schedule make_schedule(const std::string &name, int64_t T, const Params &params) {
  if (T < 1 || T > kMaxTimesteps) {
    throw Failure(DDPMX_INPUT, "T must be a whole number from 1 to " + std::to_string(kMaxTimesteps) + ", not " +
                                   std::to_string(T));
  }
  return schedule_from_betas(named(name).betas(T, schedule_params(name, params)));
}

Schedule respace(const Schedule &schedule, const std::vector<int64_t> &timesteps) {
  const auto T = static_cast<int64_t>(schedule.size());
  bool rising = !timesteps.empty() && timesteps.front() >= 0 && timesteps.back() < T;
  for (size_t i = 1; i < timesteps.size(); ++i) rising = rising && timesteps[i - 1] < timesteps[i];
  if (!rising) throw Failure(DDPMX_INPUT, "timesteps must rise strictly within 0…" + std::to_string(T - 1));
  if (timesteps.size() == schedule.size()) return schedule;
  const size_t S = timesteps.size();
  std::vector<double> alpha_bar(S), betas(S);
  std::vector<int64_t> inputs(S);
  for (size_t i = 0; i < S; ++i) {
    const auto at = static_cast<size_t>(timesteps[i]);
    alpha_bar[i] = schedule.alpha_bar[at];
    betas[i] = 1.0 - alpha_bar[i] / (i == 0 ? 1.0 : alpha_bar[i - 1]);  // β'_i = 1 − ᾱ_{τ_i}/ᾱ_{τ_{i−1}}
    inputs[i] = schedule.timesteps[at];
  }
  return with(std::move(alpha_bar), std::move(betas), std::move(inputs));
}

}  // namespace ddpmx
