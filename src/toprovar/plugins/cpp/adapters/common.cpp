#include "adapters/common.hpp"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "toprovar/noise.hpp"

namespace toprovar::adapters {

using contract::AttributeKind;
using contract::PluginSpec;

namespace {

std::atomic<nv::ILoggerFinder*> gLoggerFinder{nullptr};

// The parser passes these on for its own use.
bool isParserField(char const* name) noexcept {
    for (char const* one : {"plugin_version", "plugin_namespace", "aot", "tensorrt_plugin_shape_input_indices"}) {
        if (std::strcmp(name, one) == 0) {
            return true;
        }
    }
    return false;
}

bool readField(nv::PluginField const& field, AttributeKind kind, AttributeValue& value) noexcept {
    if (field.data == nullptr || field.length != 1) {
        return false;
    }
    if (kind == AttributeKind::kFLOAT && field.type == nv::PluginFieldType::kFLOAT32) {
        std::memcpy(&value.number, field.data, sizeof(value.number));
        return true;
    }
    if (kind == AttributeKind::kINT && field.type == nv::PluginFieldType::kINT32) {
        std::memcpy(&value.integer, field.data, sizeof(value.integer));
        return true;
    }
    return false;
}

template <typename Descs, typename Get>
Tensors shapes(Descs const* in, int32_t nbInputs, Get get) noexcept {
    Tensors tensors;
    for (int32_t i = 0; i < nbInputs && i < contract::kMAX_TENSORS; ++i) {
        tensors[static_cast<size_t>(i)] = get(in[i]);
    }
    return tensors;
}

}  // namespace

void setLogger(nv::ILoggerFinder* finder) noexcept {
    gLoggerFinder.store(finder);
}

void logError(char const* plugin, char const* message) noexcept {
    char text[640];
    std::snprintf(text, sizeof(text), "toprovar::%s: %s", plugin, message);
    nv::ILoggerFinder* const finder = gLoggerFinder.load();
    nv::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(nv::ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

contract::DataType fromTensorRT(nv::DataType type) noexcept {
    switch (type) {
        case nv::DataType::kFLOAT:
            return contract::DataType::kFLOAT32;
        case nv::DataType::kHALF:
            return contract::DataType::kFLOAT16;
        case nv::DataType::kINT32:
            return contract::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 9
        case nv::DataType::kBF16:
            return contract::DataType::kBFLOAT16;
#endif
        default:
            return contract::DataType::kANY;
    }
}

nv::DataType toTensorRT(contract::DataType type) noexcept {
    switch (type) {
        case contract::DataType::kFLOAT16:
            return nv::DataType::kHALF;
        case contract::DataType::kINT32:
            return nv::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 9
        case contract::DataType::kBFLOAT16:
            return nv::DataType::kBF16;
#endif
        default:
            return nv::DataType::kFLOAT;
    }
}

Tensor fromTensorRT(nv::Dims const& dims, nv::DataType type) noexcept {
    Tensor tensor;
    tensor.type = fromTensorRT(type);
    tensor.rank = dims.nbDims;
    for (int32_t i = 0; i < dims.nbDims && i < contract::kMAX_RANK; ++i) {
        tensor.dims[i] = dims.d[i];
    }
    return tensor;
}

Tensors currentShapes(nv::PluginTensorDesc const* in, int32_t nbInputs) noexcept {
    return shapes(in, nbInputs, [](nv::PluginTensorDesc const& d) { return fromTensorRT(d.dims, d.type); });
}

Tensors currentShapes(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs) noexcept {
    return shapes(in, nbInputs,
                  [](nv::DynamicPluginTensorDesc const& d) { return fromTensorRT(d.desc.dims, d.desc.type); });
}

Tensors largestShapes(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs) noexcept {
    return shapes(in, nbInputs, [](nv::DynamicPluginTensorDesc const& d) { return fromTensorRT(d.max, d.desc.type); });
}

bool areKnown(Tensor const* tensors, int32_t nbTensors) noexcept {
    for (int32_t i = 0; i < nbTensors; ++i) {
        for (int32_t j = 0; j < tensors[i].rank && j < contract::kMAX_RANK; ++j) {
            if (tensors[i].dims[j] < 0) {
                return false;
            }
        }
    }
    return true;
}

Status createOp(PluginSpec const& spec, nv::PluginFieldCollection const* fields, std::unique_ptr<Op>& op) {
    AttributeValue values[contract::kMAX_ATTRIBUTES];
    bool given[contract::kMAX_ATTRIBUTES] = {};
    for (int32_t i = 0; i < spec.nbAttributes; ++i) {
        values[i].number = static_cast<float>(spec.attributes[i].defaultValue);
        values[i].integer = static_cast<int32_t>(spec.attributes[i].defaultValue);
    }
    for (int32_t f = 0; fields != nullptr && f < fields->nbFields; ++f) {
        nv::PluginField const& field = fields->fields[f];
        if (field.name == nullptr || isParserField(field.name) || std::strcmp(field.name, kREVISION_FIELD) == 0) {
            continue;
        }
        if (std::strcmp(field.name, kCONTRACT_FIELD) == 0) {
            AttributeValue found;
            if (!readField(field, AttributeKind::kINT, found) || found.integer != contract::kCONTRACT_VERSION) {
                return Status::error(
                    "%s: the engine was built for version %d of the op contract, this library has version %d; build "
                    "the engine again",
                    spec.name, found.integer, contract::kCONTRACT_VERSION);
            }
            continue;
        }
        int32_t index = 0;
        while (index < spec.nbAttributes && std::strcmp(spec.attributes[index].name, field.name) != 0) {
            ++index;
        }
        if (index == spec.nbAttributes) {
            return Status::error("%s: unknown attribute %s; export the graph with this version of toprovar", spec.name,
                                 field.name);
        }
        if (!readField(field, spec.attributes[index].kind, values[index])) {
            return Status::error("%s: attribute %s has type %d and length %d; valid is one %s: export the graph again",
                                 spec.name, field.name, static_cast<int>(field.type), static_cast<int>(field.length),
                                 spec.attributes[index].kind == AttributeKind::kFLOAT ? "FLOAT" : "INT");
        }
        given[index] = true;
    }
    for (int32_t i = 0; i < spec.nbAttributes; ++i) {
        if (spec.attributes[i].required && !given[i]) {
            return Status::error("%s: attribute %s is missing; export the graph again", spec.name,
                                 spec.attributes[i].name);
        }
    }
    return Op::create(spec, values, op);
}

FieldNames::FieldNames(PluginSpec const& spec) noexcept : fields_{}, collection_{} {
    for (int32_t i = 0; i < spec.nbAttributes; ++i) {
        nv::PluginField& field = fields_[static_cast<size_t>(i)];
        field.name = spec.attributes[i].name;
        field.type = spec.attributes[i].kind == AttributeKind::kFLOAT ? nv::PluginFieldType::kFLOAT32
                                                                      : nv::PluginFieldType::kINT32;
        field.length = 1;
    }
    collection_.nbFields = spec.nbAttributes;
    collection_.fields = fields_.data();
}

void outputShape(Op const& op, int32_t output, nv::DimsExprs const* inputs, nv::DimsExprs& shape) noexcept {
    shape.nbDims = op.spec().outputs[output].rank;
    for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
        AxisSource const source = op.outputAxis(output, axis);
        shape.d[axis] = inputs[source.input].d[source.axis];
    }
}

}  // namespace toprovar::adapters

// Noise of one scale, [N, B, V], for the Python runtime, whose own takes five times as long (plugins/library.py).
extern "C" TOPROVAR_EXPORT void toprovarScaleNoise(uint64_t const* seeds, uint64_t images, uint32_t scale,
                                                   uint64_t tokens, uint64_t logits, float* out) {
    toprovar::scaleNoise(seeds, images, scale, 0, tokens, logits, out);
}
