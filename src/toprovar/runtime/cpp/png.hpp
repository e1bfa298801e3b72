// Writes 8-bit RGB pictures; zlib does the compression.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace toprovar::runtime {

// [3, height, width] in [0, 1] -> [height, width, 3] bytes, rounded to nearest.
std::vector<uint8_t> toBytes(float const* image, int64_t height, int64_t width);

// `pixels` is [height, width, 3]. The file appears whole or not at all. Throws Error where it cannot be written.
void writePng(std::filesystem::path const& path, uint8_t const* pixels, int64_t height, int64_t width);

}  // namespace toprovar::runtime
