// SelectTokens, GatherTokens, ScatterTokens and RestoreTokens: one Triton kernel each, no workspace.

#include <algorithm>

#include "core/op.hpp"
#include "kernel_arguments.hpp"

namespace toprovar {

namespace {

using contract::DataType;

// Most source cells under one cell of an area resize source -> size (kernels/launch.py: _span).
int64_t resizeSpan(int64_t size, int64_t source) noexcept {
    int64_t span = 0;
    for (int64_t i = 0; i < size; ++i) {
        span = std::max(span, ceilDivide((i + 1) * source, size) - i * source / size);
    }
    return span;
}

// What the four ops share: kernels for one type, found by op, type, number of tokens and, to restore, kind of resize.
class TokenOp : public Op {
public:
    using Op::Op;

    Status prepare(Tensor const* inputs) override {
        Device device;
        int32_t arch = 0;
        Status status = chooseArch(device, arch);
        if (!status.ok()) {
            return status;
        }
        for (int32_t cache = leastCache(); status.ok() && cache <= mostCache(); ++cache) {
            status = load(inputs, device, arch, cache);
        }
        device_ = device;
        return status;
    }

protected:
    TokenOp(TokenOp const&) = default;

    // Tokens that one program has to hold at once; 0 where that is no limit.
    virtual int64_t tokensHeld(Tensor const*) const noexcept { return 0; }

    // Kinds of resize that may be asked for.
    virtual int32_t leastCache() const noexcept { return 0; }
    virtual int32_t mostCache() const noexcept { return 0; }

    // Fails where enqueue must not launch.
    Status begin(Tensor const* inputs, void const* const* in, void* const* out, int32_t cache = 0) const noexcept {
        KernelEntry const* const entry = kernels_[cache].entry;
        if (entry == nullptr || (entry->block > 0 && entry->block < tokensHeld(inputs)) ||
            entry->type != inputs[0].type) {
            return Status::error("%s: was not prepared for these inputs; this is a defect of the adapter", spec().name);
        }
        return checkAddresses(inputs, in, out);
    }

    Kernel kernels_[3];  // by kind of resize

private:
    Status load(Tensor const* inputs, Device const& device, int32_t arch, int32_t cache) {
        Tensor const& first = inputs[0];
        int64_t const tokens = tokensHeld(inputs);
        KernelEntry const* best = nullptr;
        KernelTable const& table = kernelTable();
        for (int32_t i = 0; i < table.nbEntries; ++i) {
            KernelEntry const& entry = table.entries[i];
            if (entry.op == spec().op && entry.arch == arch && entry.type == first.type && entry.block >= tokens &&
                entry.cache == cache && (best == nullptr || entry.block < best->block)) {
                best = &entry;
            }
        }
        if (best == nullptr) {
            return Status::error(
                "%s: the plugin library has no kernel for %s and %lld tokens on sm_%d; valid are at most %d tokens",
                spec().name, contract::nameOf(first.type), static_cast<long long>(tokens), arch,
                contract::kMAX_SELECT_TOKENS);
        }
        if (best->unit > 1 && first.dims[2] % best->unit != 0) {
            return Status::error("%s: a width of %lld; valid are multiples of %d", spec().name,
                                 static_cast<long long>(first.dims[2]), best->unit);
        }
        if (kernels_[cache].entry == best && device_.contextId == device.contextId) {
            return {};
        }
        return loadKernel(device, *best, kernels_[cache]);
    }
};

class SelectOp final : public TokenOp {
public:
    using TokenOp::TokenOp;

    std::unique_ptr<Op> clone() const override { return std::unique_ptr<Op>(new SelectOp(*this)); }

    Status enqueue(Tensor const* inputs, void const* const* in, void* const* out, void*,
                   CUstream stream) const noexcept override {
        namespace spec = contract::select_tokens;
        Status const status = begin(inputs, in, out);
        int64_t const keep = inputs[spec::kKEEP_SLOTS].dims[0];
        int64_t const tokens = inputs[spec::kENTROPY].dims[1];
        if (!status.ok() || keep == 0) {
            return status;
        }
        if (keep > tokens) {
            return Status::error("%s: asked to keep %lld of %lld tokens; valid are 0 to %lld: check keep_slots",
                                 this->spec().name, static_cast<long long>(keep), static_cast<long long>(tokens),
                                 static_cast<long long>(tokens));
        }
        SelectKernel select;
        select.entropy = address(in[spec::kENTROPY]);
        select.indices = address(out[spec::kINDICES_OUT]);
        select.n_tokens = static_cast<int32_t>(tokens);
        select.keep = static_cast<int32_t>(keep);
        select.grid_images = inputs[spec::kENTROPY].dims[0];
        return launch(kernels_[0], select, stream);
    }

protected:
    int64_t tokensHeld(Tensor const* inputs) const noexcept override { return inputs[0].dims[1]; }

private:
    SelectOp(SelectOp const&) = default;
};

// Row r of x belongs to image r % B.
Status checkRows(char const* op, int64_t rows, int64_t images) noexcept {
    if (images < 1 || rows % images != 0) {
        return Status::error("%s: %lld rows for the indices of %lld images; valid are multiples: check the batch", op,
                             static_cast<long long>(rows), static_cast<long long>(images));
    }
    return {};
}

class GatherOp final : public TokenOp {
public:
    using TokenOp::TokenOp;

    std::unique_ptr<Op> clone() const override { return std::unique_ptr<Op>(new GatherOp(*this)); }

    Status enqueue(Tensor const* inputs, void const* const* in, void* const* out, void*,
                   CUstream stream) const noexcept override {
        namespace spec = contract::gather_tokens;
        Tensor const& x = inputs[spec::kX];
        Tensor const& indices = inputs[spec::kINDICES];
        Status status = begin(inputs, in, out);
        if (status.ok()) {
            status = checkRows(this->spec().name, x.dims[1], indices.dims[0]);
        }
        if (!status.ok() || indices.dims[1] == 0) {
            return status;
        }
        GatherKernel gather;
        gather.x = address(in[spec::kX]);
        gather.indices = address(in[spec::kINDICES]);
        gather.kept = address(out[spec::kKEPT_OUT]);
        gather.n_tokens = static_cast<int32_t>(x.dims[0]);
        gather.rows = static_cast<int32_t>(x.dims[1]);
        gather.images = static_cast<int32_t>(indices.dims[0]);
        gather.keep = static_cast<int32_t>(indices.dims[1]);
        gather.width_units = static_cast<int32_t>(x.dims[2] / kernels_[0].entry->unit);
        gather.grid_kept_rows = indices.dims[1] * x.dims[1];
        gather.grid_channels = x.dims[2];
        return launch(kernels_[0], gather, stream);
    }

private:
    GatherOp(GatherOp const&) = default;
};

// Scatter is restore without a cache; both have the inputs x, kept, indices first.
class RestoreOp final : public TokenOp {
public:
    using TokenOp::TokenOp;

    std::unique_ptr<Op> clone() const override { return std::unique_ptr<Op>(new RestoreOp(*this)); }

    Status enqueue(Tensor const* inputs, void const* const* in, void* const* out, void*,
                   CUstream stream) const noexcept override {
        namespace spec = contract::restore_tokens;
        Tensor const& x = inputs[spec::kX];
        Tensor const& indices = inputs[spec::kINDICES];
        bool const cached = this->spec().op == contract::Op::kRESTORE_TOKENS;
        int64_t h = x.dims[0];
        int64_t w = 1;
        int64_t hc = 1;
        int64_t wc = 1;
        if (cached) {
            h = inputs[spec::kROWS].dims[0];
            hc = inputs[spec::kROWS].dims[1];
            w = inputs[spec::kCOLS].dims[0];
            wc = inputs[spec::kCOLS].dims[1];
            if (h * w != x.dims[0] || hc * wc != inputs[spec::kCACHE].dims[0]) {
                return Status::error(
                    "%s: rows and cols resize %lld x %lld to %lld x %lld, but cache has %lld tokens and x %lld; check "
                    "the constants of this scale",
                    this->spec().name, static_cast<long long>(hc), static_cast<long long>(wc),
                    static_cast<long long>(h), static_cast<long long>(w),
                    static_cast<long long>(inputs[spec::kCACHE].dims[0]), static_cast<long long>(x.dims[0]));
            }
        }
        int64_t const spanHeight = resizeSpan(h, hc);
        int64_t const spanWidth = resizeSpan(w, wc);
        int32_t const cache = !cached ? 0 : std::max(spanHeight, spanWidth) <= 2 ? 1 : 2;
        Status status = begin(inputs, in, out, cache);
        if (status.ok()) {
            status = checkRows(this->spec().name, x.dims[1], indices.dims[0]);
        }
        if (!status.ok() || x.dims[0] == 0) {
            return status;
        }
        RestoreKernel restore;
        restore.x = address(in[spec::kX]);
        restore.kept = address(in[spec::kKEPT]);
        restore.indices = address(in[spec::kINDICES]);
        restore.cache = address(in[cached ? spec::kCACHE : spec::kX]);
        restore.y = address(out[spec::kY_OUT]);
        restore.rows = static_cast<int32_t>(x.dims[1]);
        restore.images = static_cast<int32_t>(indices.dims[0]);
        restore.keep = static_cast<int32_t>(indices.dims[1]);
        restore.width_units = static_cast<int32_t>(x.dims[2] / kernels_[cache].entry->unit);
        restore.grid_h = static_cast<int32_t>(h);
        restore.grid_w = static_cast<int32_t>(w);
        restore.cache_h = static_cast<int32_t>(hc);
        restore.cache_w = static_cast<int32_t>(wc);
        restore.span_h = static_cast<int32_t>(spanHeight);
        restore.span_w = static_cast<int32_t>(spanWidth);
        restore.grid_token_rows = x.dims[0] * x.dims[1];
        restore.grid_channels = x.dims[2];
        return launch(kernels_[cache], restore, stream);
    }

protected:
    int32_t leastCache() const noexcept override { return spec().op == contract::Op::kRESTORE_TOKENS ? 1 : 0; }
    int32_t mostCache() const noexcept override { return spec().op == contract::Op::kRESTORE_TOKENS ? 2 : 0; }

private:
    RestoreOp(RestoreOp const&) = default;
};

}  // namespace

std::unique_ptr<Op> makeTokenOp(contract::PluginSpec const& spec, AttributeValue const* attributes) {
    switch (spec.op) {
        case contract::Op::kSELECT_TOKENS:
            return std::make_unique<SelectOp>(spec, attributes);
        case contract::Op::kGATHER_TOKENS:
            return std::make_unique<GatherOp>(spec, attributes);
        case contract::Op::kSCATTER_TOKENS:
        case contract::Op::kRESTORE_TOKENS:
            return std::make_unique<RestoreOp>(spec, attributes);
        case contract::Op::kENTROPY_ATTENTION:
            break;
    }
    return nullptr;
}

}  // namespace toprovar
