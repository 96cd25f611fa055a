// Chains of a plan, without a GPU: what they give, and what may be asked of them.
#include <algorithm>
#include <atomic>
#include <thread>

#include "check.hpp"
#include "device_rig.hpp"

namespace {

using namespace ddpmx_test;

// Every bit, by both executors, for every kind of network, and from call to call.
void whole_chains() {
  for (const std::string &json : {kSmall, kOdd, kTold, kLearned}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        Asked asked = Asked::of(rig);
        CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
        CHECK(runner->description() == std::string("TensorRT 10.3.0.26 on Fake GPU, SM 8.9, executor ") + executor);
        asked.seed = 1ull << 63;
        asked.images = {4294967295u};
        asked.y.resize(asked.y.empty() ? 0 : 1);
        CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
      }
      CHECK(clean());
    }
  }
}

void previews() {
  for (const std::string &json : {kSmall, kTold, kLearned}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        const Asked asked = Asked::of(rig);
        const Images made = drawn(*runner, rig, asked, true), wanted = expected(rig, asked);
        CHECK(same(made, wanted));
        CHECK(made.t == wanted.t);
        for (size_t step = 0; step < wanted.x.size(); ++step) {
          CHECK(same(made.x.at(step), wanted.x[step]));
          CHECK(same(made.x0.at(step), wanted.x0[step]));
        }
      }
      CHECK(clean());
    }
  }
}

// The next chain like the last one costs no memory, no engine's context and no measuring.
void memory_is_kept() {
  Rig rig;
  {
    const auto runner = rig.open();
    Asked asked;
    drawn(*runner, rig, asked);
    CHECK((trt().batches == std::vector<int64_t>{4, 4, 3, 3}));  // whether alone, whether as few, and the chain's
    const int allocated = cuda().count("cuMemAlloc_v2");
    const size_t contexts = trt().batches.size();
    asked.images = {3, 4, 5};
    asked.seed = 6;
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    // without x0 the chain that keeps it will do
    ddpmx::Job job = asked.job(rig.table);
    std::vector<uint8_t> pixels(asked.images.size() * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(pixels, expected(rig, asked).pixels));
    CHECK(cuda().count("cuMemAlloc_v2") == allocated && trt().batches.size() == contexts);
    // the largest batch serves all that follow
    asked.images = {3, 4, 5, 6};
    drawn(*runner, rig, asked);
    const int before = cuda().count("cuMemAlloc_v2");
    asked.images = {9};
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    CHECK(cuda().count("cuMemAlloc_v2") == before);
    // another table is another chain
    rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance, Rig::sampling(5));
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    CHECK(cuda().count("cuMemAlloc_v2") > before);
    // and so is one that is told other timesteps, or has other coefficients
    for (int32_t &t : rig.table.timesteps) t = std::max(0, t - 1);
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    rig.table.rows[1].sigma = 0.25f;
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
  }
  {  // a chain that keeps no x0 serves nobody who wants it
    const auto runner = rig.open();
    const Asked asked;
    ddpmx::Job job = asked.job(rig.table);
    std::vector<uint8_t> pixels(asked.images.size() * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    CHECK(same(pixels, expected(rig, asked).pixels));
  }
  CHECK(clean());
  {  // a network that answers a variance which the table does not want
    Rig learned(kLearned);
    {
      const auto runner = learned.open();
      CHECK(same(drawn(*runner, learned, Asked()), expected(learned, Asked())));
      learned.table.learned[1].c += 0.5f;
      CHECK(same(drawn(*runner, learned, Asked()), expected(learned, Asked())));
      learned.table = ddpmx::make_table(learned.spec.schedule, learned.spec.prediction, ddpmx::Variance::fixed_small,
                                        Rig::sampling(7));
      CHECK(same(drawn(*runner, learned, Asked()), expected(learned, Asked())));
    }
  }
  CHECK(clean());
}

// Samples alone, pixels alone, and a state of the caller's own.
void what_is_wanted() {
  Rig rig;
  {
    const auto runner = rig.open();
    Asked asked;
    for (size_t k = 0; k < asked.images.size() * static_cast<size_t>(rig.N()); ++k) {
      asked.x.push_back(static_cast<float>(k % 17) / 8 - 1);
    }
    const Images wanted = expected(rig, asked);
    CHECK(same(drawn(*runner, rig, asked), wanted));
    std::vector<float> samples(wanted.samples.size());
    ddpmx::Job job = asked.job(rig.table);
    job.samples = samples.data();
    runner->run(job);
    CHECK(same(samples, wanted.samples));
  }
  {
    const auto runner = rig.open();
    const Asked asked;
    std::vector<uint8_t> pixels(asked.images.size() * static_cast<size_t>(rig.N()));
    ddpmx::Job job = asked.job(rig.table);
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(pixels, expected(rig, asked).pixels));
  }
  CHECK(clean());
}

// Arrays on the device, the first of which is still being written in a stream of the caller's.
void on_the_device() {
  for (const bool watched : {false, true}) {
    Rig rig(kTold);
    {
      const auto runner = rig.open();
      ddpmx::cuda::Driver mine(0);
      mine.start();
      const ddpmx::cuda::Current current(mine);
      Asked asked = Asked::of(rig);
      for (size_t k = 0; k < asked.images.size() * static_cast<size_t>(rig.N()); ++k) {
        asked.x.push_back(static_cast<float>(k % 23) / 16);
      }
      const Images wanted = expected(rig, asked);
      CHECK(same(drawn(*runner, rig, asked), wanted));  // now nothing is freed while the stream below is at work
      const auto bytes = [](const auto &array) { return array.size() * sizeof array[0]; };
      const ddpmx::cuda::Handle x = mine.allocate(bytes(asked.x), "x"), cond = mine.allocate(bytes(asked.cond), "cond"),
                                pixels = mine.allocate(bytes(wanted.pixels), "levels"),
                                samples = mine.allocate(bytes(wanted.samples), "samples"), stream = mine.stream();
      mine.copy_in(cond.value(), asked.cond.data(), bytes(asked.cond), stream.pointer());
      mine.wait_for_stream(stream.pointer(), "");
      mine.copy_in(x.value(), asked.x.data(), bytes(asked.x), stream.pointer());  // and nobody waits
      ddpmx::Job job = asked.job(rig.table);
      job.x = reinterpret_cast<const float *>(x.value()), job.cond = reinterpret_cast<const float *>(cond.value());
      job.pixels = reinterpret_cast<uint8_t *>(pixels.value()),
      job.samples = reinterpret_cast<float *>(samples.value());
      job.on_device = true, job.after = stream.pointer(), job.previews = watched;
      runner->run(job);
      Images made;
      made.pixels.resize(wanted.pixels.size()), made.samples.resize(wanted.samples.size());
      std::memcpy(made.pixels.data(), pixels.pointer(), bytes(made.pixels));  // the fake's memory is the host's
      std::memcpy(made.samples.data(), samples.pointer(), bytes(made.samples));
      CHECK(same(made, wanted));
    }
    CHECK(clean());
  }
}

// What a batch has left is filled up, wherever the arrays are.
void filled_up() {
  Rig rig(kTold);
  trt().network.by_size = true;
  Asked asked = Asked::of(rig);
  Images made[2];
  {
    const auto runner = rig.open();
    made[0] = drawn(*runner, rig, asked);
    CHECK(trt().batches.back() == 4);
  }
  {
    const auto runner = rig.open();
    ddpmx::cuda::Driver mine(0);
    mine.start();
    const ddpmx::cuda::Current current(mine);
    const size_t size = asked.cond.size() * sizeof(float);
    const ddpmx::cuda::Handle cond = mine.allocate(size, "cond"),
                              pixels = mine.allocate(made[0].pixels.size(), "levels");
    std::memcpy(cond.pointer(), asked.cond.data(), size);  // the fake's memory is the host's
    ddpmx::Job job = asked.job(rig.table);
    job.cond = reinterpret_cast<const float *>(cond.value()), job.pixels = reinterpret_cast<uint8_t *>(pixels.value());
    job.on_device = true;
    runner->run(job);
    made[1].pixels.assign(reinterpret_cast<uint8_t *>(pixels.pointer()),
                          reinterpret_cast<uint8_t *>(pixels.pointer()) + made[0].pixels.size());
    CHECK(trt().batches.back() == 4);
  }
  CHECK(same(made[0].pixels, made[1].pixels));
  CHECK(clean());
}

// Steps are told in their order, end with the last one, and are told in the caller's own context.
void reports() {
  for (const char *executor : {"graph", "plain"}) {
    Rig rig;
    {
      const auto runner = rig.open(executor);
      std::vector<uint64_t> seen;
      bool outside = true, right_t = true;
      std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
      const Asked asked;
      ddpmx::Job job = asked.job(rig.table);
      job.pixels = pixels.data();
      job.report = [&](int32_t t, uint64_t done, const float *x, const float *x0) {
        outside &= cuda().depth() == 0 && !x && !x0;
        right_t &= t == rig.table.timesteps.at(done - 1);
        seen.push_back(done);
        return true;
      };
      runner->run(job);
      CHECK(outside && right_t);
      CHECK(!seen.empty() && seen.back() == rig.table.rows.size());
      CHECK(std::is_sorted(seen.begin(), seen.end()) && std::adjacent_find(seen.begin(), seen.end()) == seen.end());
      CHECK(cuda().depth() == 0);
    }
    CHECK(clean());
  }
}

// How images are grouped changes no bit of them, whatever the network does.
void neighbours() {
  Rig rig;
  const auto told_images = [&](ddpmx::Runner &runner, const std::vector<uint32_t> &images) {
    Asked asked;
    asked.images = images;
    return drawn(runner, rig, asked);
  };
  const auto part = [&](const Images &whole, size_t first, size_t n) {
    const auto N = static_cast<size_t>(rig.N());
    Images some;
    some.pixels.assign(whole.pixels.begin() + static_cast<long>(first * N),
                       whole.pixels.begin() + static_cast<long>((first + n) * N));
    some.samples.assign(whole.samples.begin() + static_cast<long>(first * N),
                        whole.samples.begin() + static_cast<long>((first + n) * N));
    return some;
  };
  {  // by nothing: as few as there are
    const auto runner = rig.open();
    told_images(*runner, {1, 2});
    CHECK(trt().batches.back() == 2);
  }
  {  // by the size of the batch: it is filled up
    trt().network.by_size = true;
    const auto runner = rig.open();
    const Images whole = told_images(*runner, {0, 1, 2, 3});
    CHECK(trt().batches.back() == 4);
    CHECK(same(told_images(*runner, {1, 2}), part(whole, 1, 2)));
    const auto other = rig.open();
    CHECK(same(told_images(*other, {1, 2}), part(whole, 1, 2)));
    CHECK(trt().batches.back() == 4);
    trt().network.by_size = false;
  }
  {  // by the place: each runs alone, and is told of as one chain
    trt().network.by_place = true;
    const auto runner = rig.open();
    const Images whole = told_images(*runner, {0, 1, 2, 3});
    CHECK(trt().batches.back() == 1);
    CHECK(same(told_images(*runner, {2, 3}), part(whole, 2, 2)));
    Asked asked;
    std::vector<uint64_t> seen;
    std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
    ddpmx::Job job = asked.job(rig.table);
    job.pixels = pixels.data();
    job.report = [&](int32_t, uint64_t done, const float *, const float *) { return seen.push_back(done), true; };
    runner->run(job);
    CHECK(seen.back() == rig.table.rows.size());
    CHECK(std::is_sorted(seen.begin(), seen.end()) && std::adjacent_find(seen.begin(), seen.end()) == seen.end());
    CHECK(fails(DDPMX_INPUT, "only one can be watched", [&] { drawn(*runner, rig, asked, true); }));
    asked.images = {2};
    CHECK(same(drawn(*runner, rig, asked, true), part(whole, 2, 1)));
    trt().network.by_place = false;
  }
  {  // by chance: nothing helps, and nothing breaks
    trt().network.by_run = true;
    const auto runner = rig.open();
    told_images(*runner, {0, 1});
    CHECK(trt().batches.back() == 4);
    CHECK(runner->description().find("executor graph") != std::string::npos);  // nor is the capture to blame
    trt().network.by_run = false;
  }
  {  // a plan of several profiles, none of which takes one image
    trt().profiles = {{4, 8}, {2, 3}};
    const auto runner = rig.open();
    CHECK((runner->batches() == std::vector<std::pair<uint64_t, uint64_t>>{{4, 8}, {2, 3}}));
    Asked asked;
    asked.images = {5};
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    CHECK(trt().batches.back() == 4);  // one is no batch of its, so the largest is measured
    trt().network.by_place = true;
    const auto other = rig.open();
    drawn(*other, rig, asked);
    CHECK(trt().batches.back() == 2);  // as alone as it gets
    trt().network.by_place = false;
    trt().profiles = {{1, 8}, {2, 4}, {1, 4}};
    drawn(*rig.open(), rig, Asked());
    CHECK(trt().chosen.back() == 1);  // which was tuned for the fewest others
  }
  CHECK(clean());
}

// The host says what is next before it is, and no further than that.
void ahead() {
  Rig rig;
  rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance);  // 20 steps
  {
    const auto runner = rig.open("graph");
    Asked asked;
    drawn(*runner, rig, asked);
    const size_t begun = cuda().calls.size();
    CHECK(same(drawn(*runner, rig, asked), expected(rig, asked)));
    const std::vector<std::string> calls(cuda().calls.begin() + static_cast<long>(begun), cuda().calls.end());
    const auto first_wait = std::find(calls.begin(), calls.end(), "cuEventSynchronize");
    CHECK(std::count(calls.begin(), first_wait, "cuEventRecord") == ddpmx::cuda::kLookAhead);
    CHECK(std::count(calls.begin(), calls.end(), "cuGraphLaunch") == 20);
    CHECK(std::count(calls.begin(), calls.end(), "cuStreamSynchronize") == 2);  // at the end, and for the images
  }
  CHECK(clean());
}

// Chains of several threads wait for each other; one within another is refused.
void threads() {
  Rig rig;
  {
    const auto runner = rig.open();
    std::atomic<int> wrong{0};
    Asked first, second;
    second.seed = 9, second.images = {1, 2};
    const Images wanted[] = {expected(rig, first), expected(rig, second)};
    const auto work = [&](const Asked &asked, const Images &want) {
      for (int i = 0; i < 8; ++i) wrong += !same(drawn(*runner, rig, asked), want);
    };
    std::thread other([&] { work(second, wanted[1]); });
    work(first, wanted[0]);
    other.join();
    CHECK(wrong == 0);
    ddpmx::Job job = first.job(rig.table);
    std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    job.report = [&](int32_t, uint64_t, const float *, const float *) {
      CHECK(fails(DDPMX_INPUT, "at work already", [&] { runner->run(first.job(rig.table)); }));
      return true;
    };
    runner->run(job);
  }
  CHECK(clean());
}

// The same through the C functions, in two batches.
void through_the_border() {
  Rig rig(kTold);
  ddpmx_open_options options;
  CHECK(ddpmx_open_options_init(&options, sizeof options) == DDPMX_OK);
  options.trt_module = FAKE_TRT, options.executor = "graph";
  ddpmx_pipeline *pipeline = nullptr;
  CHECK(ddpmx_open(rig.path.c_str(), &options, &pipeline) == DDPMX_OK);
  CHECK(std::string(ddpmx_backend(pipeline)) == "TensorRT 10.3.0.26 on Fake GPU, SM 8.9");
  Asked asked;
  asked.images = {3, 4, 5, 6, 7, 8};
  for (size_t i = 0; i < 6; ++i) asked.y.push_back(static_cast<int32_t>(i));
  for (int64_t k = 0; k < 6 * rig.K(); ++k) asked.cond.push_back(static_cast<float>(k % 31) / 32);
  ddpmx_request request;
  CHECK(ddpmx_request_init(&request, sizeof request) == DDPMX_OK);
  request.n = 6, request.batch = 4, request.first = 3, request.seed = asked.seed, request.steps = 7;
  request.labels = asked.y.data(), request.labels_count = 6, request.cond = asked.cond.data();
  std::vector<ddpmx_progress> seen;
  request.callback = [](const ddpmx_progress *progress, void *user) {
    static_cast<std::vector<ddpmx_progress> *>(user)->push_back(*progress);
    return 0;
  };
  request.user = &seen;
  Images made;
  made.pixels.resize(6 * static_cast<size_t>(rig.N())), made.samples.resize(made.pixels.size());
  const ddpmx_status status = ddpmx_generate(pipeline, &request, made.pixels.data(), made.pixels.size(),
                                             made.samples.data(), made.samples.size() * sizeof(float));
  CHECK(status == DDPMX_OK);
  if (status) std::fprintf(stderr, "%s\n", ddpmx_last_error());
  CHECK(same(made, expected(rig, asked)));
  CHECK(!seen.empty() && seen.back().done == 14 && seen.back().total == 14 && seen.back().first == 4 &&
        seen.back().n == 2);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  CHECK(clean());
}

}  // namespace

int main() {
  through_the_border();
  whole_chains();
  previews();
  memory_is_kept();
  what_is_wanted();
  on_the_device();
  filled_up();
  reports();
  neighbours();
  ahead();
  threads();
  return finish();
}
