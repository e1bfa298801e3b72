#include "sha256.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "error.hpp"

namespace toprovar::runtime {

namespace {

constexpr uint32_t kROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr uint32_t rotate(uint32_t x, int n) noexcept {
    return x >> n | x << (32 - n);
}

}  // namespace

void Sha256::block(uint8_t const* data) noexcept {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
        w[i] = uint32_t{data[4 * i]} << 24 | uint32_t{data[4 * i + 1]} << 16 | uint32_t{data[4 * i + 2]} << 8 |
               uint32_t{data[4 * i + 3]};
    }
    for (int i = 16; i < 64; ++i) {
        uint32_t const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (int i = 0; i < 64; ++i) {
        uint32_t const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t const t1 = h + s1 + ((e & f) ^ (~e & g)) + kROUND[i] + w[i];
        uint32_t const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t const t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    uint32_t const sums[8] = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) {
        state_[i] += sums[i];
    }
}

void Sha256::update(void const* data, size_t size) noexcept {
    auto const* bytes = static_cast<uint8_t const*>(data);
    total_ += size;
    if (restSize_ > 0) {
        size_t const taken = std::min(size, rest_.size() - restSize_);
        std::memcpy(rest_.data() + restSize_, bytes, taken);
        restSize_ += taken;
        bytes += taken;
        size -= taken;
        if (restSize_ < rest_.size()) {
            return;
        }
        block(rest_.data());
        restSize_ = 0;
    }
    for (; size >= rest_.size(); bytes += rest_.size(), size -= rest_.size()) {
        block(bytes);
    }
    if (size > 0) {
        std::memcpy(rest_.data(), bytes, size);
        restSize_ = size;
    }
}

std::string Sha256::hexDigest() noexcept {
    uint64_t const bits = total_ * 8;
    uint8_t const end = 0x80;
    update(&end, 1);
    uint8_t const zero = 0;
    while (restSize_ != 56) {
        update(&zero, 1);
    }
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) {
        length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    }
    update(length, sizeof(length));
    std::string digest;
    for (uint32_t const word : state_) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            digest += "0123456789abcdef"[word >> shift & 15];
        }
    }
    return digest;
}

std::string sha256(void const* data, size_t size) {
    Sha256 hash;
    hash.update(data, size);
    return hash.hexDigest();
}

std::string sha256File(std::filesystem::path const& path) {
    std::ifstream file(path, std::ios::binary);
    Sha256 hash;
    std::vector<char> piece(1 << 20);
    while (file) {
        file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
        hash.update(piece.data(), static_cast<size_t>(file.gcount()));
    }
    if (!file.eof()) {
        throw Error(text(path.string(), ": cannot be read; check that it exists and may be read"));
    }
    return hash.hexDigest();
}

}  // namespace toprovar::runtime
