// Chains of a plan that fail, without a GPU: each reports what happened, nothing leaks, and, unless the device is lost,
// the next chain is right.
#include <cmath>
#include <stdexcept>

#include "check.hpp"
#include "device_rig.hpp"

namespace {

using namespace ddpmx_test;

const char *const kExecutors[] = {"graph", "plain"};

void not_finite() {
  for (const char *executor : kExecutors) {
    for (const size_t step : {size_t{0}, size_t{4}, size_t{6}}) {
      for (const bool watched : {false, true}) {
        Rig rig;
        {
          const auto runner = rig.open(executor);
          Request request;
          drawn(*runner, rig, request, watched);  // by now the effect of the batch has been measured
          const int32_t t = trt().network.nan_at = rig.table.timesteps[step];
          const std::string where = "the network's output at t = " + std::to_string(t) + " is not finite";
          CHECK(fails(DDPMX_NUMERIC, where, [&] { drawn(*runner, rig, request, watched); }));
          CHECK(fails(DDPMX_NUMERIC,
                      "step " + std::to_string(step + 1) + " of 7; TensorRT 10.3.0.26 on Fake GPU, SM 8.9; executor " +
                          executor,
                      [&] { drawn(*runner, rig, request, watched); }));
          request.x.assign(3 * static_cast<size_t>(rig.N()), 0.5f);
          CHECK(fails(DDPMX_NUMERIC, step ? "if the file is fp16" : "check the x that was passed",
                      [&] { drawn(*runner, rig, request, watched); }));
          trt().network.nan_at = -1;
          CHECK(same(drawn(*runner, rig, request, watched), expected(rig, request)));
        }
        CHECK(clean());
      }
    }
  }
}

void cancelled() {
  for (const char *executor : kExecutors) {
    for (const uint64_t k : {1u, 5u, 20u}) {
      for (const bool watched : {false, true}) {
        Rig rig;
        rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance);  // 20 steps
        {
          const auto runner = rig.open(executor);
          const Request request;
          drawn(*runner, rig, request, watched);
          cuda().launches.clear();
          std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
          ddpmx::Job job = request.job(rig.table);
          job.pixels = pixels.data(), job.previews = watched;
          uint64_t last = 0;
          job.report = [&](int32_t, uint64_t done, const float *, const float *) { return last = done, done < k; };
          // the running step is still completed
          std::string note;
          try {
            runner->run(job);
          } catch (const Failure &failure) {
            CHECK(failure.status == DDPMX_CANCELLED);
            note = failure.note;
          }
          CHECK(note == "after " + std::to_string(k) + " of 20 steps" ||
                (!watched && note == "after " + std::to_string(k + 1) + " of 20 steps"));
          CHECK(last == k);
          const auto steps = std::count(cuda().launches.begin(), cuda().launches.end(), "ddpmx_step");
          CHECK(static_cast<uint64_t>(steps) <= k + ddpmx::cuda::kLookAhead);
          job.report = [](int32_t, uint64_t done, const float *, const float *) -> bool {
            if (done > 2) throw std::runtime_error("thrown by the callback");
            return true;
          };
          bool thrown = false;
          try {
            runner->run(job);
          } catch (const std::runtime_error &) {
            thrown = true;
          }
          CHECK(thrown && cuda().depth() == 0);
          CHECK(same(drawn(*runner, rig, request, watched), expected(rig, request)));
        }
        CHECK(clean());
      }
    }
  }
}

// A network that fails: in its first run, in the capture, and in the chain.
void refusals() {
  for (const char *executor : kExecutors) {
    for (int at = 1; at <= 14; ++at) {
      Rig rig;
      {
        const auto runner = rig.open(executor);
        Request request;
        request.batch = request.images.size();
        trt().refuse_at = at;
        bool failed = false;
        try {
          CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
        } catch (const Failure &failure) {
          failed = true;
          CHECK(failure.status == DDPMX_BACKEND && failure.fact == "TensorRT 10.3.0.26 refuses to run the network");
          CHECK(failure.note == "'its error message'");
        }
        CHECK(failed == (trt().enqueued >= at));
        trt().refuse_at = 0;
        CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
      }
      CHECK(clean());
    }
  }
  for (const auto &[function, text] :
       std::map<std::string, std::string>{{"open_context", "does not take an execution context for profile 0"},
                                          {"bind", "does not take 4 images as x"},
                                          {"check", "does not take a batch of 4"},
                                          {"enqueue", "refuses to run the network"}}) {
    Rig rig;
    {
      const auto runner = rig.open();
      trt().refuse.insert(function);
      CHECK(fails(DDPMX_BACKEND, text, [&] { drawn(*runner, rig, Request()); }));
      CHECK(fails(DDPMX_BACKEND, "[" + function + "] refused\\x01", [&] { drawn(*runner, rig, Request()); }));
      trt().refuse.clear();
      CHECK(same(drawn(*runner, rig, Request()), expected(rig, Request())));
    }
    CHECK(clean());
  }
}

// A network that does its work on the host while it is enqueued, or nothing while it is captured: the capture repeats an
// old output, and is not used.
void stale_captures() {
  for (const bool on_the_host : {true, false}) {
    Rig rig;
    trt().on_the_host = on_the_host, trt().skips_captures = !on_the_host;
    const auto runner = rig.open("auto");
    drawn(*runner, rig, Request());
    CHECK(runner->description().find("executor plain; not graph: the captured step gives another output") !=
          std::string::npos);
    const auto insisting = rig.open("graph");
    CHECK(fails(DDPMX_BACKEND, "the captured step gives another output", [&] { drawn(*insisting, rig, Request()); }));
  }
  CHECK(clean());
}

// "auto" continues without graphs where they do not work, and says why.
void without_graphs() {
  for (const char *function :
       {"cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"}) {
    Rig rig;
    cuda().fail[function] = {0, 900};
    {
      const auto runner = rig.open("auto");
      CHECK(same(drawn(*runner, rig, Request()), expected(rig, Request())));
      CHECK(runner->description().find("executor plain; not graph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED while ") !=
            std::string::npos);
      const auto insisting = rig.open("graph");
      CHECK(fails(DDPMX_BACKEND, function, [&] { drawn(*insisting, rig, Request()); }));
    }
    CHECK(clean());
  }
}

// A step that hangs is abandoned, and none of its objects is freed or waited for; later calls report that.
void given_up() {
  Rig rig(kConditioned);
  Request request = Request::of(rig);
  request.batch = request.images.size();
  {
    const auto runner = rig.open_inside("auto", 0.02);
    cuda().graphs_hang = true;
    CHECK(fails(DDPMX_BACKEND, "the network did not finish in time", [&] { drawn(*runner, rig, request); }));
    const int freed = cuda().count("cuMemFree_v2");
    CHECK(cuda().alive["stream"] == 1 && cuda().alive["pinned"] == 1 && cuda().alive["memory"] > 9);
    CHECK(fails(DDPMX_BACKEND, "a chain was abandoned and may still be running", [&] { drawn(*runner, rig, request); }));
    CHECK(cuda().count("cuMemFree_v2") == freed);
  }
  CHECK(cuda().alive["stream"] == 1 && cuda().retained == 1 && trt().contexts == 1 && trt().engines == 1);
  CHECK(cuda().faults.empty() && cuda().depth() == 0);
}

// A device that is lost in the middle of a chain.
void lost_device() {
  for (const char *executor : kExecutors) {
    Rig rig;
    {
      const auto runner = rig.open(executor);
      drawn(*runner, rig, Request());
      cuda().on_kernel = [steps = 0](const std::string &name) mutable {
        if (name == "ddpmx_step" && ++steps == 4) cuda().broken = 700;
      };
      CHECK(fails(DDPMX_BACKEND, "CUDA_ERROR_ILLEGAL_ADDRESS while running the chain",
                  [&] { drawn(*runner, rig, Request()); }));
      CHECK(fails(DDPMX_BACKEND, "end it and start again", [&] { drawn(*runner, rig, Request()); }));
    }
    CHECK(cuda().retained == 0 && cuda().depth() == 0 && cuda().alive["memory"] == 0);
  }
}

// Opens, generates, watches, generates again, closes.
void attempt(Rig &rig, const char *executor, int *wrong) {
  const auto runner = rig.open(executor);
  Request request = Request::of(rig);
  const Images wanted = expected(rig, request);
  std::vector<Failure> failures;
  const auto try_it = [&](bool watched) {
    try {
      *wrong += !same(drawn(*runner, rig, request, watched), wanted);
    } catch (const Failure &failure) {
      failures.push_back(failure);
      if (failure.status != DDPMX_BACKEND) ++*wrong;
    }
  };
  try_it(false);
  try_it(true);
  try_it(false);
  try_it(false);
  if (failures.size() > 1) ++*wrong;  // one call fails, and the pipeline stays usable
  if (!failures.empty()) throw failures[0];
}

// Each call to the driver fails once: an error, no leak, no fault, and the next chain is right.
void every_call() {
#ifdef __SANITIZE_ADDRESS__
  const std::vector<const char *> executors{"auto"};  // which captures too, and may fall back to plain
#else
  const std::vector<const char *> executors{"graph", "plain", "auto"};
#endif
  for (const std::string &json : {kConditioned, kLearned}) {
    for (const char *executor : executors) {
      int calls = 0, errors = 0, wrong = 0;
      {
        Rig rig(json);
        attempt(rig, executor, &wrong);
        calls = cuda().counted;
        CHECK(calls > 200 && wrong == 0 && clean());
      }
      for (int at = 1; at <= calls; ++at) {
        Rig rig(json);
        cuda().fail_at = at;
        try {
          attempt(rig, executor, &wrong);
        } catch (const Failure &failure) {
          ++errors;
          if (failure.status != DDPMX_BACKEND) std::fprintf(stderr, "call %d: %s\n", at, failure.what()), ++wrong;
        }
        if (!clean()) std::fprintf(stderr, "when call %d failed\n", at), ++wrong;
      }
      CHECK(wrong == 0);
      // a capture that fails is no error if plain works
      CHECK(errors > calls * (executor == std::string("auto") ? 8 : 9) / 10);
      std::printf("%s by %s: each of %d calls failed once, %d errors\n",
                  json == kConditioned ? "conditioned" : "learned variance", executor, calls, errors);
    }
  }
}

// Also the calls that free, push and pop: their objects stay allocated, but nothing else is wrong.
void every_free() {
  Rig rig;
  int wrong = 0;
  cuda().count_frees = true;
  attempt(rig, "graph", &wrong);
  const int calls = cuda().counted;
  for (int at = 1; at <= calls; ++at) {
    Rig again;
    cuda().count_frees = true;
    cuda().fail_at = at;
    try {
      attempt(again, "graph", &wrong);
    } catch (const Failure &failure) {
      if (failure.status != DDPMX_BACKEND) ++wrong;
    }
    if (!cuda().faults.empty()) std::fprintf(stderr, "call %d: %s\n", at, cuda().faults[0].c_str()), ++wrong;
  }
  CHECK(wrong == 0 && calls > 400);
}

void out_of_memory() {
  Rig rig(kConditioned);
  Request request = Request::of(rig);
  request.batch = request.images.size();
  for (int at = 1;; ++at) {
    const auto runner = rig.open("graph");
    cuda().calls.clear();
    cuda().fail["cuMemAlloc_v2"] = {at, 2};
    bool failed = false;
    try {
      drawn(*runner, rig, request);
    } catch (const Failure &failure) {
      failed = true;
      CHECK(failure.fact.find("CUDA_ERROR_OUT_OF_MEMORY while allocating ") == 0);
      CHECK(failure.hint.find("a smaller batch") == 0);
    }
    cuda().fail.clear();
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    if (!failed) {
      CHECK(at > 15);
      break;
    }
  }
  CHECK(clean());
}

}  // namespace

int main() {
  not_finite();
  cancelled();
  refusals();
  stale_captures();
  without_graphs();
  given_up();
  lost_device();
  every_call();
  every_free();
  out_of_memory();
  return finish();
}
