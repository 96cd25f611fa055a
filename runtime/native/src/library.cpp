#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>

namespace ddpmx {

Library::Library(const std::string &what, const std::vector<Place> &places, const std::string &hint) {
  std::string tried;
  for (const Place &place : places) {
    handle_ = dlopen(place.name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle_) {
      name_ = place.name;
      return;
    }
    const char *why = dlerror();
    if (!tried.empty()) tried += "; ";
    tried += in_quotes(place.name) + (place.from.empty() ? "" : " (" + place.from + ")") + ": " + (why ? why : "no reason given");
  }
  throw Failure(DDPMX_BACKEND, "there is no " + what + " here", "tried " + tried, hint);
}

void *Library::find(const char *symbol) const { return dlsym(handle_, symbol); }

std::vector<Library::Place> places(const char *option, const char *option_name, const char *variable,
                                   const std::vector<std::string> &defaults) {
  if (option && *option) return {{option, std::string("option ") + option_name}};
  if (const char *value = secure_getenv(variable); value && *value) return {{value, std::string("$") + variable}};
  std::vector<Library::Place> found;
  for (const std::string &name : defaults) found.push_back({name, ""});
  return found;
}

}  // namespace ddpmx
