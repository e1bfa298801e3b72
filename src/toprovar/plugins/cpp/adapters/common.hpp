// What the adapters of both plugin interfaces share: descriptors, fields, and where errors go.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <memory>

#include "core/op.hpp"

// The library hides everything else.
#define TOPROVAR_EXPORT __attribute__((visibility("default")))

namespace toprovar::adapters {

namespace nv = nvinfer1;

// To TensorRT's logger where a logger finder was given, else to stderr. Never throws.
void logError(char const* plugin, char const* message) noexcept;
void setLogger(nv::ILoggerFinder* finder) noexcept;

// Runs `body`, which returns T, and turns what it throws into `failed`: TensorRT calls across a C boundary.
template <typename T, typename Body>
T guarded(char const* plugin, T failed, Body body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        logError(plugin, error.what());
    } catch (...) {
        logError(plugin, "unknown exception");
    }
    return failed;
}

// kANY for a type that no op takes.
contract::DataType fromTensorRT(nv::DataType type) noexcept;
nv::DataType toTensorRT(contract::DataType type) noexcept;

Tensor fromTensorRT(nv::Dims const& dims, nv::DataType type) noexcept;

using Tensors = std::array<Tensor, contract::kMAX_TENSORS>;

// Of DynamicPluginTensorDesc the sizes that are set, or the largest ones of the profile.
Tensors currentShapes(nv::PluginTensorDesc const* in, int32_t nbInputs) noexcept;
Tensors currentShapes(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs) noexcept;
Tensors largestShapes(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs) noexcept;

// Sizes that are not known (while building with dynamic shapes) are below 0.
bool areKnown(Tensor const* tensors, int32_t nbTensors) noexcept;

// The op of a node or of an engine. Fails on a field that is missing, unknown or of another type.
Status createOp(contract::PluginSpec const& spec, nv::PluginFieldCollection const* fields, std::unique_ptr<Op>& op);

// Fields that an engine carries beside the attributes; of another contract version, it is refused.
inline constexpr char const* kCONTRACT_FIELD = "contract_version";
inline constexpr char const* kREVISION_FIELD = "kernel_revision";

// The attributes of a spec as the parser has to look for them.
class FieldNames {
public:
    explicit FieldNames(contract::PluginSpec const& spec) noexcept;
    nv::PluginFieldCollection const* collection() const noexcept { return &collection_; }

private:
    std::array<nv::PluginField, contract::kMAX_ATTRIBUTES> fields_;
    nv::PluginFieldCollection collection_;
};

// Output shapes from the contract's axis names.
void outputShape(Op const& op, int32_t output, nv::DimsExprs const* inputs, nv::DimsExprs& shape) noexcept;

// Types of all tensors before and at `position`; TensorRT fills them from the left.
template <typename Desc, typename Get>
bool supports(Op const& op, int32_t position, Desc const* inOut, Get get) noexcept {
    contract::DataType types[contract::kMAX_TENSORS];
    for (int32_t i = 0; i <= position; ++i) {
        types[i] = fromTensorRT(get(inOut[i]).type);
    }
    return get(inOut[position]).format == nv::TensorFormat::kLINEAR && op.supportsType(position, types);
}

}  // namespace toprovar::adapters
