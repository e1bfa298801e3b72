// The ops as IPluginV3, for TensorRT 10.15 to 11. One class serves every op: what differs is in contract.hpp and core/.

#include <NvInferRuntime.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "adapters/common.hpp"

#if NV_TENSORRT_MAJOR < 10
#error "IPluginV3 needs the headers of TensorRT 10 or 11; for 8.6 build toprovar_plugins86"
#endif

namespace toprovar::adapters {

namespace {

constexpr int32_t kSUCCESS = 0;
constexpr int32_t kFAILURE = -1;

class PluginV3 final : public nv::IPluginV3,
                       public nv::IPluginV3OneCore,
                       public nv::IPluginV3OneBuild,
                       public nv::IPluginV3OneRuntime {
public:
    explicit PluginV3(std::unique_ptr<Op> op) : op_(std::move(op)), timingCacheId_(describe(*op_)) {
        contract::PluginSpec const& spec = op_->spec();
        for (int32_t i = 0; i < spec.nbAttributes; ++i) {
            AttributeValue const& value = op_->attribute(i);
            bool const number = spec.attributes[i].kind == contract::AttributeKind::kFLOAT;
            void const* const data = number ? static_cast<void const*>(&value.number) : &value.integer;
            auto const type = number ? nv::PluginFieldType::kFLOAT32 : nv::PluginFieldType::kINT32;
            fields_.emplace_back(spec.attributes[i].name, data, type, 1);
        }
        fields_.emplace_back(kCONTRACT_FIELD, &contract::kCONTRACT_VERSION, nv::PluginFieldType::kINT32, 1);
        fields_.emplace_back(kREVISION_FIELD, &contract::kKERNEL_REVISION, nv::PluginFieldType::kINT32, 1);
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    PluginV3(PluginV3 const&) = delete;
    PluginV3& operator=(PluginV3 const&) = delete;

    // IPluginV3

    nv::IPluginCapability* getCapabilityInterface(nv::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nv::PluginCapabilityType::kCORE:
                return static_cast<nv::IPluginV3OneCore*>(this);
            case nv::PluginCapabilityType::kBUILD:
                return static_cast<nv::IPluginV3OneBuild*>(this);
            case nv::PluginCapabilityType::kRUNTIME:
                return static_cast<nv::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nv::IPluginV3* clone() noexcept override {
        return guarded<nv::IPluginV3*>(name(), nullptr, [this] { return new PluginV3(op_->clone()); });
    }

    // IPluginV3OneCore

    char const* getPluginName() const noexcept override { return name(); }
    char const* getPluginVersion() const noexcept override { return contract::kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return contract::kPLUGIN_NAMESPACE; }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept override { return op_->nbOutputs(); }

    int32_t getOutputDataTypes(nv::DataType* outputTypes, int32_t nbOutputs, nv::DataType const* inputTypes,
                               int32_t /*nbInputs*/) const noexcept override {
        for (int32_t i = 0; i < nbOutputs; ++i) {
            contract::DataType const type = op_->spec().outputs[i].type;
            outputTypes[i] = type == contract::DataType::kANY ? inputTypes[0] : toTensorRT(type);
        }
        return kSUCCESS;
    }

    int32_t getOutputShapes(nv::DimsExprs const* inputs, int32_t nbInputs, nv::DimsExprs const* /*shapeInputs*/,
                            int32_t /*nbShapeInputs*/, nv::DimsExprs* outputs, int32_t nbOutputs,
                            nv::IExprBuilder& /*builder*/) noexcept override {
        for (int32_t i = 0; i < nbInputs; ++i) {
            if (inputs[i].nbDims != op_->spec().inputs[i].rank) {
                return report(Status::error("input %s has %d dimensions, valid are %d: export the graph again",
                                            op_->spec().inputs[i].name, inputs[i].nbDims, op_->spec().inputs[i].rank));
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputShape(*op_, i, inputs, outputs[i]);
        }
        return kSUCCESS;
    }

    bool supportsFormatCombination(int32_t position, nv::DynamicPluginTensorDesc const* inOut, int32_t /*nbInputs*/,
                                   int32_t /*nbOutputs*/) noexcept override {
        return supports(
            *op_, position, inOut,
            [](nv::DynamicPluginTensorDesc const& desc) -> nv::PluginTensorDesc const& { return desc.desc; });
    }

    int32_t configurePlugin(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nv::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept override {
        Tensors const largest = largestShapes(in, nbInputs);
        return report(op_->checkShapes(largest.data()));
    }

    size_t getWorkspaceSize(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nv::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) const noexcept override {
        return guarded<size_t>(name(), 0, [&] {
            // What is needed depends on the device: its kernels, and how many blocks fill it.
            Tensors const largest = largestShapes(in, nbInputs);
            std::unique_ptr<Op> const op = op_->clone();
            Status const status = op->prepare(largest.data());
            if (!status.ok()) {
                logError(name(), status.message());
                return size_t{0};
            }
            return op->workspaceBytes(largest.data());
        });
    }

    // Every attribute and the revision of the kernels: what changes the speed changes the key.
    char const* getTimingCacheID() noexcept override { return timingCacheId_.c_str(); }

    // IPluginV3OneRuntime

    int32_t onShapeChange(nv::PluginTensorDesc const* in, int32_t nbInputs, nv::PluginTensorDesc const* /*out*/,
                          int32_t /*nbOutputs*/) noexcept override {
        return guarded<int32_t>(name(), kFAILURE, [&] {
            Tensors const shapes = currentShapes(in, nbInputs);
            Status const status = op_->checkShapes(shapes.data());
            return report(status.ok() ? op_->prepare(shapes.data()) : status);
        });
    }

    int32_t enqueue(nv::PluginTensorDesc const* inputDesc, nv::PluginTensorDesc const* /*outputDesc*/,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        Tensors const shapes = currentShapes(inputDesc, op_->spec().nbInputs);
        return report(op_->enqueue(shapes.data(), inputs, outputs, workspace, stream));
    }

    nv::IPluginV3* attachToContext(nv::IPluginResourceContext* /*context*/) noexcept override { return clone(); }

    nv::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    static std::string describe(Op const& op) {
        contract::PluginSpec const& spec = op.spec();
        std::string text = std::string(spec.name) + ";contract=" + std::to_string(contract::kCONTRACT_VERSION) +
                           ";revision=" + std::to_string(contract::kKERNEL_REVISION);
        for (int32_t i = 0; i < spec.nbAttributes; ++i) {
            char value[48];
            if (spec.attributes[i].kind == contract::AttributeKind::kFLOAT) {
                std::snprintf(value, sizeof(value), "%a", static_cast<double>(op.attribute(i).number));
            } else {
                std::snprintf(value, sizeof(value), "%d", op.attribute(i).integer);
            }
            text += std::string(";") + spec.attributes[i].name + "=" + value;
        }
        return text;
    }

    char const* name() const noexcept { return op_->spec().name; }

    int32_t report(Status const& status) const noexcept {
        if (status.ok()) {
            return kSUCCESS;
        }
        logError(name(), status.message());
        return kFAILURE;
    }

    std::unique_ptr<Op> op_;
    std::string timingCacheId_;
    std::vector<nv::PluginField> fields_;
    nv::PluginFieldCollection collection_{};
};

class CreatorV3 final : public nv::IPluginCreatorV3One {
public:
    explicit CreatorV3(contract::PluginSpec const& spec) noexcept : spec_(&spec), names_(spec) {}

    nv::IPluginV3* createPlugin(char const* /*name*/, nv::PluginFieldCollection const* fields,
                                nv::TensorRTPhase /*phase*/) noexcept override {
        return guarded<nv::IPluginV3*>(spec_->name, nullptr, [&]() -> nv::IPluginV3* {
            std::unique_ptr<Op> op;
            Status const status = createOp(*spec_, fields, op);
            if (!status.ok()) {
                logError(spec_->name, status.message());
                return nullptr;
            }
            return new PluginV3(std::move(op));
        });
    }

    nv::PluginFieldCollection const* getFieldNames() noexcept override { return names_.collection(); }
    char const* getPluginName() const noexcept override { return spec_->name; }
    char const* getPluginVersion() const noexcept override { return contract::kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return contract::kPLUGIN_NAMESPACE; }

private:
    contract::PluginSpec const* spec_;
    FieldNames names_;
};

struct Creators {
    std::vector<std::unique_ptr<CreatorV3>> owned;
    std::vector<nv::IPluginCreatorInterface*> list;

    Creators() {
        for (contract::PluginSpec const& spec : contract::kPLUGINS) {
            owned.push_back(std::make_unique<CreatorV3>(spec));
            list.push_back(owned.back().get());
        }
    }
};

}  // namespace

}  // namespace toprovar::adapters

// What IPluginRegistry::loadLibrary and trtexec --dynamicPlugins look for.

extern "C" TOPROVAR_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    static toprovar::adapters::Creators const creators;
    nbCreators = static_cast<int32_t>(creators.list.size());
    return creators.list.data();
}

extern "C" TOPROVAR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    toprovar::adapters::setLogger(finder);
}
