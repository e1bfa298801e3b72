#include "core/driver.hpp"

#include <dlfcn.h>

#define TOPROVAR_TEXT(name) #name
#define TOPROVAR_EXPANDED_TEXT(name) TOPROVAR_TEXT(name)

namespace toprovar {

namespace {

struct Opened {
    Driver driver;
    Status status;

    Opened() noexcept : status(open()) {}

    Status open() noexcept {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            return Status::error("CUDA driver: %s; install the NVIDIA driver (in a container: run it with --gpus all)",
                                 dlerror());
        }
#define TOPROVAR_RESOLVE(name)                                                                           \
    driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(library, TOPROVAR_EXPANDED_TEXT(name))); \
    if (driver.name == nullptr) {                                                                        \
        return Status::error(                                                                            \
            "CUDA driver: libcuda.so.1 has no %s; this library needs a driver of CUDA %d.%d or later",   \
            TOPROVAR_EXPANDED_TEXT(name), CUDA_VERSION / 1000, CUDA_VERSION % 1000 / 10);                \
    }
        TOPROVAR_DRIVER_FUNCTIONS(TOPROVAR_RESOLVE)
#undef TOPROVAR_RESOLVE
        return driver.check(driver.cuInit(0), "cuInit");
    }
};

}  // namespace

Driver const* Driver::get(Status& status) noexcept {
    static Opened const opened;
    status = opened.status;
    return opened.status.ok() ? &opened.driver : nullptr;
}

Status Driver::check(CUresult code, char const* what) const noexcept {
    if (code == CUDA_SUCCESS) {
        return {};
    }
    char const* text = nullptr;
    if (cuGetErrorString == nullptr || cuGetErrorString(code, &text) != CUDA_SUCCESS || text == nullptr) {
        text = "unknown";
    }
    return Status::error("%s failed with CUDA error %d (%s)", what, static_cast<int>(code), text);
}

}  // namespace toprovar
