// A linear sampler is a table: five numbers for every step. See runtime/ddpmx/diffusion/samplers.py.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "spec.hpp"
#include "step.h"

namespace ddpmx {

// A chain to run, first step first.
struct Table {
  std::vector<int32_t> timesteps;      // [S], the network's input t in each step
  std::vector<ddpmx_row> rows;         // [S]
  std::vector<ddpmx_learned> learned;  // [S], or empty if σ is that of rows
};

struct Sampling {
  std::string sampler = "ancestral";
  std::string spacing = "linspace";
  std::optional<int64_t> steps;  // all of them if not set
  double eta = 0;
  std::optional<int64_t> start;  // the first timestep, which must be visited; the largest if not set
};

// `steps` of the timesteps 0…T−1, rising. Failure(DDPMX_INPUT): as timestep_grid in Python.
std::vector<int64_t> timestep_grid(int64_t T, int64_t steps, std::string_view spacing);

// Failure(DDPMX_INPUT) or (DDPMX_SPEC) as make_table in Python.
Table make_table(const Schedule &schedule, Prediction prediction, Variance variance, const Sampling &sampling = {});

// CRC32 of every float32 that the chain computes with, [S, 5] or [S, 7], little-endian, in hexadecimal.
std::string checksum(const Table &table);

}  // namespace ddpmx
