#include "core/attention_plan.hpp"

#include <algorithm>

#include "core/kernels.hpp"

namespace toprovar {

namespace {

constexpr int64_t kMERGE_BLOCKS = 2;  // hopper.py: _MERGE_BLOCKS
constexpr int64_t kMERGE_NS = 5500;   // hopper.py: _MERGE_NS
constexpr int64_t kLEAST_RUN = 2;     // hopper.py: _LEAST_RUN
constexpr int64_t kMEAN_QUERIES = 32;

TileEntry const* findTile(KernelTable const& table, int32_t arch, contract::DataType type, int64_t headDim,
                          int32_t tile) noexcept {
    for (int32_t i = 0; i < table.nbTiles; ++i) {
        TileEntry const& entry = table.tiles[i];
        if (entry.arch == arch && entry.type == type && entry.headDim == headDim && entry.tile == tile) {
            return &entry;
        }
    }
    return nullptr;
}

}  // namespace

TritonPlan planTriton(KernelTable const& table, int32_t arch, contract::DataType type, AttentionSizes const& sizes,
                      int32_t smCount) noexcept {
    TileEntry const* wide = findTile(table, arch, type, sizes.headDim, kWIDE);
    TileEntry const* narrow = findTile(table, arch, type, sizes.headDim, kNARROW);
    if (wide == nullptr || narrow == nullptr) {
        return {};
    }
    int64_t const rowHeads = sizes.rows * sizes.heads;
    int64_t const keys = sizes.past + sizes.fresh;
    TritonPlan plan;
    if (ceilDivide(sizes.queries, wide->blockM) * rowHeads * 100 >= int64_t{table.wideFillPercent} * smCount) {
        plan.tile = kWIDE;
        plan.blockM = wide->blockM;
        plan.splits = 1;
        plan.keysPerSplit = static_cast<int32_t>(ceilDivide(keys, wide->blockN) * wide->blockN);
        return plan;
    }
    int64_t const blocks = ceilDivide(sizes.queries, narrow->blockM) * rowHeads;
    int64_t const wanted = std::min(
        {int64_t{table.slotsPerSm} * smCount / blocks, keys / table.minKeysPerSplit, int64_t{table.maxSplits}});
    int64_t const splits = std::max(int64_t{1}, wanted);
    int64_t const perSplit = ceilDivide(ceilDivide(keys, splits), narrow->blockN) * narrow->blockN;
    plan.tile = kNARROW;
    plan.blockM = narrow->blockM;
    plan.splits = static_cast<int32_t>(ceilDivide(keys, perSplit));
    plan.keysPerSplit = static_cast<int32_t>(perSplit);
    return plan;
}

int64_t hopperMeanBlocks(AttentionSizes const& sizes) noexcept {
    return sizes.rows * ceilDivide(sizes.queries, kMEAN_QUERIES);
}

HopperPlan planHopper(HopperBuild const& build, AttentionSizes const& sizes, int32_t smCount, bool mean) noexcept {
    int64_t const tiles = ceilDivide(sizes.queries, build.tileM) * sizes.rows * sizes.heads;
    int64_t const seam = ceilDivide(sizes.past, build.seam) * build.seam;
    int64_t const blocks = ceilDivide(seam + sizes.fresh, build.tileN);
    int64_t const ctas = int64_t{build.ctasPerSm} * smCount;
    int64_t rest = tiles % ctas;
    int64_t run = std::max(kLEAST_RUN, ceilDivide(rest * blocks, ctas));
    if (rest == 0 || run + kMERGE_BLOCKS >= blocks) {
        rest = 0;
        run = 0;
    }
    int64_t const runs = run > 0 ? ceilDivide(rest * blocks, run) : 0;
    int64_t const slots = 2 * runs;
    int64_t const merges = rest * build.consumers * build.sets;
    HopperPlan plan;
    plan.ctas = std::min(ctas, std::max(tiles - rest, runs));
    plan.fullTiles = tiles - rest;
    plan.splitTiles = rest;
    plan.run = run;
    plan.finishBlocks = ceilDivide(merges, 2) + (mean ? hopperMeanBlocks(sizes) : 0);
    plan.partOutFloats = slots * build.tileM * sizes.headDim;
    plan.partStatsFloats = slots * 3 * build.tileM;
    plan.ns = ceilDivide(plan.fullTiles, ctas) * (build.tileNs + blocks * build.blockNs);
    if (run > 0) {
        plan.ns += build.tileNs + run * build.blockNs + kMERGE_NS;
    }
    return plan;
}

int32_t chooseHopper(HopperBuild const* const* builds, int32_t nbBuilds, AttentionSizes const& sizes, int32_t smCount,
                     bool mean, HopperPlan& plan) noexcept {
    int32_t best = 0;
    for (int32_t i = 0; i < nbBuilds; ++i) {
        HopperPlan const candidate = planHopper(*builds[i], sizes, smCount, mean);
        if (i == 0 || candidate.ns < plan.ns) {
            best = i;
            plan = candidate;
        }
    }
    return best;
}

}  // namespace toprovar
