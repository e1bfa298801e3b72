// SHA-256 (FIPS 180-4), for the hashes of a manifest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace toprovar::runtime {

class Sha256 {
public:
    void update(void const* data, size_t size) noexcept;
    std::string hexDigest() noexcept;  // ends it

private:
    void block(uint8_t const* data) noexcept;

    std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> rest_{};
    size_t restSize_ = 0;
    uint64_t total_ = 0;
};

std::string sha256(void const* data, size_t size);

// Throws Error where the file cannot be read.
std::string sha256File(std::filesystem::path const& path);

}  // namespace toprovar::runtime
