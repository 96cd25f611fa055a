#include "device_runner.hpp"

#include <sys/utsname.h>

#include <algorithm>
#include <cstring>

#include "host_runner.hpp"
#include "trial.hpp"

namespace ddpmx {

namespace {

std::string host_platform() {
  utsname names = {};
  if (uname(&names) != 0) return "";
  std::string text = std::string(names.sysname) + " " + names.machine;
  for (char &c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text;
}

template <class T>
bool same_bits(const std::vector<T> &a, const std::vector<T> &b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

cuda::TrtModule find_module(const std::string &path, const PlanInfo &info, const ddpmx_open_options &options) {
  try {
    return cuda::TrtModule(info, options.trt_module, options.trt_library);
  } catch (const Failure &failure) {
    throw at(path, failure);
  }
}

std::string fact_and_note(const Failure &failure) {
  return failure.note.empty() ? failure.fact : failure.fact + ": " + failure.note;
}

}  // namespace

std::unique_ptr<Runner> open_plan(const std::string &path, const MappedFile &file, const PlanInfo &info,
                                  const ddpmx_open_options &options) {
  const std::string executor = options.executor && *options.executor ? options.executor : "auto";
  Here here;
  here.platform = host_platform();
  std::unique_ptr<cuda::Driver> driver;
  try {
    driver = std::make_unique<cuda::Driver>(options.device);
    here.gpu = driver->name(), here.sm = driver->sm();
  } catch (const Failure &failure) {
    if (failure.status == DDPMX_INPUT) throw;
    here.trouble = fact_and_note(failure);
  }
  here.version = info.version;
  check_fits(path, info, here);  // platform and GPU first, which no other TensorRT helps
  cuda::TrtModule module = find_module(path, info, options);
  here.version = module.version();
  check_fits(path, info, here);
  if (info.engine.stripped) {
    throw Failure(DDPMX_BACKEND, path + ": a plan without weights, which this version of ddpmx does not fill", "",
                  "ddpmx build " + shell_word(info.engine.source) + ", without --strip");
  }
  driver->start();
  auto engine = std::make_unique<cuda::TrtEngine>(*driver, std::move(module), path, file.bytes(), info,
                                                  (options.flags & DDPMX_TRUST_HOST_CODE) != 0, options.cache);
  return std::make_unique<cuda::DeviceRunner>(std::move(driver), std::move(engine), info.spec, executor);
}

namespace cuda {

DeviceRunner::DeviceRunner(std::unique_ptr<Driver> driver, std::unique_ptr<TrtEngine> engine, const Spec &spec,
                           const std::string &executor, double patience)
    : driver_(std::move(driver)), engine_(std::move(engine)), spec_(spec), executor_(executor), patience_(patience) {}

DeviceRunner::~DeviceRunner() {
  release();
  if (!lost_) return;
  // the abandoned chain uses them, and freeing them may wait for it
  if (kernels_) kernels_->module.abandon();
  driver_->abandon();
}

std::string DeviceRunner::description() const {
  const std::lock_guard<std::mutex> lock(executor_mutex_);
  return executor_text_.empty() ? engine_->description() : engine_->description() + ", " + executor_text_;
}

void DeviceRunner::run(const Job &job) {
  // only this thread can have stored its own id
  if (running_.load() == std::this_thread::get_id()) {
    throw Failure(DDPMX_INPUT, "the pipeline is already running a chain",
                  "a callback asks for a chain of the pipeline that calls it", "another pipeline of the same file");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  struct Running {
    std::atomic<std::thread::id> &who;
    ~Running() { who.store(std::thread::id()); }
  } const running{running_};
  running_.store(std::this_thread::get_id());
  try {
    run_alone_or_together(job);
  } catch (...) {
    lost_ = lost_ || (chain_ && chain_->lost());
    throw;
  }
}

void DeviceRunner::run_alone_or_together(const Job &job) {
  if (lost_)
    throw Failure(DDPMX_BACKEND, "a chain was abandoned and may still be running", "", "end the process and start again");
  const auto n = static_cast<int64_t>(job.images.size()), total = static_cast<int64_t>(job.table.rows.size());
  if (n < 1 || static_cast<uint64_t>(n) > job.batch)
    throw Failure(DDPMX_INTERNAL, "a chain of no images, or of too many");
  const bool alone = is_alone(job), with_x0 = job.previews || job.samples || spec_.self_condition;
  if (alone && job.previews && n > 1) {
    throw Failure(DDPMX_INPUT,
                  description() + " gives an image other bits in a batch than alone, so only one can be watched at a time", "",
                  "batch = 1");
  }
  DeviceChain &chain = prepared(job, batch_of(job, with_x0), with_x0);
  const auto part_of = [](auto *array, int64_t numbers) { return array ? array + numbers : nullptr; };
  const int64_t N = spec_.elements(), K = spec_.condition.value_or(0) * spec_.height * spec_.width;
  int64_t reported = 0;
  for (int64_t first = 0; first < n; first += alone ? 1 : n) {
    Run run;
    run.seed = job.seed;
    run.images = job.images.data() + first, run.n = alone ? 1 : n;
    run.x = part_of(job.x, first * N), run.y = part_of(job.y, first), run.cond = part_of(job.cond, first * K);
    run.on_device = job.on_device;
    run.pixels = part_of(job.pixels, first * N), run.samples = part_of(job.samples, first * N);
    if (first == 0) run.after = job.after || !job.on_device ? job.after : kLegacyStream;
    if (job.report) {
      // the steps of images that run one after the other count as those of one chain
      run.report = [&, first](int64_t done, const float *x, const float *x0) {
        const int64_t now = alone ? (first * total + done) / n : done;
        if (now <= reported) return true;
        reported = now;
        return job.report(job.table.timesteps[static_cast<size_t>(now - 1)], static_cast<uint64_t>(now), x, x0);
      };
    }
    job.previews ? chain.watch(run) : chain.run(run);
  }
}

// Whether each image has to run alone, since its place in a batch changes its bits.
bool DeviceRunner::is_alone(const Job &job) { return measured(job.batch, job.batch, job.guidance) == 1 && job.batch > 1; }

// At which batch size the network runs the job's images.
int64_t DeviceRunner::batch_of(const Job &job, bool with_x0) {
  const auto batch = static_cast<int64_t>(job.batch);
  if (fits(job, batch, with_x0)) return batch;  // repeating an image costs less than another chain
  uint64_t least = UINT64_MAX;
  for (const auto &[low, high] : batches_of(job.guidance)) least = std::min(least, low);
  return static_cast<int64_t>(std::max(measured(job.images.size(), job.batch, job.guidance), least));
}

// See executed_batch; measured once for every size.
uint64_t DeviceRunner::measured(uint64_t n, uint64_t batch, const std::optional<Guidance> &guidance) {
  if (batch == 1) return 1;
  const auto key = std::make_tuple(n, batch, guidance.has_value());
  if (const auto found = executed_.find(key); found != executed_.end()) return found->second;
  const Ranges ranges = batches_of(guidance);
  const bool taken =
      std::any_of(ranges.begin(), ranges.end(), [n](auto range) { return range.first <= n && n <= range.second; });
  release();  // a small device has no memory for both
  Trial trial(*driver_, *engine_, spec_);
  const auto evaluate = [&](Example &example) {
    if (guidance) {
      trial.evaluate_guided(example, *guidance);
    } else {
      trial.evaluate(example);
    }
  };
  return executed_[key] = executed_batch(spec_, taken ? n : batch, batch, evaluate);
}

// The smallest and the largest batch of images of each range.
Ranges DeviceRunner::batches_of(const std::optional<Guidance> &guidance) const {
  return guidance ? guided_batches(batches()) : batches();
}

bool DeviceRunner::fits(const Job &job, int64_t batch, bool with_x0) const {
  const Table &table = job.table;
  return chain_ && !chain_->executor().empty() && batch == batch_ && with_x0_ >= with_x0 && job.guidance == guidance_ &&
         same_bits(table.timesteps, table_.timesteps) && same_bits(table.rows, table_.rows) &&
         same_bits(table.learned, table_.learned) && same_bits(table.memory, table_.memory);
}

// The chain, with its network and executor.
DeviceChain &DeviceRunner::prepared(const Job &job, int64_t batch, bool with_x0) {
  const Table &table = job.table;
  if (fits(job, batch, with_x0)) return *chain_;
  release();
  try {
    if (!kernels_) {
      const Current current(*driver_);
      kernels_ = std::make_unique<Kernels>(*driver_);
    }
    chain_ = std::make_unique<DeviceChain>(*driver_, *kernels_, spec_, batch, table, job.guidance, with_x0,
                                           engine_->description());
    context_ = engine_->bind(chain_->rows(), chain_->at(), chain_->stream());
    TrtContext &network = *context_;
    const std::string chosen =
        choose_executor(*chain_, [&network](Stream stream) { network.enqueue(stream); }, executor_, patience_);
    const std::lock_guard<std::mutex> lock(executor_mutex_);
    executor_text_ = "executor " + chosen;
  } catch (...) {
    lost_ = chain_ && chain_->lost();
    release();
    throw;
  }
  table_ = table, guidance_ = job.guidance, batch_ = batch, with_x0_ = with_x0;
  return *chain_;
}

// Frees the last chain, its network first.
void DeviceRunner::release() noexcept {
  if (context_ && chain_ && !chain_->unprepare()) context_->abandon();
  context_.reset();
  chain_.reset();
  batch_ = 0;
}

}  // namespace cuda
}  // namespace ddpmx
