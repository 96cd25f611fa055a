// Preparing and running a DeviceChain.
#include <chrono>
#include <cstring>
#include <limits>
#include <thread>

#include "device_chain.hpp"

namespace ddpmx::cuda {

namespace {

using Clock = std::chrono::steady_clock;

// How often an event that must come soon is polled.
constexpr std::chrono::microseconds kLookEvery{100};

std::string joined(const std::string &a, const char *between, const std::string &b) {
  return a.empty() || b.empty() ? a + b : a + between + b;
}

}  // namespace

// Runs `work` on the device. Any failure stops the chain, and waits for its end.
template <class Work>
void DeviceChain::stopping(Work work) {
  try {
    Current current(driver_);
    work(current);
  } catch (const Timeout &) {  // waiting would not end
    lost_ = true;
    throw;
  } catch (...) {
    control().stop = 1;
    settle();
    throw;
  }
}

// --- getting ready ---

void DeviceChain::prepare(const Enqueue &enqueue, const std::string &executor, double seconds) {
  if (lost_)
    throw Failure(DDPMX_BACKEND, "the chain was abandoned and may still be running", "", "end the process and start again");
  executable_.reset();
  graph_.reset();
  enqueue_ = nullptr;
  executor_.clear();
  Step steps[3];  // declared here, since copies into them may run until stopping() has waited
  try {
    stopping([&](Current &) {
      // A chain that is stopped before it begins: x is noise and t a timestep, which is an index into the network's
      // tables, and both kernels have run
      begin(0, 1, false);
      launch_step();
      enqueue(stream());
      driver_.wait_for_stream(stream(), "running the network for the first time");
      if (executor != "graph") return;
      graph_ = driver_.capture(stream(), [&] {
        enqueue(stream());
        launch_step();
      });
      executable_ = driver_.instantiate(graph_, "the graph of a step");
      check_capture(enqueue, seconds, steps);
    });
  } catch (const Timeout &) {
    throw;
  } catch (...) {
    executable_.reset();
    graph_.reset();
    throw;
  }
  enqueue_ = enqueue;
  executor_ = executor;
}

// Compares the captured step with the plain one. A library may do part of its work while it enqueues, on the host or in
// temporary memory. Then the capture succeeds, but repeats old outputs.
void DeviceChain::check_capture(const Enqueue &enqueue, double seconds, Step steps[3]) {
  const auto plain = [&] {
    enqueue(stream());
    launch_step();
  };
  one_step(plain, seconds, &steps[0]);
  one_step([&] { driver_.launch_graph(executable_, stream(), "the captured step"); }, seconds, &steps[1]);
  if (steps[1] == steps[0]) return;
  // a network whose outputs differ from run to run cannot be compared
  one_step(plain, seconds, &steps[2]);
  if (!(steps[2] == steps[0])) return;
  throw Failure(DDPMX_BACKEND, "the captured step gives another output than the plain one", description_,
                "executor \"plain\" gives the right images");
}

void DeviceChain::one_step(const std::function<void()> &launch, double seconds, Step *step) {
  const auto count = static_cast<size_t>(rows_ * elements_);
  step->out.assign(count, std::numeric_limits<float>::quiet_NaN());  // so that a missing output is noticed
  step->x.assign(count, 0.0f);
  begin(1, 0, false);  // other noise than in the capture
  driver_.copy_in(at_.out, step->out.data(), count * sizeof(float), stream());
  driver_.wait_for_stream(stream(), "beginning a step");
  control().stop = 1;
  launch();
  driver_.record(events_[0], stream());
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  while (!driver_.has_come(events_[0], "running a step")) {
    if (Clock::now() > until) {
      throw Timeout(
          DDPMX_BACKEND, "the network did not finish in time",
          joined(description_, "; ", "it was waited for " + std::to_string(static_cast<int64_t>(seconds)) + " s"),
          "end the process and start again");
    }
    std::this_thread::sleep_for(kLookEvery);
  }
  driver_.copy_out(step->out.data(), at_.out, count * sizeof(float), stream());
  driver_.copy_out(step->x.data(), at_.x, count * sizeof(float), stream());
  driver_.wait_for_stream(stream(), "fetching a step");
}

bool DeviceChain::Step::operator==(const Step &other) const {
  const auto same = [](const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  return same(out, other.out) && same(x, other.x);
}

std::string choose_executor(DeviceChain &chain, const Enqueue &enqueue, const std::string &executor, double seconds) {
  if (executor != "auto") {
    chain.prepare(enqueue, executor, seconds);
    return executor;
  }
  try {
    chain.prepare(enqueue, "graph", seconds);
    return "graph";
  } catch (const Timeout &) {  // it may run for ever, and nothing else can run in its stream
    throw;
  } catch (const Failure &failure) {
    chain.prepare(enqueue, "plain", seconds);
    return "plain; not graph: " + joined(failure.fact, ": ", failure.note);
  }
}

// --- running ---

void DeviceChain::ready(const Run &run) {
  if (lost_)
    throw Failure(DDPMX_BACKEND, "the chain was abandoned and may still be running", "", "end the process and start again");
  if (executor_.empty()) throw Failure(DDPMX_INTERNAL, "the chain has no network");
  if (run.n < 1 || run.n > batch_) {
    throw Failure(DDPMX_INTERNAL, std::to_string(run.n) + " images in a chain of " + std::to_string(batch_));
  }
  set_images(run);
}

void DeviceChain::run(const Run &run) {
  ready(run);
  int64_t seen = 0;
  bool cancelled = false;
  stopping([&](Current &current) {
    if (run.after) driver_.follow(stream(), run.after);
    set_inputs(run);
    begin(run.seed, 0, run.x != nullptr);
    const auto look = [&] {
      const int64_t step = control().step;
      if (step <= seen) return;
      seen = step;
      if (!run.report || cancelled) return;
      current.aside([&] { cancelled = !run.report(step, nullptr, nullptr); });
      if (cancelled) control().stop = 1;
    };
    run_steps(look, [&] { return !cancelled && control().done == DDPMX_RUNNING; });
    driver_.wait_for_stream(stream(), "running the chain");
    judge(cancelled, run.x != nullptr);
    fetch(run);
  });
}

void DeviceChain::run_steps(const std::function<void()> &look, const std::function<bool()> &goes_on) {
  const auto total = static_cast<int64_t>(table_.rows.size());
  const std::string doing = "running the chain by " + executor_;
  int64_t launched = 0, waited = 0;
  while (waited < launched || (launched < total && goes_on())) {
    // after the end nothing is added, but the rest of the stream is still waited for
    if (launched < total && launched - waited < kLookAhead && goes_on()) {
      launch_one();
      driver_.record(events_[static_cast<size_t>(launched++ % kLookAhead)], stream());
    } else {
      driver_.wait_for(events_[static_cast<size_t>(waited++ % kLookAhead)], doing.c_str());
    }
    look();
  }
}

void DeviceChain::watch(const Run &run) {
  ready(run);
  if (!x0_) throw Failure(DDPMX_INTERNAL, "the chain keeps no x0");
  const auto size = static_cast<size_t>(run.n * elements_), bytes = size * sizeof(float);
  const std::string doing = "running the chain by " + executor_;
  std::vector<float> x(size), x0(size), next(size);
  stopping([&](Current &) {
    if (run.after) driver_.follow(stream(), run.after);
    set_inputs(run);
    begin(run.seed, 0, run.x != nullptr);
    driver_.copy_out(x.data(), at_.x, bytes, stream());
    driver_.wait_for_stream(stream(), "beginning the chain");
  });
  const auto total = static_cast<int64_t>(table_.rows.size());
  for (int64_t done = 1; done <= total; ++done) {
    stopping([&](Current &) {  // not around the report, which runs in the caller's context
      launch_one();
      driver_.copy_out(x0.data(), x0_, bytes, stream());
      driver_.copy_out(next.data(), at_.x, bytes, stream());
      driver_.wait_for_stream(stream(), doing.c_str());
      if (control().done != DDPMX_RUNNING || done == total) judge(false, run.x != nullptr);
    });
    if (run.report && !run.report(done, x.data(), x0.data())) judge(true, run.x != nullptr);
    x.swap(next);
  }
  stopping([&](Current &) { fetch(run); });
}

// Copies the results to the caller's arrays.
void DeviceChain::fetch(const Run &run) {
  const uint64_t count = static_cast<uint64_t>(run.n * elements_);
  const auto give = [&](void *to, Address from, uint64_t size) {
    if (to && run.on_device) driver_.copy(reinterpret_cast<Address>(to), from, size, stream());
    if (to && !run.on_device) driver_.copy_out(to, from, size, stream());
  };
  give(run.pixels, pixels_, count);
  give(run.samples, x0_, count * sizeof(float));
  driver_.wait_for_stream(stream(), "fetching the images");
}

// Throws unless the chain ended well, by its control block and whether the host cancelled it.
void DeviceChain::judge(bool cancelled, bool given) const {
  const auto total = static_cast<ddpmx_i32>(table_.rows.size());
  const ddpmx_i32 done = control().done, step = control().step, bad = control().bad_step;
  const std::string where = joined(description_, "; ", "executor " + executor_), of = " of " + std::to_string(total);
  if (done == DDPMX_NOT_FINITE && bad >= 0 && bad < total) {
    throw Failure(
        DDPMX_NUMERIC,
        "the network's output at t = " + std::to_string(table_.timesteps[static_cast<size_t>(bad)]) + " is not finite",
        "step " + std::to_string(bad + 1) + of + "; " + where,
        given && bad == 0 ? "check the x that was passed: it may hold NaN or infinities"
                          : "if the file is fp16, try fp32: an activation may exceed 65504");
  }
  if (cancelled || done == DDPMX_STOPPED) {
    throw Failure(DDPMX_CANCELLED, "cancelled before the chain finished",
                  "after " + std::to_string(step) + of + " steps");
  }
  if (done == DDPMX_REFUSED) throw Failure(DDPMX_BACKEND, "the kernels refuse this chain", where);
  if (done != DDPMX_FINISHED || step != total) {
    throw Failure(DDPMX_BACKEND, "the chain ended after " + std::to_string(step) + of + " steps without giving a reason",
                  where, "executor \"plain\"; and report this");
  }
}

}  // namespace ddpmx::cuda
