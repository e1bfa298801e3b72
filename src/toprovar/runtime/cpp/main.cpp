#include "command.hpp"
#include "tensorrt_target.hpp"

int main(int argc, char** argv) {
    using namespace toprovar::runtime;
    return runCommand(argc, argv, "tensorrt", [](Bundle const& bundle, int64_t batch, TargetOptions const& options) {
        return openTensorRt(bundle, batch, {options.plugins, options.device, options.cudaGraphs});
    });
}
