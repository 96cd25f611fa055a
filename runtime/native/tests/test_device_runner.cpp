// Chains of a plan, without a GPU: their results, and the requests that are possible.
#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "check.hpp"
#include "device_rig.hpp"

namespace {

using namespace ddpmx_test;

// Every bit, by both executors, for every kind of network, and from call to call.
void whole_chains() {
  for (const std::string &json : {kSmall, kOdd, kConditioned, kLearned}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        Request request = Request::of(rig);
        CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
        CHECK(runner->description() == std::string("TensorRT 10.3.0.26 on Fake GPU, SM 8.9, executor ") + executor);
        request.seed = 1ull << 63;
        request.images = {4294967295u};
        request.y.resize(request.y.empty() ? 0 : 1);
        CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
      }
      CHECK(clean());
    }
  }
}

// Samplers that remember x0 of the steps before, which a network that conditions itself takes from the same place.
void chains_with_memory() {
  for (const std::string &json : {kSmall, kOdd, kConditioned, kLearned, kGuided}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        for (const char *sampler : {"unipc", "dpmpp_2m", "unipc"}) {  // again, and nothing of the last chain is left
          ddpmx::Sampling sampling = Rig::sampling(7);
          sampling.sampler = sampler;
          rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance, sampling);
          CHECK(rig.table.remembers_two() == (sampling.sampler == "unipc"));
          for (const bool previews : {false, true}) {
            Request request = Request::of(rig);
            CHECK(same(drawn(*runner, rig, request, previews), expected(rig, request)));
            if (json == kGuided) request.guidance = ddpmx::Guidance{2.5f, 10};
            CHECK(same(drawn(*runner, rig, request, previews), expected(rig, request)));
          }
        }
        rig.table.memory[3].c += 0.5f;  // another table is another chain
        CHECK(same(drawn(*runner, rig, Request::of(rig)), expected(rig, Request::of(rig))));
      }
      CHECK(clean());
    }
  }
}

// Guided: each image has a row with its class and one without.
void guided_chains() {
  for (const std::string &json : {kGuided, kGuidedLearned}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        Request request = Request::of(rig);
        const Images plain = drawn(*runner, rig, request);
        for (const float scale : {2.5f, -1.0f}) {
          request.guidance = ddpmx::Guidance{scale, 10};
          const Images wanted = expected(rig, request), made = drawn(*runner, rig, request, true);
          CHECK(same(drawn(*runner, rig, request), wanted) && same(made, wanted));
          CHECK(same(made.x.back(), wanted.x.back()) && same(made.x0.front(), wanted.x0.front()));
          CHECK(trt().batches.back() == 6);
          CHECK(!same(wanted, plain));
        }
        request.guidance.reset();
        CHECK(same(drawn(*runner, rig, request), plain));
      }
      CHECK(clean());
    }
  }
  {  // conditions on the device, a batch that is filled up, and images that run alone
    for (bool FakeNetwork::*sways : {&FakeNetwork::by_size, &FakeNetwork::by_place}) {
      Rig rig(kGuided);
      trt().network.*sways = true;
      Request request = Request::of(rig);
      request.guidance = ddpmx::Guidance{2.0f, 10};
      Images made[2];
      {
        const auto runner = rig.open();
        made[0] = drawn(*runner, rig, request);
        CHECK(trt().batches.back() == (sways == &FakeNetwork::by_size ? 8 : 2));
      }
      {
        const auto runner = rig.open();
        ddpmx::cuda::Driver mine(0);
        mine.start();
        const ddpmx::cuda::Current current(mine);
        const size_t size = request.cond.size() * sizeof(float);
        const ddpmx::cuda::Handle cond = mine.allocate(size, "cond"),
                                  pixels = mine.allocate(made[0].pixels.size(), "pixels");
        std::memcpy(cond.pointer(), request.cond.data(), size);  // the fake's memory is the host's
        ddpmx::Job job = request.job(rig.table);
        job.cond = reinterpret_cast<const float *>(cond.value());
        job.pixels = reinterpret_cast<uint8_t *>(pixels.value()), job.on_device = true;
        runner->run(job);
        made[1].pixels.assign(reinterpret_cast<uint8_t *>(pixels.pointer()),
                              reinterpret_cast<uint8_t *>(pixels.pointer()) + made[0].pixels.size());
      }
      CHECK(same(made[0].pixels, made[1].pixels));
      CHECK(clean());
    }
  }
  CHECK((ddpmx::guided_batches({{1, 16}}) == ddpmx::Ranges{{1, 8}}));
  CHECK((ddpmx::guided_batches({{3, 3}, {5, 9}}) == ddpmx::Ranges{{3, 4}}));
  CHECK(fails(DDPMX_INPUT, "takes no even number of rows", [] { ddpmx::guided_batches({{1, 1}, {3, 3}}); }));
}

void previews() {
  for (const std::string &json : {kSmall, kConditioned, kLearned}) {
    for (const char *executor : {"graph", "plain"}) {
      Rig rig(json);
      {
        const auto runner = rig.open(executor);
        const Request request = Request::of(rig);
        const Images made = drawn(*runner, rig, request, true), wanted = expected(rig, request);
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

// The next chain of the same kind costs no memory, no execution context and no measuring.
void memory_is_kept() {
  Rig rig;
  {
    const auto runner = rig.open();
    Request request;
    drawn(*runner, rig, request);
    CHECK((trt().batches == std::vector<int64_t>{4, 4, 3, 3}));  // two for the place, one for the size, and the chain's
    const int allocated = cuda().count("cuMemAlloc_v2");
    const size_t contexts = trt().batches.size();
    request.images = {3, 4, 5};
    request.seed = 6;
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    // a chain without x0 can use one that keeps it
    ddpmx::Job job = request.job(rig.table);
    std::vector<uint8_t> pixels(request.images.size() * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(pixels, expected(rig, request).pixels));
    CHECK(cuda().count("cuMemAlloc_v2") == allocated && trt().batches.size() == contexts);
    // the chain of the largest batch is used for smaller ones
    request.images = {3, 4, 5, 6};
    drawn(*runner, rig, request);
    const int before = cuda().count("cuMemAlloc_v2");
    request.images = {9};
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    CHECK(cuda().count("cuMemAlloc_v2") == before);
    // another table is another chain
    rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance, Rig::sampling(5));
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    CHECK(cuda().count("cuMemAlloc_v2") > before);
    // and so is one with other timesteps, or other coefficients
    for (int32_t &t : rig.table.timesteps) t = std::max(0, t - 1);
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    rig.table.rows[1].sigma = 0.25f;
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
  }
  {  // a chain that keeps no x0 cannot be used for one that needs it
    const auto runner = rig.open();
    const Request request;
    ddpmx::Job job = request.job(rig.table);
    std::vector<uint8_t> pixels(request.images.size() * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    CHECK(same(pixels, expected(rig, request).pixels));
  }
  CHECK(clean());
  {  // a network with a second output that the table does not use
    Rig learned(kLearned);
    {
      const auto runner = learned.open();
      CHECK(same(drawn(*runner, learned, Request()), expected(learned, Request())));
      learned.table.learned[1].c += 0.5f;
      CHECK(same(drawn(*runner, learned, Request()), expected(learned, Request())));
      learned.table = ddpmx::make_table(learned.spec.schedule, learned.spec.prediction, ddpmx::Variance::fixed_small,
                                        Rig::sampling(7));
      CHECK(same(drawn(*runner, learned, Request()), expected(learned, Request())));
    }
  }
  CHECK(clean());
}

// Samples alone, pixels alone, and an initial state from the caller.
void what_is_wanted() {
  Rig rig;
  {
    const auto runner = rig.open();
    Request request;
    for (size_t k = 0; k < request.images.size() * static_cast<size_t>(rig.N()); ++k) {
      request.x.push_back(static_cast<float>(k % 17) / 8 - 1);
    }
    const Images wanted = expected(rig, request);
    CHECK(same(drawn(*runner, rig, request), wanted));
    std::vector<float> samples(wanted.samples.size());
    ddpmx::Job job = request.job(rig.table);
    job.samples = samples.data();
    runner->run(job);
    CHECK(same(samples, wanted.samples));
  }
  {
    const auto runner = rig.open();
    const Request request;
    std::vector<uint8_t> pixels(request.images.size() * static_cast<size_t>(rig.N()));
    ddpmx::Job job = request.job(rig.table);
    job.pixels = pixels.data();
    runner->run(job);
    CHECK(same(pixels, expected(rig, request).pixels));
  }
  CHECK(clean());
}

// Arrays on the device, one of which is still being written in a stream of the caller, or in CUDA's default stream.
void on_the_device() {
  for (const auto &[watched, by_default] : {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
    Rig rig(kConditioned);
    {
      const auto runner = rig.open();
      ddpmx::cuda::Driver mine(0);
      mine.start();
      const ddpmx::cuda::Current current(mine);
      Request request = Request::of(rig);
      for (size_t k = 0; k < request.images.size() * static_cast<size_t>(rig.N()); ++k) {
        request.x.push_back(static_cast<float>(k % 23) / 16);
      }
      const Images wanted = expected(rig, request);
      CHECK(same(drawn(*runner, rig, request), wanted));  // so that nothing is freed while the stream below runs
      const auto bytes = [](const auto &array) { return array.size() * sizeof array[0]; };
      const ddpmx::cuda::Handle x = mine.allocate(bytes(request.x), "x"), cond = mine.allocate(bytes(request.cond), "cond"),
                                pixels = mine.allocate(bytes(wanted.pixels), "pixels"),
                                samples = mine.allocate(bytes(wanted.samples), "samples"), stream = mine.stream();
      mine.copy_in(cond.value(), request.cond.data(), bytes(request.cond), stream.pointer());
      mine.wait_for_stream(stream.pointer(), "");
      const auto writing = by_default ? ddpmx::cuda::kLegacyStream : stream.pointer();
      mine.copy_in(x.value(), request.x.data(), bytes(request.x), writing);  // without waiting
      ddpmx::Job job = request.job(rig.table);
      job.x = reinterpret_cast<const float *>(x.value()), job.cond = reinterpret_cast<const float *>(cond.value());
      job.pixels = reinterpret_cast<uint8_t *>(pixels.value()),
      job.samples = reinterpret_cast<float *>(samples.value());
      job.on_device = true, job.after = by_default ? nullptr : writing, job.previews = watched;
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

// A batch is filled with the last image, wherever the arrays are.
void filled_up() {
  Rig rig(kConditioned);
  trt().network.by_size = true;
  Request request = Request::of(rig);
  Images made[2];
  {
    const auto runner = rig.open();
    made[0] = drawn(*runner, rig, request);
    CHECK(trt().batches.back() == 4);
  }
  {
    const auto runner = rig.open();
    ddpmx::cuda::Driver mine(0);
    mine.start();
    const ddpmx::cuda::Current current(mine);
    const size_t size = request.cond.size() * sizeof(float);
    const ddpmx::cuda::Handle cond = mine.allocate(size, "cond"),
                              pixels = mine.allocate(made[0].pixels.size(), "pixels");
    std::memcpy(cond.pointer(), request.cond.data(), size);  // the fake's memory is the host's
    ddpmx::Job job = request.job(rig.table);
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

// Steps are reported in order, end with the last one, and in the caller's own context.
void reports() {
  for (const char *executor : {"graph", "plain"}) {
    Rig rig;
    {
      const auto runner = rig.open(executor);
      std::vector<uint64_t> seen;
      bool outside = true, right_t = true;
      std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
      const Request request;
      ddpmx::Job job = request.job(rig.table);
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
  const auto images_of = [&](ddpmx::Runner &runner, const std::vector<uint32_t> &images) {
    Request request;
    request.images = images;
    return drawn(runner, rig, request);
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
  {  // independent: the batch is as small as the request
    const auto runner = rig.open();
    images_of(*runner, {1, 2});
    CHECK(trt().batches.back() == 2);
  }
  {  // dependent on the batch size: the batch is filled
    trt().network.by_size = true;
    const auto runner = rig.open();
    const Images whole = images_of(*runner, {0, 1, 2, 3});
    CHECK(trt().batches.back() == 4);
    CHECK(same(images_of(*runner, {1, 2}), part(whole, 1, 2)));
    const auto other = rig.open();
    CHECK(same(images_of(*other, {1, 2}), part(whole, 1, 2)));
    CHECK(trt().batches.back() == 4);
    trt().network.by_size = false;
  }
  {  // dependent on the place: each image runs alone, and they are reported as one chain
    trt().network.by_place = true;
    const auto runner = rig.open();
    const Images whole = images_of(*runner, {0, 1, 2, 3});
    CHECK(trt().batches.back() == 1);
    CHECK(same(images_of(*runner, {2, 3}), part(whole, 2, 2)));
    Request request;
    std::vector<uint64_t> seen;
    std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
    ddpmx::Job job = request.job(rig.table);
    job.pixels = pixels.data();
    job.report = [&](int32_t, uint64_t done, const float *, const float *) { return seen.push_back(done), true; };
    runner->run(job);
    CHECK(seen.back() == rig.table.rows.size());
    CHECK(std::is_sorted(seen.begin(), seen.end()) && std::adjacent_find(seen.begin(), seen.end()) == seen.end());
    CHECK(fails(DDPMX_INPUT, "only one can be watched", [&] { drawn(*runner, rig, request, true); }));
    request.images = {2};
    CHECK(same(drawn(*runner, rig, request, true), part(whole, 2, 1)));
    trt().network.by_place = false;
  }
  {  // dependent on the run: nothing helps, and nothing breaks
    trt().network.by_run = true;
    const auto runner = rig.open();
    images_of(*runner, {0, 1});
    CHECK(trt().batches.back() == 4);
    CHECK(runner->description().find("executor graph") != std::string::npos);  // and the capture is not to blame
    trt().network.by_run = false;
  }
  {  // a plan of several profiles, none of which takes one image
    trt().profiles = {{4, 8}, {2, 3}};
    const auto runner = rig.open();
    CHECK((runner->batches() == std::vector<std::pair<uint64_t, uint64_t>>{{4, 8}, {2, 3}}));
    Request request;
    request.images = {5};
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    CHECK(trt().batches.back() == 4);  // it does not take one image, so the largest batch is measured
    trt().network.by_place = true;
    const auto other = rig.open();
    drawn(*other, rig, request);
    CHECK(trt().batches.back() == 2);  // its smallest batch
    trt().network.by_place = false;
    trt().profiles = {{1, 8}, {2, 4}, {1, 4}};
    drawn(*rig.open(), rig, Request());
    CHECK(trt().chosen.back() == 1);  // which was tuned for the fewest other batches
  }
  CHECK(clean());
}

// The host launches steps ahead, but not more than kLookAhead.
void ahead() {
  Rig rig;
  rig.table = ddpmx::make_table(rig.spec.schedule, rig.spec.prediction, rig.spec.variance);  // 20 steps
  {
    const auto runner = rig.open("graph");
    Request request;
    drawn(*runner, rig, request);
    const size_t begun = cuda().calls.size();
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
    const std::vector<std::string> calls(cuda().calls.begin() + static_cast<long>(begun), cuda().calls.end());
    const auto first_wait = std::find(calls.begin(), calls.end(), "cuEventSynchronize");
    CHECK(std::count(calls.begin(), first_wait, "cuEventRecord") == ddpmx::cuda::kLookAhead);
    CHECK(std::count(calls.begin(), calls.end(), "cuGraphLaunch") == 20);
    CHECK(std::count(calls.begin(), calls.end(), "cuStreamSynchronize") == 2);  // at the end, and for the images
  }
  CHECK(clean());
}

// Chains of several threads wait for each other; a chain inside another is refused.
void threads() {
  Rig rig;
  {
    const auto runner = rig.open();
    std::atomic<int> wrong{0};
    Request first, second;
    second.seed = 9, second.images = {1, 2};
    const Images wanted[] = {expected(rig, first), expected(rig, second)};
    const auto work = [&](const Request &request, const Images &want) {
      for (int i = 0; i < 8; ++i) wrong += !same(drawn(*runner, rig, request), want);
    };
    std::thread other([&] { work(second, wanted[1]); });
    work(first, wanted[0]);
    other.join();
    CHECK(wrong == 0);
    ddpmx::Job job = first.job(rig.table);
    std::vector<uint8_t> pixels(3 * static_cast<size_t>(rig.N()));
    job.pixels = pixels.data();
    job.report = [&](int32_t, uint64_t, const float *, const float *) {
      CHECK(fails(DDPMX_INPUT, "already running", [&] { runner->run(first.job(rig.table)); }));
      return true;
    };
    runner->run(job);
  }
  CHECK(clean());
}

// The same through the C functions, in two batches.
void through_the_c_api() {
  Rig rig(kConditioned);
  ddpmx_open_options options;
  CHECK(ddpmx_open_options_init(&options, sizeof options) == DDPMX_OK);
  options.trt_module = FAKE_TRT, options.executor = "graph";
  ddpmx_pipeline *pipeline = nullptr;
  CHECK(ddpmx_open(rig.path.c_str(), &options, &pipeline) == DDPMX_OK);
  CHECK(std::string(ddpmx_backend(pipeline)) == "TensorRT 10.3.0.26 on Fake GPU, SM 8.9");
  Request request;
  request.images = {3, 4, 5, 6, 7, 8};
  for (size_t i = 0; i < 6; ++i) request.y.push_back(static_cast<int32_t>(i));
  for (int64_t k = 0; k < 6 * rig.K(); ++k) request.cond.push_back(static_cast<float>(k % 31) / 32);
  ddpmx_request c_request;
  CHECK(ddpmx_request_init(&c_request, sizeof c_request) == DDPMX_OK);
  c_request.n = 6, c_request.batch = 4, c_request.first = 3, c_request.seed = request.seed, c_request.steps = 7;
  c_request.labels = request.y.data(), c_request.labels_count = 6, c_request.cond = request.cond.data();
  std::vector<ddpmx_progress> seen;
  c_request.callback = [](const ddpmx_progress *progress, void *user) {
    static_cast<std::vector<ddpmx_progress> *>(user)->push_back(*progress);
    return 0;
  };
  c_request.user = &seen;
  Images made;
  made.pixels.resize(6 * static_cast<size_t>(rig.N())), made.samples.resize(made.pixels.size());
  const ddpmx_status status = ddpmx_generate(pipeline, &c_request, made.pixels.data(), made.pixels.size(),
                                             made.samples.data(), made.samples.size() * sizeof(float));
  CHECK(status == DDPMX_OK);
  if (status) std::fprintf(stderr, "%s\n", ddpmx_last_error());
  CHECK(same(made, expected(rig, request)));
  CHECK(!seen.empty() && seen.back().done == 14 && seen.back().total == 14 && seen.back().first == 4 &&
        seen.back().n == 2);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  CHECK(clean());
}

}  // namespace

int main() {
  through_the_c_api();
  whole_chains();
  chains_with_memory();
  guided_chains();
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
