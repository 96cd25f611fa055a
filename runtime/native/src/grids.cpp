#include "grids.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "elementary.hpp"
#include "error.hpp"

namespace ddpmx {
namespace {

constexpr std::string_view kSpacings[] = {"linspace", "leading", "trailing", "quad", "logsnr", "karras"};
constexpr double kLeastLogSnr = -5.1;  // where the linear schedule ends; cosine goes on to −10, in pure noise
constexpr double kKarrasRho = 7.0;

// The timesteps nearest to where λ should be, none twice. A single step is the noisiest.
std::vector<int64_t> by_log_snr(const Schedule &schedule, int64_t steps, bool karras) {
  const auto T = static_cast<int64_t>(schedule.size());
  std::vector<double> falling(schedule.size());
  for (size_t t = 0; t < falling.size(); ++t) {
    falling[t] = log_snr(schedule, t);
    if (t > 0) falling[t] = std::min(falling[t], falling[t - 1]);
  }
  const double most = falling.front(), least = std::max(falling.back(), std::min(kLeastLogSnr, most));
  const double low = elementary::exp(most / -kKarrasRho), high = elementary::exp(least / -kKarrasRho);
  std::vector<int64_t> grid(static_cast<size_t>(steps));
  for (int64_t i = 0; i < steps; ++i) {
    const double share = steps > 1 ? static_cast<double>(i) / static_cast<double>(steps - 1) : 1.0;
    const double wanted = karras ? -kKarrasRho * elementary::log(low + share * (high - low)) : most + share * (least - most);
    // the first t whose λ is not larger
    const auto found = std::lower_bound(falling.begin(), falling.end(), wanted, std::greater<double>());
    const auto after = std::min<int64_t>(found - falling.begin(), T - 1), before = std::max<int64_t>(after - 1, 0);
    const double above = falling[static_cast<size_t>(before)], below = falling[static_cast<size_t>(after)];
    int64_t &t = grid[static_cast<size_t>(i)];
    t = above - wanted <= wanted - below ? before : after;
    if (i > 0) t = std::max(t, grid[static_cast<size_t>(i - 1)] + 1);
  }
  for (int64_t i = 0; i < steps; ++i) {
    int64_t &t = grid[static_cast<size_t>(i)];
    t = std::min(t, T - steps + i);
  }
  return grid;
}

}  // namespace

double log_snr(const Schedule &schedule, size_t t) {
  return 0.5 * (elementary::log(schedule.alpha_bar[t]) - elementary::log(schedule.one_minus_alpha_bar[t]));
}

std::vector<int64_t> timestep_grid(int64_t T, int64_t steps, std::string_view spacing, const Schedule *schedule) {
  if (steps < 1 || steps > T) {
    throw Failure(DDPMX_INPUT,
                  "steps must be a whole number from 1 to " + std::to_string(T) + ", not " + std::to_string(steps),
                  "the model has T = " + std::to_string(T));
  }
  if (std::find(std::begin(kSpacings), std::end(kSpacings), spacing) == std::end(kSpacings)) {
    throw Failure(DDPMX_INPUT, "there is no spacing " + in_quotes(spacing), "",
                  "one of: linspace, leading, trailing, quad, logsnr, karras");
  }
  std::vector<int64_t> grid(static_cast<size_t>(steps));
  std::iota(grid.begin(), grid.end(), 0);
  if (steps == T) return grid;
  if (spacing == "logsnr" || spacing == "karras") {
    if (!schedule) throw Failure(DDPMX_INPUT, in_quotes(spacing) + " spacing follows the schedule's λ");
    return by_log_snr(*schedule, steps, spacing == "karras");
  }
  const auto length = static_cast<double>(T), count = static_cast<double>(steps);
  if (spacing == "quad") {  // dense near t = 0, up to 0.8·T
    const std::vector<double> roots = linspace(0, std::sqrt(length * 0.8), steps);
    for (size_t k = 0; k < grid.size(); ++k) grid[k] = static_cast<int64_t>(std::floor(roots[k] * roots[k]));
  } else {
    for (int64_t &t : grid) {
      const auto i = static_cast<double>(t);
      if (spacing == "leading") {
        t *= T / steps;
      } else if (spacing == "trailing") {
        t = static_cast<int64_t>(std::nearbyint(length - (count - i - 1) * length / count)) - 1;
      } else {
        t = steps > 1 ? static_cast<int64_t>(std::nearbyint(i * (length - 1) / (count - 1))) : T - 1;
      }
    }
  }
  for (size_t k = 1; k < grid.size(); ++k) {
    if (grid[k] <= grid[k - 1]) {
      throw Failure(DDPMX_INPUT,
                    in_quotes(spacing) + " spacing cannot pick " + std::to_string(steps) + " different steps out of " +
                        std::to_string(T),
                    "", "fewer steps, or linspace");
    }
  }
  return grid;
}

}  // namespace ddpmx
