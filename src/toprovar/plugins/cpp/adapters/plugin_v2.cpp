// The ops as IPluginV2DynamicExt, for TensorRT 8.6 (JetPack 6, DRIVE 6, and the wheel on PyPI). One class serves every
// op: what differs is in contract.hpp and core/.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "adapters/common.hpp"

#if NV_TENSORRT_MAJOR != 8 || NV_TENSORRT_MINOR < 6
#error "this adapter is for the headers of TensorRT 8.6; for 10 and 11 build toprovar_plugins"
#endif

namespace toprovar::adapters {

namespace {

constexpr int32_t kSUCCESS = 0;
constexpr int32_t kFAILURE = -1;

// What an engine carries of a plugin. Fixed size and little-endian, as every platform of TensorRT is.
struct Serialized {
    uint32_t magic;
    int32_t contractVersion;
    int32_t kernelRevision;
    int32_t nbAttributes;
    AttributeValue attributes[contract::kMAX_ATTRIBUTES];
    // Of the largest inputs of any profile: what initialize() loads kernels for, before shapes are set.
    Tensor inputs[contract::kMAX_TENSORS];
};
constexpr uint32_t kMAGIC = 0x32507654U;  // "TvP2"
static_assert(std::is_trivially_copyable<Serialized>::value, "it is copied byte by byte");

class PluginV2 final : public nv::IPluginV2DynamicExt {
public:
    explicit PluginV2(std::unique_ptr<Op> op) : op_(std::move(op)) {}
    PluginV2(PluginV2 const&) = delete;
    PluginV2& operator=(PluginV2 const&) = delete;

    static Status deserialize(contract::PluginSpec const& spec, void const* data, size_t size,
                              std::unique_ptr<PluginV2>& plugin) {
        Serialized stored{};
        if (data == nullptr || size != sizeof(stored)) {
            return Status::error("the engine holds %zu bytes for it, valid are %zu; build the engine again", size,
                                 sizeof(stored));
        }
        std::memcpy(&stored, data, sizeof(stored));
        if (stored.magic != kMAGIC || stored.nbAttributes != spec.nbAttributes ||
            stored.contractVersion != contract::kCONTRACT_VERSION) {
            return Status::error(
                "the engine was built for version %d of the op contract, this library has version %d; build the "
                "engine again",
                stored.contractVersion, contract::kCONTRACT_VERSION);
        }
        std::unique_ptr<Op> op;
        Status const status = Op::create(spec, stored.attributes, op);
        if (status.ok()) {
            plugin = std::make_unique<PluginV2>(std::move(op));
            for (int32_t i = 0; i < spec.nbInputs; ++i) {
                plugin->configured_[static_cast<size_t>(i)] = stored.inputs[i];
            }
        }
        return status;
    }

    // IPluginV2DynamicExt

    nv::IPluginV2DynamicExt* clone() const noexcept override {
        return guarded<nv::IPluginV2DynamicExt*>(name(), nullptr, [this] {
            auto copy = std::make_unique<PluginV2>(op_->clone());
            copy->configured_ = configured_;
            return copy.release();
        });
    }

    nv::DimsExprs getOutputDimensions(int32_t output, nv::DimsExprs const* inputs, int32_t nbInputs,
                                      nv::IExprBuilder& /*builder*/) noexcept override {
        nv::DimsExprs shape{};
        for (int32_t i = 0; i < nbInputs; ++i) {
            if (inputs[i].nbDims != op_->spec().inputs[i].rank) {
                report(Status::error("input %s has %d dimensions, valid are %d: export the graph again",
                                     op_->spec().inputs[i].name, inputs[i].nbDims, op_->spec().inputs[i].rank));
                shape.nbDims = -1;
                return shape;
            }
        }
        outputShape(*op_, output, inputs, shape);
        return shape;
    }

    bool supportsFormatCombination(int32_t position, nv::PluginTensorDesc const* inOut, int32_t /*nbInputs*/,
                                   int32_t /*nbOutputs*/) noexcept override {
        return supports(*op_, position, inOut,
                        [](nv::PluginTensorDesc const& desc) -> nv::PluginTensorDesc const& { return desc; });
    }

    // While building, with the largest shapes of a profile; while running, at every change of shape.
    void configurePlugin(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                         nv::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept override {
        Tensors const current = currentShapes(in, nbInputs);
        configured_ = areKnown(current.data(), nbInputs) ? current : largestShapes(in, nbInputs);
        Status const status = op_->checkShapes(configured_.data());
        if (!status.ok()) {
            report(status);
            return;
        }
        prepare();
    }

    size_t getWorkspaceSize(nv::PluginTensorDesc const* in, int32_t nbInputs, nv::PluginTensorDesc const* /*out*/,
                            int32_t /*nbOutputs*/) const noexcept override {
        return guarded<size_t>(name(), 0, [&] {
            // What is needed depends on the device: its kernels, and how many blocks fill it.
            Tensors const largest = currentShapes(in, nbInputs);
            std::unique_ptr<Op> const op = op_->clone();
            Status const status = op->prepare(largest.data());
            if (!status.ok()) {
                logError(name(), status.message());
                return size_t{0};
            }
            return op->workspaceBytes(largest.data());
        });
    }

    int32_t enqueue(nv::PluginTensorDesc const* inputDesc, nv::PluginTensorDesc const* /*outputDesc*/,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        Tensors const shapes = currentShapes(inputDesc, op_->spec().nbInputs);
        return report(op_->enqueue(shapes.data(), inputs, outputs, workspace, stream));
    }

    // IPluginV2Ext

    nv::DataType getOutputDataType(int32_t output, nv::DataType const* inputTypes,
                                   int32_t /*nbInputs*/) const noexcept override {
        contract::DataType const type = op_->spec().outputs[output].type;
        return type == contract::DataType::kANY ? inputTypes[0] : toTensorRT(type);
    }

    // IPluginV2

    char const* getPluginType() const noexcept override { return name(); }
    char const* getPluginVersion() const noexcept override { return contract::kPLUGIN_VERSION; }
    int32_t getNbOutputs() const noexcept override { return op_->nbOutputs(); }

    int32_t initialize() noexcept override {
        // A plugin that was just made from a node has no shapes yet; configurePlugin comes first then.
        return configured_[0].rank == 0 ? kSUCCESS : prepare();
    }

    void terminate() noexcept override {}

    size_t getSerializationSize() const noexcept override { return sizeof(Serialized); }

    void serialize(void* buffer) const noexcept override {
        Serialized stored{};
        stored.magic = kMAGIC;
        stored.contractVersion = contract::kCONTRACT_VERSION;
        stored.kernelRevision = contract::kKERNEL_REVISION;
        stored.nbAttributes = op_->spec().nbAttributes;
        for (int32_t i = 0; i < stored.nbAttributes; ++i) {
            stored.attributes[i] = op_->attribute(i);
        }
        for (int32_t i = 0; i < op_->spec().nbInputs; ++i) {
            stored.inputs[i] = configured_[static_cast<size_t>(i)];
        }
        std::memcpy(buffer, &stored, sizeof(stored));
    }

    void destroy() noexcept override { delete this; }

    // The namespace is part of the contract; what the registry sets is the same.
    void setPluginNamespace(char const* /*name*/) noexcept override {}
    char const* getPluginNamespace() const noexcept override { return contract::kPLUGIN_NAMESPACE; }

private:
    char const* name() const noexcept { return op_->spec().name; }

    int32_t prepare() noexcept {
        return guarded<int32_t>(name(), kFAILURE, [this] { return report(op_->prepare(configured_.data())); });
    }

    int32_t report(Status const& status) const noexcept {
        if (status.ok()) {
            return kSUCCESS;
        }
        logError(name(), status.message());
        return kFAILURE;
    }

    std::unique_ptr<Op> op_;
    Tensors configured_{};
};

class CreatorV2 final : public nv::IPluginCreator {
public:
    explicit CreatorV2(contract::PluginSpec const& spec) noexcept : spec_(&spec), names_(spec) {}

    nv::IPluginV2* createPlugin(char const* /*name*/, nv::PluginFieldCollection const* fields) noexcept override {
        return guarded<nv::IPluginV2*>(spec_->name, nullptr, [&]() -> nv::IPluginV2* {
            std::unique_ptr<Op> op;
            Status const status = createOp(*spec_, fields, op);
            if (!status.ok()) {
                logError(spec_->name, status.message());
                return nullptr;
            }
            return new PluginV2(std::move(op));
        });
    }

    nv::IPluginV2* deserializePlugin(char const* /*name*/, void const* data, size_t size) noexcept override {
        return guarded<nv::IPluginV2*>(spec_->name, nullptr, [&]() -> nv::IPluginV2* {
            std::unique_ptr<PluginV2> plugin;
            Status const status = PluginV2::deserialize(*spec_, data, size, plugin);
            if (!status.ok()) {
                logError(spec_->name, status.message());
            }
            return plugin.release();
        });
    }

    nv::PluginFieldCollection const* getFieldNames() noexcept override { return names_.collection(); }
    char const* getPluginName() const noexcept override { return spec_->name; }
    char const* getPluginVersion() const noexcept override { return contract::kPLUGIN_VERSION; }

    // The registry of 8.6 compares this with the namespace asked for, whatever it was registered under.
    void setPluginNamespace(char const* /*name*/) noexcept override {}
    char const* getPluginNamespace() const noexcept override { return contract::kPLUGIN_NAMESPACE; }

private:
    contract::PluginSpec const* spec_;
    FieldNames names_;
};

struct Creators {
    std::vector<std::unique_ptr<CreatorV2>> owned;
    std::vector<nv::IPluginCreator*> list;

    Creators() {
        for (contract::PluginSpec const& spec : contract::kPLUGINS) {
            owned.push_back(std::make_unique<CreatorV2>(spec));
            list.push_back(owned.back().get());
        }
    }

    // Never destroyed: the registry of TensorRT, in another library, may outlive it.
    static Creators const& all() {
        static Creators const* const creators = new Creators;
        return *creators;
    }
};

nv::IPluginRegistry* globalRegistry() noexcept {
    using Get = nv::IPluginRegistry* (*)();
    auto get = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    if (get == nullptr) {  // loaded, but its symbols are not global: Python's binding does that
        void* const library = dlopen("libnvinfer.so.8", RTLD_NOLOAD | RTLD_LAZY);
        get = library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "getPluginRegistry"));
    }
    return get == nullptr ? nullptr : get();
}

}  // namespace

}  // namespace toprovar::adapters

// Registers every creator with the global registry of the TensorRT in this process; how many are new, or -1 where no
// TensorRT 8 is loaded. Calling it twice is no error.
extern "C" TOPROVAR_EXPORT int32_t initToprovarPlugins() {
    using namespace toprovar;
    nvinfer1::IPluginRegistry* const registry = adapters::globalRegistry();
    if (registry == nullptr) {
        return -1;
    }
    int32_t added = 0;
    for (nvinfer1::IPluginCreator* creator : adapters::Creators::all().list) {
        auto const* known = registry->getPluginCreator(creator->getPluginName(), creator->getPluginVersion(),
                                                       contract::kPLUGIN_NAMESPACE);
        if (known == nullptr && registry->registerCreator(*creator, contract::kPLUGIN_NAMESPACE)) {
            ++added;
        }
    }
    return added;
}

// What IPluginRegistry::loadLibrary and trtexec --dynamicPlugins look for. (--plugins and --staticPlugins only open a
// library and would need one that registers itself when it is loaded; loadLibrary then refuses its creators as known
// already, closes it, and leaves the registry with dangling pointers. So this one does not.)
extern "C" TOPROVAR_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) {
    auto const& list = toprovar::adapters::Creators::all().list;
    nbCreators = static_cast<int32_t>(list.size());
    return list.data();
}

extern "C" TOPROVAR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    toprovar::adapters::setLogger(finder);
}
