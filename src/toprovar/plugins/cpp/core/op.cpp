#include "core/op.hpp"

#include <cmath>
#include <cstring>

namespace toprovar {

using contract::AttributeKind;
using contract::DataType;
using contract::PluginSpec;
using contract::TensorSpec;

namespace {

bool isTensorType(DataType type) noexcept {
    for (DataType const one : contract::kT_TYPES) {
        if (one == type) {
            return true;
        }
    }
    return false;
}

// fp32 attention is for checking on a CPU: the library holds no such kernel, so the type is not offered.
bool inLibrary(contract::Op op, DataType type) noexcept {
    KernelTable const& table = kernelTable();
    for (int32_t i = 0; i < table.nbEntries; ++i) {
        KernelEntry const& entry = table.entries[i];
        if (entry.op == op && entry.type == type && entry.kind != KernelKind::kMEAN_HEADS_KERNEL) {
            return true;
        }
    }
    return false;
}

}  // namespace

Op::Op(PluginSpec const& spec, AttributeValue const* attributes) noexcept : spec_(&spec) {
    for (int32_t i = 0; i < spec.nbAttributes; ++i) {
        attributes_[i] = attributes[i];
    }
}

Status Op::create(PluginSpec const& spec, AttributeValue const* attributes, std::unique_ptr<Op>& op) {
    for (int32_t i = 0; i < spec.nbAttributes; ++i) {
        contract::AttributeSpec const& attribute = spec.attributes[i];
        if (attribute.kind == AttributeKind::kFLOAT) {
            if (!std::isfinite(attributes[i].number)) {
                return Status::error("%s: attribute %s is %g; valid is a finite number: export the graph again",
                                     spec.name, attribute.name, static_cast<double>(attributes[i].number));
            }
            continue;
        }
        bool valid = attribute.nbChoices == 0;
        for (int32_t j = 0; j < attribute.nbChoices; ++j) {
            valid = valid || attribute.choices[j] == attributes[i].integer;
        }
        if (!valid) {
            return Status::error("%s: attribute %s is %d; valid is %d%s: export the graph again", spec.name,
                                 attribute.name, attributes[i].integer, attribute.choices[0],
                                 attribute.nbChoices > 1 ? " or 1" : "");
        }
    }
    op =
        spec.op == contract::Op::kENTROPY_ATTENTION ? makeAttentionOp(spec, attributes) : makeTokenOp(spec, attributes);
    return {};
}

TensorSpec const& Op::tensor(int32_t index) const noexcept {
    return index < spec_->nbInputs ? spec_->inputs[index] : spec_->outputs[index - spec_->nbInputs];
}

bool Op::supportsType(int32_t index, DataType const* types) const noexcept {
    DataType const wanted = tensor(index).type;
    if (wanted != DataType::kANY) {
        return types[index] == wanted;
    }
    for (int32_t i = 0; i < index; ++i) {
        if (tensor(i).type == DataType::kANY) {
            return types[index] == types[i];
        }
    }
    return isTensorType(types[index]) && inLibrary(spec_->op, types[index]);
}

AxisSource Op::outputAxis(int32_t output, int32_t axis) const noexcept {
    char const* name = spec_->outputs[output].axes[axis];
    for (int32_t i = 0; i < spec_->nbInputs; ++i) {
        for (int32_t j = 0; j < spec_->inputs[i].rank; ++j) {
            if (std::strcmp(spec_->inputs[i].axes[j], name) == 0) {
                return {i, j};
            }
        }
    }
    return {-1, -1};
}

Status Op::checkShapes(Tensor const* inputs) const noexcept {
    for (int32_t i = 0; i < spec_->nbInputs; ++i) {
        TensorSpec const& wanted = spec_->inputs[i];
        if (inputs[i].rank != wanted.rank) {
            return Status::error("%s: input %s has %d dimensions, valid are %d: export the graph again", spec_->name,
                                 wanted.name, inputs[i].rank, wanted.rank);
        }
        for (int32_t j = 0; j < wanted.rank; ++j) {
            AxisSource source{i, j};
            bool found = false;
            for (int32_t a = 0; a <= i && !found; ++a) {
                for (int32_t b = 0; b < spec_->inputs[a].rank && !found; ++b) {
                    if (std::strcmp(spec_->inputs[a].axes[b], wanted.axes[j]) == 0) {
                        source = {a, b};
                        found = true;
                    }
                }
            }
            int64_t const size = inputs[i].dims[j];
            int64_t const other = inputs[source.input].dims[source.axis];
            if (size >= 0 && other >= 0 && size != other) {
                return Status::error(
                    "%s: size %s is %lld in input %s and %lld in input %s; they must be equal: check the shapes that "
                    "were set",
                    spec_->name, wanted.axes[j], static_cast<long long>(other), spec_->inputs[source.input].name,
                    static_cast<long long>(size), wanted.name);
            }
        }
    }
    return {};
}

size_t Op::workspaceBytes(Tensor const*) const noexcept {
    return 0;
}

Status Op::checkAddresses(Tensor const* inputs, void const* const* in, void* const* out) const noexcept {
    for (int32_t i = 0; i < spec_->nbInputs + nbOutputs(); ++i) {
        bool const isInput = i < spec_->nbInputs;
        bool empty = false;
        for (int32_t j = 0; isInput && j < inputs[i].rank; ++j) {
            empty = empty || inputs[i].dims[j] == 0;
        }
        void const* const pointer = isInput ? in[i] : out[i - spec_->nbInputs];
        if (!empty && (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % 16 != 0)) {
            return Status::error("%s: %s is at address %p; valid are multiples of 16: align the tensor", spec_->name,
                                 tensor(i).name, pointer);
        }
    }
    return {};
}

Status chooseArch(Device& device, int32_t& arch) noexcept {
    Status status = Device::current(device);
    if (!status.ok()) {
        return status;
    }
    KernelTable const& table = kernelTable();
    arch = bestArch(table, device.capability);
    if (arch == 0) {
        char archs[128];
        describeArchs(table, archs, sizeof(archs));
        return Status::error(
            "this GPU is sm_%d, the plugin library holds kernels for %s; build it with "
            "-DTOPROVAR_CUDA_ARCHS=%d",
            device.capability, archs, device.capability);
    }
    return {};
}

}  // namespace toprovar
