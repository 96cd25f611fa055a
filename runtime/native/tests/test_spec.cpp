// Reading specs. Which specs are refused is compared with Python in tests/native/test_tables.py; here are the fields of the
// struct, and the arrays of β beside a spec.
#include "spec.hpp"

#include <cstring>

#include "check.hpp"
#include "sample_files.hpp"
#include "envelope.hpp"

using namespace ddpmx;
using ddpmx_test::fails;

namespace {

Spec parsed(const std::string &json, const std::vector<double> *betas = nullptr) {
  return spec_from_json(parse_json(json), betas, "the sidecar");
}

bool refused(const std::string &part, const std::string &json, const std::vector<double> *betas = nullptr) {
  return fails(DDPMX_SPEC, part, [&] { parsed(json, betas); });
}

// {"shape":[1,4,4],"timesteps":10, …}
std::string small(const std::string &more) { return R"({"shape":[1,4,4],"timesteps":10,)" + more + "}"; }

std::string hexadecimal(uint32_t crc) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", crc);
  return text;
}

std::string base64(const std::string &bytes) {
  const char *letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    for (size_t k = 0; k < 3; ++k) bits = bits << 8 | (i + k < bytes.size() ? static_cast<uint8_t>(bytes[i + k]) : 0);
    for (size_t k = 0; k < 4; ++k) text += i + k <= bytes.size() ? letters[bits >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

std::string bytes_of(const std::vector<double> &betas) {
  return std::string(reinterpret_cast<const char *>(betas.data()), betas.size() * sizeof(double));
}

std::string betas_text(const std::vector<double> &betas) {
  const std::string raw = bytes_of(betas);
  return "betas1 " + std::to_string(betas.size()) + " " + hexadecimal(crc32(raw.data(), raw.size())) + " " + base64(raw);
}

void defaults() {
  const Spec spec = parsed(R"({"shape":[3,32,64]})");
  CHECK(spec.channels == 3 && spec.height == 32 && spec.width == 64 && spec.elements() == 6144);
  CHECK(spec.timesteps == 1000 && spec.schedule.size() == 1000 && spec.schedule_name == "linear");
  CHECK(spec.schedule_params == (std::map<std::string, double>{{"beta_start", 1e-4}, {"beta_end", 0.02}}));
  CHECK(spec.prediction == Prediction::eps && spec.variance == Variance::fixed_large && spec.clip == 1.0);
  CHECK(spec.precision == "fp32" && !spec.weights && spec.ddpmx.empty() && spec.betas.empty());
  CHECK(!spec.classes && !spec.condition && !spec.self_condition);
  CHECK(spec.inputs().size() == 2 && spec.outputs() == std::vector<std::string>{"eps"});
}

void everything_set() {
  const Spec spec = parsed(small(R"("schedule":"cosine","schedule_params":{"s":1},"prediction":"v",
    "variance":"learned_range","clip":null,"precision":"bf16","ddpmx":"0.1.0+überall","classes":10,"condition":2,
    "self_condition":true,"weights":")" + std::string(64, 'a') + "\""));
  CHECK(spec.schedule_params == (std::map<std::string, double>{{"s", 1.0}, {"beta_max", 0.999}}));
  CHECK(spec.prediction == Prediction::v && spec.variance == Variance::learned_range && !spec.clip);
  CHECK(spec.precision == "bf16" && spec.weights == std::string(64, 'a') && spec.ddpmx == "0.1.0+überall");
  CHECK(spec.outputs() == (std::vector<std::string>{"v", "var"}));
  const std::vector<Input> inputs = spec.inputs();
  CHECK(inputs.size() == 5);
  CHECK(inputs[0].name == "x" && !inputs[0].is_int && inputs[0].dims == (std::vector<int64_t>{1, 4, 4}));
  CHECK(inputs[1].name == "t" && inputs[1].is_int && inputs[1].dims.empty());
  CHECK(inputs[2].name == "y" && inputs[2].is_int && inputs[2].dims.empty());
  CHECK(inputs[3].name == "x0_prev" && !inputs[3].is_int && inputs[3].dims == inputs[0].dims);
  CHECK(inputs[4].name == "cond" && !inputs[4].is_int && inputs[4].dims == (std::vector<int64_t>{2, 4, 4}));
}

void names() {
  CHECK(name_of(Prediction::eps) == "eps" && name_of(Prediction::x0) == "x0" && name_of(Prediction::v) == "v");
  for (const Variance variance : {Variance::fixed_small, Variance::fixed_large, Variance::learned_range,
                                  Variance::learned}) {
    CHECK(variance_named(name_of(variance)) == variance);
  }
  CHECK(!variance_named("learnt") && !variance_named(""));
}

void sizes_that_no_image_has() {
  CHECK(refused("[C, H, W]", R"({"shape":[1,4]})"));
  CHECK(refused("[C, H, W]", R"({"shape":[1,4,4.0]})"));
  CHECK(refused("[C, H, W]", R"({"shape":[1,true,4]})"));
  CHECK(refused("[C, H, W]", R"({"shape":[1,0,4]})"));
  CHECK(refused("the spec has no shape of an image", "{}"));
  // products that wrap around in 64 bits: 2⁶⁴ is 0, and 2⁶² + 1 times 4 is 4
  CHECK(refused("268435456 numbers", R"({"shape":[4294967296,4294967296,1]})"));
  CHECK(refused("268435456 numbers", R"({"shape":[4611686018427387905,4,1]})"));
  CHECK(refused("268435456 numbers", R"({"shape":[268435456,2,1]})"));
  CHECK(refused("condition 4096 is more", R"({"shape":[1,16384,1024],"condition":4096})"));
  CHECK(parsed(R"({"shape":[16,16384,1024],"timesteps":1})").elements() == 1 << 28);
}

void unknown_fields() {
  CHECK(refused("does not know: 'thresholding'\nNote: it was written by ddpmx '7.0'",
                small(R"("thresholding":1,"ddpmx":"7.0")")));
  CHECK(refused("of an unstated version", small(R"("_schedule":1,"ddpmx":5)")));
  CHECK(refused("'a\\x1b[2J'", small("\"a\\u001b[2J\":1")));  // escaped for the terminal
  CHECK(refused("must be a JSON object", "[1]"));
}

void free_betas() {
  const std::vector<double> betas = {0.25, 1e-4, 0.5}, others = {0.25, 1e-4, 0.75};
  const std::string text = betas_text(betas), crc = text.substr(9, 8);
  const std::string model = R"({"shape":[1,4,4],"timesteps":3,"schedule":"betas")";
  CHECK(betas_from_text(text) == betas);
  const Spec spec = parsed(model + R"(,"betas":")" + crc + "\"}", &betas);
  CHECK(spec.betas == betas && spec.schedule.betas == betas && spec.schedule_params.empty() && spec.timesteps == 3);
  CHECK(same_model(spec, parsed(model + R"(,"betas":[0.25,1e-4,0.5]})")));
  CHECK(same_model(spec, parsed(model + "}", &betas)));
  CHECK(!same_model(spec, parsed(model + "}", &others)));
  CHECK(refused("in the sidecar does not match the spec", model + R"(,"betas":")" + crc + "\"}", &others));
  CHECK(refused("it should be in the sidecar", model + R"(,"betas":")" + crc + "\"}"));
  CHECK(refused("it should be in the sidecar", model + "}"));
  CHECK(refused("there are 3 β, and timesteps is 1000", R"({"shape":[1,4,4],"schedule":"betas"})", &betas));
  CHECK(refused("and this is 'linear'", small(R"("betas":[0.5])")));
  CHECK(refused("has no parameters", model + R"(,"schedule_params":{"s":1}})", &betas));
  CHECK(refused("array of numbers", model + R"(,"betas":[0.25,true,0.5]})"));
  CHECK(refused("(0, 1]", model + R"(,"betas":[0.25,0,0.5]})"));
  CHECK(parsed(R"({"shape":[1,4,4]})", &betas).betas.empty());  // not needed, not read
}

void texts_of_betas() {
  const std::string good = betas_text({0.25, 1e-4, 0.5});
  for (size_t size = 0; size < good.size(); ++size) {
    CHECK(fails(DDPMX_SPEC, "the array of β is damaged", [&] { betas_from_text(good.substr(0, size)); }));
  }
  for (size_t at = 0; at < good.size(); ++at) {
    std::string changed = good;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    CHECK(fails(DDPMX_SPEC, "the array of β is damaged", [&] { betas_from_text(changed); }));
  }
  for (const std::string more : {" ", "===", "A", "\n"}) {
    CHECK(fails(DDPMX_SPEC, "damaged", [&] { betas_from_text(good + more); }));
  }
  CHECK(fails(DDPMX_SPEC, "damaged", [] { betas_from_text("betas1 99999 00000000 "); }));
  CHECK(fails(DDPMX_SPEC, "damaged", [] { betas_from_text("betas1 18446744073709551617 00000000 AAAAAAAAAAA="); }));
  CHECK(fails(DDPMX_SPEC, "the array of β: betas must be 1…16384", [] { betas_from_text(betas_text({})); }));
  CHECK(fails(DDPMX_SPEC, "the array of β: β_t must lie in (0, 1]", [] { betas_from_text(betas_text({0.5, 1.5})); }));
  CHECK(betas_from_text(betas_text(std::vector<double>(1 << 14, 0.5))).size() == 1 << 14);
  CHECK(fails(DDPMX_SPEC, "16385", [] { betas_from_text(betas_text(std::vector<double>((1 << 14) + 1, 0.5))); }));
}

void no_class() {
  const Spec spec = parsed(R"({"shape":[1,4,4],"classes":3,"null_class":true})");
  CHECK(spec.null_class && spec.label_count() == 4);
  CHECK(parsed(R"({"shape":[1,4,4],"classes":3,"null_class":false})").label_count() == 3);
  CHECK(parsed(R"({"shape":[1,4,4]})").label_count() == 0);
  CHECK(!same_model(spec, parsed(R"({"shape":[1,4,4],"classes":3})")));
  CHECK(refused("null_class is for networks with classes", small(R"("null_class":true)")));
  CHECK(refused("null_class is for networks with classes", small(R"("null_class":true,"classes":null)")));
  CHECK(refused("null_class must be true or false, not 1", small(R"("classes":3,"null_class":1)")));
}

void the_same_model() {
  const Spec spec = parsed(R"({"shape":[1,4,4],"clip":1})");
  CHECK(same_model(spec, parsed(R"({"shape":[1,4,4],"schedule_params":{"beta_end":0.02},"clip":1.0})")));
  CHECK(same_model(spec, parsed(R"({"shape":[1,4,4],"ddpmx":"9","weights":")" + std::string(64, '0') + "\"}")));
  for (const char *change :
       {R"("timesteps":999)", R"("schedule":"quad")", R"("schedule_params":{"beta_end":0.03})", R"("prediction":"v")",
        R"("variance":"fixed_small")", R"("clip":null)", R"("clip":0.5)", R"("precision":"fp16")", R"("classes":2)",
        R"("condition":1)", R"("self_condition":true)", R"("classes":2,"null_class":true)"}) {
    CHECK(!same_model(spec, parsed(R"({"shape":[1,4,4],)" + std::string(change) + "}")));
  }
  CHECK(!same_model(spec, parsed(R"({"shape":[1,4,5]})")) && !same_model(spec, parsed(R"({"shape":[1,5,4]})")));
}

void texts() {
  const std::string text = ddpmx_test::envelope("ddpmx1", R"({"shape":[1,4,4],"timesteps":10})");
  CHECK(spec_from_text(text, nullptr, "there").timesteps == 10);
  CHECK(fails(DDPMX_SPEC, "not a ddpmx spec", [] { spec_from_text("main_graph", nullptr, "there"); }));
  CHECK(fails(DDPMX_SPEC, "damaged", [&] { spec_from_text(text.substr(0, text.size() - 1), nullptr, "there"); }));
  CHECK(refused("gives other coefficients here", small(R"("coefficients":"00000000")")));
  CHECK(refused("gives other coefficients here", small(R"("coefficients":0)")));
}

}  // namespace

int main() {
  defaults();
  everything_set();
  names();
  sizes_that_no_image_has();
  unknown_fields();
  free_betas();
  texts_of_betas();
  no_class();
  the_same_model();
  texts();
  return ddpmx_test::finish();
}
