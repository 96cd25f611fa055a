// A texture generator without a window: a square sheet of tiles from one seed, written as PNG files during and after the
// chain. A game or a tool would upload the same bytes to its own textures.
//
//     texture MODEL FOLDER [--seed S] [--tiles K] [--steps S] [--every E]
//
// FOLDER/texture.png is the sheet of K×K tiles, FOLDER/preview-NNNNN.png a preview of every E-th step. Exit codes: 0; 2
// after an error; 130 after Ctrl-C.
#include <ddpmx/ddpmx.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <string_view>

#ifdef _WIN32
#include <io.h>
#else
#include <unistd.h>
#endif

#include "png.hpp"

namespace {

// Whether standard error is a terminal: only there can a line be written over.
bool terminal() {
#ifdef _WIN32
  return _isatty(2);
#else
  return isatty(2);
#endif
}

volatile std::sig_atomic_t interrupted = 0;

// K×K tiles as one image, uint8 [K·H, K·W, C].
class Sheet {
 public:
  Sheet(const ddpmx::Model &model, std::size_t tiles)
      : tiles_(tiles),
        channels_(static_cast<std::size_t>(model.channels)),
        height_(static_cast<std::size_t>(model.height)),
        width_(static_cast<std::size_t>(model.width)),
        pixels_(tiles * tiles * model.elements(), 128) {}

  // Tile `index` from float [C, H, W] in [−1, 1].
  void set(std::size_t index, const float *tile) {
    for (std::size_t c = 0; c < channels_; ++c)
      for (std::size_t y = 0; y < height_; ++y)
        for (std::size_t x = 0; x < width_; ++x)
          at(index, y, x)[c] = static_cast<std::uint8_t>(std::clamp(*tile++ * 127.5f + 128.0f, 0.0f, 255.0f));
  }

  // Tile `index` from uint8 [H, W, C].
  void set(std::size_t index, const std::uint8_t *tile) {
    for (std::size_t y = 0; y < height_; ++y, tile += width_ * channels_)
      std::copy_n(tile, width_ * channels_, at(index, y, 0));
  }

  void write(const std::filesystem::path &path) const {
    write_png(path, static_cast<std::uint32_t>(tiles_ * width_), static_cast<std::uint32_t>(tiles_ * height_),
              static_cast<std::uint32_t>(channels_), pixels_);
  }

 private:
  std::uint8_t *at(std::size_t index, std::size_t y, std::size_t x) {
    const std::size_t row = index / tiles_ * height_ + y, column = index % tiles_ * width_ + x;
    return &pixels_[(row * tiles_ * width_ + column) * channels_];
  }

  std::size_t tiles_, channels_, height_, width_;
  std::vector<std::uint8_t> pixels_;
};

struct Wanted {
  std::uint64_t seed = 0, tiles = 4, steps = 0, every = 0; // steps 0: all of the model's; every 0: no previews
};

std::uint64_t number(const std::string &flag, std::string_view text, std::uint64_t most) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value > most)
    throw std::invalid_argument(flag + " must be a whole number from 0 to " + std::to_string(most) + ", not " +
                                std::string(text));
  return value;
}

Wanted parse(int argc, char **argv) {
  Wanted wanted;
  if (argc < 3 || argc % 2 == 0)
    throw std::invalid_argument("texture MODEL FOLDER [--seed S] [--tiles K] [--steps S] [--every E]");
  for (int i = 3; i < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--seed") wanted.seed = number(flag, argv[i + 1], UINT64_MAX);
    else if (flag == "--tiles") wanted.tiles = number(flag, argv[i + 1], 64);
    else if (flag == "--steps") wanted.steps = number(flag, argv[i + 1], INT32_MAX);
    else if (flag == "--every") wanted.every = number(flag, argv[i + 1], UINT64_MAX);
    else throw std::invalid_argument("unknown flag " + flag + ": use --seed, --tiles, --steps or --every");
  }
  return wanted;
}

void draw(const std::string &model_file, const std::filesystem::path &folder, const Wanted &wanted) {
  const ddpmx::Pipeline pipeline(model_file);
  const ddpmx::Model &model = pipeline.model();
  if (model.channels != 1 && model.channels != 3 && model.channels != 4)
    throw std::invalid_argument("PNG needs 1, 3 or 4 channels, but the model has " + std::to_string(model.channels));

  ddpmx::Request request;
  request.n = wanted.tiles * wanted.tiles;
  request.seed = wanted.seed;
  request.steps = static_cast<int>(wanted.steps);
  Sheet sheet(model, wanted.tiles);
  std::filesystem::create_directories(folder);
  request.previews = wanted.every > 0;
  auto said = std::chrono::steady_clock::now();
  request.callback = [&, rewritten = terminal()](const ddpmx::Progress &now) { // generate rethrows its exceptions
    for (std::uint64_t i = 0; request.previews && i < now.n; ++i)
      sheet.set(now.first + i, now.x0.data() + i * model.elements());
    if (request.previews && now.done % wanted.every == 0) {
      char name[32];
      std::snprintf(name, sizeof name, "preview-%05llu.png", static_cast<unsigned long long>(now.done));
      sheet.write(folder / name);
    }
    const auto at = std::chrono::steady_clock::now();
    if (rewritten || at - said > std::chrono::seconds(30)) { // into a file goes a line every half minute
      said = at;
      std::fprintf(stderr, rewritten ? "\r%llu of %llu steps" : "%llu of %llu steps\n",
                   static_cast<unsigned long long>(now.done), static_cast<unsigned long long>(now.total));
    }
    return interrupted == 0;
  };
  const std::vector<std::uint8_t> images = pipeline.generate(request);
  for (std::size_t i = 0; i < request.n; ++i) sheet.set(i, &images[i * model.elements()]);
  sheet.write(folder / "texture.png");
  std::fprintf(stderr, "%s%s by %s\n", terminal() ? "\n" : "", (folder / "texture.png").c_str(), pipeline.backend().c_str());
}

} // namespace

int main(int argc, char **argv) {
  std::signal(SIGINT, [](int) { interrupted = 1; });
  try {
    const Wanted wanted = parse(argc, argv);
    draw(argv[1], argv[2], wanted);
    return 0;
  } catch (const ddpmx::Cancelled &) {
    std::fprintf(stderr, "%sinterrupted\n", terminal() ? "\n" : "");
    return 130;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s%s\n", terminal() ? "\n" : "", error.what());
    return 2;
  }
}
