// The one exception of the library, with the status that the C API returns for it.
#pragma once

#include <exception>
#include <string>
#include <string_view>

#include "ddpmx/ddpmx.h"

namespace ddpmx {

// A failure that the caller can do something about: a fact, what was seen, and what to do. Texts may contain text from a
// file: they are shortened here, and foreign bytes are made printable by in_quotes().
class Failure : public std::exception {
 public:
  Failure(ddpmx_status status, std::string fact, std::string note = "", std::string hint = "");

  // "fact\nNote: note\nHint: hint", without empty lines.
  const char *what() const noexcept override { return text_.c_str(); }

  const ddpmx_status status;
  const std::string fact, note, hint;

 private:
  std::string text_;
};

// The same failure with "where: " before its fact.
Failure at(const std::string &where, const Failure &failure);

// Foreign text in quotes, unprintable bytes as \xNN, and at most `most` bytes of it.
std::string in_quotes(std::string_view text, size_t most = 200);

// A word quoted for a shell, where a hint shows a command.
std::string shell_word(const std::string &word);

// Whether a text is UTF-8 without control and format characters, as str.isprintable() in Python.
bool printable(std::string_view text);

}  // namespace ddpmx
