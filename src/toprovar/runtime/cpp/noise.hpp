// What a seed means: the noise of profiles/noise.py, bit by bit. Value i of scale s depends on (seed, s, i) alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <future>
#include <thread>
#include <vector>

namespace toprovar::runtime {

// The first `count` values of one scale of one picture, in the open interval (0, 1): runs of `run` values that begin at
// out[0], out[stride], out[2 * stride], ...
void uniform(uint64_t seed, uint32_t scale, size_t count, size_t run, size_t stride, float* out) noexcept;

// Noise of one scale of a batch, [N, B, V]: picture b has the values of its own seed in the order [N, V].
void scaleNoise(std::vector<uint64_t> const& seeds, uint32_t scale, size_t tokens, size_t logits, float* out) noexcept;

// Noise of several scales, drawn in order by a thread of its own, while the device runs the scales before. What it is
// given has to live as long as it does.
class NoiseAhead {
public:
    struct Piece {
        uint32_t scale = 0;
        size_t tokens = 0;
        float* out = nullptr;
    };

    NoiseAhead(std::vector<uint64_t> const& seeds, size_t logits, std::vector<Piece> pieces);
    ~NoiseAhead();
    NoiseAhead(NoiseAhead const&) = delete;
    NoiseAhead& operator=(NoiseAhead const&) = delete;

    // Until piece `i` is there; its values.
    float const* wait(size_t i);

private:
    std::vector<Piece> pieces_;
    std::vector<std::promise<void>> drawn_;
    std::vector<std::future<void>> waits_;
    std::thread thread_;
};

}  // namespace toprovar::runtime
