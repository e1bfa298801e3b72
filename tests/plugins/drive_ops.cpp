// Runs one op of the core with made-up addresses, for test_launches.py: the test puts a libcuda.so.1 before it that
// writes down what is launched.
//   drive_ops PLUGIN NUMBER INTEGER WORKSPACE OUTPUT INPUT...     INPUT is ADDRESS:TYPE:SIZE,SIZE,... with ONNX's
//   numbers
// Attributes are NUMBER for kind FLOAT and INTEGER for INT; outputs begin at OUTPUT, 16 MiB apart. Prints the workspace
// it asks for, in bytes.

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "core/op.hpp"

int main(int argc, char** argv) {
    using namespace toprovar;
    if (argc < 6) {
        return 2;
    }
    contract::PluginSpec const* spec = nullptr;
    for (contract::PluginSpec const& one : contract::kPLUGINS) {
        if (std::strcmp(one.name, argv[1]) == 0) {
            spec = &one;
        }
    }
    if (spec == nullptr) {
        return 2;
    }
    AttributeValue values[contract::kMAX_ATTRIBUTES];
    for (AttributeValue& value : values) {
        value.number = std::strtof(argv[2], nullptr);
        value.integer = std::atoi(argv[3]);
    }
    auto* const workspace = reinterpret_cast<void*>(std::strtoull(argv[4], nullptr, 0));
    auto const outputBase = std::strtoull(argv[5], nullptr, 0);
    std::vector<Tensor> inputs;
    std::vector<void const*> in;
    for (int i = 6; i < argc; ++i) {
        std::stringstream text(argv[i]);
        std::string part;
        Tensor tensor;
        std::getline(text, part, ':');
        in.push_back(reinterpret_cast<void const*>(std::strtoull(part.c_str(), nullptr, 0)));
        std::getline(text, part, ':');
        tensor.type = static_cast<contract::DataType>(std::atoi(part.c_str()));
        while (std::getline(text, part, ',')) {
            tensor.dims[tensor.rank++] = std::atoll(part.c_str());
        }
        inputs.push_back(tensor);
    }
    std::unique_ptr<Op> op;
    Status status = Op::create(*spec, values, op);
    if (status.ok()) {
        status = op->checkShapes(inputs.data());
    }
    if (status.ok()) {
        status = op->prepare(inputs.data());
    }
    if (status.ok()) {
        std::cout << op->workspaceBytes(inputs.data()) << std::endl;
        void* out[2] = {reinterpret_cast<void*>(outputBase), reinterpret_cast<void*>(outputBase + 0x1000000)};
        // A copy, as a second execution context has one.
        status = op->clone()->enqueue(inputs.data(), in.data(), out, workspace, nullptr);
    }
    if (!status.ok()) {
        std::cerr << status.message() << std::endl;
        return 1;
    }
    return 0;
}
