// Multistep solvers of the probability-flow ODE, which use x̂_0 of earlier steps. The formulas, and where they come from,
// are in runtime/ddpmx/diffusion/multistep.py; the operations here are the same in the same order.
#pragma once

#include <cstddef>
#include <vector>

#include "schedule.hpp"

namespace ddpmx {

// One step: x_{i+1} = a·m_i + b·x_i + c·m_{i−1} + d·m_{i−2}, with m_i = x̂_0 of step i.
struct Multistep {
  double a = 0, b = 0, c = 0, d = 0;
};

// Of the last `steps` timesteps of the schedule, first step first. The first remembers nothing.
std::vector<Multistep> dpmpp_2m(const Schedule &schedule, size_t steps);  // DPM-Solver++(2M), Lu et al. 2022
std::vector<Multistep> unipc(const Schedule &schedule, size_t steps);     // UniPC of order 2, "bh2", Zhao et al. 2023

}  // namespace ddpmx
