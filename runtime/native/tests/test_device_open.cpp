// Opening a plan, without a GPU: the calls to driver, module and TensorRT, and the errors if one of them does not fit.
#include <fstream>
#include <iterator>

#include "check.hpp"
#include "device_rig.hpp"

namespace {

using namespace ddpmx_test;

bool refused(Rig &rig, ddpmx_status status, const std::string &part) {
  const bool as_wanted = fails(status, part, [&] { rig.open(); });
  return clean() && as_wanted;
}

void drivers() {
  Rig rig;
  setenv("DDPMX_CUDA_LIBRARY", "/nowhere/libcuda.so.1", 1);
  CHECK(refused(rig, DDPMX_BACKEND, "a plan runs on an NVIDIA GPU, and there is none here"));
  CHECK(refused(rig, DDPMX_BACKEND,
                "tried '/nowhere/libcuda.so.1' ($DDPMX_CUDA_LIBRARY): /nowhere/libcuda.so.1: cannot open"));
  CHECK(refused(rig, DDPMX_BACKEND, "the ONNX file runs on the CPU"));
  setenv("DDPMX_CUDA_LIBRARY", FAKE_TRT, 1);  // a library, but no driver
  CHECK(refused(rig, DDPMX_BACKEND, "it has no cuInit"));
  setenv("DDPMX_CUDA_LIBRARY", FAKE_CUDA, 1);
  cuda().fail["cuInit"] = {0, 100};
  CHECK(refused(rig, DDPMX_BACKEND, "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE"));
  cuda().fail.clear();
  cuda().devices = 0;
  CHECK(refused(rig, DDPMX_BACKEND, "the NVIDIA driver sees no GPU"));
  cuda().devices = 2;
  rig.options.device = 2;
  CHECK(refused(rig, DDPMX_INPUT, "there is no GPU 2"));
  CHECK(refused(rig, DDPMX_INPUT, "the NVIDIA driver sees 2, counted from 0"));
  rig.options.device = 1;
  CHECK(rig.open() != nullptr);
  cuda().fail["cuDevicePrimaryCtxRetain"] = {0, 2};
  CHECK(refused(rig, DDPMX_BACKEND, "CUDA_ERROR_OUT_OF_MEMORY while starting the GPU"));
}

void modules() {
  Rig rig;
  rig.options.trt_module = "/nowhere/module.so";
  CHECK(refused(rig, DDPMX_BACKEND, rig.path + ": there is no module for TensorRT"));
  CHECK(refused(rig, DDPMX_BACKEND, "tried '/nowhere/module.so' (option trt_module): /nowhere/module.so: cannot open"));
  rig.options.trt_module = FAKE_CUDA;  // a library, but no module
  CHECK(refused(rig, DDPMX_BACKEND, "it has no ddpmx_trt_get"));
  rig.options.trt_module = nullptr;
  trt().abi = 2;
  CHECK(refused(rig, DDPMX_BACKEND, "is no module for this version of libddpmx"));
  trt().abi = DDPMX_TRT_ABI;
  trt().flavour = "TensorRT-RTX";
  CHECK(refused(rig, DDPMX_BACKEND, "the plan needs TensorRT, and "));
  CHECK(refused(rig, DDPMX_BACKEND, "' is for TensorRT-RTX"));
  CHECK(refused(rig, DDPMX_BACKEND, "ddpmx build model.onnx"));
  trt().flavour = "TensorRT";
  // beside this program, and then by its name
  unsetenv("DDPMX_TRT_MODULE");
  CHECK(refused(rig, DDPMX_BACKEND, "libddpmx_trt.so': libddpmx_trt.so: cannot open"));
}

void libraries() {
  Rig rig;
  trt().refuse.insert("open_library");
  CHECK(refused(rig, DDPMX_BACKEND, "the plan needs TensorRT, which does not load here"));
  CHECK(refused(rig, DDPMX_BACKEND, "tried 'libfake.so.1': '[open_library] refused\\x01'"));
  setenv("DDPMX_TRT_LIBRARY", "/by/variable.so", 1);
  CHECK(refused(rig, DDPMX_BACKEND, "tried '/by/variable.so' ($DDPMX_TRT_LIBRARY)"));
  rig.options.trt_library = "/by/option.so";
  CHECK(refused(rig, DDPMX_BACKEND, "tried '/by/option.so' (option trt_library)"));
  trt().refuse.clear();
  CHECK(rig.open() && trt().library == "/by/option.so");
  rig.options.trt_library = nullptr;
  CHECK(rig.open() && trt().library == "/by/variable.so");
  unsetenv("DDPMX_TRT_LIBRARY");
  CHECK(rig.open() && trt().library == "the usual");
  trt().version = "10.4.0.1";
  CHECK(refused(rig, DDPMX_PLAN_MISMATCH, "the plan was built with TensorRT 10.3.0.26, and here is TensorRT 10.4.0.1"));
  trt().version = "10.3.0.99";  // build numbers are not compared
  CHECK(rig.open() != nullptr);
  cuda().minor = 7;
  CHECK(refused(rig, DDPMX_PLAN_MISMATCH, "built for SM 8.9, and this GPU is Fake GPU, SM 8.7"));
  setenv("DDPMX_TRT_MODULE", "/nowhere/module.so", 1);  // what no other TensorRT helps is reported first
  CHECK(refused(rig, DDPMX_PLAN_MISMATCH, "built for SM 8.9"));
}

void plans() {
  {
    Rig rig(kSmall, record_here("platform", R"("linux riscv64")"));
    CHECK(refused(rig, DDPMX_PLAN_MISMATCH, "the plan was built on linux riscv64"));
  }
  {
    Rig rig(kSmall, record_here("options", R"({"level":3,"refit":false,"strip":true,"tf32":false,"workspace":null})"));
    CHECK(refused(rig, DDPMX_BACKEND, "a plan without weights, which this version of ddpmx does not fill"));
  }
  {
    Rig rig;
    CHECK(rig.open() && trt().plan.substr(0, 4) == "ftrt" && trt().plan.find(trt().name) != std::string::npos);
    CHECK(!trt().trusted && trt().cache == "none wanted");
    rig.options.flags = DDPMX_TRUST_HOST_CODE;
    CHECK(rig.open() && trt().trusted);
    trt().refuse.insert("open_engine");
    CHECK(refused(rig, DDPMX_BACKEND, "TensorRT 10.3.0.26 cannot make the engine of " + rig.path));
    CHECK(refused(rig, DDPMX_BACKEND, "[open_engine] refused\\x01"));
    trt().refuse.clear();
    trt().name += "\n";
    CHECK(refused(rig, DDPMX_FILE_FORMAT, "reads another network name from this plan than the file holds"));
  }
}

// Wrong inputs and outputs, one fault at a time.
void contracts() {
  const auto with = [](const char *part, auto change) {
    Rig rig(kConditioned);
    change(trt().tensors);
    const bool first = refused(rig, DDPMX_FILE_FORMAT, "other inputs and outputs than the contract asks for");
    return refused(rig, DDPMX_FILE_FORMAT, part) && first;
  };
  using Tensors = std::vector<ddpmx_trt_tensor>;
  CHECK(with("'x': input float32 [-1, 3, 4, 6]", [](Tensors &all) { all[0].dims[3] = 6; }));
  CHECK(with("'x': input of another type [-1, 3, 4, 5]", [](Tensors &all) { all[0].type = DDPMX_TRT_OTHER; }));
  CHECK(with("'t': input float32 [-1]", [](Tensors &all) { all[1].type = DDPMX_TRT_FLOAT; }));
  CHECK(with("'t': input int32 []", [](Tensors &all) { all[1].rank = 0; }));
  CHECK(with("'y': output int32 [-1]", [](Tensors &all) { all[2].is_input = 0; }));
  CHECK(with("no x0_prev", [](Tensors &all) { all.erase(all.begin() + 3); }));
  CHECK(with("'cond': input float32 [-1, 2, 4, 5] on the host", [](Tensors &all) { all[4].on_device = 0; }));
  CHECK(with("'eps': output float32 [-1, 3, 4, 5]; no v", [](Tensors &all) { all[5].name = "eps"; }));
  CHECK(with("'x': input float32 [-1, 3, 4, 5]", [](Tensors &all) { all.push_back(all[0]); }));
  CHECK(with("refused", [](Tensors &) { trt().refuse.insert("tensor"), trt().tensors[0].name = "refused"; }));
  CHECK(with("no profile of batches", [](Tensors &) { trt().profiles.clear(); }));
  CHECK(with("no range of batches for x", [](Tensors &) { trt().refuse.insert("batches"); }));
  CHECK(with("no batch that all inputs take", [](Tensors &) { trt().profiles = {{3, 2}}; }));
  {
    Rig rig;  // a plan for one batch size
    trt().profiles = {{2, 2}};
    const auto runner = rig.open();
    Request request;
    request.images = {1}, request.batch = 3;
    CHECK(fails(DDPMX_INPUT, "the plan takes batches of 2…2, not 3", [&] { drawn(*runner, rig, request); }));
    CHECK(fails(DDPMX_INPUT, "ddpmx build model.onnx --batch 1,3,3", [&] { drawn(*runner, rig, request); }));
    request.batch = 2;
    CHECK(same(drawn(*runner, rig, request), expected(rig, request)));
  }
  CHECK(clean());
}

// What TensorRT-RTX compiles is kept in a folder, and passed to it the next time.
void caches() {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("ddpmx-cache-" + std::to_string(getpid()));
  {
    Rig rig(kSmall, record_here("flavour", R"("TensorRT-RTX","version":"1.7.1.116")"));
    std::ofstream(rig.path, std::ios::binary) << plan(trt().name);  // with a header of TensorRT-RTX
    trt().flavour = "TensorRT-RTX", trt().version = "1.7.1.116";
    const std::string inner = (folder / "deeper").string();
    rig.options.cache = inner.c_str();
    trt().saved = "compiled";
    CHECK(rig.open() && trt().cache == "none yet");
    CHECK(rig.open() && trt().cache == "compiled");
    const auto file = folder / "deeper" / ("tensorrt-rtx-1.7.1.116-fake-gpu-" + std::string(16, 'b') + ".runtime");
    CHECK(std::filesystem::exists(file));
    const auto written = std::filesystem::last_write_time(file);
    CHECK(rig.open() != nullptr);
    CHECK(std::filesystem::last_write_time(file) == written);  // the same content again
    trt().saved = "more";
    CHECK(rig.open() != nullptr);
    CHECK(rig.open() && trt().cache == "more");
    CHECK(std::distance(std::filesystem::directory_iterator(folder / "deeper"), {}) == 1);
    const std::string in_the_way = file.string();
    rig.options.cache = in_the_way.c_str();  // not a folder: no cache
    CHECK(rig.open() && trt().cache == "none wanted");
  }
  {
    Rig rig;  // TensorRT has none
    const std::string unused = (folder / "unused").string();
    rig.options.cache = unused.c_str();
    CHECK(rig.open() && trt().cache == "none wanted" && !std::filesystem::exists(folder / "unused"));
  }
  std::filesystem::remove_all(folder);
  CHECK(clean());
}

}  // namespace

int main() {
  drivers();
  modules();
  libraries();
  plans();
  contracts();
  caches();
  return finish();
}
