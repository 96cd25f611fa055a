// The C API as a program sees it, on a fake ONNX Runtime: its results, and every error.
#include <atomic>
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ddpmx/ddpmx.h"

namespace {

int failures = 0, checks = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    ++checks;                                                                  \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      ++failures;                                                              \
    }                                                                          \
  } while (0)

// Whether a call returned that status, and the error text contains `part`.
bool returned(ddpmx_status got, ddpmx_status wanted, const char *part) {
  if (got == wanted && std::strstr(ddpmx_last_error(), part)) return true;
  std::fprintf(stderr, "%s, not %s: %s\n", ddpmx_status_name(got), ddpmx_status_name(wanted), ddpmx_last_error());
  return false;
}

constexpr uint64_t N = 3 * 8 * 8;  // of the model in GAUSSIAN, of which only the spec is used
constexpr int kSteps = 12;

std::filesystem::path folder;

std::string model(const std::string &name) {
  const auto path = folder / (name + ".onnx");
  std::filesystem::copy_file(GAUSSIAN, path, std::filesystem::copy_options::skip_existing);
  return path.string();
}

// The same, which says that it is in int8. Its spec is `… BYTES CRC32 {…}`.
std::string in_int8(const std::string &name) {
  const std::string path = model(name), from = "fp32";
  std::stringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  std::string text = bytes.str();
  const size_t precision = text.find("\"precision\""), begin = text.rfind(" {", precision) + 1;
  text.replace(text.find(from, precision), from.size(), "int8");
  size_t size = 0;
  std::sscanf(text.c_str() + text.rfind(' ', begin - 11), "%zu", &size);
  uint32_t crc = ~0u;
  for (size_t at = begin; at < begin + size; ++at) {
    crc ^= static_cast<unsigned char>(text[at]);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  char hex[9];
  std::snprintf(hex, sizeof hex, "%08x", ~crc);
  std::ofstream(path, std::ios::binary) << text.replace(begin - 9, 8, hex);
  return path;
}

ddpmx_open_options options() {
  ddpmx_open_options made;
  CHECK(ddpmx_open_options_init(&made, sizeof made) == DDPMX_OK);
  made.ort_library = FAKE_ORT;
  return made;
}

ddpmx_pipeline *opened(const std::string &name) {
  const ddpmx_open_options asked = options();
  ddpmx_pipeline *pipeline = nullptr;
  const ddpmx_status status = ddpmx_open(model(name).c_str(), &asked, &pipeline);
  CHECK(status == DDPMX_OK);
  if (status) std::fprintf(stderr, "%s\n", ddpmx_last_error());
  return pipeline;
}

ddpmx_request request(uint64_t n, uint64_t seed = 7) {
  ddpmx_request made;
  CHECK(ddpmx_request_init(&made, sizeof made) == DDPMX_OK);
  made.n = n, made.seed = seed, made.steps = kSteps;
  return made;
}

std::vector<uint8_t> drawn(ddpmx_pipeline *pipeline, const ddpmx_request &asked) {
  std::vector<uint8_t> images(asked.n * N);
  CHECK(returned(ddpmx_generate(pipeline, &asked, images.data(), images.size(), nullptr, 0), DDPMX_OK, ""));
  return images;
}

void images_do_not_depend_on_how_they_are_grouped() {
  for (const char *name : {"model", "place", "size"}) {
    ddpmx_pipeline *pipeline = opened(name);
    ddpmx_request all = request(7);
    all.batch = 4;
    const std::vector<uint8_t> whole = drawn(pipeline, all);
    std::vector<uint8_t> parts;
    for (const auto &[first, n] : {std::pair<uint64_t, uint64_t>{0, 1}, {1, 3}, {4, 3}}) {
      ddpmx_request part = request(n);
      part.first = first, part.batch = 4;
      const std::vector<uint8_t> images = drawn(pipeline, part);
      parts.insert(parts.end(), images.begin(), images.end());
    }
    CHECK(parts == whole);
    CHECK(drawn(pipeline, request(7, 8)) != whole);  // another seed
    CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  }
}

struct Seen {
  std::vector<ddpmx_progress> steps;
  std::vector<std::vector<float>> x, x0;
  uint64_t until = UINT64_MAX;
};

int32_t watch(const ddpmx_progress *progress, void *user) {
  Seen &seen = *static_cast<Seen *>(user);
  seen.steps.push_back(*progress);
  if (progress->x) seen.x.emplace_back(progress->x, progress->x + progress->n * N);
  if (progress->x0) seen.x0.emplace_back(progress->x0, progress->x0 + progress->n * N);
  return progress->done >= seen.until;
}

void what_a_callback_gets() {
  ddpmx_pipeline *pipeline = opened("model");
  Seen seen;
  ddpmx_request asked = request(5);
  asked.batch = 2, asked.callback = watch, asked.user = &seen, asked.flags = DDPMX_PREVIEWS;
  std::vector<uint8_t> images(5 * N);
  std::vector<float> samples(5 * N);
  CHECK(ddpmx_generate(pipeline, &asked, images.data(), images.size(), samples.data(), 4 * samples.size()) == DDPMX_OK);
  CHECK(seen.steps.size() == 3 * kSteps && seen.x.size() == seen.steps.size() && seen.x0.size() == seen.steps.size());
  for (uint64_t k = 0; k < seen.steps.size(); ++k) {
    const ddpmx_progress &now = seen.steps[k];
    CHECK(now.struct_size == sizeof now && now.done == k + 1 && now.total == 3 * kSteps);
    CHECK(now.first == k / kSteps * 2 && now.n == (k / kSteps == 2 ? 1 : 2));
    CHECK(k % kSteps == 0 ? now.t == 999 : now.t < seen.steps[k - 1].t);
    CHECK((k + 1) % kSteps != 0 || now.t == 0);
  }
  // the last x0 of each batch are its images, and those are what was rounded
  for (uint64_t batch = 0; batch < 3; ++batch) {
    const std::vector<float> &last = seen.x0[(batch + 1) * kSteps - 1];
    CHECK(std::equal(last.begin(), last.end(), samples.begin() + static_cast<std::ptrdiff_t>(batch * 2 * N)));
  }
  for (uint64_t image = 0; image < 5; ++image)
    for (uint64_t channel = 0; channel < 3; ++channel)
      for (uint64_t pixel = 0; pixel < 64; ++pixel) {
        const float x = samples[image * N + channel * 64 + pixel] * 127.5f + 128.0f;
        CHECK(images[image * N + pixel * 3 + channel] == static_cast<uint8_t>(std::fmin(std::fmax(x, 0.0f), 255.0f)));
      }
  // from a state in the middle of the chain to the same images
  ddpmx_request rest = request(2);
  rest.x = seen.x[5].data(), rest.start = seen.steps[5].t;
  CHECK(drawn(pipeline, rest) == std::vector<uint8_t>(images.begin(), images.begin() + 2 * N));
  // and none of it without previews
  Seen plain;
  asked.flags = 0, asked.user = &plain;
  CHECK(drawn(pipeline, asked) == images && plain.steps.size() == 3 * kSteps && plain.x.empty() && plain.x0.empty());
  // samples alone
  std::vector<float> alone(5 * N);
  CHECK(ddpmx_generate(pipeline, &asked, nullptr, 0, alone.data(), 4 * alone.size()) == DDPMX_OK && alone == samples);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

void a_callback_ends_a_chain() {
  ddpmx_pipeline *pipeline = opened("model");
  for (const uint64_t until : {1, 5, 2 * kSteps}) {
    Seen seen;
    seen.until = until;
    ddpmx_request asked = request(4);
    asked.batch = 2, asked.callback = watch, asked.user = &seen;
    std::vector<uint8_t> images(4 * N);
    CHECK(returned(ddpmx_generate(pipeline, &asked, images.data(), images.size(), nullptr, 0), DDPMX_CANCELLED,
               "cancelled before the chain finished"));
    CHECK(seen.steps.size() == until);
  }
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

struct Inside {
  ddpmx_pipeline *pipeline;
  ddpmx_status closed;
  std::vector<uint8_t> images;
};

int32_t use(const ddpmx_progress *, void *user) {
  Inside &inside = *static_cast<Inside *>(user);
  inside.closed = ddpmx_close(inside.pipeline);
  if (inside.images.empty()) inside.images = drawn(inside.pipeline, request(2));
  return 0;
}

void a_running_pipeline_is_not_closed_and_may_be_used_again() {
  ddpmx_pipeline *pipeline = opened("model");
  Inside inside{pipeline, DDPMX_OK, {}};
  ddpmx_request asked = request(2);
  asked.callback = use, asked.user = &inside;
  CHECK(drawn(pipeline, asked) == inside.images);
  CHECK(inside.closed == DDPMX_BUSY);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

void threads_share_a_pipeline() {
  ddpmx_pipeline *pipeline = opened("place");
  std::vector<std::vector<uint8_t>> serial, parallel(4);
  for (uint64_t seed = 0; seed < 4; ++seed) serial.push_back(drawn(pipeline, request(3, seed)));
  ddpmx_close(pipeline);
  pipeline = opened("place");  // nothing is measured yet
  std::vector<std::thread> threads;
  std::atomic<int> faults{0};
  static const int32_t label = 0;
  for (uint64_t seed = 0; seed < 4; ++seed)
    threads.emplace_back([&, seed] {
      ddpmx_request asked;
      ddpmx_request_init(&asked, sizeof asked);
      asked.n = 3, asked.seed = seed, asked.steps = kSteps;
      parallel[seed].resize(3 * N);
      faults += ddpmx_generate(pipeline, &asked, parallel[seed].data(), 3 * N, nullptr, 0) != DDPMX_OK;
      asked.n = 0;  // each thread has its own error
      faults += ddpmx_generate(pipeline, &asked, parallel[seed].data(), 3 * N, nullptr, 0) != DDPMX_INPUT;
      asked.n = 3, asked.labels = &label, asked.labels_count = 1;
      faults += ddpmx_generate(pipeline, &asked, parallel[seed].data(), 3 * N, nullptr, 0) != DDPMX_INPUT;
      faults += !std::strstr(ddpmx_last_error(), "no classes");
    });
  for (std::thread &thread : threads) thread.join();
  CHECK(faults == 0);
  CHECK(parallel == serial);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

void what_is_refused() {
  ddpmx_pipeline *pipeline = opened("model");
  std::vector<uint8_t> images(4 * N, 17);
  std::vector<float> samples(4 * N, 0.5f);
  const auto refused = [&](ddpmx_status status, const char *part, auto change) {
    ddpmx_request asked = request(2);
    uint64_t images_size = images.size(), samples_size = 4 * samples.size();
    change(asked, images_size, samples_size);
    CHECK(returned(ddpmx_generate(pipeline, &asked, images.data(), images_size, samples.data(), samples_size), status, part));
    CHECK(images == std::vector<uint8_t>(4 * N, 17) && samples == std::vector<float>(4 * N, 0.5f));
  };
  using R = ddpmx_request &;
  using S = uint64_t &;
  std::vector<float> x(2 * N, 0.1f);
  static const int32_t label = 0;
  refused(DDPMX_INPUT, "images needs 384 bytes, and images_size is 383", [](R, S size, S) { size = 2 * N - 1; });
  refused(DDPMX_INPUT, "samples needs 1536 bytes, and samples_size is 1535", [](R, S, S size) { size = 8 * N - 1; });
  refused(DDPMX_INPUT, "no version of ddpmx_request has 8 bytes", [](R r, S, S) { r.struct_size = 8; });
  refused(DDPMX_INPUT, "no version of ddpmx_request has 4294967295", [](R r, S, S) { r.struct_size = UINT32_MAX; });
  refused(DDPMX_INPUT, "unknown flags in 8", [](R r, S, S) { r.flags = 8; });
  refused(DDPMX_INPUT, "the chain runs on the CPU", [](R r, S, S) { r.flags = DDPMX_ON_DEVICE; });
  refused(DDPMX_INPUT, "cannot wait for a CUDA stream", [](R r, S, S) { r.stream = &r; });
  refused(DDPMX_INPUT, "cannot be guided", [](R r, S, S) { r.flags = DDPMX_GUIDED, r.guidance = 2; });
  refused(DDPMX_INPUT, "cannot be guided", [](R r, S, S) { r.flags = DDPMX_GUIDED; });  // 0: without classes
  refused(DDPMX_INPUT, "finite number, not nan", [](R r, S, S) { r.flags = DDPMX_GUIDED, r.guidance = NAN; });
  refused(DDPMX_INPUT, "n must be", [](R r, S, S) { r.n = 0; });
  refused(DDPMX_INPUT, "n must be", [](R r, S, S) { r.n = UINT64_MAX; });
  refused(DDPMX_INPUT, "do not fit into memory", [](R r, S, S) { r.n = uint64_t{1} << 32; });
  refused(DDPMX_INPUT, "is beyond that", [](R r, S, S) { r.first = 0xFFFFFFFF; });
  refused(DDPMX_INPUT, "is beyond that", [](R r, S, S) { r.first = UINT64_MAX; });
  refused(DDPMX_INPUT, "at once do not fit", [](R r, S, S) { r.batch = UINT64_MAX; });
  refused(DDPMX_INPUT, "there is no sampler", [](R r, S, S) { r.sampler = "euler"; });
  refused(DDPMX_INPUT, "there is no spacing", [](R r, S, S) { r.spacing = "even"; });
  refused(DDPMX_INPUT, "there is no variance", [](R r, S, S) { r.variance = "beta"; });
  refused(DDPMX_INPUT, "has no variance output", [](R r, S, S) { r.variance = "learned_range"; });
  refused(DDPMX_INPUT, "steps must be", [](R r, S, S) { r.steps = 1001; });
  refused(DDPMX_INPUT, "steps must be", [](R r, S, S) { r.steps = -1; });
  refused(DDPMX_INPUT, "", [](R r, S, S) { r.eta = 0.5; });
  refused(DDPMX_INPUT, "", [](R r, S, S) { r.sampler = "ddim", r.eta = NAN; });
  refused(DDPMX_INPUT, "no classes", [](R r, S, S) { r.labels = &label, r.labels_count = 1; });
  refused(DDPMX_INPUT, "labels is NULL, and labels_count is 1", [](R r, S, S) { r.labels_count = 1; });
  refused(DDPMX_INPUT, "takes no condition", [&](R r, S, S) { r.cond = x.data(); });
  refused(DDPMX_INPUT, "no x to begin with", [](R r, S, S) { r.start = 0; });
  refused(DDPMX_INPUT, "start must be from 0 to 999", [&](R r, S, S) { r.start = 1000, r.x = x.data(); });
  refused(DDPMX_INPUT, "share memory", [&](R r, S, S) { r.x = samples.data() + 2 * N - 1; });
  x[5] = INFINITY;
  refused(DDPMX_INPUT, "x holds NaN or infinities", [&](R r, S, S) { r.x = x.data(); });
  const ddpmx_request asked = request(2);
  CHECK(returned(ddpmx_generate(pipeline, &asked, nullptr, 0, nullptr, 0), DDPMX_INPUT, "no place for the images"));
  CHECK(returned(ddpmx_generate(pipeline, nullptr, images.data(), images.size(), nullptr, 0), DDPMX_INPUT, "is NULL"));
  auto *inner = reinterpret_cast<float *>(images.data());
  CHECK(returned(ddpmx_generate(pipeline, &asked, images.data(), images.size(), inner, images.size() * 4), DDPMX_INPUT,
             "images and samples share memory"));
  uint64_t bytes = 0;
  CHECK(ddpmx_output_size(pipeline, &asked, &bytes) == DDPMX_OK && bytes == 2 * N);
  CHECK(returned(ddpmx_output_size(pipeline, &asked, nullptr), DDPMX_INPUT, "bytes is NULL"));
  ddpmx_model small;
  CHECK(returned(ddpmx_describe(pipeline, &small, 8), DDPMX_INPUT, "no version of ddpmx_model has 8 bytes"));
  ddpmx_model described;
  CHECK(ddpmx_describe(pipeline, &described, sizeof described) == DDPMX_OK && described.channels == 3 && described.height == 8 && described.width == 8);
  CHECK(described.timesteps == 1000 && described.classes == 0 && described.default_batch == 16 && described.struct_size == sizeof described);
  CHECK(!std::strcmp(described.prediction, "eps") && !std::strcmp(described.precision, "fp32"));
  CHECK(!std::strcmp(described.variance, "fixed_large"));
  CHECK(std::strstr(ddpmx_backend(pipeline), "onnxruntime 1.99.fake"));
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

int32_t looks(const ddpmx_progress *, void *user) {
  *static_cast<int *>(user) = std::fegetround();
  return 0;
}

// A program with another rounding mode gets the same images, and its own mode back.
void rounding_is_the_library_s_own() {
  ddpmx_pipeline *pipeline = opened("model");
  const std::vector<uint8_t> wanted = drawn(pipeline, request(3));
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  for (const int mode : {FE_UPWARD, FE_TOWARDZERO}) {
    std::fesetround(mode);
    int seen = -1;
    ddpmx_request asked = request(3);
    asked.callback = looks, asked.user = &seen;
    pipeline = opened("model");
    CHECK(drawn(pipeline, asked) == wanted);
    CHECK(seen == mode && std::fegetround() == mode);
    CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  }
  std::fesetround(FE_TONEAREST);
}

int32_t leaves(const ddpmx_progress *progress, void *) {
  if (progress->done == 3) pthread_exit(nullptr);
  return 0;
}

// A thread that ends in the middle of a chain leaks nothing.
void a_thread_ends_in_its_callback() {
  ddpmx_pipeline *pipeline = opened("model");
  const std::vector<uint8_t> wanted = drawn(pipeline, request(2));
  struct Passed {
    ddpmx_pipeline *pipeline;
    ddpmx_request request;
    std::vector<uint8_t> images;
  } passed{pipeline, request(2), std::vector<uint8_t>(2 * N)};
  passed.request.callback = leaves;
  pthread_t thread;
  const auto run = [](void *user) -> void * {
    Passed &passed = *static_cast<Passed *>(user);
    ddpmx_generate(passed.pipeline, &passed.request, passed.images.data(), passed.images.size(), nullptr, 0);
    std::abort();  // never reached
  };
  CHECK(pthread_create(&thread, nullptr, run, &passed) == 0 && pthread_join(thread, nullptr) == 0);
  CHECK(drawn(pipeline, request(2)) == wanted);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

// A program that was compiled before there was guidance, whose structs are shorter: nothing beyond them is touched.
void shorter_structs() {
  ddpmx_pipeline *pipeline = opened("model");
  const std::vector<uint8_t> wanted = drawn(pipeline, request(1));
  constexpr size_t kRequest = offsetof(ddpmx_request, guidance), kModel = offsetof(ddpmx_model, null_class);
  ddpmx_request asked;
  std::memset(&asked, 0x5A, sizeof asked);
  CHECK(ddpmx_request_init(&asked, kRequest) == DDPMX_OK && asked.struct_size == kRequest && asked.n == 1);
  const auto *bytes = reinterpret_cast<const unsigned char *>(&asked);
  CHECK(std::all_of(bytes + kRequest, bytes + sizeof asked, [](unsigned char byte) { return byte == 0x5A; }));
  asked.steps = kSteps, asked.seed = 7;
  std::vector<uint8_t> images(N);
  CHECK(ddpmx_generate(pipeline, &asked, images.data(), N, nullptr, 0) == DDPMX_OK);
  CHECK(images == std::vector<uint8_t>(wanted.begin(), wanted.begin() + static_cast<long>(N)));
  ddpmx_model model;
  std::memset(&model, 0x5A, sizeof model);
  CHECK(ddpmx_describe(pipeline, &model, kModel) == DDPMX_OK && model.channels == 3 && model.null_class == 0x5A5A5A5A);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

// A program that was compiled with a later version, whose structs are longer.
void longer_structs() {
  struct Longer {
    ddpmx_request request;
    uint64_t more;
  } asked;
  asked.more = 99;
  CHECK(ddpmx_request_init(&asked.request, sizeof asked) == DDPMX_OK && asked.more == 0 && asked.request.n == 1);
  ddpmx_pipeline *pipeline = opened("model");
  std::vector<uint8_t> images(N);
  asked.request.steps = kSteps;
  CHECK(ddpmx_generate(pipeline, &asked.request, images.data(), N, nullptr, 0) == DDPMX_OK);
  asked.more = 1;
  CHECK(returned(ddpmx_generate(pipeline, &asked.request, images.data(), N, nullptr, 0), DDPMX_INPUT,
             "fields set that this version does not know"));
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

void models_that_do_not_open() {
  const auto refused = [&](const std::string &path, ddpmx_status status, const char *part, auto change) {
    ddpmx_open_options asked = options();
    change(asked);
    ddpmx_pipeline *pipeline = reinterpret_cast<ddpmx_pipeline *>(&asked);
    CHECK(returned(ddpmx_open(path.c_str(), &asked, &pipeline), status, part));
    CHECK(pipeline == nullptr);
  };
  using O = ddpmx_open_options &;
  const auto nothing = [](O) {};
  const std::string good = model("model");
  refused(folder / "none.onnx", DDPMX_FILE_FORMAT, "none.onnx: cannot be read", nothing);
  refused(folder, DDPMX_FILE_FORMAT, "a folder", nothing);
  refused("", DDPMX_INPUT, "path is empty", nothing);
  std::ofstream(folder / "empty.onnx").close();
  refused(folder / "empty.onnx", DDPMX_FILE_FORMAT, "the file is empty", nothing);
  std::ofstream(folder / "text.onnx") << "<html>";
  refused(folder / "text.onnx", DDPMX_FILE_FORMAT, "neither an ONNX file nor a TensorRT plan", nothing);
  std::filesystem::copy_file(good, folder / "cut.onnx");
  std::filesystem::resize_file(folder / "cut.onnx", 500);
  refused(folder / "cut.onnx", DDPMX_FILE_FORMAT, "not a valid ONNX file", nothing);
  std::ofstream(folder / "cut.plan") << "ftrt and not much more";
  refused(folder / "cut.plan", DDPMX_FILE_FORMAT, "not a valid TensorRT plan", nothing);
  refused(good, DDPMX_BACKEND, "tried '/nowhere/libonnxruntime.so' (option ort_library): ",
          [](O o) { o.ort_library = "/nowhere/libonnxruntime.so"; });
  refused(good, DDPMX_BACKEND, "is not ONNX Runtime", [](O o) { o.ort_library = "libm.so.6"; });
  refused(good, DDPMX_BACKEND, "ONNX Runtime 1.15.0 is too old", [](O o) { o.ort_library = FAKE_ORT_OLD; });
  const std::string rounded = in_int8("rounded");
  refused(rounded, DDPMX_BACKEND, "ONNX Runtime 1.29.1 computes this int8 file wrongly",
          [](O o) { o.ort_library = FAKE_ORT_CUTS; });
  for (const auto &[path, library] : {std::pair{rounded, FAKE_ORT}, std::pair{good, FAKE_ORT_CUTS}}) {
    ddpmx_open_options asked = options();
    asked.ort_library = library;
    ddpmx_pipeline *pipeline = nullptr;
    CHECK(ddpmx_open(path.c_str(), &asked, &pipeline) == DDPMX_OK);
    CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  }
  refused(model("fail-open"), DDPMX_FILE_FORMAT, "set to fail, with 3 threads", [](O o) { o.threads = 3; });
  refused(good, DDPMX_INPUT, "threads must be", [](O o) { o.threads = 257; });
  refused(good, DDPMX_INPUT, "threads must be", [](O o) { o.threads = -1; });
  refused(good, DDPMX_INPUT, "there is no GPU -1", [](O o) { o.device = -1; });
  refused(good, DDPMX_INPUT, "there is no executor", [](O o) { o.executor = "while"; });
  refused(good, DDPMX_INPUT, "runs a chain on a GPU", [](O o) { o.executor = "graph"; });
  refused(good, DDPMX_INPUT, "unknown flags in 2", [](O o) { o.flags = 2; });
  refused(good, DDPMX_INPUT, "no version of ddpmx_open_options has 3 bytes", [](O o) { o.struct_size = 3; });
  refused(good, DDPMX_SPEC, "contradicts", [](O o) { o.spec = "{\"shape\": [1, 8, 8]}"; });
  refused(good, DDPMX_SPEC, "", [](O o) { o.spec = "{"; });
  refused(good, DDPMX_SPEC, "not the name of a file", [](O o) { o.spec = "spec.json"; });
  refused(folder / "a\nNote: forged\xff.onnx", DDPMX_FILE_FORMAT, "a\\x0aNote: forged\\xff.onnx: cannot be read", nothing);
  setenv("DDPMX_ORT_LIBRARY", "/elsewhere.so", 1);
  refused(good, DDPMX_BACKEND, "'/elsewhere.so' ($DDPMX_ORT_LIBRARY)", [](O o) { o.ort_library = nullptr; });
  setenv("DDPMX_ORT_LIBRARY", FAKE_ORT, 1);
  ddpmx_pipeline *pipeline = nullptr;
  CHECK(ddpmx_open(good.c_str(), nullptr, &pipeline) == DDPMX_OK);
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  unsetenv("DDPMX_ORT_LIBRARY");
}

void networks_that_fail() {
  std::vector<uint8_t> images(N);
  const auto fails = [&](const char *name, ddpmx_status status, const char *part) {
    ddpmx_pipeline *pipeline = opened(name);
    ddpmx_request asked = request(1);
    asked.batch = 1;  // nothing is measured, and the third run is the third step
    CHECK(returned(ddpmx_generate(pipeline, &asked, images.data(), N, nullptr, 0), status, part));
    CHECK(ddpmx_generate(pipeline, &asked, images.data(), N, nullptr, 0) == DDPMX_OK);  // and the next one works
    CHECK(ddpmx_close(pipeline) == DDPMX_OK);
  };
  fails("fail-run", DDPMX_BACKEND, "this run is set to fail");
  fails("nan", DDPMX_NUMERIC, "the network's output at t = 817 is not finite\nNote: step 3 of 12; onnxruntime");
  ddpmx_pipeline *pipeline = opened("flaky");  // nothing helps, and nothing hangs
  CHECK(!drawn(pipeline, request(3)).empty());
  CHECK(ddpmx_close(pipeline) == DDPMX_OK);
}

}  // namespace

int main() {
  std::string pattern = (std::filesystem::temp_directory_path() / "ddpmx-XXXXXX").string();
  if (!mkdtemp(pattern.data())) return 2;
  folder = pattern;
  images_do_not_depend_on_how_they_are_grouped();
  what_a_callback_gets();
  a_callback_ends_a_chain();
  a_running_pipeline_is_not_closed_and_may_be_used_again();
  threads_share_a_pipeline();
  what_is_refused();
  rounding_is_the_library_s_own();
  a_thread_ends_in_its_callback();
  shorter_structs();
  longer_structs();
  models_that_do_not_open();
  networks_that_fail();
  std::filesystem::remove_all(folder);
  void *fake = dlopen(FAKE_ORT, RTLD_NOW | RTLD_NOLOAD);
  const auto live = fake ? reinterpret_cast<int (*)()>(dlsym(fake, "fake_ort_live")) : nullptr;
  CHECK(live && live() == 0);  // every object of ONNX Runtime has been released
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
