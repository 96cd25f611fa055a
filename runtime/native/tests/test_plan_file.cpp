// Reading TensorRT plans and their sidecars, and where a plan can run. The bytes are made here.
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <optional>
#include <sys/stat.h>
#include <unistd.h>

#include "check.hpp"
#include "model_file.hpp"
#include "sample_files.hpp"

namespace {

using ddpmx::Failure;
using ddpmx::PlanInfo;
using ddpmx_test::elf;
using ddpmx_test::fails;
using ddpmx_test::kSpec;
using ddpmx_test::plan;
using ddpmx_test::plan_name;
using ddpmx_test::record;
using ddpmx_test::envelope;

const std::string kTensorRT =
    plan_name(kSpec, record("flavour", R"("TensorRT","version":"10.3.0.26","targets":["8.7"])"));
const std::string kVersion10("\x0A\3\0\x1A", 4);

PlanInfo parse(const std::string &bytes, const std::optional<std::string> &sidecar = {}, bool trust = false) {
  return ddpmx::parse_plan("m.plan", bytes, sidecar ? &*sidecar : nullptr, trust);
}

void check_refused(ddpmx_status status, const std::string &bytes, const std::string &text) {
  CHECK(fails(status, "m.plan: " + text, [&] { parse(bytes); }));
}

std::string resized(std::string bytes, uint64_t size) { return bytes.replace(16, 8, ddpmx_test::bytes_of(size, 8)); }

void headers() {
  for (const std::string &cut :
       {std::string(), std::string("ftrt"), "ftrt" + std::string(23, '\0'), "\x08" + std::string(40, '\0')}) {
    check_refused(DDPMX_FILE_FORMAT, cut,
                  "not a valid TensorRT plan\nNote: " + std::to_string(std::min<size_t>(cut.size(), 28)));
  }
  const std::string whole = plan(), size = std::to_string(whole.size());
  check_refused(DDPMX_FILE_FORMAT, whole.substr(0, whole.size() - 1),
                "not a valid TensorRT plan\nNote: " + std::to_string(whole.size() - 1) +
                    " bytes, and its header declares " + size + "\nHint: build or copy it again");
  check_refused(DDPMX_FILE_FORMAT, whole + "x", "not a valid TensorRT plan");
  check_refused(DDPMX_FILE_FORMAT, resized(whole, 0), "not a valid TensorRT plan");
  // TensorRT's length is checked only if it can be one
  const std::string other = plan(kTensorRT, "", "ftrt", kVersion10);
  for (const uint64_t declared : {uint64_t{0}, uint64_t{5}, uint64_t{1} << 40, uint64_t{1} << 60, UINT64_MAX}) {
    CHECK(parse(resized(other, declared)).version == "10.3.0.26");
  }
  check_refused(DDPMX_FILE_FORMAT, resized(other, other.size() + 1), "not a valid TensorRT plan");
  check_refused(DDPMX_FILE_FORMAT, resized(other, (uint64_t{1} << 40) - 1), "not a valid TensorRT plan");
}

void names() {
  const PlanInfo info = parse(plan());
  CHECK(info.flavour == "TensorRT-RTX" && info.version == "1.7.1.116" && info.name == plan_name());
  CHECK(info.spec.channels == 3 && info.spec.timesteps == 20 && info.spec.ddpmx == "0.1.0");
  CHECK(info.engine.version == "1.7.1.116" && info.engine.targets == std::vector<std::string>{"8.0+"});
  CHECK(info.engine.batch[0] == 1 && info.engine.batch[1] == 4 && info.engine.batch[2] == 8);
  CHECK(info.engine.platform == "linux x86_64" && info.engine.source == "model.onnx" && info.engine.key[63] == 'b');
  CHECK(!info.engine.stripped && info.engine.rebuild == "ddpmx build model.onnx -o m.plan --batch 1,4,8 --level 3");
  CHECK(parse(plan(kTensorRT, "", "ftrt", kVersion10)).flavour == "TensorRT");
  CHECK(parse(plan(plan_name(), plan_name())).name == plan_name());  // the name may occur twice
  CHECK(parse(plan("ddpmx1 9999 00000000 " + plan_name())).name == plan_name());

  check_refused(
      DDPMX_SPEC, plan("Unnamed Network 0"),
      "the plan does not say which diffusion model it is\nNote: a plan of TensorRT-RTX 1.7.1.116; `ddpmx build` writes "
      "a description into the network's name: another program built this plan, or the name was lost\nHint: ddpmx build "
      "model.onnx -o model.plan");
  const std::string damaged =
      "the description in this plan of TensorRT-RTX 1.7.1.116 is damaged\nHint: build or copy it again";
  for (const char *what : {"\"timesteps\"", "\"batch\"", "engine1 "}) {
    std::string bytes = plan();
    bytes[bytes.find(what) + 3] ^= 1;
    check_refused(DDPMX_SPEC, bytes, damaged);
  }
  check_refused(DDPMX_SPEC, plan(envelope("ddpmx1", kSpec)), damaged);
  check_refused(DDPMX_SPEC, plan(envelope("ddpmx1", kSpec) + std::string(4096, '\0') + envelope("engine1", record())),
                damaged);
  for (const std::string &other : {plan_name(R"({"shape":[3,8,9]})"), plan_name(kSpec, record("batch", "[1,1,1]"))}) {
    check_refused(DDPMX_FILE_FORMAT, plan(plan_name(), other), "two descriptions in the plan contradict each other");
  }
  check_refused(DDPMX_SPEC, plan(plan_name(R"({"shape":[3,8,8],"timesteps":-1})")), "T must be ");
  check_refused(DDPMX_SPEC, plan(plan_name("{")), "not valid JSON");
  check_refused(DDPMX_FILE_FORMAT, plan(plan_name(), "", "ftrt"),
                "the plan's header and its record contradict each other");
  check_refused(DDPMX_FILE_FORMAT, plan(plan_name(), "", "vtrt", std::string("\1\7\2\x74", 4)),
                "the plan's header and its record contradict each other\nNote: TensorRT-RTX 1.7.2.116 and TensorRT-RTX "
                "1.7.1.116\nHint: ddpmx build model.onnx -o m.plan --batch 1,4,8 --level 3");
  CHECK(parse(plan(plan_name(kSpec, record("version", "\"1.7.1.372\"")))).version == "1.7.1.116");
}

void records() {
  const std::vector<std::pair<std::string, std::vector<std::string>>> faults = {
      {"flavour", {"\"tensorrt\"", "\"\"", "null", "1", "[]"}},
      {"version",
       {"\"\"", "\"10\"", "\"10.x\"", "\"10.3\\n\"", "10.3", "\"1.2.3.4.5\"", "\"12345.1\"", "\"1..2\"", "\"1.2.\""}},
      {"targets",
       {"[]", "null", "\"8.0\"", "[\"8\"]", "[8.0]", "[\"8.0\",\"sm_86\"]", "[\"8.0++\"]", "[\"123.0\"]",
        "[\"8.00\"]"}},
      {"platform", {"null", "1", "\"linux\\n\"", "\"\\u202e\"", "\"\\ud800\""}},
      {"batch",
       {"[1,2]", "[1,2,3,4]", "[0,1,2]", "[3,2,4]", "[1,2,65537]", "\"123\"", "[1.0,2,3]", "[true,2,3]", "{}"}},
      {"onnx", {"\"\"", "null", '"' + std::string(63, 'a') + '"', '"' + std::string(64, 'A') + '"'}},
      {"source", {"null", "\"\"", "\"-x\"", "\"a/b\"", "\"a\\\\b\"", "\"a\\nb\""}},
      {"options",
       {"null", "[]", "{\"a\":1.5}", "{\"a\":\"3\"}", "{\"\":1}", "{\"a b\":1}", "{\"a;b\":1}", "{\"1a\":1}"}},
      {"key", {"null", "1", '"' + std::string(65, 'b') + '"'}},
  };
  for (const auto &[name, values] : faults) {
    for (const std::string &value : values) {
      check_refused(DDPMX_SPEC, plan(plan_name(kSpec, record(name, value))),
                    "the plan's record is damaged\nNote: {\"batch\"");
    }
    std::string without = record();
    without.replace(without.find('"' + name + '"'), name.size() + 2, "\"other\"");
    check_refused(DDPMX_SPEC, plan(plan_name(kSpec, without)),
                  "the plan's record has missing or unknown fields");
  }
  for (const char *other : {"null", "3", "[]", "\"x\"", "{}"}) {
    check_refused(DDPMX_SPEC, plan(plan_name(kSpec, other)), "the plan's record has missing or unknown fields");
  }
  check_refused(DDPMX_SPEC, plan(plan_name(kSpec, record("more", "1"))), "the plan's record has missing or unknown fields");
}

void commands() {
  const auto rebuild = [](const std::string &path, const std::string &name, const std::string &value) {
    return ddpmx::parse_plan(path, plan(plan_name(kSpec, record(name, value))), nullptr, false).engine.rebuild;
  };
  const std::string begin = "ddpmx build model.onnx -o m.plan --batch 1,4,8";
  CHECK(rebuild("m.plan", "options", "{}") == begin);
  CHECK(rebuild("m.plan", "options", R"({"workspace":3221225472,"tf32":true,"level":null,"b":false,"a":-1})") ==
        begin + " --a -1 --tf32 --workspace 3072");
  CHECK(rebuild("m.plan", "options", R"({"workspace":true})") == begin + " --workspace 0");
  CHECK(rebuild("my plans/it's.plan", "source", "\"a b.onnx\"") ==
        "ddpmx build 'a b.onnx' -o 'my plans/it'\"'\"'s.plan' --batch 1,4,8 --level 3");
  CHECK(rebuild("$(rm x)", "source", "\"é\"") == "ddpmx build 'é' -o '$(rm x)' --batch 1,4,8 --level 3");
  CHECK(parse(plan(plan_name(kSpec, record("options", R"({"strip":true})")))).engine.stripped);
  CHECK(!parse(plan(plan_name(kSpec, record("options", R"({"strip":1})")))).engine.stripped);
}

void host_code() {
  const std::string holds = "the plan contains code for the CPU, which loading it would run\nNote: a library for ";
  const std::string pe("PE\0\0", 4);
  const std::vector<std::pair<std::string, std::string>> found = {
      {elf(62), "x86-64; "},
      {elf(183), "AArch64; "},
      {elf(3), "x86; "},
      {elf(40), "ARM; "},
      {elf(243), "RISC-V; "},
      {elf(999), "machine 999; "},
      {elf(190) + elf(0) + elf(62), "x86-64; "},
      {pe + "\x64\x86", "Windows; "},
      {pe + "\x64\xaa", "Windows; "},
      {pe + "\x4c\x01", "Windows; "},
      {pe + pe + "\x64\x86" + elf(62), "Windows; "},
      {elf(62) + pe + "\x64\x86", "x86-64; "},
      {"\177ELF" + elf(62), "x86-64; "},
  };
  for (const auto &[tail, machine] : found) {
    const std::string bytes = plan(plan_name(), tail);
    check_refused(DDPMX_FILE_FORMAT, bytes, holds + machine);
    CHECK(fails(DDPMX_FILE_FORMAT, "or accept this one with DDPMX_TRUST_HOST_CODE", [&] { parse(bytes); }));
    CHECK(parse(bytes, {}, true).version == "1.7.1.116");
  }
  for (const std::string &tail :
       {elf(190), elf(0), pe, pe + "\x64", pe + std::string(2, '\0'), std::string("\177ELF\3\1\1>>>>>>>>>>>>>")}) {
    CHECK(parse(plan(plan_name(), tail)).version == "1.7.1.116");
  }
  // at the very end, cut off
  std::string bytes = plan();
  for (const size_t length : {size_t{4}, size_t{7}, size_t{18}}) {
    const std::string cut = bytes + elf(62).substr(0, length);
    CHECK(parse(resized(cut, cut.size())).version == "1.7.1.116");
  }
  const std::string one_byte = bytes + elf(62).substr(0, 19);
  check_refused(DDPMX_FILE_FORMAT, resized(one_byte, one_byte.size()), holds);
}

// --- the sidecar -----------------------------------------------------------------------------------------------------

const std::string kSidecarSpec =
    R"({"shape":[3,8,8],"timesteps":20,"schedule":"linear","schedule_params":{"beta_start":0.0001,"beta_end":0.02},)"
    R"("prediction":"eps","variance":"fixed_large","clip":1.0,"precision":"fp32","weights":null,"ddpmx":"0.1.0")";

// The checksum that belongs to it, from the error about a sidecar that has none.
std::string coefficients() {
  try {
    parse(plan(), R"({"spec":)" + kSidecarSpec + "}}");
  } catch (const Failure &failure) {
    const size_t mine = failure.note.find("coefficients: nothing there, \"");
    if (mine != std::string::npos) return failure.note.substr(mine + 30, 8);
  }
  return "none";
}

std::string sidecar(const std::string &spec, const std::string &engine, const std::string &size,
                    const std::string &more = "") {
  return "{\"spec\":" + spec + ",\"engine\":" + engine + ",\"bytes\":" + size + more + "}";
}

void sidecars() {
  const std::string bytes = plan(), size = std::to_string(bytes.size());
  const std::string spec = kSidecarSpec + ",\"coefficients\":\"" + coefficients() + "\"}";
  CHECK(parse(bytes, sidecar(spec, record(), size)).name == plan_name());
  CHECK(parse(bytes, sidecar(spec, record(), size + ".0", ",\"build\":[1]")).name == plan_name());
  const auto refused = [&](const std::string &json, const std::string &text) {
    CHECK(fails(DDPMX_SPEC, text, [&] { parse(bytes, json); }));
  };
  const std::string contradicts = "m.plan.json: the sidecar contradicts its plan\nNote: ";
  const std::string hint =
      "\nHint: remove it, or build again: ddpmx build model.onnx -o m.plan --batch 1,4,8 --level 3";
  refused(sidecar(spec, record(), "1"), contradicts + "bytes: 1 there, " + size + " in m.plan" + hint);
  refused(sidecar(spec, record(), "null"), contradicts + "bytes: null there");
  refused(sidecar(spec, record("batch", "[1,1,1]"), size),
          contradicts + "engine: batch: [1,1,1] there, [1,4,8] in m.plan");
  refused(sidecar(spec, record("more", "1"), size), contradicts + "engine: more: 1 there, nothing in m.plan");
  refused(sidecar(spec, "null", size), contradicts + "engine: null there, {");
  refused(sidecar("{}", record(), size), contradicts + "spec: clip: nothing there, 1.0 in m.plan");
  refused(sidecar(kSidecarSpec + "}", record(), size), contradicts + "spec: coefficients: nothing there");
  refused("{}", contradicts + "spec: nothing there, {");
  refused("[]", contradicts + "spec: nothing there, {");
  refused("3", contradicts + "spec: nothing there, {");
  const std::string unread = "m.plan.json: the plan's sidecar cannot be read\nNote: ";
  refused("", unread + "not valid JSON; no value at byte 0" + hint);
  refused("{", unread + "not valid JSON");
  refused(sidecar(spec, record(), size, ",\"betas\":3"), "m.plan: the array of β is damaged\nNote: it begins with 3");
  refused(sidecar(spec, record(), size, ",\"betas\":\"betas1 \""), "m.plan: the array of β is damaged");
  // the array of β is in the sidecar
  const std::string free = R"({"shape":[3,8,8],"timesteps":2,"schedule":"betas"})";
  CHECK(fails(DDPMX_SPEC, "Hint: it should be in the plan's sidecar, m.plan.json, as \"betas\"",
              [&] { parse(plan(plan_name(free))); }));
}

void sidecar_files() {
  char name[] = "/tmp/ddpmx-test-XXXXXX";
  const std::string folder = mkdtemp(name), path = folder + "/m.plan", beside = path + ".json";
  const auto write = [](const std::string &to, const std::string &text) {
    std::ofstream(to, std::ios::binary) << text;
  };
  const auto read = [](const std::string &from) {
    const ddpmx::MappedFile file(from);
    return ddpmx::read_plan(from, file.bytes(), false);
  };
  write(path, plan());
  CHECK(read(path).spec.timesteps == 20);
  const std::string spec = kSidecarSpec + ",\"coefficients\":\"" + coefficients() + "\"}";
  write(beside, sidecar(spec, record(), std::to_string(plan().size())));
  CHECK(read(path).spec.timesteps == 20);
  write(beside, sidecar(spec, record(), "1"));
  CHECK(fails(DDPMX_SPEC, beside + ": the sidecar contradicts its plan", [&] { read(path); }));
  CHECK(symlink("m.plan", (folder + "/link.plan").c_str()) == 0);  // the sidecar of the link's target counts
  CHECK(fails(DDPMX_SPEC, beside + ": the sidecar contradicts its plan", [&] { read(folder + "/link.plan"); }));
  write(beside, std::string((1 << 20) + 1, ' '));
  CHECK(fails(DDPMX_SPEC, beside + ": the plan's sidecar cannot be read\nNote: too large", [&] { read(path); }));
  unlink(beside.c_str());
  CHECK(mkdir(beside.c_str(), 0700) == 0);
  CHECK(fails(DDPMX_SPEC, "sidecar cannot be read\nNote: not a file", [&] { read(path); }));
  rmdir(beside.c_str());
  CHECK(mkfifo(beside.c_str(), 0600) == 0);
  CHECK(fails(DDPMX_SPEC, "sidecar cannot be read\nNote: not a file", [&] { read(path); }));
  unlink(beside.c_str());
  CHECK(symlink("nowhere", beside.c_str()) == 0);
  CHECK(fails(DDPMX_SPEC, "sidecar cannot be read\nNote: not a file", [&] { read(path); }));
  for (const std::string &file : {beside, folder + "/link.plan", path}) unlink(file.c_str());
  CHECK(rmdir(folder.c_str()) == 0);
}

// --- where it can run ------------------------------------------------------------------------------------------------

void fits() {
  const ddpmx::Here ada{"1.7.1.116", "linux x86_64", "NVIDIA RTX 4090", "8.9", ""};
  const auto check = [](const ddpmx::Here &here, const std::string &bytes = plan()) {
    ddpmx::check_fits("m.plan", parse(bytes), here);
  };
  const auto here = [&](auto change) {
    ddpmx::Here other = ada;
    change(other);
    return other;
  };
  const auto refused = [&](ddpmx_status status, const ddpmx::Here &where, const std::string &text,
                           const std::string &bytes = plan()) {
    CHECK(fails(status, "m.plan: " + text, [&] { check(where, bytes); }));
  };
  check(ada);
  check(here([](auto &h) { h.version = "1.7.1.999"; }));  // build numbers are not compared
  for (const char *sm : {"8.0", "8.6", "9.0", "12.0"}) check(here([&](auto &h) { h.sm = sm; }));
  const std::string again = "ddpmx build model.onnx -o m.plan --batch 1,4,8 --level 3";
  const std::string built = "TensorRT-RTX 1.7.1.116 for SM 8.0+ on linux x86_64";
  const ddpmx::Here none{"", "linux x86_64", "", "", "there is no NVIDIA driver"};
  refused(DDPMX_BACKEND, none,
          "a plan runs on an NVIDIA GPU, and there is none here\nNote: there is no NVIDIA driver; the plan was "
          "built with " +
              built + "\nHint: the ONNX file runs on the CPU: model.onnx in its place");
  CHECK(fails(DDPMX_BACKEND, "Hint: it is bfloat16, which no CPU runs",
              [&] { check(none, plan(plan_name(R"({"shape":[3,8,8],"precision":"bf16"})"))); }));
  refused(
      DDPMX_PLAN_MISMATCH, here([](auto &h) { h.platform = "linux aarch64"; }),
      "the plan was built on linux x86_64, and this is linux aarch64\nNote: plans do not cross operating systems or "
      "processors\nHint: " +
          again);
  refused(DDPMX_BACKEND, here([](auto &h) { h.version.clear(); }),
          "the plan needs TensorRT-RTX, which is not installed here\nNote: it was built with " + built +
              "; this GPU is NVIDIA RTX 4090, SM 8.9\nHint: pip install tensorrt-rtx-cu13");
  for (const char *version : {"1.7.2.116", "1.8.1.116", "2.7.1.116"}) {
    refused(DDPMX_PLAN_MISMATCH, here([&](auto &h) { h.version = version; }),
            std::string("the plan was built with TensorRT-RTX 1.7.1.116, and here is TensorRT-RTX ") + version +
                "\nNote: plans do not cross versions\nHint: " + again);
  }
  refused(DDPMX_PLAN_MISMATCH, here([](auto &h) { h.sm = "7.5"; }),
          "the plan was built for SM 8.0+, and this GPU is NVIDIA RTX 4090, SM 7.5\nNote: plans do not cross GPU "
          "architectures\n"
          "Hint: " +
              again);
  const std::string jetson = plan(kTensorRT, "", "ftrt", kVersion10);
  const ddpmx::Here orin{"10.3.0.30", "linux x86_64", "Orin", "8.7", ""};
  check(orin, jetson);
  ddpmx::Here newer = orin;
  newer.sm = "8.9";
  refused(DDPMX_PLAN_MISMATCH, newer, "the plan was built for SM 8.7, and this GPU is Orin, SM 8.9", jetson);
  const std::string two = plan(plan_name(kSpec, record("targets", R"(["7.5","12.0+"])")));
  check(here([](auto &h) { h.sm = "7.5"; }), two);
  check(here([](auto &h) { h.sm = "12.1"; }), two);
  refused(DDPMX_PLAN_MISMATCH, ada, "the plan was built for SM 7.5, 12.0+, and this GPU is", two);
}

// Large files with many texts that look like descriptions.
void time_to_read() {
  const auto seconds = [](const std::string &tail) {
    const std::string bytes = plan(plan_name(), tail);
    const std::clock_t start = std::clock();
    try {
      parse(bytes);
    } catch (const Failure &) {
    }
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;  // of the CPU, which may be shared
  };
  const auto repeated = [](const std::string &what, size_t size) {
    std::string out;
    while (out.size() < size) out += what;
    return out;
  };
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kSize = 5'000'000;
#else
  constexpr size_t kSize = 50'000'000;
#endif
  for (const char *what : {"\177EL", "\177ELF", "PE", "ddpmx1", "ddpmx1 ", "ddpmx1 9999 ", "engine1 9999 00000000 "}) {
    CHECK(seconds(repeated(what, kSize)) < 10);
  }
  CHECK(seconds(repeated(envelope("ddpmx1", "") + "engine1 4000 00000000 engine1 4000 00000000 ", kSize)) < 10);
  const std::string many = plan(plan_name(), repeated("ddpmx1 9999 00000000 ", kSize));
  check_refused(DDPMX_FILE_FORMAT, many,
                "not a TensorRT plan that `ddpmx build` wrote\nNote: more than 16384 places in it look like");
  CHECK(seconds(repeated("ddpmx1 9999 00000000 ", kSize)) < 10);
}

}  // namespace

int main() {
  headers();
  names();
  records();
  commands();
  host_code();
  sidecars();
  sidecar_files();
  fits();
  time_to_read();
  return ddpmx_test::finish();
}
