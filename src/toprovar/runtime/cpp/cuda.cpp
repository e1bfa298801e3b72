#include "cuda.hpp"

#include <dlfcn.h>

#include "error.hpp"

#define TOPROVAR_TEXT(name) #name
#define TOPROVAR_EXPANDED_TEXT(name) TOPROVAR_TEXT(name)

namespace toprovar::runtime {

namespace {

Cuda open() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw Error(text("no CUDA driver: ", dlerror(),
                         "; install the NVIDIA driver (in a container: run it with --gpus all)"));
    }
    Cuda cuda;
#define TOPROVAR_RESOLVE(name)                                                                              \
    cuda.name = reinterpret_cast<decltype(cuda.name)>(dlsym(library, TOPROVAR_EXPANDED_TEXT(name)));        \
    if (cuda.name == nullptr) {                                                                             \
        throw Error(text("the CUDA driver has no ", TOPROVAR_EXPANDED_TEXT(name), "; install one of CUDA ", \
                         CUDA_VERSION / 1000, ".", CUDA_VERSION % 1000 / 10, " or later"));                 \
    }
    TOPROVAR_RUNTIME_FUNCTIONS(TOPROVAR_RESOLVE)
#undef TOPROVAR_RESOLVE
    cuda.check(cuda.cuInit(0), "starting CUDA");
    return cuda;
}

}  // namespace

Cuda const& Cuda::get() {
    static Cuda const cuda = open();
    return cuda;
}

void Cuda::check(CUresult code, char const* what) const {
    if (code == CUDA_SUCCESS) {
        return;
    }
    char const* words = nullptr;
    if (cuGetErrorString(code, &words) != CUDA_SUCCESS || words == nullptr) {
        words = "unknown";
    }
    char const* const todo = code == CUDA_ERROR_OUT_OF_MEMORY ? "; free GPU memory, or use a smaller batch"
                             : code == CUDA_ERROR_NO_DEVICE   ? "; run on a machine with an NVIDIA GPU"
                                                              : "";
    throw Error(text(what, " failed with CUDA error ", static_cast<int>(code), " (", words, ")", todo));
}

}  // namespace toprovar::runtime
