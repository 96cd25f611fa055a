// Runs requests that it reads line by line, and writes the results to files: for tests that must run in another process,
// such as an emulator's, and for measurements. It uses only the public header.
//
//   run_model MODEL [threads=1] [ort=LIBRARY] [spec=JSON] <<< 'n=4 seed=5 steps=25 images=out.u8'
//
// Words of a line: n, seed, first, batch, steps, start, eta, sampler, spacing, variance, labels (numbers with commas), and
// files: x and cond (float, read), images (uint8), samples (float) and seen (of each step: int32 t, x and x0 of the batch).
// stop=2 ends the chain after its second step. For each request it prints a line: the seconds that it took.
#include <ddpmx/ddpmx.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using Words = std::map<std::string, std::string>;

[[noreturn]] void fail(const std::string &why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

void check(ddpmx_status status) {
  if (status) fail(std::string(ddpmx_status_name(status)) + ": " + ddpmx_last_error());
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::pair<std::string, std::string> split(const std::string &word) {
  const size_t at = word.find('=');
  if (at == std::string::npos) fail("'" + word + "' is not name=value");
  return {word.substr(0, at), word.substr(at + 1)};
}

// The value of a word, which is removed from `unknown`; NULL if there is none.
const char *take(const Words &words, Words &unknown, const char *name) {
  unknown.erase(name);
  const auto found = words.find(name);
  return found == words.end() ? nullptr : found->second.c_str();
}

uint64_t number(const char *text, uint64_t fallback) {
  if (!text) return fallback;
  char *end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (end == text || *end) fail(std::string("'") + text + "' is not a number");
  return value;
}

std::vector<float> read_floats(const char *path) {
  std::FILE *file = std::fopen(path, "rb");
  if (!file) fail(std::string(path) + " cannot be read");
  std::vector<float> all;
  float part[4096];
  for (size_t count; (count = std::fread(part, sizeof *part, 4096, file)) > 0;) all.insert(all.end(), part, part + count);
  std::fclose(file);
  return all;
}

void write(std::FILE *file, const void *data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file) != bytes) fail("the disk is full");
}

void write_file(const char *path, const void *data, size_t bytes) {
  std::FILE *file = std::fopen(path, "wb");
  if (!file) fail(std::string(path) + " cannot be written");
  write(file, data, bytes);
  if (std::fclose(file)) fail("the disk is full");
}

struct Watcher {
  size_t image;  // numbers in one image
  uint64_t stop;
  std::FILE *seen;
  uint64_t calls = 0;

  static int32_t watch(const ddpmx_progress *progress, void *user) {
    auto &self = *static_cast<Watcher *>(user);
    if (self.seen) {
      write(self.seen, &progress->t, sizeof progress->t);
      for (const float *array : {progress->x, progress->x0}) {
        write(self.seen, array, progress->n * self.image * sizeof *array);
      }
    }
    return ++self.calls == self.stop;
  }
};

void serve(ddpmx_pipeline *pipeline, const ddpmx_model &model, const Words &words) {
  Words unknown = words;
  const auto word = [&](const char *name) { return take(words, unknown, name); };
  const auto floats = [](const char *path) { return path ? read_floats(path) : std::vector<float>(); };
  ddpmx_request request;
  check(ddpmx_request_init(&request, sizeof request));
  request.n = number(word("n"), 1);
  request.seed = number(word("seed"), 0);
  request.first = number(word("first"), 0);
  request.batch = number(word("batch"), 0);
  request.steps = static_cast<int32_t>(number(word("steps"), 0));
  if (const char *start = word("start")) request.start = static_cast<int32_t>(number(start, 0));
  if (const char *eta = word("eta")) request.eta = std::strtod(eta, nullptr);
  request.sampler = word("sampler");
  request.spacing = word("spacing");
  request.variance = word("variance");

  const size_t image = static_cast<size_t>(model.channels) * static_cast<size_t>(model.height * model.width);
  const size_t condition = static_cast<size_t>(model.condition) * static_cast<size_t>(model.height * model.width);
  const std::vector<float> x = floats(word("x")), cond = floats(word("cond"));
  if (!x.empty() && x.size() != request.n * image) fail("x has another size");
  if (!cond.empty() && cond.size() != request.n * condition) fail("cond has another size");
  if (!x.empty()) request.x = x.data();
  if (!cond.empty()) request.cond = cond.data();
  std::vector<int32_t> labels;
  if (const char *text = word("labels")) {
    for (const char *at = text;; ++at) {
      char *end = nullptr;
      labels.push_back(static_cast<int32_t>(std::strtol(at, &end, 10)));
      if (*(at = end) == 0) break;
      if (*at != ',') fail("labels are numbers with commas");
    }
    request.labels = labels.data();
    request.labels_count = labels.size();
  }

  Watcher watcher{image, number(word("stop"), 0), nullptr};
  if (const char *path = word("seen")) {
    watcher.seen = std::fopen(path, "wb");
    if (!watcher.seen) fail(std::string(path) + " cannot be written");
    request.flags = DDPMX_PREVIEWS;
  }
  if (watcher.seen || watcher.stop) request.callback = Watcher::watch, request.user = &watcher;
  uint64_t bytes = 0;
  check(ddpmx_output_size(pipeline, &request, &bytes));
  std::vector<uint8_t> images(bytes);
  const char *images_path = word("images"), *samples_path = word("samples");
  std::vector<float> samples(samples_path ? bytes : 0);
  if (!unknown.empty()) fail("'" + unknown.begin()->first + "' is not known");

  const double begun = now();
  const ddpmx_status status = ddpmx_generate(pipeline, &request, images.data(), images.size(),
                                             samples_path ? samples.data() : nullptr, samples.size() * sizeof(float));
  const double seconds = now() - begun;
  if (!(status == DDPMX_CANCELLED && watcher.calls == watcher.stop)) check(status);
  if (watcher.seen && std::fclose(watcher.seen)) fail("the disk is full");
  if (images_path) write_file(images_path, images.data(), images.size());
  if (samples_path) write_file(samples_path, samples.data(), samples.size() * sizeof(float));
  std::printf("%.6f\n", seconds);
  std::fflush(stdout);
}

bool read_line(std::string &line) {
  line.clear();
  int next;
  while ((next = std::getchar()) != EOF && next != '\n') line += static_cast<char>(next);
  return next != EOF || !line.empty();
}

}  // namespace

int main(int count, char **arguments) {
  if (count < 2) fail("run_model MODEL [threads=1] [ort=LIBRARY] [spec=JSON] < requests");
  Words words;
  for (int i = 2; i < count; ++i) words.insert(split(arguments[i]));
  Words unknown = words;
  ddpmx_open_options options;
  check(ddpmx_open_options_init(&options, sizeof options));
  options.threads = static_cast<int32_t>(number(take(words, unknown, "threads"), 0));
  options.ort_library = take(words, unknown, "ort");
  options.spec = take(words, unknown, "spec");
  if (!unknown.empty()) fail("'" + unknown.begin()->first + "' is not known");
  ddpmx_pipeline *pipeline = nullptr;
  const double begun = now();
  check(ddpmx_open(arguments[1], &options, &pipeline));
  ddpmx_model model;
  check(ddpmx_describe(pipeline, &model, sizeof model));
  std::printf("%.6f %s\n", now() - begun, ddpmx_backend(pipeline));
  std::fflush(stdout);
  for (std::string line; read_line(line);) {
    Words request;
    for (size_t at = 0; (at = line.find_first_not_of(' ', at)) != std::string::npos;) {
      const size_t end = std::min(line.find(' ', at), line.size());
      request.insert(split(line.substr(at, end - at)));
      at = end;
    }
    serve(pipeline, model, request);
  }
  check(ddpmx_close(pipeline));
}
