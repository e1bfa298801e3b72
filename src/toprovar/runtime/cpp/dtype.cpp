#include "dtype.hpp"

#include <cmath>
#include <cstring>

#include "error.hpp"

namespace toprovar::runtime {

namespace {

struct Named {
    DType type;
    char const* name;
    size_t size;
};
constexpr Named kTYPES[] = {{DType::kFLOAT32, "float32", 4},   {DType::kFLOAT16, "float16", 2},
                            {DType::kBFLOAT16, "bfloat16", 2}, {DType::kINT32, "int32", 4},
                            {DType::kINT64, "int64", 8},       {DType::kBOOL, "bool", 1}};

uint32_t bitsOf(float value) noexcept {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

float floatOf(uint32_t bits) noexcept {
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

uint16_t toBfloat16(float value) noexcept {
    uint32_t const bits = bitsOf(value);
    if (std::isnan(value)) {
        return static_cast<uint16_t>(bits >> 16 | 0x40);
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t toFloat16(float value) noexcept {
    uint32_t const bits = bitsOf(value);
    auto const sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (std::isnan(value)) {
        return sign | 0x7e00;
    }
    float const magnitude = std::fabs(value);
    if (magnitude >= 65520.F) {
        return sign | 0x7c00;
    }
    if (magnitude < 0x1p-14F) {  // subnormal: a multiple of 2^-24; nearbyint rounds ties to even
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24F)));
    }
    uint32_t const rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112U << 10)));
}

float fromFloat16(uint16_t half) noexcept {
    uint32_t const sign = uint32_t{half} << 16 & 0x80000000;
    uint32_t const exponent = half >> 10 & 31;
    uint32_t const fraction = half & 0x3ff;
    if (exponent == 0) {
        float const value = static_cast<float>(fraction) * 0x1p-24F;
        return sign != 0 ? -value : value;
    }
    uint32_t const wide = exponent == 31 ? 255 : exponent + 112;
    return floatOf(sign | wide << 23 | fraction << 13);
}

[[noreturn]] void noFloat(DType type) {
    throw Error(text("a tensor is ", nameOf(type), " where float32, float16 or bfloat16 is valid; export again"));
}

}  // namespace

size_t sizeOf(DType type) noexcept {
    for (Named const& one : kTYPES) {
        if (one.type == type) {
            return one.size;
        }
    }
    return 0;
}

char const* nameOf(DType type) noexcept {
    for (Named const& one : kTYPES) {
        if (one.type == type) {
            return one.name;
        }
    }
    return "?";
}

DType dtypeOf(std::string const& name) {
    for (Named const& one : kTYPES) {
        if (name == one.name) {
            return one.type;
        }
    }
    throw Error(text("element type '", name, "'; valid are float32, float16, bfloat16, int32, int64 and bool"));
}

int64_t volume(Shape const& shape) noexcept {
    int64_t product = 1;
    for (int64_t const size : shape) {
        product *= size;
    }
    return product;
}

std::string describe(Shape const& shape) {
    std::string words = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        words += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return words + "]";
}

void fromFloat(float const* values, size_t count, DType type, void* out) {
    if (type == DType::kFLOAT32) {
        std::memcpy(out, values, count * sizeof(float));
        return;
    }
    if (type != DType::kFLOAT16 && type != DType::kBFLOAT16) {
        noFloat(type);
    }
    auto* const halves = static_cast<uint16_t*>(out);
    for (size_t i = 0; i < count; ++i) {
        halves[i] = type == DType::kFLOAT16 ? toFloat16(values[i]) : toBfloat16(values[i]);
    }
}

void toFloat(void const* values, size_t count, DType type, float* out) {
    if (type == DType::kFLOAT32) {
        std::memcpy(out, values, count * sizeof(float));
        return;
    }
    if (type != DType::kFLOAT16 && type != DType::kBFLOAT16) {
        noFloat(type);
    }
    auto const* const halves = static_cast<uint16_t const*>(values);
    for (size_t i = 0; i < count; ++i) {
        out[i] = type == DType::kFLOAT16 ? fromFloat16(halves[i]) : floatOf(uint32_t{halves[i]} << 16);
    }
}

}  // namespace toprovar::runtime
