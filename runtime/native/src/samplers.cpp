#include "samplers.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

#include "elementary.hpp"
#include "error.hpp"
#include "envelope.hpp"
#include "grids.hpp"
#include "multistep.hpp"

namespace ddpmx {
namespace {

// A row before its numbers are rounded to float32.
struct Row {
  double p = 0, q = 0, a = 0, b = 0, sigma = 0;
};

// x̂_0 = p·x_t + q·out at the position t. For Prediction::mu the schedule must not be respaced.
void set_x0_coefficients(const Schedule &schedule, Prediction prediction, size_t t, Row &row) {
  const double alpha_bar = schedule.alpha_bar[t], noise = schedule.one_minus_alpha_bar[t];
  switch (prediction) {
    case Prediction::eps:  // √(1/ᾱ)·x − √(1/ᾱ − 1)·ε, equation 15
      row.p = std::sqrt(1 / alpha_bar);
      row.q = -std::sqrt(noise / alpha_bar);
      break;
    case Prediction::x0:
      row.p = 0;
      row.q = 1;
      break;
    case Prediction::v:  // √ᾱ·x − √(1−ᾱ)·v, Salimans & Ho 2022
      row.p = std::sqrt(alpha_bar);
      row.q = -std::sqrt(noise);
      break;
    case Prediction::mu: {  // (μ − B·x)/A, with A and B of μ̃ = A·x_0 + B·x, equation 7
      const double a = schedule.posterior_mean_coef_x0(t);
      row.p = -schedule.posterior_mean_coef_xt(t) / a;
      row.q = 1 / a;
      break;
    }
  }
}

// Ho et al., Algorithm 2: x_{t−1} = μ̃(x_t, x̂_0) + σ_t·z, no noise at t = 0. With a learned variance σ only marks the steps
// with noise.
void set_ancestral(const Schedule &schedule, Variance variance, size_t t, Row &row) {
  row.a = schedule.posterior_mean_coef_x0(t);
  row.b = schedule.posterior_mean_coef_xt(t);
  if (t == 0) {
    row.sigma = 0;
  } else if (is_learned(variance)) {
    row.sigma = 1;
  } else {
    const bool large = variance == Variance::fixed_large;
    row.sigma = elementary::exp(0.5 * (large ? schedule.log_variance_large(t) : schedule.log_variance_small(t)));
  }
}

// c and d of σ = exp(c + d·v), Nichol & Dhariwal 2021, equation 15: log σ² = f·log β + (1−f)·log β̃ with f = (v + 1)/2.
ddpmx_learned learned_range(const Schedule &schedule, size_t t) {
  const double small = schedule.log_variance_small(t), large = elementary::log(schedule.betas[t]);
  return {static_cast<float>((large + small) / 4), static_cast<float>((large - small) / 4)};
}

// c and d of σ = exp(c + d·v) where v is log σ² itself.
constexpr ddpmx_learned kLearnedLog = {0.0F, 0.5F};

// Song et al. 2020, equation 12, with ε̂ re-derived from the clipped x̂_0: see ddim() in samplers.py.
void set_ddim(const Schedule &schedule, double eta, size_t t, Row &row) {
  const double beta = schedule.betas[t];
  const double noise = schedule.one_minus_alpha_bar[t], noise_previous = schedule.one_minus_alpha_bar_prev(t);
  row.sigma = eta * std::sqrt(noise_previous / noise) * std::sqrt(beta);  // β = 1 − ᾱ/ᾱ_prev
  // √(1−ᾱ_prev−σ²) written without a difference, by 1−ᾱ = α·(1−ᾱ_prev) + β
  const double direction =
      std::sqrt(noise_previous * ((1 - beta) * noise_previous + (1 - eta * eta) * beta) / noise);
  row.b = direction / std::sqrt(noise);
  row.a = std::sqrt(schedule.alpha_bar_prev(t)) - row.b * std::sqrt(schedule.alpha_bar[t]);
}

ddpmx_row rounded(const Row &row) {
  return {static_cast<float>(row.p), static_cast<float>(row.q), static_cast<float>(row.a), static_cast<float>(row.b),
          static_cast<float>(row.sigma)};
}

bool finite(const ddpmx_row &row) {
  return std::isfinite(row.p) && std::isfinite(row.q) && std::isfinite(row.a) && std::isfinite(row.b) &&
         std::isfinite(row.sigma);
}

// The step that begins at `start`, or at the nearest timestep that is visited; of two the larger one.
size_t position(const Table &table, int64_t start, int64_t T) {
  if (start < 0 || start >= T) {
    throw Failure(DDPMX_INPUT, "start must be from 0 to " + std::to_string(T - 1) + ", not " + std::to_string(start),
                  "the model has T = " + std::to_string(T));
  }
  // the first row whose timestep is not larger; timesteps fall
  auto found = std::lower_bound(table.timesteps.begin(), table.timesteps.end(), start, std::greater<int64_t>());
  if (found == table.timesteps.end() ||
      (found != table.timesteps.begin() && found[-1] - start <= start - *found)) {
    --found;
  }
  return static_cast<size_t>(found - table.timesteps.begin());
}

// The chain of a multistep sampler over the last `steps` timesteps of `part`. set_x0(t, row) sets p and q at a position.
template <class X0>
Table multistep_table(const Schedule &part, bool unified, size_t steps, X0 set_x0) {
  Table table;
  const std::vector<Multistep> columns = unified ? unipc(part, steps) : dpmpp_2m(part, steps);
  for (size_t i = 0; i < steps; ++i) {
    const size_t t = steps - 1 - i;
    Row row;
    set_x0(t, row);
    row.a = columns[i].a;
    row.b = columns[i].b;
    table.timesteps.push_back(static_cast<int32_t>(part.timesteps[t]));
    table.rows.push_back(rounded(row));
    table.memory.push_back({static_cast<float>(columns[i].c), static_cast<float>(columns[i].d)});
  }
  return table;
}

}  // namespace

bool Table::remembers_two() const {
  return std::any_of(memory.begin(), memory.end(), [](const ddpmx_memory &row) { return row.d != 0; });
}

Table make_table(const Schedule &schedule, Prediction prediction, Variance variance, const Sampling &sampling) {
  const bool ddim = sampling.sampler == "ddim", ancestral = sampling.sampler == "ancestral";
  const bool unified = sampling.sampler == "unipc", multistep = unified || sampling.sampler == "dpmpp_2m";
  if (!ddim && !ancestral && !multistep) {
    throw Failure(DDPMX_INPUT, "there is no sampler " + in_quotes(sampling.sampler), "",
                  "one of: ancestral, ddim, dpmpp_2m, unipc");
  }
  if (!ddim && sampling.eta != 0) {
    throw Failure(DDPMX_INPUT, "η is for the ddim sampler only", "", "sampler ddim, or leave out η");
  }
  const auto T = static_cast<int64_t>(schedule.size());
  const std::vector<int64_t> timesteps = timestep_grid(T, sampling.steps.value_or(T), sampling.spacing, &schedule);
  if (ancestral && variance == Variance::learned && timesteps.size() < schedule.size()) {
    throw Failure(DDPMX_INPUT,
                  "the network learned the variance of single steps, and this chain takes " +
                      std::to_string(timesteps.size()) + " of " + std::to_string(T),
                  "", "sampler ddim, or variance fixed_small");
  }
  const Schedule part = respace(schedule, timesteps);
  if (ddim && !(sampling.eta >= 0 && sampling.eta <= 1)) {
    throw Failure(DDPMX_INPUT, "η must lie between 0 (no noise) and 1 (as much as the ancestral chain), not " +
                                   shown(sampling.eta));
  }
  if (prediction == Prediction::eps && part.alpha_bar.back() <= 0) {
    throw Failure(DDPMX_SPEC, "this schedule ends at ᾱ = 0, where x_0 does not follow from ε", "",
                  "predict x0 or v, or choose a schedule that keeps some signal");
  }
  const size_t S = part.size();
  const bool learns = ancestral && is_learned(variance);
  const auto set_x0 = [&](size_t t, Row &row) {
    if (prediction == Prediction::mu) {  // also in a chain that leaves out timesteps, μ is the mean of a single step
      set_x0_coefficients(schedule, prediction, static_cast<size_t>(part.timesteps[t]), row);
    } else {
      set_x0_coefficients(part, prediction, t, row);
    }
  };
  Table table;
  if (multistep) {
    table = multistep_table(part, unified, S, set_x0);
  } else {
    table.timesteps.reserve(S);
    table.rows.reserve(S);
    if (learns) table.learned.reserve(S);
    for (size_t t = S; t-- > 0;) {
      Row row;
      set_x0(t, row);
      if (ddim) {
        set_ddim(part, sampling.eta, t, row);
      } else {
        set_ancestral(part, variance, t, row);
      }
      table.timesteps.push_back(static_cast<int32_t>(part.timesteps[t]));
      table.rows.push_back(rounded(row));
      if (learns) table.learned.push_back(variance == Variance::learned ? kLearnedLog : learned_range(part, t));
    }
  }
  bool numbers = std::all_of(table.rows.begin(), table.rows.end(), finite);
  for (const ddpmx_learned &row : table.learned) numbers = numbers && std::isfinite(row.c) && std::isfinite(row.d);
  for (const ddpmx_memory &row : table.memory) numbers = numbers && std::isfinite(row.c) && std::isfinite(row.d);
  if (!numbers) {
    throw Failure(DDPMX_SPEC, "this schedule leaves no signal or adds no noise at some timestep",
                  "the chain would compute with NaN or infinities", "other β, or fewer timesteps");
  }
  if (!sampling.start) return table;
  const size_t at = position(table, *sampling.start, T);
  if (multistep) return multistep_table(part, unified, S - at, set_x0);  // there is nothing to remember at its start
  const auto before = static_cast<std::ptrdiff_t>(at);
  table.timesteps.erase(table.timesteps.begin(), table.timesteps.begin() + before);
  table.rows.erase(table.rows.begin(), table.rows.begin() + before);
  if (!table.learned.empty()) table.learned.erase(table.learned.begin(), table.learned.begin() + before);
  return table;
}

std::string checksum(const Table &table) {
  std::vector<float> numbers;
  numbers.reserve(7 * table.rows.size());
  for (size_t k = 0; k < table.rows.size(); ++k) {
    const ddpmx_row &row = table.rows[k];
    numbers.insert(numbers.end(), {row.p, row.q, row.a, row.b, row.sigma});
    if (!table.learned.empty()) numbers.insert(numbers.end(), {table.learned[k].c, table.learned[k].d});
  }
  char text[9];
  std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(crc32(numbers.data(), numbers.size() * sizeof(float))));
  return text;
}

}  // namespace ddpmx
