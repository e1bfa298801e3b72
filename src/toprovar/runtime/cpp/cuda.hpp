// The CUDA driver API as the runtime uses it, opened when it is first needed.
#pragma once

#include <cuda.h>

#include <string>

#if CUDA_VERSION < 12000
#error "toprovar needs the headers of CUDA 12.0 or later"
#endif

// cuda.h maps some of these names to versioned ones (cuMemAlloc is cuMemAlloc_v2); members and symbols follow it.
#define TOPROVAR_RUNTIME_FUNCTIONS(X) \
    X(cuInit)                         \
    X(cuDriverGetVersion)             \
    X(cuGetErrorString)               \
    X(cuDeviceGet)                    \
    X(cuDeviceGetName)                \
    X(cuDeviceGetAttribute)           \
    X(cuDevicePrimaryCtxRetain)       \
    X(cuDevicePrimaryCtxRelease)      \
    X(cuCtxSetCurrent)                \
    X(cuMemAlloc)                     \
    X(cuMemFree)                      \
    X(cuMemHostAlloc)                 \
    X(cuMemFreeHost)                  \
    X(cuMemsetD8Async)                \
    X(cuMemcpyHtoDAsync)              \
    X(cuMemcpyDtoHAsync)              \
    X(cuStreamCreate)                 \
    X(cuStreamDestroy)                \
    X(cuStreamSynchronize)            \
    X(cuStreamBeginCapture)           \
    X(cuStreamEndCapture)             \
    X(cuGraphInstantiateWithFlags)    \
    X(cuGraphLaunch)                  \
    X(cuGraphDestroy)                 \
    X(cuGraphExecDestroy)

namespace toprovar::runtime {

struct Cuda {
#define TOPROVAR_DECLARE(name) decltype(&::name) name = nullptr;
    TOPROVAR_RUNTIME_FUNCTIONS(TOPROVAR_DECLARE)
#undef TOPROVAR_DECLARE

    // Throws Error where there is no driver, or one that is too old.
    static Cuda const& get();

    // Throws Error where `code` is none of success; `what` is what was tried.
    void check(CUresult code, char const* what) const;
};

}  // namespace toprovar::runtime
