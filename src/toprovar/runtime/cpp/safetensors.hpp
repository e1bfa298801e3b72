// Reads safetensors files. Nothing in one is trusted: sizes and offsets are checked before they are used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "dtype.hpp"

namespace toprovar::runtime {

struct HostTensor {
    DType type = DType::kFLOAT32;
    Shape shape;
    std::vector<uint8_t> bytes;

    size_t count() const noexcept { return static_cast<size_t>(volume(shape)); }

    // Of a floating-point tensor; throws Error for another type.
    std::vector<float> floats() const;

    // Of an int32 or int64 tensor; throws Error for another type.
    std::vector<int64_t> integers() const;
};

// Every tensor of a file. Throws Error where it is no safetensors file; types that no bundle holds are errors too.
std::map<std::string, HostTensor> readSafetensors(std::filesystem::path const& path);

}  // namespace toprovar::runtime
