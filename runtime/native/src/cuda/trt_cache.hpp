// Files in which TensorRT-RTX keeps what it has compiled. Failures are silent: the next start is only slower.
#pragma once

#include <cstddef>
#include <string>

namespace ddpmx::cuda {

// The path of the file for one version, one GPU and one plan; the folder is made if it is missing. Empty if that fails.
std::string cache_file(const std::string &folder, const std::string &flavour, const std::string &version,
                       const std::string &gpu, const std::string &key);

// The content of a file, or "".
std::string file_content(const std::string &path) noexcept;

// Replaces the file's content, if it is different, by one rename, so that nobody ever sees a part.
void replace_content(const std::string &path, const void *data, size_t size) noexcept;

}  // namespace ddpmx::cuda
