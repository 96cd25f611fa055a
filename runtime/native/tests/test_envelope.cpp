// Envelopes, their checksums, and base64.
#include "envelope.hpp"

#include "check.hpp"
#include "sample_files.hpp"

namespace {

using ddpmx::EnvelopeSearch;
using ddpmx::unwrap;
using ddpmx_test::fails;
using ddpmx_test::envelope;

std::vector<std::string> all(const std::string &data, size_t budget = 1000) {
  std::vector<std::string> found;
  EnvelopeSearch texts("p1", data, budget);
  while (const auto text = texts.next()) found.emplace_back(*text);
  return found;
}

void checksums() {
  CHECK(ddpmx::crc32("123456789", 9) == 0xCBF43926);  // the check value of this CRC in every catalogue
  CHECK(ddpmx::crc32("", 0) == 0);
}

void unwrapping() {
  CHECK(*unwrap("p1", envelope("p1", R"({"a":1})")).get("a") == ddpmx::Json{int64_t{1}});
  for (const char *text : {"", "p1", "p1 ", "p1 2", "p1 2 00000000", "p2 2 00000000 {}", "xp1 2 00000000 {}",
                           "p1 12345 00000000 {}", "p1 -2 00000000 {}", "p1 2 0000000g {}", "p1 2 0000000A {}",
                           "p1  2 00000000 {}", "p1 2 000000000 {}", "P1 2 00000000 {}"}) {
    CHECK(fails(DDPMX_SPEC, "the text is not a ddpmx spec\nNote: it begins with ", [&] { unwrap("p1", text); }));
  }
  CHECK(fails(DDPMX_SPEC, "Note: it begins with '<html>\\xff'", [] { unwrap("p1", "<html>\xFF"); }));
  const std::string good = envelope("p1", R"({"a":1})"), damaged = "the ddpmx spec in the file is damaged";
  CHECK(fails(DDPMX_SPEC, damaged + "\nNote: 6 bytes where it says 7, or another CRC\nHint: export the model again",
              [&] { unwrap("p1", good.substr(0, good.size() - 1)); }));
  CHECK(fails(DDPMX_SPEC, damaged, [&] { unwrap("p1", good + " "); }));
  std::string changed = good;
  changed.back() ^= 1;
  CHECK(fails(DDPMX_SPEC, damaged, [&] { unwrap("p1", changed); }));
  CHECK(fails(DDPMX_SPEC, damaged, [] { unwrap("p1", envelope("p1", "{\"a\":\"\xFF\"}")); }));
  CHECK(fails(DDPMX_SPEC, damaged, [] { unwrap("p1", envelope("p1", "{\"a\":\"\xED\xA0\x80\"}")); }));
  CHECK(fails(DDPMX_SPEC, "not valid JSON", [] { unwrap("p1", envelope("p1", "{")); }));
}

void searching() {
  const std::string a = envelope("p1", "{}"), b = envelope("p1", R"({"a":"p1 "})");
  CHECK(all("").empty() && all("p1").empty() && all("p1 ").empty() && all("p1 2 00000000 {}").empty());
  CHECK((all(a) == std::vector{a}) && (all("xx" + a + "yy" + b + "p1 ") == std::vector{a, b}));
  CHECK((all("p1 9999 00000000 " + a) == std::vector{a}));  // a false start does not hide the next one
  CHECK((all("p1 p1 2 p1 2 00000000" + a) == std::vector{a}));
  CHECK(all(a.substr(0, a.size() - 1)).empty());
  const std::string inner = envelope("p1", "[]"), outer = envelope("p1", "\"" + inner + "\"");
  CHECK((all(outer) == std::vector{outer, inner}));
  std::string zeros(1000, '\0');
  CHECK((all(zeros + a + zeros) == std::vector{a}));
  CHECK((all(a + a + a, 2) == std::vector{a, a}) && all(a, 0).empty());
}

void base64() {
  const auto decoded = [](const char *text) { return ddpmx::base64_decode(text); };
  // RFC 4648, section 10
  CHECK(decoded("").empty() && decoded("Zg==") == "f" && decoded("Zm8=") == "fo" && decoded("Zm9v") == "foo");
  CHECK(decoded("Zm9vYg==") == "foob" && decoded("Zm9vYmE=") == "fooba" && decoded("Zm9vYmFy") == "foobar");
  CHECK(decoded("+/+/") == "\xFB\xFF\xBF");
  CHECK(decoded("Zm9v==") == "foo" && decoded("Zm8==") == "fo");  // as in Python
  for (const char *text : {"Z", "Zg", "Zg=", "Zm8", "Zm9vY===", "Zg==Zg==", "Zm 9v", "Zm9v\n", "Zm-_", "Zm9v==="}) {
    CHECK(fails(DDPMX_SPEC, "not base64", [&] { decoded(text); }));
  }
}

}  // namespace

int main() {
  checksums();
  unwrapping();
  searching();
  base64();
  return ddpmx_test::finish();
}
