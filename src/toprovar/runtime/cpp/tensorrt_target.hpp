// Target `tensorrt`: the bundle's engines on one stream, every scale a CUDA graph of its own.
#pragma once

#include <filesystem>
#include <memory>

#include "bundle.hpp"
#include "target.hpp"

namespace toprovar::runtime {

struct TensorRtOptions {
    std::filesystem::path plugins;  // empty: TOPROVAR_PLUGIN_LIBRARY, else beside the program
    int device = 0;
    bool cudaGraphs = true;
};

// Loads every engine. Throws Error where the bundle has none, or where its TensorRT version, GPU or plugin contract is
// not the one at hand; the message says which.
std::unique_ptr<Target> openTensorRt(Bundle const& bundle, int64_t batch, TensorRtOptions const& options);

}  // namespace toprovar::runtime
