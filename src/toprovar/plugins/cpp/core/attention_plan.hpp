// How attention is dealt to a GPU: the arithmetic of kernels/tuning.py (`choose`) and kernels/hopper.py (`plan`).
// tests/plugins compares both with the Python originals.
#pragma once

#include <cstdint>

#include "core/kernel_table.hpp"

namespace toprovar {

struct AttentionSizes {
    int64_t queries = 0;
    int64_t past = 0;
    int64_t fresh = 0;
    int64_t rows = 0;
    int64_t heads = 0;
    int64_t headDim = 0;

    int64_t items() const noexcept { return queries * rows * heads; }
};

// tuning.AttentionConfig; tile -1: the table has no tile for this architecture, type and head dim.
struct TritonPlan {
    int32_t tile = -1;
    int32_t blockM = 0;
    int32_t splits = 0;
    int32_t keysPerSplit = 0;
};

TritonPlan planTriton(KernelTable const& table, int32_t arch, contract::DataType type, AttentionSizes const& sizes,
                      int32_t smCount) noexcept;

// hopper.Plan
struct HopperPlan {
    int64_t ctas = 0;
    int64_t fullTiles = 0;
    int64_t splitTiles = 0;
    int64_t run = 0;
    int64_t finishBlocks = 0;
    int64_t partOutFloats = 0;
    int64_t partStatsFloats = 0;
    int64_t ns = 0;
};

// Blocks of the finish kernel that take the mean over heads.
int64_t hopperMeanBlocks(AttentionSizes const& sizes) noexcept;
HopperPlan planHopper(HopperBuild const& build, AttentionSizes const& sizes, int32_t smCount, bool mean) noexcept;
// hopper.choose: which of the builds, and its plan.
int32_t chooseHopper(HopperBuild const* const* builds, int32_t nbBuilds, AttentionSizes const& sizes, int32_t smCount,
                     bool mean, HopperPlan& plan) noexcept;

}  // namespace toprovar
