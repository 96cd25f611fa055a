// Files in which TensorRT-RTX keeps what it has compiled. That fails without a word: it is only slower then.
#pragma once

#include <cstddef>
#include <string>

namespace ddpmx::cuda {

// The file in a folder, which is made if it is missing, for one version, one GPU and one plan; empty: it cannot be.
std::string cache_file(const std::string &folder, const std::string &flavour, const std::string &version,
                       const std::string &gpu, const std::string &key);

// What stands in a file, or nothing.
std::string file_content(const std::string &path) noexcept;

// Replace the file's content, if it is another, by one rename, so that nobody ever sees a part.
void replace_content(const std::string &path, const void *data, size_t size) noexcept;

}  // namespace ddpmx::cuda
