// Element types of the tensors that a loop binds, by the names of a manifest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace toprovar::runtime {

enum class DType { kFLOAT32, kFLOAT16, kBFLOAT16, kINT32, kINT64, kBOOL };

size_t sizeOf(DType type) noexcept;
char const* nameOf(DType type) noexcept;

// Throws Error for a name that a manifest may not have.
DType dtypeOf(std::string const& name);

using Shape = std::vector<int64_t>;

int64_t volume(Shape const& shape) noexcept;

// Such as [2, 3, 4].
std::string describe(Shape const& shape);

// Rounds to nearest, ties to even; throws Error where `type` is no floating-point type.
void fromFloat(float const* values, size_t count, DType type, void* out);
void toFloat(void const* values, size_t count, DType type, float* out);

}  // namespace toprovar::runtime
