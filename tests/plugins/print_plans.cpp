// Reads problems from stdin, one a line, and prints how the C++ core deals them to a GPU; test_plans.py compares.
//   triton ARCH TYPE SM_COUNT QUERIES PAST FRESH ROWS HEADS HEAD_DIM   -> tile blockM splits keysPerSplit
//   hopper ENTROPY TYPE SM_COUNT QUERIES PAST FRESH ROWS HEADS HEAD_DIM
//     -> build ctas fullTiles splitTiles run finishBlocks partOutFloats partStatsFloats ns

#include <iostream>
#include <string>
#include <vector>

#include "core/attention_plan.hpp"

int main() {
    using namespace toprovar;
    KernelTable const& table = kernelTable();
    std::string kind;
    int arch = 0;
    int type = 0;
    int smCount = 0;
    AttentionSizes sizes;
    while (std::cin >> kind >> arch >> type >> smCount >> sizes.queries >> sizes.past >> sizes.fresh >> sizes.rows >>
           sizes.heads >> sizes.headDim) {
        auto const dataType = static_cast<contract::DataType>(type);
        if (kind == "triton") {
            TritonPlan const plan = planTriton(table, arch, dataType, sizes, smCount);
            std::cout << plan.tile << ' ' << plan.blockM << ' ' << plan.splits << ' ' << plan.keysPerSplit << '\n';
            continue;
        }
        std::vector<HopperBuild const*> builds;
        for (int i = 0; i < table.nbEntries; ++i) {
            KernelEntry const& entry = table.entries[i];
            if (entry.kind == KernelKind::kHOPPER_ATTENTION && entry.type == dataType &&
                entry.headDim == sizes.headDim && entry.entropy == arch) {
                builds.push_back(&entry.hopper);
            }
        }
        HopperPlan plan;
        std::cout << chooseHopper(builds.data(), static_cast<int>(builds.size()), sizes, smCount, arch == kENTROPY_MEAN,
                                  plan);
        std::cout << ' ' << plan.ctas << ' ' << plan.fullTiles << ' ' << plan.splitTiles << ' ' << plan.run << ' '
                  << plan.finishBlocks << ' ' << plan.partOutFloats << ' ' << plan.partStatsFloats << ' ' << plan.ns
                  << '\n';
    }
}
