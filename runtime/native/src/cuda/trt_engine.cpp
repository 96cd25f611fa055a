#include "trt_engine.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "trt_cache.hpp"

namespace ddpmx::cuda {

namespace {

constexpr const char *kModule = "libddpmx_trt.so";

// The folder of the library that this code is part of, with a slash, or empty.
std::string own_folder() {
  Dl_info info;
  static const char here = 0;
  if (!dladdr(&here, &info) || !info.dli_fname) return "";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "" : file.substr(0, slash + 1);
}

std::vector<Library::Place> module_places(const char *option) {
  std::vector<std::string> usual;
  if (const std::string folder = own_folder(); !folder.empty()) usual.push_back(folder + kModule);
  usual.push_back(kModule);
  return places(option, "trt_module", "DDPMX_TRT_MODULE", usual);
}

// A buffer for an error message of TensorRT, which is foreign text.
class Message {
 public:
  char *at() { return text_; }
  size_t size() const { return sizeof text_; }
  std::string note() const { return text_[0] ? in_quotes(text_, 600) : ""; }

 private:
  char text_[1024] = "";
};

std::string install_hint(const std::string &flavour) {
  if (flavour == "TensorRT-RTX")
    return "pip install tensorrt-rtx-cu13, and name its libtensorrt_rtx.so.1 by trt_library";
  return "install TensorRT's runtime library, or name it by trt_library; on a Jetson it is part of JetPack";
}

std::string shown(const ddpmx_trt_tensor &tensor) {
  std::string text = in_quotes(tensor.name ? tensor.name : "?", 80) + ": " + (tensor.is_input ? "input" : "output");
  text += tensor.type == DDPMX_TRT_FLOAT   ? " float32 ["
          : tensor.type == DDPMX_TRT_INT32 ? " int32 ["
                                           : " of another type [";
  for (int32_t i = 0; i < tensor.rank && i < DDPMX_TRT_MAX_RANK; ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.dims[i]);
  }
  return text + (tensor.on_device ? "]" : "] on the host");
}

struct Wanted {
  bool is_input, is_int;
  std::vector<int64_t> dims;  // of one image
};

std::map<std::string, Wanted> wanted_of(const Spec &spec) {
  std::map<std::string, Wanted> wanted;
  for (const Input &input : spec.inputs()) wanted[input.name] = {true, input.is_int, input.dims};
  for (const std::string &name : spec.outputs())
    wanted[name] = {false, false, {spec.channels, spec.height, spec.width}};
  return wanted;
}

bool is_as_wanted(const ddpmx_trt_tensor &tensor, const Wanted &wanted) {
  if (static_cast<bool>(tensor.is_input) != wanted.is_input || !tensor.on_device) return false;
  if (tensor.type != (wanted.is_int ? DDPMX_TRT_INT32 : DDPMX_TRT_FLOAT)) return false;
  return tensor.rank >= 1 && tensor.rank <= DDPMX_TRT_MAX_RANK &&
         std::vector<int64_t>(tensor.dims + 1, tensor.dims + tensor.rank) == wanted.dims;
}

}  // namespace

// --- the module ---

TrtModule::TrtModule(const PlanInfo &info, const char *module, const char *library)
    : module_(std::string("module for TensorRT, ") + kModule + ",", module_places(module),
              "build it where TensorRT's headers are (cmake -DDDPMX_TENSORRT=ON), and name it by trt_module") {
  const auto get = reinterpret_cast<ddpmx_trt_get_function>(module_.find(DDPMX_TRT_GET));
  functions_ = get ? get(DDPMX_TRT_ABI) : nullptr;
  if (!functions_ || functions_->abi != DDPMX_TRT_ABI || functions_->size != sizeof(ddpmx_trt_module)) {
    throw Failure(DDPMX_BACKEND, in_quotes(module_.name()) + " is no module for this version of libddpmx",
                  get ? "it has another interface" : std::string("it has no ") + DDPMX_TRT_GET,
                  "build both from the same sources");
  }
  if (functions_->flavour != info.flavour) {
    throw Failure(
        DDPMX_BACKEND,
        "the plan needs " + info.flavour + ", and " + in_quotes(module_.name()) + " is for " + functions_->flavour,
        std::string("it was compiled with the headers of ") + functions_->flavour + " " + functions_->compiled,
        "name a module for " + info.flavour + " by trt_module, or, for what is here: " + info.engine.rebuild);
  }
  std::string from = "option trt_library";
  if (!library || !*library) {
    library = secure_getenv("DDPMX_TRT_LIBRARY");
    from = "$DDPMX_TRT_LIBRARY";
  }
  if (!library || !*library) library = nullptr, from.clear();
  char version[32] = "";
  Message message;
  if (functions_->open_library(library, &opened_, version, message.at(), message.size())) {
    throw Failure(DDPMX_BACKEND, "the plan needs " + info.flavour + ", which does not load here",
                  "tried " + in_quotes(library ? library : functions_->library) + (from.empty() ? "" : " (" + from + ")") +
                      ": " + message.note(),
                  install_hint(info.flavour));
  }
  version_ = version;
}

// --- the engine ---

TrtEngine::TrtEngine(const Driver &driver, TrtModule module, const std::string &path, std::string_view plan,
                     const PlanInfo &info, bool trust_host_code, const char *cache)
    : driver_(driver),
      module_(std::move(module)),
      path_(path),
      spec_(info.spec),
      record_(info.engine),
      description_(module_.description() + " on " + driver.name() + ", SM " + driver.sm()) {
  const Current current(driver_);
  std::string compiled;
  if (cache && *cache && info.flavour == "TensorRT-RTX") {
    cache_file_ = cache_file(cache, info.flavour, module_.version(), driver.name(), info.engine.key);
    if (!cache_file_.empty()) compiled = file_content(cache_file_);
  }
  Message message;
  if (module_.functions().open_engine(module_.library(), plan.data(), plan.size(), trust_host_code,
                                      compiled.empty() ? nullptr : compiled.data(), compiled.size(),
                                      !cache_file_.empty(), &engine_, message.at(), message.size())) {
    throw Failure(DDPMX_BACKEND, module_.description() + " cannot make the engine of " + path_, message.note(),
                  "`ddpmx doctor` shows the driver and the libraries that are here");
  }
  try {
    check_name(info.name);
    check_io();
  } catch (...) {
    module_.functions().close_engine(engine_);
    throw;
  }
}

TrtEngine::~TrtEngine() {
  if (abandoned_) return;
  try {
    const Current current(driver_);
    save_cache();
    module_.functions().close_engine(engine_);
  } catch (const Failure &) {  // without the context it cannot be freed safely
  }
}

void TrtEngine::check_name(const std::string &plan_name) const {
  const char *const text = module_.functions().name(engine_);
  const std::string name = text ? text : "";
  if (name == plan_name) return;
  throw Failure(DDPMX_FILE_FORMAT,
                path_ + ": " + module_.description() + " reads another network name from this plan than the file holds",
                in_quotes(name), record_.rebuild);
}

// Checks the inputs and outputs against the spec, and reads the batches of each profile.
void TrtEngine::check_io() {
  const ddpmx_trt_module &trt = module_.functions();
  std::map<std::string, Wanted> missing = wanted_of(spec_);
  std::string faults;
  const auto fault = [&faults](const std::string &text) { faults += (faults.empty() ? "" : "; ") + text; };
  for (int32_t i = 0, count = trt.tensors(engine_); i < count; ++i) {
    ddpmx_trt_tensor tensor;
    const bool refused = trt.tensor(engine_, i, &tensor) != 0;
    const auto found = refused || !tensor.name ? missing.end() : missing.find(tensor.name);
    if (found == missing.end() || !is_as_wanted(tensor, found->second)) fault(shown(tensor));
    if (found != missing.end()) missing.erase(found);
  }
  for (const auto &[name, wanted] : missing) fault("no " + name);
  for (int32_t profile = 0; faults.empty() && profile < trt.profiles(engine_); ++profile) {
    int64_t low = 1, high = INT64_MAX;
    for (const Input &input : spec_.inputs()) {
      int64_t least = 0, most = 0;
      if (trt.batches(engine_, profile, input.name.c_str(), &least, &most))
        fault("no range of batches for " + input.name);
      low = std::max(low, least), high = std::min(high, most);
    }
    if (faults.empty() && high < low) fault("no batch that all inputs take");
    batches_.emplace_back(low, high);
  }
  if (faults.empty() && batches_.empty()) fault("no profile of batches");
  if (!faults.empty()) {
    throw Failure(DDPMX_FILE_FORMAT, path_ + ": the plan has other inputs and outputs than the contract asks for",
                  faults, "build it from what `ddpmx export` writes");
  }
}

// The profile for this batch: the one with the smallest range, which was tuned for the fewest other batches.
int32_t TrtEngine::profile_for(int64_t batch) const {
  const auto wanted = static_cast<uint64_t>(batch);
  int32_t best = -1;
  uint64_t width = 0, largest = 0;
  std::string ranges;
  for (size_t i = 0; i < batches_.size(); ++i) {
    const auto [low, high] = batches_[i];
    largest = std::max(largest, high);
    ranges += (i ? ", " : "") + std::to_string(low) + "…" + std::to_string(high);
    if (wanted < low || wanted > high || (best >= 0 && high - low >= width)) continue;
    best = static_cast<int32_t>(i), width = high - low;
  }
  if (best >= 0) return best;
  const std::string more = std::to_string(batch);
  throw Failure(DDPMX_INPUT, path_ + ": the plan takes batches of " + ranges + ", not " + more, "",
                "a batch of " + std::to_string(largest) + ", or a plan for more: ddpmx build " +
                    shell_word(record_.source) + " --batch 1," + more + "," + more);
}

std::unique_ptr<TrtContext> TrtEngine::bind(int64_t batch, const Addresses &at, Stream stream) {
  return std::make_unique<TrtContext>(*this, batch, at, stream);
}

void TrtEngine::save_cache() const noexcept {
  if (cache_file_.empty()) return;
  const auto take = [](const void *data, size_t size, void *file) {
    replace_content(*static_cast<const std::string *>(file), data, size);
  };
  module_.functions().save_cache(engine_, take, const_cast<std::string *>(&cache_file_));
}

// --- a context ---

TrtContext::TrtContext(TrtEngine &engine, int64_t batch, const Addresses &at, Stream stream) : engine_(engine) {
  const Current current(engine_.driver_);
  try {
    prepare(batch, at, stream);
  } catch (...) {
    try {
      engine_.driver_.wait_for_stream(stream, "choosing a profile");
    } catch (const Failure &) {  // the first failure is the one to report
    }
    engine_.module_.functions().close_context(context_);
    throw;
  }
}

void TrtContext::prepare(int64_t batch, Addresses at, Stream stream) {
  const ddpmx_trt_module &trt = engine_.module_.functions();
  const Spec &spec = engine_.spec_;
  Message message;
  const auto demand = [&](int32_t refused, const std::string &what) {
    if (refused) throw Failure(DDPMX_BACKEND, engine_.module_.description() + " does not take " + what, message.note());
  };
  const int32_t profile = engine_.profile_for(batch);
  demand(trt.open_context(engine_.engine_, profile, stream, &context_, message.at(), message.size()),
         "an execution context for profile " + std::to_string(profile));
  engine_.driver_.wait_for_stream(stream, "choosing a profile");
  if (spec.learns_variance() && !at.var) {  // the network writes it, used or not
    unused_ = engine_.driver_.allocate(static_cast<uint64_t>(batch * spec.elements()) * 4, "the variance");
    at.var = unused_.value();
  }
  for (const Input &input : spec.inputs()) {
    std::vector<int64_t> dims{batch};
    dims.insert(dims.end(), input.dims.begin(), input.dims.end());
    demand(trt.bind(context_, input.name.c_str(), dims.data(), static_cast<int32_t>(dims.size()), at.of(input.name),
                    message.at(), message.size()),
           std::to_string(batch) + " images as " + input.name);
  }
  for (const std::string &name : spec.outputs()) {
    demand(trt.bind(context_, name.c_str(), nullptr, 0, at.of(name), message.at(), message.size()),
           "the address for " + name);
  }
  demand(trt.check(context_, message.at(), message.size()), "a batch of " + std::to_string(batch));
}

TrtContext::~TrtContext() {
  if (!context_) return;
  try {
    const Current current(engine_.driver_);
    engine_.module_.functions().close_context(context_);
  } catch (const Failure &) {
    abandon();
  }
}

void TrtContext::abandon() noexcept {
  context_ = nullptr;
  unused_.abandon();
  engine_.abandon();
}

void TrtContext::enqueue(Stream stream) {
  Message message;
  if (engine_.module_.functions().enqueue(context_, stream, message.at(), message.size())) {
    throw Failure(DDPMX_BACKEND, engine_.module_.description() + " refuses to run the network", message.note(),
                  "`ddpmx doctor` shows the driver and the libraries that are here");
  }
}

}  // namespace ddpmx::cuda
