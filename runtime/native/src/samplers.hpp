// A linear sampler is a table: five numbers for every step. See runtime/ddpmx/diffusion/samplers.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "spec.hpp"
#include "step.h"

namespace ddpmx {

// A chain to run, first step first.
struct Table {
  std::vector<int32_t> timesteps;      // [S], the network's input t in each step
  std::vector<ddpmx_row> rows;         // [S]
  std::vector<ddpmx_learned> learned;  // [S], or empty if σ is that of rows
  std::vector<ddpmx_memory> memory;    // [S], or empty for a sampler without memory; never with learned, and then σ = 0

  bool remembers_two() const;  // whether x̂_0 of the step before the last one is used as well
};

struct Sampling {
  std::string sampler = "ancestral";
  std::string spacing = "linspace";
  std::optional<int64_t> steps;  // all of them if not set
  double eta = 0;
  std::optional<int64_t> start;  // the first timestep, or the nearest that is visited; the largest if not set
};

// Failure(DDPMX_INPUT) or (DDPMX_SPEC) as make_table in Python.
Table make_table(const Schedule &schedule, Prediction prediction, Variance variance, const Sampling &sampling = {});

// CRC32 of every float32 that the chain computes with, [S, 5] or [S, 7], little-endian, in hexadecimal.
std::string checksum(const Table &table);

}  // namespace ddpmx
