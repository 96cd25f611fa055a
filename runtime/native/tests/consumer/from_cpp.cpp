// from_cpp MODEL FILE: checks what ddpmx.hpp promises, and writes the images of from_c, as bytes.
#include <ddpmx/ddpmx.hpp>

#include <array>
#include <cstdio>
#include <memory>
#include <thread>
#include <type_traits>

#include "border.hpp"

int channels_of(const ddpmx::Pipeline &pipeline);

namespace {

int failures = 0;

#define CHECK(what) (static_cast<bool>(what) ? void() : fail(#what, __LINE__))

void fail(const char *what, int line) {
  std::fprintf(stderr, "from_cpp.cpp:%d: %s\n", line, what);
  ++failures;
}

// What `call` throws, if it is an E.
template <typename E, typename Call>
std::optional<E> thrown(Call call) {
  try {
    call();
  } catch (const E &error) {
    return error;
  } catch (...) {
  }
  return std::nullopt;
}

struct Odd { // not a std::exception
  int value;
};

ddpmx::Request two() {
  ddpmx::Request request;
  request.n = 2;
  request.seed = 7;
  request.steps = 20;
  return request;
}

std::vector<std::uint8_t> rounded(const std::vector<float> &samples, const ddpmx::Model &model) {
  const std::size_t channels = static_cast<std::size_t>(model.channels), area = model.elements() / channels;
  std::vector<std::uint8_t> pixels(samples.size());
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const std::size_t image = i / model.elements(), channel = i % model.elements() / area, pixel = i % area;
    const float scaled = samples[i] * 127.5f + 128.0f; // floor(127.5·x + 128), clipped
    pixels[image * model.elements() + pixel * channels + channel] =
        static_cast<std::uint8_t>(scaled < 0 ? 0.0f : scaled > 255 ? 255.0f : scaled);
  }
  return pixels;
}

void results(const ddpmx::Pipeline &pipeline, const std::vector<std::uint8_t> &images) {
  const ddpmx::Model &model = pipeline.model();
  CHECK(images.size() == 2 * model.elements());
  CHECK(rounded(pipeline.samples(two()), model) == images);

  std::vector<std::uint8_t> pixels(images.size());
  std::vector<float> samples(images.size());
  pipeline.generate(two(), pixels, samples);
  CHECK(pixels == images && rounded(samples, model) == images);

  ddpmx::Request later = two();
  later.n = 1;
  later.first = 1;
  CHECK(std::vector<std::uint8_t>(images.begin() + static_cast<std::ptrdiff_t>(model.elements()), images.end()) ==
        pipeline.generate(later));

  const std::vector<float> start(2 * model.elements(), 0.25f);
  ddpmx::Request from = two();
  from.x = start;
  CHECK(pipeline.generate(from) != images);
}

void errors(const ddpmx::Pipeline &pipeline) {
  const auto missing = thrown<ddpmx::Error>([] { ddpmx::Pipeline("no-such-file.onnx"); });
  CHECK(missing && missing->status() == DDPMX_FILE_FORMAT);
  CHECK(missing && std::string(missing->what()).find("no-such-file.onnx") != std::string::npos);
  const auto zero = thrown<ddpmx::Error>([] { ddpmx::Pipeline(std::string("model\0.onnx", 11)); });
  CHECK(zero && zero->status() == DDPMX_INPUT);

  const std::array<float, 3> few{};
  ddpmx::Request request = two();
  request.x = few;
  const auto wrong = thrown<ddpmx::Error>([&] { pipeline.generate(request); });
  CHECK(wrong && wrong->status() == DDPMX_INPUT);
  CHECK(wrong && std::string(wrong->what()).find("x has 3 elements") == 0);

  request = two();
  request.sampler = "nonsense";
  CHECK(thrown<ddpmx::Error>([&] { pipeline.generate(request); }));
  request = two();
  request.on_device = true;
  const auto elsewhere = thrown<ddpmx::Error>([&] { pipeline.generate(request); });
  CHECK(elsewhere && std::string(elsewhere->what()).find("on_device has results on the GPU") == 0);
  std::vector<std::uint8_t> small(1);
  const auto short_of = thrown<ddpmx::Error>([&] { pipeline.generate(two(), small); });
  CHECK(short_of && short_of->status() == DDPMX_INPUT);
}

void callbacks(const ddpmx::Pipeline &pipeline, const std::vector<std::uint8_t> &images) {
  int calls = 0;
  ddpmx::Request request = two();
  request.previews = true;
  std::vector<float> last;
  request.callback = [&](const ddpmx::Progress &now) {
    CHECK(now.done == static_cast<std::uint64_t>(++calls) && now.total == 20 && now.first == 0 && now.n == 2);
    CHECK(now.x.size() == images.size() && now.x0.size() == images.size());
    last.assign(now.x0.begin(), now.x0.end());
    return true;
  };
  CHECK(pipeline.generate(request) == images);
  CHECK(calls == 20 && rounded(last, pipeline.model()) == images);

  calls = 0;
  request.callback = [&](const ddpmx::Progress &now) {
    ++calls;
    return now.done < 3;
  };
  const auto cancelled = thrown<ddpmx::Cancelled>([&] { pipeline.generate(request); });
  CHECK(cancelled && cancelled->status() == DDPMX_CANCELLED && calls == 3);

  calls = 0;
  request.callback = [&](const ddpmx::Progress &) -> bool {
    ++calls;
    throw Odd{42};
  };
  const auto odd = thrown<Odd>([&] { pipeline.generate(request); });
  CHECK(odd && odd->value == 42 && calls == 1);
  CHECK(pipeline.generate(two()) == images);
}

void lifetimes(const char *path, const std::vector<std::uint8_t> &images) {
  static_assert(!std::is_copy_constructible_v<ddpmx::Pipeline> && !std::is_copy_assignable_v<ddpmx::Pipeline>);
  static_assert(std::is_nothrow_move_constructible_v<ddpmx::Pipeline> && std::is_nothrow_move_assignable_v<ddpmx::Pipeline>);
  ddpmx::Pipeline first(path), second(std::move(first));
  CHECK(second.generate(two()) == images);
  CHECK(thrown<ddpmx::Error>([&] { first.generate(two()); })); // NOLINT: it was moved from
  first = std::move(second);
  CHECK(first.generate(two()) == images && border.closed == 0);
  first = ddpmx::Pipeline(path);
  CHECK(first.generate(two()) == images && border.closed == 1);

  auto own = std::make_unique<ddpmx::Pipeline>(path); // destroyed by its own callback, in the first step
  ddpmx::Request request = two();
  request.callback = [&](const ddpmx::Progress &) {
    own.reset();
    return true;
  };
  std::vector<std::uint8_t> pixels(images.size());
  own->generate(request, pixels);
  CHECK(!own && pixels == images && border.closed == 2);
}

// Every field of a Request and of OpenOptions reaches the C API. Most values make no sense, and the library refuses them.
void every_field(const char *path, const ddpmx::Pipeline &pipeline) {
  int place = 0;
  const std::size_t size = 3 * pipeline.model().elements();
  std::vector<std::uint8_t> images(size);
  const std::vector<float> x(size), cond(2);
  ddpmx::Request request;
  request.n = 3;
  request.seed = 1ull << 40;
  request.first = 5;
  request.batch = 6;
  request.sampler = "a";
  request.spacing = "b";
  request.variance = "c";
  request.eta = 0.5;
  request.steps = 9;
  request.start = 11;
  request.x = x;
  request.labels = {1, 2};
  request.cond = cond;
  request.on_device = true;
  request.stream = &place;
  request.previews = true;
  CHECK(thrown<ddpmx::Error>([&] { pipeline.generate(request, images); }));
  const ddpmx_request &seen = border.request;
  CHECK(seen.struct_size == sizeof seen && seen.flags == (DDPMX_PREVIEWS | DDPMX_ON_DEVICE));
  CHECK(seen.n == 3 && seen.seed == 1ull << 40 && seen.first == 5 && seen.batch == 6);
  CHECK(seen.sampler == request.sampler && seen.spacing == request.spacing && seen.variance == request.variance);
  CHECK(seen.eta == 0.5 && seen.steps == 9 && seen.start == 11);
  CHECK(seen.x == x.data() && seen.labels == request.labels.data() && seen.labels_count == 2 && seen.cond == cond.data());
  CHECK(seen.stream == &place && seen.callback == nullptr);

  CHECK(thrown<ddpmx::Error>([&] { pipeline.generate({}, images, {}), pipeline.generate({}, {}); }));
  CHECK(seen.flags == 0 && seen.n == 1 && seen.sampler == nullptr && seen.start == -1 && seen.labels == nullptr);

  ddpmx::OpenOptions options;
  options.trust_host_code = true;
  options.threads = 3;
  options.device = 4;
  options.spec = "a";
  options.ort_library = "b";
  options.trt_module = "c";
  options.trt_library = "d";
  options.executor = "e";
  options.cache = "f";
  CHECK(thrown<ddpmx::Error>([&] { ddpmx::Pipeline("missing.onnx", options); }));
  const ddpmx_open_options &given = border.options;
  CHECK(given.struct_size == sizeof given && given.flags == DDPMX_TRUST_HOST_CODE);
  CHECK(given.threads == 3 && given.device == 4 && given.spec == options.spec);
  CHECK(given.ort_library == options.ort_library && given.trt_module == options.trt_module);
  CHECK(given.trt_library == options.trt_library && given.executor == options.executor && given.cache == options.cache);

  border.condition = 2;
  const ddpmx::Pipeline conditioned(path);
  border.condition = 0;
  ddpmx::Request with_cond = two();
  with_cond.cond = x; // 2 channels for 3 images, and these are two
  const auto wrong = thrown<ddpmx::Error>([&] { conditioned.generate(with_cond); });
  CHECK(wrong && std::string(wrong->what()).find("cond has 576 elements, and 2 images need 128 each") == 0);

  border.abi = 2;
  const auto other = thrown<ddpmx::Error>([&] { ddpmx::Pipeline again(path); });
  border.abi = 0;
  CHECK(other && std::string(other->what()) == "libddpmx has ABI 2, and this program was compiled for 1");
}

void threads(const ddpmx::Pipeline &pipeline, const std::vector<std::uint8_t> &images) {
  std::array<std::vector<std::uint8_t>, 4> drawn;
  std::vector<std::thread> running;
  for (auto &mine : drawn) running.emplace_back([&] { mine = pipeline.generate(two()); });
  for (std::thread &thread : running) thread.join();
  for (const auto &mine : drawn) CHECK(mine == images);
}

} // namespace

int main(int argc, char **argv) {
  if (argc != 3) return 64;
  try {
    const ddpmx::Pipeline pipeline(argv[1]);
    CHECK(channels_of(pipeline) == 3 && pipeline.model().prediction == "eps" && !pipeline.backend().empty());
    const std::vector<std::uint8_t> images = pipeline.generate(two());
    results(pipeline, images);
    errors(pipeline);
    callbacks(pipeline, images);
    lifetimes(argv[1], images);
    threads(pipeline, images);
    every_field(argv[1], pipeline);
    std::FILE *file = std::fopen(argv[2], "wb");
    CHECK(file && std::fwrite(images.data(), 1, images.size(), file) == images.size() && std::fclose(file) == 0);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  CHECK(border.closed == 5 && border.not_closed == 0);
  return failures == 0 ? 0 : 1;
}
