// Writes uint8 [height, width, channels] as a PNG in stored blocks: larger files, but no zlib.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

inline void put_big_endian(std::string &to, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) to += static_cast<char>(value >> shift & 0xFFu);
}

inline void put_chunk(std::string &to, const std::string &kind_and_data) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (const char byte : kind_and_data) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1u ? 0xEDB88320u : 0u);
  }
  put_big_endian(to, static_cast<std::uint32_t>(kind_and_data.size() - 4));
  to += kind_and_data;
  put_big_endian(to, ~crc);
}

// channels: 1 (grey), 3 (RGB) or 4 (RGBA). The file appears under its name once it is complete.
inline void write_png(const std::string &path, std::uint32_t width, std::uint32_t height, std::uint32_t channels,
                      const std::vector<std::uint8_t> &pixels) {
  std::string rows; // each after a byte for "no filter"
  const std::size_t pitch = std::size_t{width} * channels;
  for (std::size_t y = 0; y < height; ++y) {
    rows += '\0';
    rows.append(pixels.begin() + static_cast<std::ptrdiff_t>(y * pitch),
                pixels.begin() + static_cast<std::ptrdiff_t>((y + 1) * pitch));
  }
  std::string data = "IDAT\x78\x01";
  for (std::size_t at = 0; at < rows.size(); at += 65535) {
    const std::size_t size = std::min<std::size_t>(65535, rows.size() - at);
    const char low = static_cast<char>(size & 0xFFu), high = static_cast<char>(size >> 8);
    data += {static_cast<char>(at + size == rows.size()), low, high, static_cast<char>(~low), static_cast<char>(~high)};
    data.append(rows, at, size);
  }
  std::uint32_t a = 1, b = 0; // Adler-32
  for (const char byte : rows) {
    a = (a + static_cast<unsigned char>(byte)) % 65521;
    b = (b + a) % 65521;
  }
  put_big_endian(data, b << 16 | a);

  std::string header = "IHDR", file = "\x89PNG\r\n\x1A\n";
  put_big_endian(header, width);
  put_big_endian(header, height);
  header += {8, static_cast<char>(channels == 1 ? 0 : channels == 3 ? 2 : 6), 0, 0, 0};
  put_chunk(file, header);
  put_chunk(file, data);
  put_chunk(file, "IEND");

  const std::string part = path + ".part";
  std::FILE *stream = std::fopen(part.c_str(), "wb");
  const bool written = stream && std::fwrite(file.data(), 1, file.size(), stream) == file.size();
  if ((stream && std::fclose(stream) != 0) || !written || std::rename(part.c_str(), path.c_str()) != 0)
    throw std::runtime_error("cannot write " + path);
}
