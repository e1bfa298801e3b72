// The CUDA driver, opened when it is first needed: the library loads on a machine that has none, and says so when
// asked.
#pragma once

#include <cuda.h>

#include "core/status.hpp"

#if CUDA_VERSION < 12000
#error "toprovar needs the headers of CUDA 12.0 or later (tensor maps, cuLaunchKernelEx)"
#endif

// cuda.h maps some of these names to versioned ones (cuMemAlloc is cuMemAlloc_v2); members and symbols follow it.
#define TOPROVAR_DRIVER_FUNCTIONS(X) \
    X(cuInit)                        \
    X(cuDriverGetVersion)            \
    X(cuGetErrorString)              \
    X(cuCtxGetCurrent)               \
    X(cuCtxGetDevice)                \
    X(cuCtxGetId)                    \
    X(cuDeviceGetAttribute)          \
    X(cuModuleLoadData)              \
    X(cuModuleGetFunction)           \
    X(cuFuncSetAttribute)            \
    X(cuLaunchKernel)                \
    X(cuLaunchKernelEx)              \
    X(cuTensorMapEncodeTiled)

namespace toprovar {

struct Driver {
#define TOPROVAR_DECLARE(name) decltype(&::name) name = nullptr;
    TOPROVAR_DRIVER_FUNCTIONS(TOPROVAR_DECLARE)
#undef TOPROVAR_DECLARE

    // The driver with every function resolved; `status` says why there is none. Opened once per process.
    static Driver const* get(Status& status) noexcept;

    // For calls inside enqueue, after get() has succeeded.
    Status check(CUresult code, char const* what) const noexcept;
};

}  // namespace toprovar
