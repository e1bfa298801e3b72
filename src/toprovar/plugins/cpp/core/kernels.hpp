// Finds, loads and launches the kernels of the table on the current device.
#pragma once

#include <cstdint>

#include "core/driver.hpp"
#include "core/kernel_table.hpp"
#include "core/status.hpp"

namespace toprovar {

// The device of the current CUDA context.
struct Device {
    int32_t capability = 0;  // 10 * major + minor
    int32_t smCount = 0;
    unsigned long long contextId = 0;

    // Fails where no driver is installed or no context is current.
    static Status current(Device& device) noexcept;
};

// Whether machine code for `arch` runs on a device: on its own major architecture from its minor one on; from sm_90 on,
// where code uses features of one architecture alone, only on that one.
constexpr bool runsOn(int32_t arch, int32_t capability) noexcept {
    return arch == capability || (arch < 90 && arch / 10 == capability / 10 && arch <= capability);
}

// The best architecture of the table for a device; 0: none.
int32_t bestArch(KernelTable const& table, int32_t capability) noexcept;

// What the table was built for, such as "sm_80, sm_90"; cut at the end of `text`.
void describeArchs(KernelTable const& table, char* text, size_t size) noexcept;

struct Kernel {
    KernelEntry const* entry = nullptr;
    CUfunction function = nullptr;
    CUfunction finish = nullptr;
    CUfunction small = nullptr;
};

// Loads a kernel into the current context; a kernel is loaded once per context and stays. Allocates: never in enqueue.
Status loadKernel(Device const& device, KernelEntry const& entry, Kernel& kernel);

Status launchKernel(Kernel const& kernel, int64_t const (&sizes)[3], void** parameters, CUstream stream) noexcept;

// Starts a Triton kernel; `arguments` is one of the structs of kernel_arguments.hpp.
template <typename Arguments>
Status launch(Kernel const& kernel, Arguments& arguments, CUstream stream) noexcept {
    void* parameters[Arguments::kNB_PARAMETERS];
    int64_t sizes[3];
    arguments.pointers(parameters);
    arguments.sizes(sizes);
    return launchKernel(kernel, sizes, parameters, stream);
}

constexpr int64_t ceilDivide(int64_t a, int64_t b) noexcept {
    return (a + b - 1) / b;
}

inline CUdeviceptr address(void const* pointer) noexcept {
    return reinterpret_cast<CUdeviceptr>(pointer);
}

}  // namespace toprovar
