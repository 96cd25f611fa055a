#include "multistep.hpp"

#include <cmath>

#include "grids.hpp"

namespace ddpmx {
namespace {

// What the steps have in common.
struct Common {
  double phi = 0;  // 1 − e^{−h_i}
  double g = 0;    // α_{i+1}·φ
  double b = 0;    // σ_{i+1}/σ_i
  double h = 0;    // λ_{i+1} − λ_i; in the last step 0, which nothing uses
  double q = 0;    // h_i/h_{i−1}; 0 where the step is of first order
};

std::vector<Common> common(const Schedule &schedule, size_t steps) {
  std::vector<Common> found(steps);
  for (size_t i = 0; i < steps; ++i) {
    const size_t t = steps - 1 - i;
    Common &one = found[i];
    const double noise = schedule.one_minus_alpha_bar[t], after = schedule.one_minus_alpha_bar_prev(t);
    const double signal = schedule.alpha_bar[t], before = schedule.alpha_bar_prev(t);
    const double e = std::sqrt(signal / noise) * std::sqrt(after / before);  // e^{−h}
    one.phi = schedule.betas[t] / noise / (1 + e);
    one.g = std::sqrt(before) * one.phi;
    one.b = std::sqrt(after / noise);
    if (t > 0) one.h = log_snr(schedule, t - 1) - log_snr(schedule, t);
    if (i > 0 && t > 0) one.q = one.h / found[i - 1].h;
  }
  return found;
}

std::vector<Multistep> predicted(const std::vector<Common> &steps) {
  std::vector<Multistep> found(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const double half = 0.5 * steps[i].q;
    found[i].a = steps[i].g * (1 + half);
    found[i].b = steps[i].b;
    found[i].c = -(steps[i].g * half);
  }
  return found;
}

// UniPC's b_1 and b_2; below h = 1 by Taylor's series, since the differences would lose digits.
void right_hand_sides(double h, double phi, double &b1, double &b2) {
  double series = 1;
  for (int n = 20; n > 3; --n) series = 1 - h / n * series;
  const double psi = series / 6, rest = 1 - phi / h;
  b1 = (h < 1 ? h * (0.5 - h * psi) : rest) / phi;
  b2 = (h < 1 ? 2 * h * psi : 1 - 2 * rest / h) / phi;
}

}  // namespace

std::vector<Multistep> dpmpp_2m(const Schedule &schedule, size_t steps) { return predicted(common(schedule, steps)); }

std::vector<Multistep> unipc(const Schedule &schedule, size_t steps) {
  const std::vector<Common> all = common(schedule, steps);
  std::vector<Multistep> found = predicted(all);
  for (size_t i = 1; i < steps; ++i) {
    const Common &last = all[i - 1];
    double rho1 = 0, rho2 = 0.5;  // of order 1
    if (i > 1) {
      double b1 = 0, b2 = 0;
      right_hand_sides(last.h, last.phi, b1, b2);
      rho1 = (b1 - b2) * (last.q / (last.q + 1));
      rho2 = b1 - rho1;
    }
    const double reach = all[i].b * last.g;  // from x^c_i − x_i into x_{i+1}
    const double newest = reach * rho2, oldest = reach * ((rho1 - 0.5) * last.q);
    found[i].a += newest;
    found[i].c += oldest - newest;
    found[i].d -= oldest;
  }
  return found;
}

}  // namespace ddpmx
