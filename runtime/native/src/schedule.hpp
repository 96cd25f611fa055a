// β_t and every coefficient that follows from it, in float64: the formulas of runtime/ddpmx/diffusion/schedule.py in the
// same order of operations, so that the float32 tables have the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ddpmx {

// A variance schedule: the coefficients of q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t) and its posterior. t below is the
// position 0…S−1.
struct Schedule {
  std::vector<double> alpha_bar, betas;     // [S]: ᾱ_t = Π (1 − β_s), falling; β_t = 1 − ᾱ_t/ᾱ_{t−1}, in (0, 1]
  std::vector<int64_t> timesteps;           // [S], rising: the network's input t
  std::vector<double> one_minus_alpha_bar;  // [S], summed as Σ ᾱ_{s−1}·β_s: a difference loses digits where β is tiny

  size_t size() const { return betas.size(); }
  double alpha_bar_prev(size_t t) const { return t == 0 ? 1.0 : alpha_bar[t - 1]; }
  double one_minus_alpha_bar_prev(size_t t) const { return t == 0 ? 0.0 : one_minus_alpha_bar[t - 1]; }

  double posterior_variance(size_t t) const;      // β̃_t, equation 7; β̃_0 = 0
  double posterior_mean_coef_x0(size_t t) const;  // coefficient of x_0 in μ̃_t
  double posterior_mean_coef_xt(size_t t) const;  // coefficient of x_t in μ̃_t
  double log_variance_small(size_t t) const;      // log β̃_t, with β̃_1 at t = 0
  double log_variance_large(size_t t) const;      // log β_t, with β̃_1 at t = 0

 private:
  double first_replaced(size_t t, double variance) const;
};

// The schedule of the given β. Failure(DDPMX_INPUT): empty, too long, or outside (0, 1].
Schedule schedule_from_betas(std::vector<double> betas);

// The parameters of a named schedule, defaults filled in. Failure(DDPMX_INPUT): no such schedule or parameter.
std::map<std::string, double> schedule_params(const std::string &name, const std::map<std::string, double> &given);

// The schedule of that name over T steps. Failure(DDPMX_INPUT) as in Python.
Schedule make_schedule(const std::string &name, int64_t T, const std::map<std::string, double> &params);

// The shorter chain that visits only `timesteps` (rising, within 0…T−1), with the same ᾱ at each of them.
Schedule respace(const Schedule &schedule, const std::vector<int64_t> &timesteps);

// `count` numbers from start to stop, both included, with the roundings of NumPy's linspace.
std::vector<double> linspace(double start, double stop, int64_t count);

// For messages: as by "%g", in every locale.
std::string shown(double value);

}  // namespace ddpmx
