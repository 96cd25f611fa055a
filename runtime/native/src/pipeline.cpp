#include "pipeline.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cuda/device_runner.hpp"
#include "error.hpp"
#include "floats.hpp"
#include "host_runner.hpp"
#include "model_file.hpp"
#include "ort.hpp"

namespace ddpmx {

namespace {

constexpr uint64_t kImages = uint64_t{1} << 32;         // they are numbered 0…2³²−1
constexpr uint64_t kResultBytes = uint64_t{1} << 36;    // 64 GiB in one request is a mistake
constexpr uint64_t kBatchElements = uint64_t{1} << 25;  // 128 MiB of float, and several times that inside the network
constexpr uint64_t kDefaultBatch = 16, kDefaultBatchElements = uint64_t{1} << 22;

// A text from the caller, or the default for NULL.
std::string text_or(const char *text, const char *fallback) { return text ? text : fallback; }

std::string sides(const Spec &spec) { return std::to_string(spec.height) + "×" + std::to_string(spec.width); }

// Elements of an image, or of its condition if that is larger.
uint64_t largest_image(const Spec &spec) {
  return static_cast<uint64_t>(std::max(spec.channels, spec.condition.value_or(0)) * spec.height * spec.width);
}

// The largest batch up to `wanted` that a network takes, or else its smallest batch.
uint64_t fitting_batch(const std::vector<std::pair<uint64_t, uint64_t>> &ranges, uint64_t wanted) {
  uint64_t most = 0, least = ranges.front().first;
  for (const auto &[low, high] : ranges) {
    if (low <= wanted) most = std::max(most, std::min(high, wanted));
    least = std::min(least, low);
  }
  return most ? most : least;
}

void check_finite(const float *values, uint64_t size, const char *what) {
  for (uint64_t k = 0; k < size; ++k) {
    if (!std::isfinite(values[k])) throw Failure(DDPMX_INPUT, std::string(what) + " holds NaN or infinities");
  }
}

// An array from the caller.
struct Region {
  const char *name;
  const void *begin;
  uint64_t bytes;
};

// Checks that arrays that are written overlap no other array. Regions of NULL are ignored.
void check_no_overlap(const std::vector<Region> &read, const std::vector<Region> &written) {
  const auto overlap = [](const Region &a, const Region &b) {
    const auto a0 = reinterpret_cast<uintptr_t>(a.begin), b0 = reinterpret_cast<uintptr_t>(b.begin);
    return a.begin && b.begin && a0 < b0 + b.bytes && b0 < a0 + a.bytes;
  };
  for (size_t i = 0; i < written.size(); ++i) {
    std::vector<Region> others(read);
    others.insert(others.end(), written.begin(), written.begin() + static_cast<std::ptrdiff_t>(i));
    for (const Region &other : others) {
      if (overlap(written[i], other)) {
        throw Failure(DDPMX_INPUT, std::string(other.name) + " and " + written[i].name + " share memory", "",
                      std::string("an array of its own for ") + written[i].name);
      }
    }
  }
}

void check_room(const char *name, const void *buffer, uint64_t has, uint64_t needs) {
  if (buffer && has < needs) {
    throw Failure(DDPMX_INPUT, std::string(name) + " needs " + std::to_string(needs) + " bytes, and " + name + "_size is " +
                                   std::to_string(has), "", "ddpmx_output_size says how many it takes");
  }
}

// The class of each image.
std::vector<int32_t> labels_of(const Spec &spec, const ddpmx_request &request, bool with_class) {
  if (!request.labels && request.labels_count) {
    throw Failure(DDPMX_INPUT, "labels is NULL, and labels_count is " + std::to_string(request.labels_count));
  }
  if (!spec.classes) {
    if (request.labels) throw Failure(DDPMX_INPUT, "the model has no classes, but labels were passed");
    return {};
  }
  const auto null = static_cast<int32_t>(*spec.classes);
  if (!request.labels && spec.null_class) return std::vector<int32_t>(request.n, null);
  const std::string range = "0…" + std::to_string(*spec.classes - 1);
  if (!request.labels) {
    throw Failure(DDPMX_INPUT, "missing labels: the model has " + std::to_string(*spec.classes) + " classes", "",
                  "labels: " + range);
  }
  if (request.labels_count != 1 && request.labels_count != request.n) {
    throw Failure(DDPMX_INPUT, "labels must be one whole number, or " + std::to_string(request.n) + " of them",
                  "labels_count is " + std::to_string(request.labels_count));
  }
  std::vector<int32_t> labels(request.labels, request.labels + request.labels_count);
  for (const int32_t label : labels) {
    if (label < 0 || label >= *spec.classes) {
      throw Failure(DDPMX_INPUT, "there is no class " + std::to_string(label), "", "the model's are " + range);
    }
  }
  labels.resize(request.n, labels.front());
  if (!with_class) std::fill(labels.begin(), labels.end(), null);
  return labels;
}

// w of classifier-free guidance, 1 for none.
float scale_of(const Spec &spec, const ddpmx_request &request) {
  if (!(request.flags & DDPMX_GUIDED)) return 1;
  const double w = request.guidance;
  if (!std::isfinite(w) || std::abs(w) > double{std::numeric_limits<float>::max()}) {
    throw Failure(DDPMX_INPUT, "guidance must be a finite number, not " + shown(w), "",
                  "1 is no guidance, 2 to 4 is usual");
  }
  if (w == 1) return 1;
  if (!spec.null_class) {
    throw Failure(DDPMX_INPUT, "the model cannot be guided: it was not trained to do without a class",
                  "its spec has no null_class", "guidance 1 draws without");
  }
  if (w != 0 && !request.labels) {
    throw Failure(DDPMX_INPUT, "guidance needs the class of each image", "",
                  "labels: 0…" + std::to_string(*spec.classes - 1));
  }
  return static_cast<float>(w);
}

}  // namespace

// The checked numbers of a request, whose products do not overflow.
struct Pipeline::Numbers {
  uint64_t n, first, batch;
};

Pipeline::Pipeline(Spec spec, std::unique_ptr<Runner> runner)
    : spec_(std::move(spec)), runner_(std::move(runner)), description_(runner_->description()) {}

uint64_t Pipeline::default_batch() const { return usual_batch(runner_->batches()); }

uint64_t Pipeline::usual_batch(const Ranges &ranges) const {
  const auto elements = largest_image(spec_);
  return fitting_batch(ranges, std::clamp<uint64_t>(kDefaultBatchElements / elements, 1, kDefaultBatch));
}

uint64_t Pipeline::output_size(uint64_t n) const {
  if (n < 1 || n > kImages) {
    throw Failure(DDPMX_INPUT, "n must be a whole number from 1 to 2**32, not " + std::to_string(n));
  }
  const uint64_t bytes = n * static_cast<uint64_t>(spec_.elements());  // below 2³² times 2²⁸
  if (bytes > kResultBytes) {
    throw Failure(DDPMX_INPUT, std::to_string(n) + " images of " + sides(spec_) + " do not fit into memory", "",
                  "draw them in parts, with first");
  }
  return bytes;
}

Pipeline::Numbers Pipeline::checked(const ddpmx_request &request, bool guided) const {
  const Ranges ranges = guided ? guided_batches(runner_->batches()) : runner_->batches();
  const uint64_t batch = request.batch ? request.batch : usual_batch(ranges);
  output_size(request.n);
  if (request.first >= kImages || request.first + request.n > kImages) {
    throw Failure(DDPMX_INPUT, "images are numbered 0…2**32 - 1, and " + std::to_string(request.first) + " + " +
                                   std::to_string(request.n) + " is beyond that");
  }
  if (batch > kImages || batch * (guided ? 2 : 1) * largest_image(spec_) > kBatchElements) {
    throw Failure(DDPMX_INPUT, std::to_string(batch) + " images of " + sides(spec_) + " at once do not fit into memory", "",
                  "a smaller batch");
  }
  return {request.n, request.first, fitting_batch(ranges, batch)};
}

Table Pipeline::table(const ddpmx_request &request) const {
  Sampling sampling;
  sampling.sampler = text_or(request.sampler, "ancestral");
  sampling.spacing = text_or(request.spacing, "linspace");
  sampling.eta = request.eta;
  if (request.steps != 0) sampling.steps = request.steps;
  if (request.start != -1) sampling.start = request.start;
  Variance variance = spec_.variance;
  if (request.variance) {
    const auto named = variance_named(request.variance);
    if (!named) {
      throw Failure(DDPMX_INPUT, "there is no variance " + in_quotes(request.variance), "",
                    "one of: fixed_small, fixed_large, learned_range, learned");
    }
    if (is_learned(*named) && *named != spec_.variance) {
      throw Failure(DDPMX_INPUT,
                    spec_.learns_variance() ? "the network's variance output means something else"
                                            : "the network has no variance output",
                    "the file says " + in_quotes(name_of(spec_.variance)));
    }
    variance = *named;
  }
  return make_table(spec_.schedule, spec_.prediction, variance, sampling);
}

void Pipeline::generate(const ddpmx_request &request, uint8_t *images, uint64_t images_size, float *samples,
                        uint64_t samples_size) {
  const DefaultFloats floats;
  if (request.flags & ~(DDPMX_PREVIEWS | DDPMX_ON_DEVICE | DDPMX_GUIDED)) {
    throw Failure(DDPMX_INPUT, "unknown flags in " + std::to_string(request.flags));
  }
  const bool on_device = request.flags & DDPMX_ON_DEVICE, previews = request.flags & DDPMX_PREVIEWS;
  if (on_device && !runner_->on_device()) {
    throw Failure(DDPMX_INPUT, "the chain runs on the CPU, but the arrays are in GPU memory", description_,
                  "DDPMX_ON_DEVICE is for plans");
  }
  if (request.stream && !runner_->on_device()) {
    throw Failure(DDPMX_INPUT, "the chain runs on the CPU and cannot wait for a CUDA stream", description_);
  }
  const Table table = this->table(request);
  const float scale = scale_of(spec_, request);
  const bool guided = scale != 0 && scale != 1;
  const Numbers numbers = checked(request, guided);
  const auto N = static_cast<uint64_t>(spec_.elements());
  const auto K = static_cast<uint64_t>(spec_.condition.value_or(0) * spec_.height * spec_.width);
  if (!images && !samples) throw Failure(DDPMX_INPUT, "there is no place for the images", "images and samples are NULL");
  check_room("images", images, images_size, numbers.n * N);
  check_room("samples", samples, samples_size, numbers.n * N * sizeof(float));
  if (request.start != -1 && !request.x) {
    throw Failure(DDPMX_INPUT, "start begins in the middle of a chain, and there is no x to begin with", "",
                  "x: the states x_t at t = " + std::to_string(request.start));
  }
  if (K && !request.cond) {
    throw Failure(DDPMX_INPUT, "missing cond: the model takes a condition image", "",
                  "cond: float [n, " + std::to_string(*spec_.condition) + ", " + std::to_string(spec_.height) + ", " +
                      std::to_string(spec_.width) + "]");
  }
  if (!K && request.cond) throw Failure(DDPMX_INPUT, "the model takes no condition, but cond was passed");
  check_no_overlap({{"x", request.x, numbers.n * N * sizeof(float)}, {"cond", request.cond, numbers.n * K * sizeof(float)}},
                   {{"images", images, numbers.n * N}, {"samples", samples, numbers.n * N * sizeof(float)}});
  if (!on_device) {
    if (request.x) check_finite(request.x, numbers.n * N, "x");
    if (request.cond) check_finite(request.cond, numbers.n * K, "cond");
  }
  const std::vector<int32_t> labels = labels_of(spec_, request, scale != 0);

  const uint64_t steps = table.rows.size(), total = (numbers.n + numbers.batch - 1) / numbers.batch * steps;
  for (uint64_t at = 0, before = 0; at < numbers.n; at += numbers.batch, before += steps) {
    const uint64_t n = std::min(numbers.batch, numbers.n - at);
    Job job{table, request.seed, {}, numbers.batch};
    for (uint64_t i = 0; i < n; ++i) job.images.push_back(static_cast<uint32_t>(numbers.first + at + i));
    job.x = request.x ? request.x + at * N : nullptr;
    job.y = labels.empty() ? nullptr : labels.data() + at;
    if (guided) job.guidance = Guidance{scale, static_cast<int32_t>(*spec_.classes)};
    job.cond = request.cond ? request.cond + at * K : nullptr;
    job.pixels = images ? images + at * N : nullptr;
    job.samples = samples ? samples + at * N : nullptr;
    job.on_device = on_device, job.previews = previews && request.callback, job.after = at ? nullptr : request.stream;
    if (request.callback) {
      job.report = [&](int32_t t, uint64_t done, const float *x, const float *x0) {
        const ddpmx_progress progress{sizeof(ddpmx_progress), t, before + done, total, at, n, x, x0};
        return floats.aside([&] { return request.callback(&progress, request.user) == 0; });
      };
    }
    runner_->run(job);
  }
}

std::unique_ptr<Pipeline> open_pipeline(const std::string &path, const ddpmx_open_options &options) {
  const DefaultFloats floats;
  if (options.flags & ~DDPMX_TRUST_HOST_CODE) {
    throw Failure(DDPMX_INPUT, "unknown flags in " + std::to_string(options.flags));
  }
  if (options.threads < 0 || options.threads > 256) {
    throw Failure(DDPMX_INPUT, "threads must be a whole number from 0 to 256, not " + std::to_string(options.threads));
  }
  if (options.device < 0) throw Failure(DDPMX_INPUT, "there is no GPU " + std::to_string(options.device));
  const std::string executor = text_or(options.executor, "auto"), spec_json = text_or(options.spec, "");
  if (executor != "auto" && executor != "graph" && executor != "plain") {
    throw Failure(DDPMX_INPUT, "there is no executor " + in_quotes(executor), "", "auto, graph, plain");
  }
  if (identify(path) == Kind::plan) {
    if (!spec_json.empty()) {
      throw Failure(DDPMX_INPUT, path + ": a plan carries its own spec", "", "spec is for ONNX files that carry none");
    }
    const MappedFile file(path);
    const PlanInfo info = read_plan(path, file.bytes(), options.flags & DDPMX_TRUST_HOST_CODE);
    return std::make_unique<Pipeline>(info.spec, open_plan(path, file, info, options));
  }
  // A link is resolved once: the weights are beside its target, and those are checked.
  const std::unique_ptr<char, void (*)(void *)> resolved(realpath(path.c_str(), nullptr), std::free);
  const std::string real = resolved ? resolved.get() : path;
  Spec spec;
  {
    const MappedFile file(real);
    const GraphInfo info = read_onnx(path, file.bytes());
    check_external(real, info);
    spec = onnx_spec(path, info, spec_json);
  }
  std::unique_ptr<Network> network = open_ort(real, spec, options.ort_library, options.threads);
  if (executor != "auto") {
    throw Failure(DDPMX_INPUT,
                  "executor " + in_quotes(executor) + " runs a chain on a GPU, and " + network->description() + " does not");
  }
  return std::make_unique<Pipeline>(spec, std::make_unique<HostRunner>(std::move(network), spec));
}

}  // namespace ddpmx
