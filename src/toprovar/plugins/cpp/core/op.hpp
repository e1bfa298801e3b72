// One node of the graph: attributes fixed, shapes known at each call. Knows nothing of TensorRT.
//
// The adapters ask in this order: create, supportsType and outputAxis while building; prepare when the sizes of the
// inputs are known (it loads kernels); workspaceBytes for the largest inputs; enqueue, which launches and does nothing
// else: it does not allocate, wait, throw or lock.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/kernels.hpp"
#include "core/status.hpp"
#include "toprovar/contract.hpp"

namespace toprovar {

struct Tensor {
    contract::DataType type = contract::DataType::kANY;
    int32_t rank = 0;
    int64_t dims[contract::kMAX_RANK] = {};
};

// Value of an attribute: `number` for kFLOAT, `integer` for kINT.
struct AttributeValue {
    float number = 0.F;
    int32_t integer = 0;
};

// Where the size of an output axis comes from.
struct AxisSource {
    int32_t input;
    int32_t axis;
};

class Op {
public:
    // `attributes` holds spec.nbAttributes values in the spec's order; fails where one is not valid.
    static Status create(contract::PluginSpec const& spec, AttributeValue const* attributes, std::unique_ptr<Op>& op);

    Op(contract::PluginSpec const& spec, AttributeValue const* attributes) noexcept;
    virtual ~Op() = default;
    virtual std::unique_ptr<Op> clone() const = 0;

    contract::PluginSpec const& spec() const noexcept { return *spec_; }
    AttributeValue const& attribute(int32_t index) const noexcept { return attributes_[index]; }

    virtual int32_t nbOutputs() const noexcept { return spec_->nbOutputs; }

    // Spec of tensor `index`, inputs first, outputs behind them.
    contract::TensorSpec const& tensor(int32_t index) const noexcept;

    // Whether tensor `index` may be `types[index]`, given the types of those before it. Types that no kernel of the
    // library takes are refused.
    bool supportsType(int32_t index, contract::DataType const* types) const noexcept;

    // Every output axis is an axis of an input of the same name (a property of the contract, checked by create).
    AxisSource outputAxis(int32_t output, int32_t axis) const noexcept;

    // Ranks, and equal sizes for equal names. Sizes below 0 are not known yet.
    Status checkShapes(Tensor const* inputs) const noexcept;

    // Loads what a launch on these inputs needs into the current context. Idempotent.
    virtual Status prepare(Tensor const* inputs) = 0;

    // Enough for every input that is nowhere larger than these; 0 where the device is not known.
    virtual size_t workspaceBytes(Tensor const* largest) const noexcept;

    virtual Status enqueue(Tensor const* inputs, void const* const* in, void* const* out, void* workspace,
                           CUstream stream) const noexcept = 0;

protected:
    Op(Op const&) = default;
    Op& operator=(Op const&) = delete;

    // Kernels take addresses that are multiples of 16 bytes; those of empty tensors do not matter.
    Status checkAddresses(Tensor const* inputs, void const* const* in, void* const* out) const noexcept;

    Device device_;

private:
    contract::PluginSpec const* spec_;
    AttributeValue attributes_[contract::kMAX_ATTRIBUTES];
};

// Ops of tokens.cpp and attention.cpp.
std::unique_ptr<Op> makeTokenOp(contract::PluginSpec const& spec, AttributeValue const* attributes);
std::unique_ptr<Op> makeAttentionOp(contract::PluginSpec const& spec, AttributeValue const* attributes);

// The best architecture for the current device, with an error that lists what the library holds.
Status chooseArch(Device& device, int32_t& arch) noexcept;

}  // namespace toprovar
