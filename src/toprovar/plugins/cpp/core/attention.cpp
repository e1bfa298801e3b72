// EntropyAttention and CachedAttention. On Hopper one CUDA C++ kernel (kernels/cuda/hopper.cu says what a caller has to
// know), everywhere else the Triton kernels; both as kernels/ops.py chooses.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/attention_plan.hpp"
#include "core/op.hpp"
#include "hopper_arguments.hpp"
#include "kernel_arguments.hpp"

namespace toprovar {

namespace {

namespace spec = contract::entropy_attention;
using contract::DataType;

constexpr double kLOG2_E = 1.4426950408889634;
constexpr int32_t kMAX_HOPPER_BUILDS = 4;

AttentionSizes sizesOf(Tensor const* inputs) noexcept {
    AttentionSizes sizes;
    sizes.queries = inputs[spec::kQ].dims[0];
    sizes.rows = inputs[spec::kQ].dims[1];
    sizes.heads = inputs[spec::kQ].dims[2];
    sizes.headDim = inputs[spec::kQ].dims[3];
    sizes.past = inputs[spec::kPAST_K].dims[0];
    sizes.fresh = inputs[spec::kNEW_K].dims[0];
    return sizes;
}

class AttentionOp final : public Op {
public:
    using Op::Op;

    std::unique_ptr<Op> clone() const override { return std::unique_ptr<Op>(new AttentionOp(*this)); }

    int32_t nbOutputs() const noexcept override { return wantsEntropy() ? spec().nbOutputs : 1; }

    Status prepare(Tensor const* inputs) override {
        AttentionSizes const sizes = sizesOf(inputs);
        DataType const type = inputs[spec::kQ].type;
        Device device;
        int32_t arch = 0;
        Status status = chooseArch(device, arch);
        if (!status.ok()) {
            return status;
        }
        if (ready_ && type_ == type && headDim_ == sizes.headDim && device_.contextId == device.contextId) {
            return {};
        }
        ready_ = false;
        device_ = device;
        arch_ = arch;
        int32_t const entropy = wantsEntropy() ? kENTROPY_MEAN : kENTROPY_NONE;
        status = prepareHopper(type, sizes.headDim, entropy);
        if (status.ok() && nbHopper_ == 0) {
            status = prepareTriton(type, sizes, entropy);
        }
        if (status.ok()) {
            ready_ = true;
            type_ = type;
            headDim_ = sizes.headDim;
        }
        return status;
    }

    // The plan depends on the sizes in no monotonous way (fewer queries are split more), so this is a bound on all of
    // them: splits exist only where the blocks do not fill the GPU, which bounds queries * splits by blockM times the
    // number of blocks that fill it.
    size_t workspaceBytes(Tensor const* largest) const noexcept override {
        AttentionSizes const sizes = sizesOf(largest);
        int64_t const perHead = wantsEntropy() ? sizes.items() : 0;
        int64_t parts = 0;
        if (nbHopper_ > 0) {
            for (int32_t i = 0; i < nbHopper_; ++i) {
                HopperBuild const& build = hopper_[i].entry->hopper;
                int64_t const slots = 2 * int64_t{build.ctasPerSm} * device_.smCount;
                parts = std::max(parts, slots * build.tileM * (sizes.headDim + 3));
            }
            return sizeof(float) * static_cast<size_t>(parts + perHead);
        }
        KernelTable const& table = kernelTable();
        for (int32_t i = 0; i < table.nbTiles; ++i) {
            TileEntry const& tile = table.tiles[i];
            if (tile.arch == arch_ && tile.tile == kNARROW && tile.headDim == sizes.headDim) {
                parts = std::max(parts, int64_t{table.slotsPerSm} * device_.smCount * tile.blockM);
            }
        }
        parts = std::min(parts, table.maxSplits * sizes.items()) * (sizes.headDim + 3);
        return sizeof(float) * static_cast<size_t>(std::max(parts, perHead));
    }

    Status enqueue(Tensor const* inputs, void const* const* in, void* const* out, void* workspace,
                   CUstream stream) const noexcept override {
        AttentionSizes const sizes = sizesOf(inputs);
        if (!ready_ || type_ != inputs[spec::kQ].type || headDim_ != sizes.headDim) {
            return Status::error("%s: was not prepared for %s heads of %lld; this is a defect of the adapter",
                                 spec().name, contract::nameOf(inputs[spec::kQ].type),
                                 static_cast<long long>(sizes.headDim));
        }
        Status const status = checkAddresses(inputs, in, out);
        if (!status.ok()) {
            return status;
        }
        if (sizes.queries == 0) {
            return {};
        }
        if (sizes.past + sizes.fresh == 0) {
            return Status::error("%s: no keys; past_k and new_k must not both be empty", spec().name);
        }
        auto* const scratch = static_cast<float*>(workspace);
        return nbHopper_ > 0 ? enqueueHopper(sizes, in, out, scratch, stream)
                             : enqueueTriton(sizes, in, out, scratch, stream);
    }

private:
    AttentionOp(AttentionOp const&) = default;

    float scale() const noexcept { return attribute(spec::kSCALE_ATTR).number; }
    float scaleLog2() const noexcept { return static_cast<float>(scale() * kLOG2_E); }
    bool wantsEntropy() const noexcept { return attribute(spec::kENTROPY_ATTR).integer == kENTROPY_MEAN; }

    // Fields that are not asked for are -1 (entropy, tile) or 0 (headDim, heads).
    KernelEntry const* find(KernelKind kind, DataType type, int64_t headDim, int32_t entropy, int32_t tile,
                            int32_t split, int64_t heads) const noexcept {
        KernelTable const& table = kernelTable();
        KernelEntry const* best = nullptr;
        for (int32_t i = 0; i < table.nbEntries; ++i) {
            KernelEntry const& entry = table.entries[i];
            if (entry.kind != kind || entry.arch != arch_ || entry.type != type) {
                continue;
            }
            bool const fits = (headDim == 0 || entry.headDim == headDim) && (entropy < 0 || entry.entropy == entropy) &&
                              (tile < 0 || entry.tile == tile) && entry.split == split && entry.headsPad >= heads;
            if (fits && (best == nullptr || entry.headsPad < best->headsPad)) {
                best = &entry;
            }
        }
        return best;
    }

    Status load(KernelEntry const* entry, char const* what, DataType type, AttentionSizes const& sizes,
                Kernel& kernel) {
        if (entry == nullptr) {
            return Status::error(
                "%s: the plugin library has no %s kernel for %s, %lld heads of %lld on sm_%d; valid are float16 and "
                "bfloat16, at most %d heads of 64, 80, 96 or 128",
                spec().name, what, contract::nameOf(type), static_cast<long long>(sizes.heads),
                static_cast<long long>(sizes.headDim), arch_, kernelTable().maxHeads);
        }
        return loadKernel(device_, *entry, kernel);
    }

    // All builds for this type, head dim and entropy, in the order of hopper.VARIANTS; none for a scale that would turn
    // the mask and the maximum of the scores around.
    Status prepareHopper(DataType type, int64_t headDim, int32_t entropy) {
        KernelTable const& table = kernelTable();
        nbHopper_ = 0;
        for (int32_t i = 0; i < table.nbEntries && scale() > 0.F; ++i) {
            KernelEntry const& entry = table.entries[i];
            if (entry.kind == KernelKind::kHOPPER_ATTENTION && entry.arch == arch_ && entry.type == type &&
                entry.headDim == headDim && entry.entropy == entropy) {
                if (nbHopper_ == kMAX_HOPPER_BUILDS) {
                    return Status::error("%s: more than %d builds of a Hopper kernel; this is a defect of the library",
                                         spec().name, kMAX_HOPPER_BUILDS);
                }
                Status const status = loadKernel(device_, entry, hopper_[nbHopper_]);
                if (!status.ok()) {
                    nbHopper_ = 0;
                    return status;
                }
                ++nbHopper_;
            }
        }
        return {};
    }

    Status prepareTriton(DataType type, AttentionSizes const& sizes, int32_t entropy) {
        KernelKind const attention = KernelKind::kATTENTION_KERNEL;
        int64_t const d = sizes.headDim;
        int64_t const h = sizes.heads;
        Status status = load(find(attention, type, d, entropy, kWIDE, 0, 0), "attention", type, sizes, wide_);
        if (status.ok()) {
            status = load(find(attention, type, d, entropy, kNARROW, 0, 0), "attention", type, sizes, narrow_);
        }
        if (status.ok()) {
            status = load(find(attention, type, d, kENTROPY_MEAN, kNARROW, 1, 0), "split", type, sizes, split_);
        }
        if (status.ok()) {
            status = load(find(KernelKind::kMERGE_KERNEL, type, 0, entropy, -1, 0, h), "merge", type, sizes, merge_);
        }
        if (status.ok() && entropy == kENTROPY_MEAN) {
            KernelEntry const* mean = find(KernelKind::kMEAN_HEADS_KERNEL, DataType::kFLOAT32, 0, -1, -1, 0, h);
            status = load(mean, "mean", type, sizes, mean_);
        }
        return status;
    }

    Status enqueueTriton(AttentionSizes const& sizes, void const* const* in, void* const* out, float* workspace,
                         CUstream stream) const noexcept {
        TritonPlan const plan = planTriton(kernelTable(), arch_, type_, sizes, device_.smCount);
        if (plan.tile < 0) {
            return Status::error("%s: no tile for heads of %lld on sm_%d; build the cubins again", spec().name,
                                 static_cast<long long>(sizes.headDim), arch_);
        }
        bool const split = plan.splits > 1;
        bool const mean = wantsEntropy();
        float* const stats = split ? workspace + plan.splits * sizes.items() * sizes.headDim : nullptr;
        auto const token8 = static_cast<int32_t>(sizes.rows * sizes.heads * sizes.headDim / 8);
        auto const row8 = static_cast<int32_t>(sizes.heads * sizes.headDim / 8);

        AttentionKernel attention;
        attention.q = address(in[spec::kQ]);
        attention.past_k = address(in[spec::kPAST_K]);
        attention.past_v = address(in[spec::kPAST_V]);
        attention.new_k = address(in[spec::kNEW_K]);
        attention.new_v = address(in[spec::kNEW_V]);
        attention.out = split ? address(workspace) : address(out[spec::kOUT_OUT]);
        attention.entropy = address(workspace);  // per head; not written when split
        attention.stats = address(stats);
        attention.scale_log2 = scaleLog2();
        attention.n_queries = static_cast<int32_t>(sizes.queries);
        attention.n_past = static_cast<int32_t>(sizes.past);
        attention.n_new = static_cast<int32_t>(sizes.fresh);
        attention.rows = static_cast<int32_t>(sizes.rows);
        attention.heads = static_cast<int32_t>(sizes.heads);
        attention.keys_per_split = plan.keysPerSplit;
        attention.q_token8 = attention.past_k_token8 = attention.past_v_token8 = token8;
        attention.new_k_token8 = attention.new_v_token8 = token8;
        attention.q_row8 = attention.past_k_row8 = attention.past_v_row8 = row8;
        attention.new_k_row8 = attention.new_v_row8 = row8;
        attention.grid_n_queries = sizes.queries;
        attention.grid_row_heads = sizes.rows * sizes.heads;
        attention.grid_splits = plan.splits;
        Kernel const& kernel = split ? split_ : plan.tile == kWIDE ? wide_ : narrow_;
        Status const status = launch(kernel, attention, stream);
        if (!status.ok()) {
            return status;
        }

        if (split) {
            MergeKernel merge;
            merge.parts = address(workspace);
            merge.stats = address(stats);
            merge.out = address(out[spec::kOUT_OUT]);
            merge.entropy = mean ? address(out[spec::kENTROPY_OUT]) : 0;
            merge.n_queries = static_cast<int32_t>(sizes.queries);
            merge.rows = static_cast<int32_t>(sizes.rows);
            merge.heads = static_cast<int32_t>(sizes.heads);
            merge.splits = plan.splits;
            merge.head_dim8 = static_cast<int32_t>(sizes.headDim / 8);
            merge.grid_n_queries = sizes.queries;
            merge.grid_rows = sizes.rows;
            return launch(merge_, merge, stream);
        }
        if (mean) {
            MeanHeadsKernel average;
            average.per_head = address(workspace);
            average.mean = address(out[spec::kENTROPY_OUT]);
            average.n_queries = static_cast<int32_t>(sizes.queries);
            average.heads = static_cast<int32_t>(sizes.heads);
            average.grid_n_queries = sizes.queries;
            average.grid_rows = sizes.rows;
            return launch(mean_, average, stream);
        }
        return {};
    }

    Status encodeMap(Driver const& driver, CUtensorMap& map, int32_t dataType, void const* pointer, int64_t length,
                     AttentionSizes const& sizes, int32_t boxRows) const noexcept {
        auto const d = static_cast<cuuint64_t>(sizes.headDim);
        auto const rowHeads = static_cast<cuuint64_t>(sizes.rows * sizes.heads);
        cuuint64_t const shape[3] = {d, rowHeads, static_cast<cuuint64_t>(length)};
        cuuint64_t const strides[2] = {2 * d, 2 * d * rowHeads};
        cuuint32_t const box[3] = {64, 1, static_cast<cuuint32_t>(boxRows)};
        cuuint32_t const steps[3] = {1, 1, 1};
        CUresult const code = driver.cuTensorMapEncodeTiled(
            &map, static_cast<CUtensorMapDataType>(dataType), 3, const_cast<void*>(pointer),
            shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        return driver.check(code, "cuTensorMapEncodeTiled");
    }

    Status enqueueSmall(Driver const& driver, AttentionSizes const& sizes, void const* const* in, void* const* out,
                        float* perHead, CUstream stream) const noexcept {
        Kernel const& kernel = hopper_[0];  // every build has the same small kernel
        HopperBuild const& build = kernel.entry->hopper;
        HopperSmall small;
        small.q = address(in[spec::kQ]);
        small.past_k = address(in[spec::kPAST_K]);
        small.past_v = address(in[spec::kPAST_V]);
        small.new_k = address(in[spec::kNEW_K]);
        small.new_v = address(in[spec::kNEW_V]);
        small.out = address(out[spec::kOUT_OUT]);
        small.head_entropy = wantsEntropy() ? address(perHead) : 0;
        small.queries = static_cast<int32_t>(sizes.queries);
        small.past = static_cast<int32_t>(sizes.past);
        small.fresh = static_cast<int32_t>(sizes.fresh);
        small.row_heads = static_cast<int32_t>(sizes.rows * sizes.heads);
        small.scale_log2 = scaleLog2();
        void* parameters[HopperSmall::kNB_PARAMETERS];
        small.pointers(parameters);
        CUlaunchConfig config{};
        config.gridDimX = static_cast<unsigned>(sizes.rows * sizes.heads);
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
        config.blockDimX = static_cast<unsigned>(build.smallThreads);
        config.sharedMemBytes = static_cast<unsigned>(build.smallSharedBytes);
        config.hStream = stream;
        Status const status =
            driver.check(driver.cuLaunchKernelEx(&config, kernel.small, parameters, nullptr), kernel.entry->name);
        if (!status.ok() || !wantsEntropy()) {
            return status;
        }
        HopperFinish finish;
        finish.out = small.out;
        finish.head_entropy = small.head_entropy;
        finish.mean_entropy = address(out[spec::kENTROPY_OUT]);
        finish.queries = small.queries;
        finish.past = small.past;
        finish.fresh = small.fresh;
        finish.row_heads = small.row_heads;
        finish.heads = static_cast<int32_t>(sizes.heads);
        int64_t const tiles = (sizes.queries + build.tileM - 1) / build.tileM * sizes.rows * sizes.heads;
        finish.full_tiles = static_cast<int32_t>(tiles);
        return launchFinish(driver, kernel, finish, hopperMeanBlocks(sizes), stream);
    }

    Status launchFinish(Driver const& driver, Kernel const& kernel, HopperFinish& finish, int64_t blocks,
                        CUstream stream) const noexcept {
        void* parameters[HopperFinish::kNB_PARAMETERS];
        finish.pointers(parameters);
        // It may be set up while the kernel before it still runs; it waits for that with griddepcontrol.wait.
        CUlaunchAttribute overlap{};
        overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig config{};
        config.gridDimX = static_cast<unsigned>(blocks);
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
        config.blockDimX = static_cast<unsigned>(kernel.entry->hopper.finishThreads);
        config.hStream = stream;
        config.attrs = &overlap;
        config.numAttrs = 1;
        return driver.check(driver.cuLaunchKernelEx(&config, kernel.finish, parameters, nullptr), kernel.entry->name);
    }

    Status enqueueHopper(AttentionSizes const& sizes, void const* const* in, void* const* out, float* workspace,
                         CUstream stream) const noexcept {
        Status status;
        Driver const* driver = Driver::get(status);
        if (driver == nullptr) {
            return status;
        }
        HopperBuild const* builds[kMAX_HOPPER_BUILDS];
        for (int32_t i = 0; i < nbHopper_; ++i) {
            builds[i] = &hopper_[i].entry->hopper;
        }
        bool const mean = wantsEntropy();
        if (sizes.queries <= builds[0]->smallQueries && sizes.past + sizes.fresh <= builds[0]->smallKeys) {
            return enqueueSmall(*driver, sizes, in, out, workspace, stream);
        }
        HopperPlan plan;
        Kernel const& kernel = hopper_[chooseHopper(builds, nbHopper_, sizes, device_.smCount, mean, plan)];
        HopperBuild const& build = kernel.entry->hopper;

        HopperForward forward;
        int32_t const inputs[4] = {spec::kPAST_K, spec::kPAST_V, spec::kNEW_K, spec::kNEW_V};
        int32_t const type = build.mapDataType;
        status = encodeMap(*driver, forward.maps[0], type, in[spec::kQ], sizes.queries, sizes, build.tileM);
        for (int32_t i = 0; i < 8 && status.ok(); ++i) {
            int32_t const boxRows = i < 4 ? build.tileN : build.seam;
            int32_t piece = i % 4;
            // The maps of an empty piece are not read, but they must be maps: the other piece lends its own.
            if ((piece < 2 ? sizes.past : sizes.fresh) == 0) {
                piece ^= 2;
            }
            status = encodeMap(*driver, forward.maps[1 + i], type, in[inputs[piece]],
                               piece < 2 ? sizes.past : sizes.fresh, sizes, boxRows);
        }
        if (!status.ok()) {
            return status;
        }
        float* const stats = workspace + plan.partOutFloats;
        float* const perHead = stats + plan.partStatsFloats;

        forward.out = address(out[spec::kOUT_OUT]);
        forward.head_entropy = mean ? address(perHead) : 0;
        forward.part_out = address(workspace);
        forward.part_stats = address(stats);
        forward.queries = static_cast<int32_t>(sizes.queries);
        forward.past = static_cast<int32_t>(sizes.past);
        forward.fresh = static_cast<int32_t>(sizes.fresh);
        forward.row_heads = static_cast<int32_t>(sizes.rows * sizes.heads);
        forward.scale_log2 = scaleLog2();
        forward.full_tiles = static_cast<int32_t>(plan.fullTiles);
        forward.run = static_cast<int32_t>(plan.run);
        void* parameters[HopperForward::kNB_PARAMETERS];
        forward.pointers(parameters);
        CUlaunchConfig config{};
        config.gridDimX = static_cast<unsigned>(plan.ctas);
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
        config.blockDimX = static_cast<unsigned>(kernel.entry->threads);
        config.sharedMemBytes = static_cast<unsigned>(kernel.entry->sharedBytes);
        config.hStream = stream;
        status = driver->check(driver->cuLaunchKernelEx(&config, kernel.function, parameters, nullptr),
                               kernel.entry->name);
        if (!status.ok() || plan.finishBlocks == 0) {
            return status;
        }

        HopperFinish finish;
        finish.out = forward.out;
        finish.head_entropy = forward.head_entropy;
        finish.mean_entropy = mean ? address(out[spec::kENTROPY_OUT]) : 0;
        finish.part_out = forward.part_out;
        finish.part_stats = forward.part_stats;
        finish.queries = forward.queries;
        finish.past = forward.past;
        finish.fresh = forward.fresh;
        finish.row_heads = forward.row_heads;
        finish.heads = static_cast<int32_t>(sizes.heads);
        finish.full_tiles = forward.full_tiles;
        finish.run = forward.run;
        return launchFinish(*driver, kernel, finish, plan.finishBlocks, stream);
    }

    bool ready_ = false;
    DataType type_ = DataType::kANY;
    int64_t headDim_ = 0;
    int32_t arch_ = 0;
    Kernel hopper_[kMAX_HOPPER_BUILDS];
    int32_t nbHopper_ = 0;  // 0: Triton's kernels
    Kernel wide_;
    Kernel narrow_;
    Kernel split_;
    Kernel merge_;
    Kernel mean_;
};

}  // namespace

std::unique_ptr<Op> makeAttentionOp(contract::PluginSpec const& spec, AttributeValue const* attributes) {
    return std::make_unique<AttentionOp>(spec, attributes);
}

}  // namespace toprovar
