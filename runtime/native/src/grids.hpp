// Which of the T timesteps a chain visits. See runtime/ddpmx/diffusion/grids.py.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "schedule.hpp"

namespace ddpmx {

// λ_t = ln(√ᾱ_t/√(1−ᾱ_t)), falling; −∞ where ᾱ = 0.
double log_snr(const Schedule &schedule, size_t t);

// `steps` of the timesteps 0…T−1, rising. schedule: of which the spacings "logsnr" and "karras" are made, which need it.
// Failure(DDPMX_INPUT): as timestep_grid in Python.
std::vector<int64_t> timestep_grid(int64_t T, int64_t steps, std::string_view spacing, const Schedule *schedule = nullptr);

}  // namespace ddpmx
