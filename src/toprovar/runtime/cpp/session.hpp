// Asks a bundle for pictures, replays its golden trace, and measures it: what toprovar_run does, on any target.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "loop.hpp"

namespace toprovar::runtime {

// The number of a label given by name or number; throws Error where the bundle has no such label.
int64_t labelNumber(Bundle const& bundle, std::string const& label);

// One prompt class of the golden trace against what came out.
struct ClassVerdict {
    std::string promptClass;
    size_t images = 0;
    std::vector<std::pair<int64_t, size_t>> wrongTokens;  // scale, how many
    double imageError = 0;                                // largest difference of a pixel in [0, 1]
    double tolerance = 0;

    std::optional<int64_t> firstWrongScale() const noexcept;
    bool passed() const noexcept;
    std::string line() const;
};

// Largest difference of a pixel between two targets in fp32 (runtime/verify.py: IMAGE_TOLERANCE).
inline constexpr double kIMAGE_TOLERANCE = 1e-3;

std::vector<ClassVerdict> verify(Bundle const& bundle, Loop& loop, double tolerance);

// The document of runtime/bench.py: same schema, same keys. Throws Error where the bundle fails its golden trace.
nlohmann::ordered_json bench(Bundle const& bundle, Loop& loop, std::string const& target,
                             std::string const& description, int64_t repeat, int64_t warmup, double tolerance);

}  // namespace toprovar::runtime
