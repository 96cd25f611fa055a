#include "trt_cache.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

namespace ddpmx::cuda {

namespace {

// Without a locale: letters and digits as they are, all others as a hyphen.
std::string plain(const std::string &text, bool hyphens) {
  std::string made;
  for (const char c : text) {
    const bool upper = c >= 'A' && c <= 'Z', kept = upper || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
    made += upper ? static_cast<char>(c - 'A' + 'a') : kept || !hyphens ? c : '-';
  }
  return made;
}

bool write_all(int file, const char *data, size_t size) {
  while (size > 0) {
    const ssize_t written = write(file, data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    data += written, size -= static_cast<size_t>(written);
  }
  return fsync(file) == 0;
}

}  // namespace

std::string cache_file(const std::string &folder, const std::string &flavour, const std::string &version,
                       const std::string &gpu, const std::string &key) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (!std::filesystem::is_directory(folder, error)) return "";
  const std::string name = plain(flavour + "-" + version, false) + "-" + plain(gpu, true) + "-" + key.substr(0, 16);
  return (std::filesystem::path(folder) / (name + ".runtime")).string();
}

std::string file_content(const std::string &path) noexcept {
  try {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  } catch (const std::exception &) {
    return "";
  }
}

void replace_content(const std::string &path, const void *data, size_t size) noexcept {
  try {
    if (file_content(path) == std::string(static_cast<const char *>(data), size)) return;
    std::string part = path + ".XXXXXX";
    const int file = mkstemp(part.data());
    if (file < 0) return;
    const bool written = write_all(file, static_cast<const char *>(data), size);
    if (close(file) != 0 || !written || rename(part.c_str(), path.c_str()) != 0) unlink(part.c_str());
  } catch (const std::exception &) {
  }
}

}  // namespace ddpmx::cuda
