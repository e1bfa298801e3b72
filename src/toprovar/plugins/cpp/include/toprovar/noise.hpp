// What a seed means: the noise of profiles/noise.py, bit by bit. Value i of scale s depends on (seed, s, i) alone.
// For the C++ runtime, and through the plugin library for the Python runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace toprovar {

// Tokens `begin` to `end` of the noise of one scale, in the open interval (0, 1). `out` is that of the whole scale,
// [N, B, V]: picture b has the values of seeds[b] in the order [N, V].
void scaleNoise(uint64_t const* seeds, size_t images, uint32_t scale, size_t begin, size_t end, size_t logits,
                float* out) noexcept;

}  // namespace toprovar
