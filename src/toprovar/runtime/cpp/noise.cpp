#include "noise.hpp"

#include <utility>

namespace toprovar::runtime {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) noexcept {
    auto [c0, c1, c2, c3] = counter;
    auto [k0, k1] = key;
    for (int round = 0; round < 10; ++round) {
        uint64_t const product0 = uint64_t{c0} * 0xD2511F53U;
        uint64_t const product1 = uint64_t{c2} * 0xCD9E8D57U;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return {c0, c1, c2, c3};
}

void uniform(uint64_t seed, uint32_t scale, size_t count, size_t run, size_t stride, float* out) noexcept {
    std::array<uint32_t, 2> const key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    size_t row = 0;
    size_t column = 0;
    for (size_t i = 0; i < count; i += 4) {
        auto const words = philox4x32({static_cast<uint32_t>(i / 4), scale, 0, 0}, key);
        for (size_t j = 0; j < 4 && i + j < count; ++j) {
            // Nine bits are dropped: with 24 kept, the largest value would round to 1, whose Gumbel noise is infinite.
            out[row * stride + column] = (static_cast<float>(words[j] >> 9) + 0.5F) * 0x1p-23F;
            if (++column == run) {
                column = 0;
                ++row;
            }
        }
    }
}

void scaleNoise(std::vector<uint64_t> const& seeds, uint32_t scale, size_t tokens, size_t logits, float* out) noexcept {
    for (size_t image = 0; image < seeds.size(); ++image) {
        uniform(seeds[image], scale, tokens * logits, logits, seeds.size() * logits, out + image * logits);
    }
}

NoiseAhead::NoiseAhead(std::vector<uint64_t> const& seeds, size_t logits, std::vector<Piece> pieces)
    : pieces_(std::move(pieces)), drawn_(pieces_.size()), thread_([this, &seeds, logits] {
          for (size_t i = 0; i < pieces_.size(); ++i) {
              scaleNoise(seeds, pieces_[i].scale, pieces_[i].tokens, logits, pieces_[i].out);
              drawn_[i].set_value();
          }
      }) {}

NoiseAhead::~NoiseAhead() {
    thread_.join();
}

float const* NoiseAhead::wait(size_t i) {
    drawn_[i].get_future().wait();
    return pieces_[i].out;
}

}  // namespace toprovar::runtime
