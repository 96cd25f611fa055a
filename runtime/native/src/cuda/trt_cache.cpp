#include "trt_cache.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string_view>
#include <system_error>

namespace ddpmx::cuda {

namespace {

// In lower case; with `hyphens`, all characters but letters and digits become hyphens. Independent of the locale.
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
    std::string content;
    FILE *const file = std::fopen(path.c_str(), "rb");
    if (!file) return content;
    char part[1 << 14];
    while (const size_t count = std::fread(part, 1, sizeof part, file)) content.append(part, count);
    if (std::ferror(file)) content.clear();
    std::fclose(file);
    return content;
  } catch (const std::exception &) {
    return "";
  }
}

void replace_content(const std::string &path, const void *data, size_t size) noexcept {
  try {
    if (file_content(path) == std::string_view(static_cast<const char *>(data), size)) return;
    // not mkstemp, which makes files that nobody else may read
    const std::string part = path + "." + std::to_string(getpid()) + ".part";
    const int file = open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file < 0) return;
    const bool written = write_all(file, static_cast<const char *>(data), size);
    if (close(file) != 0 || !written || rename(part.c_str(), path.c_str()) != 0) unlink(part.c_str());
  } catch (const std::exception &) {
  }
}

}  // namespace ddpmx::cuda
