#include "png.hpp"

#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>

#include "error.hpp"

namespace toprovar::runtime {

namespace {

void putNumber(std::vector<uint8_t>& out, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) {
        out.push_back(static_cast<uint8_t>(value >> shift));
    }
}

void putChunk(std::vector<uint8_t>& out, char const* type, std::vector<uint8_t> const& content) {
    putNumber(out, static_cast<uint32_t>(content.size()));
    size_t const begin = out.size();
    out.insert(out.end(), type, type + 4);
    out.insert(out.end(), content.begin(), content.end());
    putNumber(out, static_cast<uint32_t>(crc32(0, out.data() + begin, static_cast<uInt>(out.size() - begin))));
}

}  // namespace

std::vector<uint8_t> toBytes(float const* image, int64_t height, int64_t width) {
    auto const plane = static_cast<size_t>(height * width);
    std::vector<uint8_t> pixels(3 * plane);
    for (size_t i = 0; i < plane; ++i) {
        for (size_t c = 0; c < 3; ++c) {
            float const value = std::clamp(image[c * plane + i], 0.F, 1.F);
            pixels[3 * i + c] = static_cast<uint8_t>(std::isnan(value) ? 0.F : value * 255.F + 0.5F);
        }
    }
    return pixels;
}

void writePng(std::filesystem::path const& path, uint8_t const* pixels, int64_t height, int64_t width) {
    auto const rowBytes = static_cast<size_t>(3 * width);
    std::vector<uint8_t> rows;
    rows.reserve(static_cast<size_t>(height) * (rowBytes + 1));
    for (int64_t y = 0; y < height; ++y) {
        rows.push_back(1);  // filter "Sub": differences to the pixel on the left
        uint8_t const* const row = pixels + static_cast<size_t>(y) * rowBytes;
        for (size_t i = 0; i < rowBytes; ++i) {
            rows.push_back(static_cast<uint8_t>(row[i] - (i < 3 ? 0 : row[i - 3])));
        }
    }
    std::vector<uint8_t> packed(compressBound(rows.size()));
    uLongf packedSize = packed.size();
    if (compress2(packed.data(), &packedSize, rows.data(), rows.size(), 6) != Z_OK) {
        throw Error(text(path.string(), ": zlib could not compress ", rows.size(), " bytes; free some memory"));
    }
    packed.resize(packedSize);

    std::vector<uint8_t> out{0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
    std::vector<uint8_t> header;
    putNumber(header, static_cast<uint32_t>(width));
    putNumber(header, static_cast<uint32_t>(height));
    header.insert(header.end(), {8, 2, 0, 0, 0});  // 8 bits, RGB, deflate, adaptive filters, not interlaced
    putChunk(out, "IHDR", header);
    putChunk(out, "IDAT", packed);
    putChunk(out, "IEND", {});

    std::filesystem::path const half = path.string() + ".part";
    std::ofstream file(half, std::ios::binary);
    file.write(reinterpret_cast<char const*>(out.data()), static_cast<std::streamsize>(out.size()));
    file.close();
    std::error_code failed;
    if (file) {
        std::filesystem::rename(half, path, failed);
    }
    if (!file || failed) {
        std::filesystem::remove(half, failed);
        throw Error(text(path.string(), ": cannot be written; choose a folder that exists and has room"));
    }
}

}  // namespace toprovar::runtime
