// JSON as Python's json module reads it, but without NaN, infinities and deep nesting; and error texts.
#include "json.hpp"

#include <clocale>
#include <cmath>
#include <limits>

#include "check.hpp"

namespace {

using ddpmx::Json;
using ddpmx::parse_json;
using ddpmx_test::fails;

void check_refused(const std::string &text, const std::string &why) {
  CHECK(fails(DDPMX_SPEC, "not valid JSON\nNote: " + why, [&] { parse_json(text); }));
}

void values() {
  CHECK(parse_json("null") == Json{});
  CHECK(parse_json(" true ") == Json{true});
  CHECK(parse_json("\t\r\nfalse\n") == Json{false});
  CHECK(parse_json("[]") == Json{Json::Array{}});
  CHECK(parse_json("{ }") == Json{Json::Object{}});
  const Json nested = parse_json(R"({"a": [1, {"b": null}], "": "x"})");
  CHECK(nested.get("a") && nested.get("a")->as<Json::Array>()->size() == 2);
  CHECK(*nested.get("") == Json{std::string("x")});
  CHECK(nested.get("b") == nullptr && Json{}.get("a") == nullptr);
  CHECK(*parse_json(R"({"a":1,"a":2})").get("a") == Json{int64_t{2}});
  CHECK(parse_json("\xEF\xBB\xBF[]") == Json{Json::Array{}});  // a byte order mark, as some editors write
  for (const char *text :
       {"",           " ",     "{",     "[",   "[1",    "[1,",  "[1,]",      "[,1]", "{\"a\"", "{\"a\":", "{\"a\":1",
        "{\"a\":1,}", "{a:1}", "{1:1}", "nul", "nulll", "True", "undefined", "'a'",  "[] []",  "1 2",     "\xEF\xBB"}) {
    check_refused(text, "");
  }
}

void numbers() {
  const auto whole = [](const char *text) { return *parse_json(text).as<int64_t>(); };
  CHECK(whole("0") == 0 && whole("-0") == 0 && whole("-17") == -17);
  CHECK(whole("9223372036854775807") == INT64_MAX && whole("-9223372036854775808") == INT64_MIN);
  const auto real = [](const std::string &text) { return *parse_json(text).as<double>(); };
  CHECK(real("9223372036854775808") == 0x1p63);
  CHECK(real("1.0") == 1 && real("1e2") == 100 && real("1E+2") == 100 && real("-2.5e-1") == -0.25);
  CHECK(real("0.1") == 0.1 && real("2.2250738585072011e-308") == 2.2250738585072011e-308);
  CHECK(real("1e-320") == 1e-320 && real("1.7976931348623157e308") == std::numeric_limits<double>::max());
  CHECK(std::signbit(real("-0.0")));
  // near zero is zero, as in Python; also with many digits
  for (const char *text : {"1e-400", "-1e-400", "1e-99999999999999999999", "0.1e-400"}) CHECK(real(text) == 0);
  CHECK(std::signbit(real("-1e-400")));
  CHECK(real("0." + std::string(400, '0') + "1") == 0);
  CHECK(real("0." + std::string(400, '0') + "1e401") == 1);
  CHECK(real("1" + std::string(400, '0') + "e-400") == 1);
  CHECK(real("0e999999999999999999999") == 0);
  check_refused("1e400", "a number that does not fit into a double");
  check_refused("-1e999", "a number that does not fit into a double");
  check_refused("1e99999999999999999999", "a number that does not fit into a double");
  check_refused(std::string(310, '9'), "a number that does not fit into a double");
  check_refused(std::string(4301, '0').replace(0, 1, "1"), "a whole number of more than 4300 digits");
  for (const char *text : {"NaN", "Infinity", "-Infinity", "-", "+1", "01", "1.", ".5", "1.e5", "1e", "1e+", "0x10",
                           "1_0", "--1", "1,5"}) {
    check_refused(text, "");
  }
}

void texts() {
  const auto text = [](const std::string &json) { return *parse_json(json).as<std::string>(); };
  CHECK(text(R"("")").empty());
  CHECK(text(R"("a\"\\\/\b\f\n\r\tb")") == "a\"\\/\b\f\n\r\tb");
  CHECK(text(R"("\u0041\u00e9\u20AC")") == "Aé€");
  CHECK(text(R"("\u0000")") == std::string(1, '\0'));
  CHECK(text(R"("\ud83d\ude00")") == "😀" && text("\"😀\"") == "😀");
  // half a pair: kept as Python keeps it, and so never equal to text
  CHECK(text(R"("\ud800")") == "\xED\xA0\x80" && text(R"("\udc00")") == "\xED\xB0\x80");
  CHECK(text(R"("\ud800\u0041")") == "\355\240\200A" && text(R"("\ud800\ud800")") == "\xED\xA0\x80\xED\xA0\x80");
  for (const char *json : {"\"", "\"a", "\"\\", "\"\\\"", R"("\x41")", R"("\u")", R"("\u12")", R"("\u12g4")",
                           R"("\u-123")", R"("\u 123")", R"("\ud800\u12")", "\"\n\"", "\"\t\"", "\"\x01\""}) {
    check_refused(json, "");
  }
  // not UTF-8: a lone byte, truncated, overlong, beyond U+10FFFF
  for (const char *bytes : {"\x80", "\xFF", "\xC3", "\xE2\x82", "\xF0\x9F\x98", "\xC0\x80", "\xE0\x80\x80",
                            "\xF0\x80\x80\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80"}) {
    check_refused("\"" + std::string(bytes) + "\"", "not UTF-8 at byte 1");
  }
  check_refused(std::string("\"\0\"", 3), "a control character at byte 1");
}

void depth() {
  const auto lists = [](size_t n, const std::string &inner) {
    return std::string(n, '[') + inner + std::string(n, ']');
  };
  CHECK(parse_json(lists(64, "")).as<Json::Array>());
  CHECK(parse_json(lists(63, "1")).as<Json::Array>());
  check_refused(lists(64, "1"), "nested deeper than 64");
  check_refused(lists(65, ""), "nested deeper than 64");
  check_refused(std::string(10'000'000, '['), "nested deeper than 64");
  std::string objects;
  for (int i = 0; i < 1'000'000; ++i) objects += "{\"a\":";
  check_refused(objects, "nested deeper than 64");
}

void locales() {
  // in a locale in which 1.5 is written 1,5, if there is one
  for (const char *name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "C"}) {
    if (std::setlocale(LC_ALL, name) == nullptr) continue;
    CHECK(*parse_json("1.5").as<double>() == 1.5);
    CHECK(ddpmx::shown(Json{1.5}) == "1.5");
  }
  std::setlocale(LC_ALL, "C");
}

void showing() {
  const auto again = [](const std::string &text) { return ddpmx::shown(parse_json(text)); };
  CHECK(again(R"({ "b" : [1, -2.5, 1.0, 1e300, true, false, null], "a": {} , "c": [] })") ==
        R"({"a":{},"b":[1,-2.5,1.0,1e+300,true,false,null],"c":[]})");
  CHECK(again("\"é\\n\\\"\\\\\xF0\x9F\x98\x80\\ud800\"") == R"("\u00e9\u000a\"\\\ud83d\ude00\ud800")");
  const std::string many =
      ddpmx::shown(parse_json("[" + std::string(100'000, ' ') + "\"" + std::string(1000, 'x') + "\"]"));
  CHECK(many.size() == 200);
}

void errors() {
  using ddpmx::Failure;
  CHECK(std::string(Failure(DDPMX_INPUT, "fact").what()) == "fact");
  CHECK(std::string(Failure(DDPMX_INPUT, "fact", "", "hint").what()) == "fact\nHint: hint");
  const Failure located = at("file", Failure(DDPMX_SPEC, "fact", "note", "hint"));
  CHECK(located.status == DDPMX_SPEC && std::string(located.what()) == "file: fact\nNote: note\nHint: hint");
  CHECK(Failure(DDPMX_INPUT, std::string(600, 'x')).fact == std::string(600, 'x'));
  // the beginning and the end, without cutting a character
  for (size_t n = 600; n < 606; ++n) {
    std::string text(n % 3, 'a');
    while (text.size() < 3 * n) text += "€";
    const std::string fact = Failure(DDPMX_INPUT, text).fact;
    CHECK(fact.size() <= 602 && fact.size() >= 590);
    CHECK(parse_json('"' + fact + '"').as<std::string>());
  }
  CHECK(ddpmx::in_quotes("plain é €") == "'plain é €'");
  CHECK(ddpmx::in_quotes("it's") == "\"it's\"" && ddpmx::in_quotes("\"") == "'\"'" && ddpmx::in_quotes("'\"") == "'\\'\"'");
  CHECK(ddpmx::in_quotes(std::string("\0\n\xFF\x7F\\", 5)) == R"('\x00\x0a\xff\x7f\\')");
  CHECK(ddpmx::in_quotes("a\u202E\uFEFF") ==
        R"('a\xe2\x80\xae\xef\xbb\xbf')");  // a right-to-left override, and an invisible character
  CHECK(ddpmx::in_quotes("€€", 4) == "'€'" && ddpmx::in_quotes("abc", 0) == "''");
  CHECK(ddpmx::printable("") && ddpmx::printable("linux x86_64 é 模型 😀"));
  for (const char *text :
       {"a\n", "\t", "\x7F", "\xC2\xA0", "\u200B", "\u2028", "\xED\xA0\x80", "\xFF", "\uE000", "\xC3"}) {
    CHECK(!ddpmx::printable(text));
  }
}

}  // namespace

int main() {
  values();
  numbers();
  texts();
  depth();
  locales();
  showing();
  errors();
  return ddpmx_test::finish();
}
