// The command line of toprovar_run; main.cpp gives it TensorRT, a test a target of its own.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>

#include "bundle.hpp"
#include "target.hpp"

namespace toprovar::runtime {

struct TargetOptions {
    std::filesystem::path plugins;
    int device = 0;
    bool cudaGraphs = true;
};

using OpenTarget = std::function<std::unique_ptr<Target>(Bundle const&, int64_t batch, TargetOptions const&)>;

// Exit status: 0 done, 1 the golden trace was not reproduced, 2 the user's mistake (one line on stderr).
int runCommand(int argc, char const* const* argv, char const* targetName, OpenTarget const& openTarget);

}  // namespace toprovar::runtime
