// Noise of the scales to come, drawn by threads while the device runs the scales before.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <future>
#include <thread>
#include <vector>

namespace toprovar::runtime {

// One picture's noise, drawn in order by threads of its own. What it is given has to live as long as it does.
class NoiseAhead {
public:
    struct Piece {
        uint32_t scale = 0;
        size_t tokens = 0;
        float* out = nullptr;  // [N, B, V]
    };

    NoiseAhead(std::vector<uint64_t> const& seeds, size_t logits, std::vector<Piece> pieces);
    ~NoiseAhead();
    NoiseAhead(NoiseAhead const&) = delete;
    NoiseAhead& operator=(NoiseAhead const&) = delete;

    // Until piece `i` is there; its values.
    float const* wait(size_t i);

private:
    struct Part {
        size_t piece = 0;
        size_t begin = 0;  // tokens
        size_t end = 0;
    };

    void draw() noexcept;

    std::vector<uint64_t> const& seeds_;
    size_t logits_;
    std::vector<Piece> pieces_;
    std::vector<Part> parts_;
    std::atomic<size_t> next_{0};            // part that nobody draws yet
    std::vector<std::atomic<size_t>> left_;  // parts of each piece that are not there
    std::vector<std::promise<void>> drawn_;
    std::vector<std::future<void>> waits_;
    std::vector<std::thread> threads_;
};

}  // namespace toprovar::runtime
