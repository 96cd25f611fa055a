// Properties of schedules and tables, however they are computed. tests/native/test_tables.py checks that they have
// Python's bits.
#include <cmath>
#include <limits>

#include "check.hpp"
#include "elementary.hpp"
#include "grids.hpp"
#include "samplers.hpp"

using namespace ddpmx;
using ddpmx_test::fails;

namespace {

bool near(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance * std::max(1.0, std::fabs(b)); }

Sampling over(int64_t steps, const std::string &spacing = "linspace") {
  Sampling sampling;
  sampling.steps = steps;
  sampling.spacing = spacing;
  return sampling;
}

Sampling ddim(double eta) {
  Sampling sampling;
  sampling.sampler = "ddim";
  sampling.eta = eta;
  return sampling;
}

constexpr const char *kNames[] = {"linear", "quad",   "const",             "warmup10",    "warmup50",
                                  "jsd",    "cosine", "sigmoid_alpha_bar", "sigmoid_beta"};
constexpr Prediction kPredictions[] = {Prediction::eps, Prediction::x0, Prediction::v, Prediction::mu};
constexpr Variance kVariances[] = {Variance::fixed_small, Variance::fixed_large, Variance::learned_range};

void functions() {
  for (double x = -30; x < 30; x += 0.037) {
    CHECK(near(elementary::exp(x) / std::exp(x), 1, 4e-16));
    CHECK(near(elementary::log(std::exp(x)), std::log(std::exp(x)), 4e-16));
    CHECK(near(elementary::cos(x), std::cos(x), 4e-16));
  }
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(elementary::exp(0) == 1 && elementary::exp(-infinity) == 0 && elementary::exp(infinity) == infinity);
  CHECK(elementary::exp(1e308) == infinity && elementary::exp(-1e308) == 0 && std::isnan(elementary::exp(NAN)));
  CHECK(elementary::log(1) == 0 && elementary::log(0) == -infinity && elementary::log(infinity) == infinity);
  CHECK(std::isnan(elementary::log(-1)) && std::isnan(elementary::log(NAN)) && elementary::log(5e-324) < -744);
  CHECK(elementary::cos(0) == 1 && std::isnan(elementary::cos(infinity)) && std::isnan(elementary::cos(1e300)));
}

void schedules() {
  const Schedule linear = make_schedule("linear", 1000, {});
  CHECK(linear.size() == 1000 && linear.timesteps.front() == 0 && linear.timesteps.back() == 999);
  CHECK(linear.betas.front() == 1e-4 && linear.betas.back() == 0.02);
  for (const char *name : kNames) {
    const Schedule schedule = make_schedule(name, 1000, {});
    bool falls = true, sums = true;
    for (size_t t = 0; t < schedule.size(); ++t) {
      falls = falls && schedule.alpha_bar[t] < schedule.alpha_bar_prev(t);
      sums = sums && near(schedule.one_minus_alpha_bar[t], 1 - schedule.alpha_bar[t], 1e-12);
    }
    CHECK(falls);
    CHECK(sums);
  }
  CHECK(make_schedule("linear", 1, {}).betas == std::vector<double>{1e-4});
  CHECK(linspace(2, 3, 1) == std::vector<double>{2} && linspace(2, 3, 0).empty());
  CHECK(linspace(1, 2, 3) == (std::vector<double>{1, 1.5, 2}));
  CHECK(linspace(0, 5e-324, 3).back() == 5e-324);

  CHECK(fails(DDPMX_INPUT, "there is no schedule 'sigmoid'", [] { make_schedule("sigmoid", 10, {}); }));
  CHECK(fails(DDPMX_INPUT, "no parameter 's'", [] { make_schedule("linear", 10, {{"s", 1}}); }));
  CHECK(fails(DDPMX_INPUT, "it has: -", [] { make_schedule("jsd", 10, {{"s", 1}}); }));
  for (const double bad : {0.0, -1.0, 1.5, 1e300}) {
    CHECK(fails(DDPMX_INPUT, "(0, 1]", [bad] { make_schedule("const", 10, {{"beta_end", bad}}); }));
  }
  CHECK(fails(DDPMX_INPUT, "not a number", [] { make_schedule("const", 10, {{"beta_end", NAN}}); }));
  CHECK(fails(DDPMX_INPUT, "from nan to nan", [] { make_schedule("quad", 10, {{"beta_start", -1}}); }));
  CHECK(fails(DDPMX_INPUT, "tau = 0", [] { make_schedule("sigmoid_alpha_bar", 10, {{"tau", 0}}); }));
  for (const int64_t T : {int64_t{0}, int64_t{-1}, int64_t{1'000'001}, std::numeric_limits<int64_t>::max()}) {
    CHECK(fails(DDPMX_INPUT, "T must be", [T] { make_schedule("linear", T, {}); }));
  }
  CHECK(fails(DDPMX_INPUT, "one β", [] { schedule_from_betas({}); }));
  for (const auto &timesteps : {std::vector<int64_t>{}, {-1, 3}, {3, 3}, {5, 4}, {0, 1000}}) {
    CHECK(fails(DDPMX_INPUT, "rise strictly within 0…999", [&] { respace(linear, timesteps); }));
  }
}

void grids() {
  using Grid = std::vector<int64_t>;
  CHECK(timestep_grid(1000, 4, "linspace") == (Grid{0, 333, 666, 999}));
  CHECK(timestep_grid(1000, 1, "linspace") == Grid{999});
  CHECK(timestep_grid(10, 3, "leading") == (Grid{0, 3, 6}));
  CHECK(timestep_grid(10, 4, "trailing") == (Grid{1, 4, 7, 9}));  // 2.5, 5, 7.5 and 10, halves to even, less 1
  CHECK(timestep_grid(1000, 3, "quad") == (Grid{0, 200, 800}));
  for (const char *spacing : {"linspace", "leading", "trailing", "quad"}) {
    CHECK(timestep_grid(5, 5, spacing) == (Grid{0, 1, 2, 3, 4}));
  }
  const Schedule linear = make_schedule("linear", 1000, {}), jsd = make_schedule("jsd", 1000, {});
  for (const char *spacing : {"logsnr", "karras"}) {
    for (const int64_t steps : {1, 2, 8, 50, 999}) {  // rising, with both ends, however near they are wanted
      const Grid grid = timestep_grid(1000, steps, spacing, &linear);
      CHECK(grid.size() == static_cast<size_t>(steps) && grid.back() == 999 && (steps == 1 || grid.front() == 0));
      for (size_t k = 1; k < grid.size(); ++k) CHECK(grid[k] > grid[k - 1]);
    }
    CHECK(timestep_grid(1000, 2, spacing, &jsd) == (Grid{0, 998}));  // ᾱ = 0 at 999
    CHECK(fails(DDPMX_INPUT, "spacing follows the schedule's λ", [spacing] { timestep_grid(1000, 10, spacing); }));
  }
  CHECK(fails(DDPMX_INPUT, "cannot pick 900 different steps", [] { timestep_grid(1000, 900, "quad"); }));
  CHECK(fails(DDPMX_INPUT, "there is no spacing 'log'", [] { timestep_grid(1000, 10, "log"); }));
  for (const int64_t steps : {int64_t{0}, int64_t{-5}, int64_t{1001}, std::numeric_limits<int64_t>::min()}) {
    CHECK(fails(DDPMX_INPUT, "from 1 to 1000", [steps] { timestep_grid(1000, steps, "linspace"); }));
  }
}

// Without clipping Algorithm 2 is x_{t−1} = (x_t − β/√(1−ᾱ)·ε)/√α + σ·z.
void ancestral_is_algorithm_2() {
  const Schedule schedule = make_schedule("linear", 1000, {});
  for (const Variance variance : {Variance::fixed_small, Variance::fixed_large}) {
    const Table table = make_table(schedule, Prediction::eps, variance);
    CHECK(table.rows.size() == 1000 && table.timesteps.front() == 999 && table.timesteps.back() == 0);
    double alpha_bar = 1;
    bool holds = true;
    for (int t = 0; t < 1000; ++t) {
      const double beta = 1e-4 + 0.0199 * t / 999, before = alpha_bar;
      alpha_bar *= 1 - beta;
      const ddpmx_row &row = table.rows[999 - static_cast<size_t>(t)];
      const double small = beta * (1 - before) / (1 - alpha_bar);
      const double sigma = t == 0 ? 0 : std::sqrt(variance == Variance::fixed_small ? small : beta);
      // in float32 A·p and B are rounded before they are added
      holds = holds && near(double{row.a} * row.p + row.b, 1 / std::sqrt(1 - beta), 3e-7) &&
              near(double{row.a} * row.q, -beta / std::sqrt((1 - alpha_bar) * (1 - beta)), 1e-7) &&
              near(row.sigma, sigma, 1e-7);
    }
    CHECK(holds);
  }
}

// Code that takes the sample from x̂_0 relies on A = 1, B = 0, σ = 0 to the last bit.
void the_last_step_gives_x0() {
  for (const char *name : kNames) {
    for (const int64_t T : {1, 2, 10, 1000}) {
      const Schedule schedule = make_schedule(name, T, {});
      for (const int64_t steps : {int64_t{1}, (T + 1) / 2, T}) {
        for (const double eta : {-1.0, 0.0, 0.7, 1.0}) {
          Sampling sampling = eta < 0 ? Sampling() : ddim(eta);
          sampling.steps = steps;
          const ddpmx_row last = make_table(schedule, Prediction::v, Variance::fixed_large, sampling).rows.back();
          CHECK(last.a == 1 && last.b == 0 && last.sigma == 0);
        }
      }
    }
  }
}

void learned_variances() {
  const Schedule schedule = make_schedule("cosine", 1000, {});
  const Table small = make_table(schedule, Prediction::v, Variance::fixed_small, over(50));
  const Table large = make_table(schedule, Prediction::v, Variance::fixed_large, over(50));
  const Table learned = make_table(schedule, Prediction::v, Variance::learned_range, over(50));
  CHECK(small.learned.empty() && large.learned.empty() && learned.learned.size() == 50);
  for (size_t k = 0; k < 49; ++k) {
    const auto [c, d] = learned.learned[k];
    CHECK(near(std::exp(double{c} - d), small.rows[k].sigma, 1e-6));
    CHECK(near(std::exp(double{c} + d), large.rows[k].sigma, 1e-6));
    CHECK(learned.rows[k].sigma == 1 && learned.rows[k].a == small.rows[k].a);
  }
  CHECK(learned.rows[49].sigma == 0);
  CHECK(make_table(schedule, Prediction::v, Variance::learned_range, ddim(0.5)).learned.empty());
}

void learned_log_variances() {
  const Schedule schedule = make_schedule("linear", 1000, {});
  const Table table = make_table(schedule, Prediction::eps, Variance::learned);
  CHECK(table.learned.size() == 1000);
  for (size_t k = 0; k < 1000; ++k) {
    CHECK(table.learned[k].c == 0 && table.learned[k].d == 0.5F);
    CHECK(table.rows[k].sigma == (k < 999 ? 1 : 0));
  }
  CHECK(fails(DDPMX_INPUT, "variance of single steps, and this chain takes 50 of 1000",
              [&] { make_table(schedule, Prediction::eps, Variance::learned, over(50)); }));
  Sampling song = ddim(0.5);
  song.steps = 50;
  CHECK(make_table(schedule, Prediction::eps, Variance::learned, song).learned.empty());
}

// μ is the mean of a single step also where the chain leaves out timesteps: A·(p·x + q·μ) + B·x = μ for the whole schedule's
// A and B, and so −p/q = B, 1/q = A.
void predicted_means() {
  const Schedule schedule = make_schedule("linear", 1000, {});
  const Table whole = make_table(schedule, Prediction::mu, Variance::fixed_small);
  for (const ddpmx_row &row : whole.rows) {
    CHECK(near(double{row.q} * row.a, 1, 2e-7) && near(-double{row.p} / row.q, row.b, 2e-7));
  }
  const Table part = make_table(schedule, Prediction::mu, Variance::fixed_small, over(10));
  for (size_t k = 0; k < 10; ++k) {
    const ddpmx_row &row = whole.rows[999 - static_cast<size_t>(part.timesteps[k])];
    CHECK(part.rows[k].p == row.p && part.rows[k].q == row.q);
  }
  CHECK(!near(double{part.rows[0].q} * part.rows[0].a, 1, 0.1));
}

void ddim_with_all_the_noise_is_ancestral() {
  for (const char *name : kNames) {
    const Schedule schedule = make_schedule(name, 200, {});
    const Table ours = make_table(schedule, Prediction::v, Variance::fixed_small);
    const Table song = make_table(schedule, Prediction::v, Variance::fixed_small, ddim(1));
    CHECK(ours.timesteps == song.timesteps);
    for (size_t k = 0; k < 200; ++k) {
      CHECK(near(ours.rows[k].a, song.rows[k].a, 1e-6) && near(ours.rows[k].b, song.rows[k].b, 1e-6) &&
            near(ours.rows[k].sigma, song.rows[k].sigma, 1e-6));
    }
  }
  const Schedule schedule = make_schedule("linear", 100, {});
  for (const ddpmx_row &row : make_table(schedule, Prediction::eps, Variance::fixed_small, ddim(0)).rows) {
    CHECK(row.sigma == 0);
  }
}

// A perfect x0 leads from √ᾱ·x_0 + √(1−ᾱ)·ε to the same of the next timestep. The first step remembers nothing, the second
// one step, and the last one gives x0.
void multistep_samplers() {
  for (const char *name : kNames) {
    const Schedule schedule = make_schedule(name, 1000, {});
    for (const char *sampler : {"dpmpp_2m", "unipc"}) {
      Sampling sampling = over(9);
      sampling.sampler = sampler;
      const Table table = make_table(schedule, Prediction::v, Variance::learned, sampling);
      CHECK(table.learned.empty() && table.memory.size() == 9);
      CHECK(table.remembers_two() == (sampling.sampler == "unipc"));
      for (size_t k = 0; k < 9; ++k) {
        const ddpmx_row &row = table.rows[k];
        const auto [c, d] = table.memory[k];
        const double now = schedule.alpha_bar[static_cast<size_t>(table.timesteps[k])];
        const double after = k < 8 ? schedule.alpha_bar[static_cast<size_t>(table.timesteps[k + 1])] : 1;
        CHECK(near(double{row.a} + c + d + row.b * std::sqrt(now), std::sqrt(after), 1e-6));
        CHECK(near(row.b * std::sqrt(1 - now), std::sqrt(1 - after), 1e-6));
        CHECK(row.sigma == 0 && (k > 0 || c == 0) && (k > 1 || d == 0) && (k < 8 || (row.a == 1 && c == 0 && d == 0)));
      }
      sampling.start = table.timesteps[4];
      const Table part = make_table(schedule, Prediction::v, Variance::fixed_large, sampling);
      CHECK(part.rows.size() == 5 && part.timesteps[0] == table.timesteps[4] && part.memory.size() == 5);
      CHECK(part.memory[0].c == 0 && part.memory[1].d == 0 && table.memory[4].c != 0);
    }
  }
}

void starts() {
  const Schedule schedule = make_schedule("linear", 1000, {});
  for (const Variance variance : kVariances) {
    const Table whole = make_table(schedule, Prediction::eps, variance, over(10));
    for (size_t k = 0; k < 10; ++k) {
      Sampling sampling = over(10);
      sampling.start = whole.timesteps[k];
      const Table table = make_table(schedule, Prediction::eps, variance, sampling);
      CHECK(table.timesteps == std::vector<int32_t>(whole.timesteps.begin() + static_cast<long>(k), whole.timesteps.end()));
      CHECK(table.rows.size() == 10 - k && table.rows[0].p == whole.rows[k].p && table.rows[0].sigma == whole.rows[k].sigma);
      CHECK(table.rows.back().a == 1);
      CHECK(table.learned.size() == (whole.learned.empty() ? 0 : 10 - k));
      CHECK(table.learned.empty() || table.learned[0].c == whole.learned[k].c);
    }
  }
  const auto begins = [&schedule](int64_t start) {
    Sampling sampling = over(10);
    sampling.start = start;
    return make_table(schedule, Prediction::eps, Variance::fixed_large, sampling).timesteps.front();
  };
  // 0, 111, …, 999: the nearest, and of two the larger
  CHECK(begins(500) == 555 && begins(499) == 444 && begins(998) == 999 && begins(1) == 0 && begins(55) == 0);
  const auto refused = [&begins](int64_t start, const std::string &why) {
    return fails(DDPMX_INPUT, why, [&] { begins(start); });
  };
  CHECK(refused(1000, "start must be from 0 to 999, not 1000"));
  CHECK(refused(-1, "start must be from 0 to 999, not -1"));
  CHECK(refused(std::numeric_limits<int64_t>::max(), "999"));
  CHECK(refused(int64_t{1} << 32, "999"));  // and not t = 0
}

void refusals() {
  const Schedule linear = make_schedule("linear", 1000, {});
  const auto refused = [](ddpmx_status status, const std::string &part, const Schedule &schedule, const Sampling &sampling) {
    return fails(status, part, [&] { make_table(schedule, Prediction::eps, Variance::fixed_large, sampling); });
  };
  Sampling euler, noisy;
  euler.sampler = "euler";
  noisy.eta = 0.5;
  Sampling fast = noisy;
  fast.sampler = "unipc";
  CHECK(refused(DDPMX_INPUT, "there is no sampler 'euler'", linear, euler));
  CHECK(refused(DDPMX_INPUT, "η is for the ddim sampler only", linear, noisy));
  CHECK(refused(DDPMX_INPUT, "η is for the ddim sampler only", linear, fast));
  for (const double eta : {-0.1, 1.1, static_cast<double>(NAN)}) {
    CHECK(refused(DDPMX_INPUT, "η must lie between", linear, ddim(eta)));
  }
  CHECK(refused(DDPMX_SPEC, "ᾱ = 0", make_schedule("jsd", 100, {}), {}));
  const Schedule silent = make_schedule("linear", 1000, {{"beta_start", 1e-300}, {"beta_end", 1e-300}});
  for (const Prediction prediction : kPredictions) {
    CHECK(fails(DDPMX_SPEC, "NaN or infinities", [&] {
      make_table(silent, prediction, Variance::learned_range, over(10));
    }));
  }
}

}  // namespace

int main() {
  functions();
  schedules();
  grids();
  ancestral_is_algorithm_2();
  the_last_step_gives_x0();
  learned_variances();
  learned_log_variances();
  predicted_means();
  ddim_with_all_the_noise_is_ancestral();
  multistep_samplers();
  starts();
  refusals();
  return ddpmx_test::finish();
}
