// Asks a bundle for pictures, replays its golden trace, and measures it: what toprovar_run does, on any target.
#pragma once

#include <cstdint>
#include <map>
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
    struct Count {
        size_t wrong = 0;
        size_t all = 0;
    };
    std::map<int64_t, Count> tokens;  // by scale
    double imageError = 0;            // largest difference of a pixel in [0, 1]
    double tolerance = 0;
    double mostFlips = 0;
    double margin = 0;  // the widest of a token, see Trace
    double widestMargin = 0;

    double flips() const noexcept;  // part of all tokens that differ
    bool passed() const noexcept;
    std::string line() const;  // as runtime/verify.py says it
};

// Replays the golden trace, each scale shown the golden tokens of those before it; as runtime/verify.py, with its
// limits. `tolerance`: largest difference of a pixel; none: that of the bundle's precision.
std::vector<ClassVerdict> verify(Bundle const& bundle, Loop& loop, std::optional<double> tolerance);

// The document of runtime/bench.py: same schema, same keys. Throws Error where the bundle fails its golden trace.
nlohmann::ordered_json bench(Bundle const& bundle, Loop& loop, std::string const& target,
                             std::string const& description, int64_t repeat, int64_t warmup,
                             std::optional<double> tolerance);

}  // namespace toprovar::runtime
