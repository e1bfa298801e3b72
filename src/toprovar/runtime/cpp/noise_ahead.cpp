#include "noise_ahead.hpp"

#include <algorithm>
#include <utility>

#include "toprovar/noise.hpp"

namespace toprovar::runtime {

namespace {

constexpr size_t kPART = size_t{1} << 16;  // values: some 0.1 ms, so that the largest scale is drawn by all threads
constexpr size_t kTHREADS = 4;

}  // namespace

NoiseAhead::NoiseAhead(std::vector<uint64_t> const& seeds, size_t logits, std::vector<Piece> pieces)
    : seeds_(seeds), logits_(logits), pieces_(std::move(pieces)), left_(pieces_.size()), drawn_(pieces_.size()) {
    size_t const tokens = std::max<size_t>(1, kPART / std::max<size_t>(1, seeds.size() * logits));
    for (size_t i = 0; i < pieces_.size(); ++i) {
        for (size_t begin = 0; begin < pieces_[i].tokens; begin += tokens) {
            parts_.push_back({i, begin, std::min(begin + tokens, pieces_[i].tokens)});
            ++left_[i];
        }
        waits_.push_back(drawn_[i].get_future());
    }
    size_t const cores = std::max(1U, std::thread::hardware_concurrency());
    for (size_t i = 0; i < std::min({kTHREADS, cores, parts_.size()}); ++i) {
        threads_.emplace_back([this] { draw(); });
    }
}

NoiseAhead::~NoiseAhead() {
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

void NoiseAhead::draw() noexcept {
    for (size_t i = next_++; i < parts_.size(); i = next_++) {
        Part const& part = parts_[i];
        Piece const& piece = pieces_[part.piece];
        scaleNoise(seeds_.data(), seeds_.size(), piece.scale, part.begin, part.end, logits_, piece.out);
        if (--left_[part.piece] == 0) {
            drawn_[part.piece].set_value();
        }
    }
}

float const* NoiseAhead::wait(size_t i) {
    waits_[i].wait();
    return pieces_[i].out;
}

}  // namespace toprovar::runtime
