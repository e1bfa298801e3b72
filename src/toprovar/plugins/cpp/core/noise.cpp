#include "toprovar/noise.hpp"

#include <algorithm>
#include <array>

namespace toprovar {

namespace {

constexpr size_t kBLOCKS = 64;  // side by side, so that the compiler uses vector instructions: twice as fast as one
using Words = std::array<uint32_t, kBLOCKS>;

// Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in place.
void philox4x32(Words& c0, Words& c1, Words& c2, Words& c3, uint32_t k0, uint32_t k1) noexcept {
    for (int round = 0; round < 10; ++round) {
        for (size_t i = 0; i < kBLOCKS; ++i) {
            uint64_t const product0 = uint64_t{c0[i]} * 0xD2511F53U;
            uint64_t const product1 = uint64_t{c2[i]} * 0xCD9E8D57U;
            c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(product1);
            c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(product0);
        }
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
}

// Nine bits are dropped: with 24 kept, the largest value would round to 1, whose Gumbel noise is infinite. By way of a
// signed integer, which every processor converts in one instruction.
float uniformOf(uint32_t word) noexcept {
    return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5F) * 0x1p-23F;
}

// Values `begin` to `end` of one picture: runs of `run` values that begin at out[0], out[stride], out[2 * stride], ...
void uniform(uint64_t seed, uint32_t scale, size_t begin, size_t end, size_t run, size_t stride, float* out) noexcept {
    std::array<float, 4 * kBLOCKS> values;
    for (size_t first = begin - begin % values.size(); first < end; first += values.size()) {
        Words c0, c1, c2{}, c3{};
        for (size_t i = 0; i < kBLOCKS; ++i) {
            c0[i] = static_cast<uint32_t>(first / 4 + i);
            c1[i] = scale;
        }
        philox4x32(c0, c1, c2, c3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        for (size_t i = 0; i < kBLOCKS; ++i) {
            values[4 * i] = uniformOf(c0[i]);
            values[4 * i + 1] = uniformOf(c1[i]);
            values[4 * i + 2] = uniformOf(c2[i]);
            values[4 * i + 3] = uniformOf(c3[i]);
        }
        for (size_t i = std::max(first, begin), last = std::min(first + values.size(), end); i < last;) {
            size_t const column = i % run;
            size_t const piece = std::min(run - column, last - i);
            std::copy_n(&values[i - first], piece, out + i / run * stride + column);
            i += piece;
        }
    }
}

}  // namespace

void scaleNoise(uint64_t const* seeds, size_t images, uint32_t scale, size_t begin, size_t end, size_t logits,
                float* out) noexcept {
    for (size_t image = 0; image < images; ++image) {
        uniform(seeds[image], scale, begin * logits, end * logits, logits, images * logits, out + image * logits);
    }
}

}  // namespace toprovar
