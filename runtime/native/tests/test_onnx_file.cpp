// Reading ONNX files: good, damaged and hostile ones. The bytes are made here, as in tests/oracles/protobuf.py.
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <fstream>
#include <sys/stat.h>
#include <unistd.h>

#include "check.hpp"
#include "model_file.hpp"
#include "sample_files.hpp"
#include "protobuf.hpp"

namespace {

using ddpmx::GraphInfo;
using ddpmx_test::external_tensor;
using ddpmx_test::fails;
using ddpmx_test::field;
using ddpmx_test::metadata;
using ddpmx_test::model;
using ddpmx_test::node;
using ddpmx_test::envelope;
using ddpmx_test::value_info;
using ddpmx_test::varint;

const std::string kX = field(11, value_info("x", 1, {"batch", "3", "8", "8"}));
const std::string kT = field(11, value_info("t", 6, {"batch"}));
const std::string kEps = field(12, value_info("eps", 1, {"batch", "3", "8", "8"}));
const std::string kGraph = kX + kT + kEps;
const std::string kText = envelope("ddpmx1", ddpmx_test::kSpec);

GraphInfo read(const std::string &bytes) { return ddpmx::read_onnx("m.onnx", bytes); }

ddpmx::Spec spec_of(const std::string &bytes, const std::string &override_json = "") {
  return ddpmx::onnx_spec("m.onnx", read(bytes), override_json);
}

// A temporary folder, removed at the end.
class Folder {
 public:
  Folder() {
    char name[] = "/tmp/ddpmx-test-XXXXXX";
    path_ = mkdtemp(name);
  }
  ~Folder() {
    if (std::system(("rm -rf '" + path_ + "'").c_str()) != 0) std::perror("rm");
  }
  std::string operator/(const std::string &name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

void write(const std::string &path, const std::string &bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// --- protobuf --------------------------------------------------------------------------------------------------------

void numbers() {
  const auto taken = [](const std::string &bytes) {
    std::string_view rest = bytes;
    return ddpmx::take_varint(rest);
  };
  for (const uint64_t number : {uint64_t{0}, uint64_t{127}, uint64_t{128}, uint64_t{1} << 63, UINT64_MAX}) {
    CHECK(taken(varint(number)).low == number && !taken(varint(number)).over);
  }
  const std::string nine(9, '\xFF');
  CHECK(taken(nine + '\x01').low == UINT64_MAX && !taken(nine + '\x01').over);
  CHECK(taken(nine + '\x03').over && taken(nine + '\x7F').saturated() == UINT64_MAX);
  for (const std::string &bytes : {std::string(), std::string("\x80"), nine + '\xFF', std::string(20, '\xFF')}) {
    bool malformed = false;
    try {
      taken(bytes);
    } catch (const ddpmx::Malformed &) {
      malformed = true;
    }
    CHECK(malformed);
  }
}

void check_damaged(const std::string &bytes, const std::string &why) {
  CHECK(fails(DDPMX_FILE_FORMAT,
              "m.onnx: not a valid ONNX file\nNote: " + std::to_string(bytes.size()) + " bytes; " + why,
              [&] { read(bytes); }));
}

void damage() {
  check_damaged("", "no graph in the file\nHint: export or download it again");
  check_damaged("\x08", "the end is inside a number");
  check_damaged("\x08\x08", "no graph in the file");
  check_damaged(model("") + field(7, ""), "more than one graph in the file");
  check_damaged(field(1, 8) + field(7, 5), "a number in place of a message");
  check_damaged(field(1, 8) + varint(7 << 3 | 2) + varint(uint64_t{1} << 60),
                "1152921504606846976 bytes are missing at the end");
  check_damaged(field(1, 8) + varint(7 << 3 | 2) + varint(UINT64_MAX), "18446744073709551615 bytes are missing at the end");
  check_damaged(model("") + varint(3 << 3 | 2) + varint(2) + "a", "1 bytes are missing at the end");
  check_damaged(model("") + varint(3 << 3 | 1) + "1234567", "1 bytes are missing at the end");
  check_damaged(model("") + varint(3 << 3 | 5) + "123", "1 bytes are missing at the end");
  for (const char *wire : {"\x1B", "\x1C", "\x1E", "\x1F"}) check_damaged(model("") + wire, "a field of wire type ");
  check_damaged("\x08\x08" + std::string(20, '\xFF'), "a number of more than ten bytes");
  check_damaged(model("") + field(0, 1), "a field numbered 0");
  check_damaged(model(field(11, field(2, 3))), "a number in place of a message");
  check_damaged(model(field(11, field(2, field(1, field(1, "text"))))), "a message in place of a number");
  check_damaged(model(field(5, field(2, "text"))), "a message in place of a number");
  check_damaged(model(field(5, field(1, "\x02\x83"))), "the end is inside a number");
  check_damaged(model("", field(8, field(2, "text"))), "a message in place of a number");
  check_damaged(model("", field(14, field(1, 3))), "a number in place of a message");
  check_damaged(model(field(11, value_info("x", 1, std::vector<std::string>(65, "1")))),
                "a tensor of more than 64 dimensions");
  std::string many;
  for (int i = 0; i < (1 << 16) + 1; ++i) many += field(12, value_info(std::to_string(i), 1, {}));
  check_damaged(model(many), "more than 65536 names of one kind");
  many.clear();
  for (int i = 0; i < (1 << 16) + 1; ++i) many += field(5, external_tensor(std::to_string(i)));
  check_damaged(model(many), "weights in more than 65536 files");
}

void reading() {
  const GraphInfo info =
      read(model(kGraph + field(11, value_info("y", 7, {"", "5"})), metadata("a", "b") + metadata("a", "c")));
  CHECK(info.inputs.size() == 3 && info.outputs.size() == 1 && info.external.empty());
  const ddpmx::TensorInfo &x = info.inputs.at("x"), &y = info.inputs.at("y");
  CHECK(x.element_type == 1 && x.dims->size() == 4 && (*x.dims)[0].size == -1 && (*x.dims)[0].name == "batch");
  CHECK((*x.dims)[1].size == 3 && (*x.dims)[3].size == 8);
  CHECK(y.element_type == 7 && (*y.dims)[0].size == -1 && (*y.dims)[0].name.empty() && (*y.dims)[1].size == 5);
  CHECK(info.metadata.at("a") == "c");
  CHECK(!read(model(field(11, field(1, "x")))).inputs.at("x").dims);
  // IR versions before 4 demand every initializer among the inputs
  CHECK(read(model(field(5, field(8, "w")) + kGraph + field(11, value_info("w", 1, {"1"})))).inputs.size() == 2);
  CHECK(read(model(kGraph + field(5, field(8, "eps")))).outputs.size() == 1);
  // a dimension of -1 is a number, but does not fit
  const std::string minus = field(1, "x") + field(2, field(1, field(1, 1) + field(2, field(1, field(1, UINT64_MAX)))));
  CHECK((*read(model(field(11, minus))).inputs.at("x").dims)[0].size == INT64_MAX);
  const ddpmx::MappedFile gaussian(GAUSSIAN);
  const GraphInfo real = ddpmx::read_onnx(GAUSSIAN, gaussian.bytes());
  CHECK(real.inputs.size() == 2 && real.outputs.count("eps") == 1);
  CHECK(ddpmx::onnx_spec(GAUSSIAN, real, "").timesteps == 1000);
}

std::string nested(int depth, const std::string &inner) {
  return depth == 0 ? inner : field(1, node(6, nested(depth - 1, inner)));
}

void nesting() {
  CHECK(read(model(nested(32, field(5, external_tensor("w"))))).external.size() == 1);
  check_damaged(model(nested(33, "")), "graphs nested deeper than 32");
  check_damaged(model(nested(1000, "")), "graphs nested deeper than 32");
}

// The time is linear in the size of a file, whatever its content.
void time_to_read() {
  const auto seconds = [](const std::string &bytes) {
    const std::clock_t start = std::clock();
    try {
      read(bytes);
    } catch (const ddpmx::Failure &) {
    }
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;  // of the CPU, which may be shared
  };
  std::string wide, deep = "\x0a";
  for (int i = 0; i < 200'000; ++i) wide += field(1, node(5, external_tensor("same")));
  CHECK(read(model(wide)).external.size() == 1);
  CHECK(seconds(model(wide)) < 10);
  CHECK(seconds(model(std::string(10'000'000, '\x0a'))) < 10);
  std::string chain;
  for (int i = 0; i < 3000; ++i) chain = field(1, node(6, chain));
  CHECK(seconds(model(chain)) < 10);
}

// --- weights in other files ------------------------------------------------------------------------------------------

void places() {
  const std::string tensor = external_tensor("/etc/passwd"), sparse = field(1, tensor), indices = field(2, tensor);
  const std::string inner = field(1, node(6, field(1, node(5, tensor))));
  const std::vector<std::string> models = {
      model(field(5, tensor)),
      model(field(15, sparse)),
      model(field(15, indices)),
      model(field(1, node(5, tensor))),
      model(field(1, node(10, tensor))),
      model(field(1, node(22, sparse))),
      model(field(1, node(23, indices))),
      model(field(1, node(6, field(5, tensor)))),
      model(field(1, node(11, field(5, tensor)))),
      model(inner),
      model("", field(25, field(7, node(5, tensor)))),
      model("", field(25, field(11, field(1, "value") + field(5, tensor)))),
      model("", field(20, field(1, field(5, tensor)))),
      model("", field(20, field(2, inner))),
  };
  for (const std::string &bytes : models) {
    const GraphInfo info = read(bytes);
    CHECK(info.external == std::vector<std::string>{"/etc/passwd"});
    CHECK(fails(DDPMX_FILE_FORMAT,
                "weights file outside its own folder\nNote: external data at '/etc/passwd'\nHint: do not run",
                [&] { ddpmx::check_external("m.onnx", info); }));
  }
}

void external_files() {
  const Folder folder;
  mkdir((folder / "model").c_str(), 0700);
  mkdir((folder / "model/sub").c_str(), 0700);
  mkdir((folder / "model-not").c_str(), 0700);
  for (const char *name : {"secret", "model/w", "model/sub/w", "model-not/w"}) write(folder / name, "1234");
  const auto link = [&](const char *target, const char *name) { CHECK(symlink(target, (folder / name).c_str()) == 0); };
  link("../secret", "model/out");
  link("..", "model/up");
  link("sub/w", "model/in");
  link("loop", "model/loop");
  link("nowhere", "model/dangling");
  link("/etc/nowhere", "model/away");
  link("model", "link");
  const std::string path = folder / "model/m.onnx";
  const auto check = [&](const std::string &where, const std::string &location) {
    GraphInfo info;
    info.external = {location};
    ddpmx::check_external(where, info);
  };
  for (const char *good : {"w", "./w", "sub/w", "in", "sub/../w", "nothing/../w", "link/../w"}) {
    check(path, good);
    check(folder / "link/m.onnx", good);
  }
  for (const char *outside : {"/etc/passwd", "../secret", "sub/../../secret", "..\\secret", "C:\\secret", "", "out",
                              "up/secret", "./../model/../secret", "../model-not/w", "away"}) {
    CHECK(fails(DDPMX_FILE_FORMAT, path + ": weights file outside its own folder", [&] { check(path, outside); }));
  }
  for (const char *missing : {"missing.bin", ".", "sub", "dangling", "a\377b"}) {
    CHECK(fails(DDPMX_FILE_FORMAT, "missing weights file", [&] { check(path, missing); }));
  }
  CHECK(fails(DDPMX_FILE_FORMAT, "Note: 'a\\xffb' should be beside it", [&] { check(path, "a\377b"); }));
  std::string zigzag;
  for (int i = 0; i < 1'000'000; ++i) zigzag += "a/../";
  for (const std::string &impossible :
       {std::string("nul\0byte", 8), std::string("loop"), std::string(300, 'a'), zigzag + "w"}) {
    CHECK(fails(DDPMX_FILE_FORMAT, path + ": invalid path of a weights file",
                [&] { check(path, impossible); }));
  }
}

// --- the spec and the contract ---------------------------------------------------------------------------------------

void specs() {
  const std::string bare = model(kGraph), described = model(kGraph, metadata("ddpmx", kText)), spec = ddpmx_test::kSpec;
  CHECK(spec_of(described).timesteps == 20 && spec_of(bare, spec).timesteps == 20 && spec_of(described, spec).timesteps == 20);
  CHECK(spec_of(bare, "{\"model\":" + spec + "}").timesteps == 20);
  CHECK(spec_of(described, R"({"shape":[3,8,8],"timesteps":20,"weights":")" + std::string(64, 'a') + "\"}").timesteps == 20);
  CHECK(fails(DDPMX_SPEC, "m.onnx: the file does not say which diffusion model it is", [&] { spec_of(bare); }));
  CHECK(fails(DDPMX_SPEC, "Hint: if you know its schedule and prediction, pass them in ddpmx_open_options.spec",
              [&] { spec_of(bare); }));
  CHECK(fails(DDPMX_SPEC, "m.onnx: the given spec contradicts the one in the file",
              [&] { spec_of(described, R"({"shape":[3,8,8],"timesteps":20,"variance":"fixed_small"})"); }));
  for (const std::string &bad : {std::string(), std::string("ddpmx1"), kText.substr(0, kText.size() - 2)}) {
    CHECK(fails(DDPMX_SPEC, "m.onnx: the ", [&] { spec_of(model(kGraph, metadata("ddpmx", bad)), spec); }));
  }
  for (const char *bad : {"{", "3", "[]", "{}", R"({"model":3})", R"({"shape":[NaN]})"}) {
    CHECK(fails(DDPMX_SPEC, "ddpmx_open_options.spec: ", [&] { spec_of(bare, bad); }));
  }
  CHECK(fails(DDPMX_SPEC, "too large for a spec\nNote: more than 1048576 bytes",
              [&] { spec_of(bare, std::string(1 << 21, ' ')); }));
}

void arrays_of_betas() {
  const std::string two = std::string("\0\0\0\0\0\0\xE0?\0\0\0\0\0\0\xE0?", 16);  // 0.5, 0.5
  const std::string text = "AAAAAAAA4D8AAAAAAADgPw==", crc = envelope("", two).substr(4, 8);
  const std::string spec = R"({"shape":[3,8,8],"timesteps":2,"schedule":"betas"})",
                    enveloped = envelope("ddpmx1", spec);
  const std::string betas = "betas1 2 " + crc + " " + text;
  const auto file = [&](const std::string &beside) {
    return model(kGraph, metadata("ddpmx", enveloped) + metadata("ddpmx.betas", beside));
  };
  CHECK((spec_of(file(betas)).betas == std::vector{0.5, 0.5}));
  CHECK(fails(DDPMX_SPEC, "Hint: it should be in the file's metadata 'ddpmx.betas'",
              [&] { spec_of(model(kGraph, metadata("ddpmx", enveloped))); }));
  for (const std::string &bad :
       {std::string(), betas.substr(1), betas.substr(0, betas.size() - 1), "betas1 3" + betas.substr(8)}) {
    CHECK(fails(DDPMX_SPEC, "m.onnx: the array of β", [&] { spec_of(file(bad)); }));
  }
  const std::string bare = model(kGraph);
  CHECK((spec_of(bare, "{\"model\":" + spec + ",\"betas\":[0.5,0.25]}").betas == std::vector{0.5, 0.25}));
  CHECK(spec_of(bare, "{\"model\":" + spec + ",\"betas\":[0.5,0.5]}").timesteps == 2);
  CHECK(spec_of(file(betas), "{\"model\":" + spec + ",\"betas\":[0.5,0.5]}").timesteps == 2);
  CHECK(
      fails(DDPMX_SPEC, "contradicts", [&] { spec_of(file(betas), "{\"model\":" + spec + ",\"betas\":[0.5,0.25]}"); }));
  for (const char *bad : {"null", "[]", "[0.5]", "[0.5,2]", "[0.5,true]", "\"0.5\"", "[[0.5,0.5]]"}) {
    CHECK(fails(DDPMX_SPEC,
                "ddpmx_open_options.spec: ", [&] { spec_of(bare, "{\"model\":" + spec + ",\"betas\":" + bad + "}"); }));
  }
}

void contract() {
  const std::string wrong = "m.onnx: the graph does not match the spec\nNote: ";
  const auto refused = [&](const std::string &graph, const std::string &note,
                           const std::string &spec = ddpmx_test::kSpec) {
    CHECK(fails(DDPMX_SPEC, wrong + note, [&] { spec_of(model(graph), spec); }));
  };
  const auto input = [](const char *name, uint64_t type, const std::vector<std::string> &dims) {
    return field(11, value_info(name, type, dims));
  };
  refused(kX + kEps, "missing input 't'\nHint: export it so that it takes x float32 [batch, C, H, W] and t int32 [batch], and "
                     "returns 'eps'");
  refused(kX + kT, "missing output 'eps'");
  refused("", "missing input 'x'; missing input 't'; missing output 'eps'");
  refused(kX + kEps + input("t", 7, {"batch"}), "'t' is int64, not int32");
  refused(kX + kEps + input("t", 6, {"batch", "1"}), "'t' has the shape ['batch', 1], not ['batch']");
  refused(kX + kEps + input("t", 6, {}), "'t' has the shape [], not ['batch']");
  refused(kX + kEps + input("t", 6, {"4"}), "'t' has the shape [4], not ['batch']");
  refused(kT + kEps + input("x", 10, {"b", "3", "8", "8"}), "'x' is float16, not float32");
  refused(kT + kEps + input("x", 1, {"", "3", "8", "9"}), "'x' has the shape [?, 3, 8, 9], not ['batch', 3, 8, 8]");
  refused(kGraph + input("labels\n", 6, {"batch"}), "unexpected input 'labels\\x0a'");
  refused(kGraph + field(12, value_info("x0", 1, {"b", "3", "8", "8"})), "unexpected output 'x0'");
  CHECK(spec_of(model(kEps + input("x", 1, {"N", "", "h", "8"}) + input("t", 6, {""})), ddpmx_test::kSpec).height == 8);
  CHECK(
      spec_of(model(kEps + field(11, field(1, "x") + field(2, field(1, field(1, 1)))) + kT), ddpmx_test::kSpec).width ==
      8);
  std::string many = kGraph;
  for (int i = 0; i < 1000; ++i) many += input(("more" + std::to_string(i)).c_str(), 1, {});
  refused(many, "unexpected input 'more0'; ");

  const std::string conditioned =
      R"({"shape":[3,8,8],"classes":5,"self_condition":true,"condition":2,"variance":"learned_range"})";
  const std::string var = field(12, value_info("var", 1, {"b", "3", "8", "8"}));
  const std::string y = input("y", 6, {"b"}), before = input("x0_prev", 1, {"b", "3", "8", "8"}),
                    cond = input("cond", 1, {"b", "2", "8", "8"});
  CHECK(spec_of(model(kGraph + y + before + cond + var), conditioned).classes == 5);
  refused(kGraph + before + cond + var,
          "missing input 'y'\nHint: export it so that it takes x float32 [batch, C, H, W], t int32 [batch], y int32 [batch], "
          "x0_prev float32 [batch, C, H, W] and cond float32 [batch, K, H, W], and returns 'eps' and 'var'",
          conditioned);
  refused(kGraph + y + before + var + input("cond", 1, {"b", "3", "8", "8"}), "'cond' has the shape ", conditioned);
}

// --- which kind ------------------------------------------------------------------------------------------------------

void kinds() {
  const Folder folder;
  const auto kind = [&](const std::string &bytes, const char *name = "model.onnx") {
    write(folder / name, bytes);
    return ddpmx::identify(folder / name);
  };
  CHECK(ddpmx::identify(GAUSSIAN) == ddpmx::Kind::onnx);
  CHECK(kind("ftrt" + std::string(100, '\0')) == ddpmx::Kind::plan && kind("vtrt") == ddpmx::Kind::plan);
  CHECK(kind("\x08") == ddpmx::Kind::onnx);
  for (const char *foreign : {"<html>", "\x89PNG", "{", "ftr"}) {
    const std::string note = "it begins with " + ddpmx::in_quotes(std::string(foreign).substr(0, 4)) + "\nHint: ";
    CHECK(
        fails(DDPMX_FILE_FORMAT, ": neither an ONNX file nor a TensorRT plan\nNote: " + note, [&] { kind(foreign); }));
  }
  for (const char *weights : {"PK\x03\x04", "\x80\x02"}) {
    CHECK(fails(DDPMX_FILE_FORMAT, "Hint: ddpmx import ", [&] { kind(weights); }));
  }
  const std::string path = folder / "my model.onnx", quoted = "'" + path + "'";  // a command's word for a shell
  CHECK(fails(DDPMX_FILE_FORMAT, "Hint: ddpmx import " + quoted + " -o ", [&] { kind("\x80\x02", "my model.onnx"); }));
  CHECK(fails(DDPMX_FILE_FORMAT, ": the file is empty", [&] { kind(""); }));
  CHECK(fails(DDPMX_FILE_FORMAT, "Hint: ddpmx parity model.onnx --against ",
              [&] { kind("PK\x03\x04", "m.parity.npz"); }));
  const auto unreadable = [&](const std::string &path, const std::string &note) {
    CHECK(fails(DDPMX_FILE_FORMAT, path + ": cannot be read\nNote: " + note, [&] { ddpmx::identify(path); }));
    CHECK(fails(DDPMX_FILE_FORMAT, path + ": cannot be read\nNote: " + note, [&] { ddpmx::MappedFile file(path); }));
  };
  unreadable(folder / "missing.onnx", "No such file or directory\nHint: `ddpmx export RUN -o model.onnx` writes");
  unreadable(folder / "model.onnx/below", "Not a directory");
  unreadable(folder / std::string(300, 'x'), "File name too long");
  unreadable("/dev/zero", "not a file");
  unreadable("", "No such file or directory");
  CHECK(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  unreadable(folder / "pipe", "not a file");  // without waiting for a writer
  CHECK(symlink("loop", (folder / "loop").c_str()) == 0);
  unreadable(folder / "loop", "Too many levels of symbolic links");
  CHECK(fails(DDPMX_FILE_FORMAT, ": a folder, but not a ddpmx checkpoint\nNote: ", [&] { ddpmx::identify(folder / ""); }));
  CHECK(fails(DDPMX_FILE_FORMAT, "Note: Is a directory", [&] { ddpmx::MappedFile file(folder / ""); }));
  write(folder / "spec.json", "{}");
  CHECK(fails(DDPMX_FILE_FORMAT, ": a ddpmx checkpoint, not a model file\nHint: `ddpmx export ",
              [&] { ddpmx::identify(folder / ""); }));
  write(folder / "empty", "");
  CHECK(ddpmx::MappedFile(folder / "empty").bytes().empty());
  write(folder / "some", std::string(10'000, 'x'));
  CHECK(ddpmx::MappedFile(folder / "some").bytes() == std::string(10'000, 'x'));
}

}  // namespace

int main() {
  numbers();
  damage();
  reading();
  nesting();
  time_to_read();
  places();
  external_files();
  specs();
  arrays_of_betas();
  contract();
  kinds();
  return ddpmx_test::finish();
}
